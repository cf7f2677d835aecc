"""What a run tells its user on stderr: progress, and notes on what its numbers mean."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from tqdm import tqdm

from coldpress.io.terminal import printable

LINE_EVERY_S = 10.0

_T = TypeVar("_T")


class Sized(Generic[_T]):
    """An iterator of which it is known how much it gives."""

    def __init__(self, items: Iterator[_T], n: int):
        self.items, self.n = items, n

    def __iter__(self) -> Iterator[_T]:
        return self.items

    def __len__(self) -> int:
        return self.n


def note(message: str, kind: str = "note") -> None:
    """One line on stderr, above a progress bar if there is one; where stderr is full or gone, none."""
    with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
        tqdm.write(printable(f"{kind}: {message}"), file=sys.stderr)


@contextlib.contextmanager
def warnings_noted(kind: type[Warning] = UserWarning) -> Iterator[None]:
    """The warnings of a block as notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        yield


def progress(items: Sequence[_T] | Sized[_T], name: str, more: Callable[[], str] = str) -> Iterator[_T]:
    """``items``, with a progress bar on a terminal; elsewhere, as in a log file, a line every 10 s and a last one.

    ``more`` gives what else to say at any time, such as the time left of something larger.
    """
    with counted(name, len(items), more) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def counted(
    name: str, total: int | None, more: Callable[[], str] = str, unit: str = ""
) -> Iterator[Callable[[int], None]]:
    """A function that is told how much more is done, and shows it as :func:`progress` does.

    ``total`` is None where nobody knows it.
    """
    if sys.stderr.isatty():
        how = {"file": sys.stderr, "dynamic_ncols": True, "smoothing": 0.05, "unit": f" {unit}" if unit else "it"}
        with tqdm(total=total, desc=name, **how) as bar:

            def advance(n: int) -> None:
                bar.update(n)
                bar.set_postfix_str(more(), refresh=False)

            yield advance
        return
    start = said = time.monotonic()
    done, of = 0, "" if total is None else f"/{total}"

    def count(n: int) -> None:
        nonlocal done, said
        done, now = done + n, time.monotonic()
        if done == total or now - said >= LINE_EVERY_S:
            said = now
            parts = [f"{name}: {done}{of} {unit}".rstrip(), f"{now - start:.0f} s", more()]
            with contextlib.suppress(OSError):
                sys.stderr.write(printable(", ".join(part for part in parts if part)) + "\n")
                sys.stderr.flush()

    yield count


class WorkClock:
    """Shows how far something of several parts is, and about how long all of it will take.

    Work is counted in tokens that a model reads, a token that is decoded alone as several. Parts that are not planned
    yet are taken to be what the others are on average.
    """

    def __init__(self, n_parts: int):
        self.n_parts = n_parts
        self.open: dict[Hashable, float] = {}  # work of each part that is planned and not begun
        self.works: list[float] = []  # of all that are planned
        self.work_done = self.time_spent = 0.0

    def plan(self, part: Hashable, work: float) -> None:
        """Note how much work a part is; none if there is nothing to do."""
        self.works.append(work)
        if work:
            self.open[part] = work

    def progress(self, items: Sequence[_T] | Sized[_T], name: str, part: Hashable) -> Iterator[_T]:
        """The items of a part, with a bar or lines on stderr that are called ``name``."""
        n, work = len(items), self.open.pop(part, 0.0)
        start, before = time.monotonic(), self.work_done
        n_unknown = self.n_parts - len(self.works)

        def left() -> str:
            spent = self.time_spent + time.monotonic() - start
            rest = sum(self.open.values()) + before + work - self.work_done
            rest += n_unknown * sum(self.works) / len(self.works)
            if not self.work_done or not rest > 0:
                return ""
            return f"about {_duration(spent * rest / self.work_done)} left in all"

        for i, item in enumerate(progress(items, name, left), start=1):
            yield item
            self.work_done = before + work * i / n
        self.time_spent += time.monotonic() - start


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
