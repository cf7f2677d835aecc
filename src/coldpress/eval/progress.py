"""What a run tells its user on stderr: progress, and notes on what its numbers mean."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from tqdm import tqdm

__all__ = ["Sized", "note", "progress"]

LINE_EVERY_S = 10.0

_T = TypeVar("_T")
_Co = TypeVar("_Co", covariant=True)


class _Countable(Protocol[_Co]):
    def __iter__(self) -> Iterator[_Co]: ...
    def __len__(self) -> int: ...


class Sized(Generic[_T]):
    """An iterator of which it is known how much it gives."""

    def __init__(self, items: Iterator[_T], n: int):
        self.items, self.n = items, n

    def __iter__(self) -> Iterator[_T]:
        return self.items

    def __len__(self) -> int:
        return self.n


def note(message: str, kind: str = "note") -> None:
    """One line on stderr, above a progress bar if there is one."""
    tqdm.write(f"{kind}: {message}", file=sys.stderr)


def progress(items: _Countable[_T], name: str) -> Iterator[_T]:
    """``items``, with a progress bar on a terminal; elsewhere, as in a log file, a line every 10 s and a last one."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=name, file=sys.stderr, dynamic_ncols=True, smoothing=0.05)
        return
    start = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == len(items) or now - said >= LINE_EVERY_S:
            said = now
            sys.stderr.write(f"{name}: {done}/{len(items)}, {now - start:.0f} s\n")
            sys.stderr.flush()
