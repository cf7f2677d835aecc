"""Segments: rows of several tensors, one segment for each head of each row of a batch, with room for more."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coldpress.stores.base import is_frozen, room_for

__all__ = ["Segments"]


class Segments:
    """Rows of the tensors ``[n, ...]`` of a table, cut into segments that grow, shrink and lose rows anywhere.

    Segments of equal length are as far apart as each other, so that :meth:`even` sees them side by side.

    Args:
        parts: the tensors by name, ``[sum(counts), ...]``, the object's own from now on.
        counts: rows of each segment.
    """

    def __init__(self, parts: Mapping[str, Tensor], counts: Sequence[int]):
        self._parts, self.counts = dict(parts), list(counts)
        self._rooms = list(counts)  # rows that fit
        self.is_borrowed = False
        self._settle()

    def _settle(self) -> None:
        """Note what follows from the rows that fit into each segment."""
        self._starts = [0]
        for n in self._rooms:
            self._starts.append(self._starts[-1] + n)
        self._forget_places()

    def _forget_places(self) -> None:
        self._rows: Tensor | None = None
        self._ends: Tensor | None = None  # int64 [S], where the next row of each segment goes

    @property
    def total(self) -> int:
        """Rows in use."""
        return sum(self.counts)

    @property
    def device(self) -> torch.device:
        return next(iter(self._parts.values())).device

    @property
    def room(self) -> int:
        """Rows that can be added to each segment before memory has to be taken."""
        parts = self._parts.values()
        if self.is_borrowed or any(is_frozen(part) for part in parts):
            return 0
        return min(room - n for room, n in zip(self._rooms, self.counts, strict=True))

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, room included."""
        return tuple(self._parts.values())

    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(self._parts)

    def buffer(self, name: str) -> Tensor:
        """A tensor with all its room; :meth:`rows` says which rows are in use."""
        return self._parts[name]

    def spans(self) -> list[slice]:
        """Where the rows of each segment are in :meth:`buffer`."""
        return [slice(start, start + n) for start, n in zip(self._starts, self.counts, strict=False)]

    def rows(self) -> Tensor:
        """Which rows of the buffers are in use, int64, segment by segment."""
        if self._rows is None:
            self._rows = torch.cat([torch.arange(span.start, span.stop) for span in self.spans()]).to(self.device)
        return self._rows

    def flat(self, name: str) -> Tensor:
        """The rows of all segments, ``[total, ...]``."""
        part = self._parts[name]
        return part if self.total == len(part) else part.index_select(0, self.rows())

    def segment(self, name: str, i: int) -> Tensor:
        """The rows of one segment, a view."""
        return self._parts[name][self._starts[i] : self._starts[i] + self.counts[i]]

    def places(self) -> tuple[tuple[int, int], ...]:
        """Where each segment begins in the buffers, and how many rows it has."""
        return tuple(zip(self._starts, self.counts, strict=False))

    @property
    def pitch(self) -> int | None:
        """Rows from one segment to the next, where that is the same for all."""
        return self._rooms[0] if min(self._rooms) == max(self._rooms) else None

    @classmethod
    def held(cls, parts: Mapping[str, Tensor], counts: Sequence[int]) -> Segments:
        """Segments that are equally far apart in ``parts``, of which the first ``counts[i]`` rows are in use."""
        held = cls(parts, counts)
        held._rooms = [len(next(iter(parts.values()))) // len(counts)] * len(counts)
        held._settle()
        return held

    def commit(self, n: int) -> None:
        """Count ``n`` rows of each segment that were written in place, after those in use."""
        self.counts = [count + n for count in self.counts]
        self._forget_places()

    @property
    def is_even(self) -> bool:
        """Whether all segments have as many rows, equally far apart."""
        return min(self.counts) == max(self.counts) and min(self._rooms) == max(self._rooms)

    def runs(self, other: Segments, *numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Runs of segments that are even here and in ``other`` and alike in ``numbers``: first, one after the last."""
        own = zip(self.counts, self._rooms, other.counts, other._rooms, *numbers, strict=True)
        stops = itertools.accumulate(len(list(run)) for _, run in itertools.groupby(own))
        return list(itertools.pairwise([0, *stops]))

    def part(self, first: int, stop: int) -> Segments:
        """Some segments, with views of the same rows: to be read, not to be added to."""
        span = slice(self._starts[first], self._starts[stop])
        other = Segments({name: part[span] for name, part in self._parts.items()}, self.counts[first:stop])
        other._rooms = self._rooms[first:stop]
        other._settle()
        return other

    def even(self, name: str) -> Tensor:
        """The rows of segments that are :attr:`is_even`, side by side: a view ``[S, n, ...]``."""
        return self._parts[name].unflatten(0, (len(self.counts), self._rooms[0]))[:, : self.counts[0]]

    def append(self, new: Mapping[str, Tensor], counts: Sequence[int], room: int | None = None) -> None:
        """Add ``counts[i]`` rows to each segment, all of them one after the other in ``new``.

        Args:
            room: rows that fit into a segment after that, where memory has to be taken; None: an eighth more.
        """
        after = [n + more for n, more in zip(self.counts, counts, strict=True)]
        is_frozen_now = any(is_frozen(part) for part in self._parts.values())
        if self.is_borrowed or is_frozen_now or any(n > most for n, most in zip(after, self._rooms, strict=True)):
            mean = sum(after) // len(after)
            self.own([n + (room_for(mean) - mean if room is None else room) for n in after])
        n_each, ends = (counts[0] if len(set(counts)) == 1 else None), None
        if self.is_even and n_each is not None:
            n = self.counts[0]
            for name, part in self._parts.items():
                whole = part.unflatten(0, (len(self.counts), self._rooms[0]))
                whole[:, n : n + n_each] = new[name].unflatten(0, (len(self.counts), n_each))
        else:
            if n_each is not None:  # nothing is copied to the device, token after token
                before = self._ends
                if before is None:
                    before = torch.tensor([span.stop for span in self.spans()], device=self.device)
                at, ends = (before[:, None] + torch.arange(n_each, device=self.device)).flatten(), before + n_each
            else:
                places = zip(self._starts, self.counts, counts, strict=False)
                at = torch.cat([torch.arange(start + n, start + n + m) for start, n, m in places]).to(self.device)
            for name, part in self._parts.items():
                part.index_copy_(0, at, new[name])
        self.counts = after
        self._forget_places()
        self._ends = ends

    def own(self, rooms: Sequence[int] | None = None) -> None:
        """Move to memory of its own with room for ``rooms`` rows; None: if it is shared, without room for more."""
        if rooms is None:
            if not self.is_borrowed:
                return
            rooms = self.counts
        before, total = self.rows(), sum(rooms)
        self._rooms = list(rooms)
        self._settle()
        after = self.rows()
        for name, old in self._parts.items():
            new = old.new_zeros(total, *old.shape[1:])
            new[after] = old[before]
            self._parts[name] = new
        self.is_borrowed = False

    def crop(self, n: int) -> None:
        """Forget the last ``n`` rows of each segment."""
        self.counts = [count - n for count in self.counts]
        self._forget_places()

    def take(self, at: Sequence[Sequence[int] | Tensor]) -> Segments:
        """New segments of the rows ``at[i]`` of each segment i, in this order, without room for more."""
        chosen = [torch.as_tensor(rows, dtype=torch.long) for rows in at]
        index = torch.cat([rows + start for rows, start in zip(chosen, self._starts, strict=False)]).to(self.device)
        parts = {name: part.index_select(0, index) for name, part in self._parts.items()}
        return Segments(parts, [len(rows) for rows in chosen])

    def of(self, segments: Sequence[int]) -> Segments:
        """New segments: those with these indices, which may repeat."""
        spans = self.spans()
        parts = {name: torch.cat([part[spans[i]] for i in segments]) for name, part in self._parts.items()}
        return Segments(parts, [self.counts[i] for i in segments])

    def drop(self, stays: Sequence[Sequence[bool]]) -> None:
        """Forget rows of each segment; ``stays[i]`` says of the last rows of segment i whether they stay."""
        if self.is_borrowed or any(is_frozen(part) for part in self._parts.values()):
            self.own(self._rooms)
        self.counts = list(self.counts)
        self._forget_places()
        for i, own in enumerate(stays):
            if all(own):
                continue
            first = self._starts[i] + self.counts[i] - len(own)
            kept = torch.tensor([first + j for j, is_kept in enumerate(own) if is_kept], dtype=torch.long)
            for part in self._parts.values():
                part[first : first + len(kept)] = part.index_select(0, kept.to(part.device))
            self.counts[i] -= len(own) - len(kept)

    def shared(self) -> Segments:
        """The same rows, that go their own way; whichever of the two is written to first copies."""
        self.is_borrowed = True
        other = copy.copy(self)
        other._parts = dict(self._parts)
        return other
