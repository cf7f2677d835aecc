"""What a run tells its user on stderr: progress, and notes on what its numbers mean."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
