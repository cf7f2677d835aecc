"""What a benchmark is: where its rows are, what they hold, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from coldpress.errors import InputError, nearest

__all__ = ["Benchmark", "Row", "Scores", "Share", "benchmark_names", "find_benchmark", "register", "task_of"]

Row = Mapping[str, Any]  # a line of a data set, by the names of its columns


class Share(NamedTuple):
    """What an answer reached, out of how much: 1 but where an answer has parts that count one by one."""

    reached: float
    of: float = 1


Scores = dict[str, Share]  # by the measure's name; the first one is compared with the uncompressed cache's


def task_of(row: Row) -> tuple[str, ...]:
    """The group of a row where its column ``task`` says it."""
    return (str(row["task"]),)


@dataclass(frozen=True)
class Benchmark:
    """Questions about contexts.

    Attributes:
        name: it is asked for by.
        hub_id: of its data set.
        score: of an answer and its row.
        data_dirs: folders of the data set, of which one is read; empty where it is not divided.
        data_dir: the folder that is read where none is named.
        columns: that a row must have beside the context, the question and what is put before the answer.
        groups: names under which a row's scores are averaged.
        is_haystack: whether the rows are texts in which a needle is put.
        packages: that scoring a row needs beside coldpress itself.
    """

    name: str
    hub_id: str
    score: Callable[[str, Row], Scores]
    data_dirs: tuple[str, ...] = ()
    data_dir: str | None = None
    columns: tuple[str, ...] = ("answer", "task")
    groups: Callable[[Row], tuple[str, ...]] = task_of
    is_haystack: bool = False
    packages: Callable[[Row], tuple[str, ...]] = lambda row: ()


_BENCHMARKS: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known by its name."""
    if benchmark.name in _BENCHMARKS:
        raise ValueError(f"There are two benchmarks {benchmark.name!r}.")
    _BENCHMARKS[benchmark.name] = benchmark
    return benchmark


def benchmark_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_BENCHMARKS)


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in _BENCHMARKS:
        known = benchmark_names()
        raise InputError(f"Unknown benchmark {name!r}; allowed: {', '.join(known)}.{nearest(name, known)}")
    return _BENCHMARKS[name]
