"""RaggedStore: rows and heads that store different numbers of pairs, in no more memory than these need."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coldpress.attend.one_token import attend_blocks, can_attend_once
from coldpress.attend.segments import attend_group, causal_bias, segment_bias
from coldpress.stores.base import Store, is_frozen, room_for
from coldpress.stores.dense import DenseStore
from coldpress.stores.parts import RaggedPart, stays_in_place

__all__ = ["RaggedStore", "pad_segments"]

_SPREAD_TOKENS = 64  # segments that differ by so many, or by this fraction, are given as much memory
_SPREAD_FRACTION = 16
_BLOCKS = ((2048, 128), (512, 64), (0, 16))  # longest segment from which on blocks have so many slots


class RaggedStore(Store):
    """The pairs of every row and head one after the other, each with room for the tokens to come.

    A segment is what one KV head of one row stores: ``n_first`` pairs of its own number, then those of later tokens, as
    many in every segment. Seen as slots, as the other stores have them, the first pairs are padded to the longest
    segment's, so ``n = max(n_first) + later tokens``; in memory nothing is padded.
    """

    name = "ragged"
    is_ragged = True
    takes_codec = True
    moves_pairs = True

    def __init__(self, keys: Tensor, values: Tensor, is_stored: Tensor):
        """Store some of the pairs ``keys [B, Hkv, T, D]``, ``values [B, Hkv, T, Dv]``.

        Args:
            keys, values: the pairs, and anything in the slots that are not stored.
            is_stored: bool ``[B, Hkv, T]``, the first slots of each head.
        """
        self._shape = is_stored.shape[:2]
        self._k, self._v = keys[is_stored], values[is_stored]  # [slots of all segments, D]
        self._n_first: list[int] = is_stored.sum(-1).flatten().tolist()
        self._n_later = 0
        self._place(0, is_exact=True)
        self.is_borrowed = False

    def _place(self, room: int, is_exact: bool = False) -> None:
        """Note where the segments are, with room for ``room`` later tokens in each, and where the next token goes.

        Args:
            room: later tokens that fit into every segment.
            is_exact: the segments are in their order and none has more room. Without, those of similar length are side
                by side and as large as the largest of them, in whole blocks, so that one product serves them all.
        """
        n_segments = len(self._n_first)
        order = list(range(n_segments))
        if not is_exact:
            order.sort(key=self._n_first.__getitem__, reverse=True)
        self._n_slots = 1 if is_exact else _block_of(max(self._n_first))
        self._starts, self._ends_of_room = [0] * n_segments, [0] * n_segments
        self._groups, end = [], 0
        for members in _alike(order, self._n_first, is_exact):
            size = max(self._n_first[i] for i in members) + room
            size += -size % self._n_slots
            self._groups.append(_Group(members, end, size))
            for i in members:
                self._starts[i], self._ends_of_room[i] = end, end + size
                end += size
        rank = sorted(range(n_segments), key=order.__getitem__)
        self._order = None if order == list(range(n_segments)) else torch.tensor([order, rank], device=self._v.device)
        self._blocks = None if is_exact else self._cut_into_blocks()
        self._find_ends()

    def _cut_into_blocks(self) -> tuple[Tensor, Tensor]:
        """Which segment each block of slots belongs to, and its first slot: int64 ``[N]`` each."""
        sizes = [end - start for start, end in zip(self._starts, self._ends_of_room, strict=True)]
        order = sorted(range(len(sizes)), key=self._starts.__getitem__)
        n_blocks = torch.tensor([sizes[i] // self._n_slots for i in order])
        segment = torch.tensor(order).repeat_interleave(n_blocks)
        first = torch.arange(len(segment)) * self._n_slots
        return segment.to(self.device), first.to(self.device)

    def _find_ends(self) -> None:
        """Update what follows from the number of pairs in each segment."""
        spans = zip(self._ends_of_room, self._starts, self._n_first, strict=True)
        self._room = min(end - start - n for end, start, n in spans)
        self._ends = torch.tensor([span.stop for span in self.spans()], device=self._v.device)
        self._longest = [max(self._n_first[i] for i in group.members) for group in self._groups]
        self._first = [  # what each segment of a group stores of the first pairs, where they differ
            None if min(counts) == max(counts) else torch.tensor(counts, device=self._v.device)[:, None]
            for counts in ([self._n_first[i] for i in group.members] for group in self._groups)
        ]

    @property
    def n_rows(self) -> int:
        return self._shape[0]

    @property
    def n_heads(self) -> int:
        return self._shape[1]

    @property
    def n(self) -> int:
        """Slots in use, as the longest segment counts them."""
        return self.n_first + self._n_later

    @property
    def n_first(self) -> int:
        return max(self._n_first)

    @property
    def device(self) -> torch.device:
        return self._v.device

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy, zero where a head stores fewer pairs."""
        return self._padded(self._k)

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a copy, zero where a head stores fewer pairs."""
        return self._padded(self._v)

    def _padded(self, flat: Tensor) -> Tensor:
        padded = pad_segments([flat[span] for span in self.spans()], self._n_first, self._n_later)
        return padded.unflatten(0, (self.n_rows, self.n_heads))

    @property
    def n_later(self) -> int:
        """Pairs of later tokens, of every segment."""
        return self._n_later

    def counts(self) -> list[int]:
        """How many pairs each segment stores beside those of later tokens."""
        return list(self._n_first)

    def spans(self) -> list[slice]:
        """Where each segment's pairs are in the flat tensors."""
        ends = zip(self._starts, self._n_first, strict=True)
        return [slice(start, start + n + self._n_later) for start, n in ends]

    def tensors(self) -> tuple[Tensor, ...]:
        return self._k, self._v

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        if n > self._n_later:
            return self.keys[:, :, self.n - n :], self.values[:, :, self.n - n :]
        at = self._ends[:, None] + torch.arange(-n, 0, device=self.device)
        keys, values = (flat[at].unflatten(0, (self.n_rows, self.n_heads)) for flat in (self._k, self._v))
        return keys, values

    @property
    def room(self) -> int:
        return 0 if self.is_borrowed or is_frozen(self._v) else self._room - self._n_later

    def packed(self) -> dict[str, Tensor]:
        """The tensors that make the store again, by name: the segments one after the other, without room to grow."""
        keys, values = (torch.cat([flat[span] for span in self.spans()]) for flat in (self._k, self._v))
        counts = torch.tensor(self._n_first, device=self.device).view(self.n_rows, self.n_heads)
        return {"keys": keys, "values": values, "counts": counts}

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int) -> RaggedStore:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        keys, values, counts = parts["keys"], parts["values"], parts["counts"]
        nothing = counts.new_zeros(*counts.shape, 0, dtype=torch.bool)
        empty = [flat.new_empty(*nothing.shape, flat.shape[1]) for flat in (keys, values)]
        store = cls(empty[0], empty[1], nothing)
        store._k, store._v = keys, values
        store._n_first = counts.flatten().tolist()
        store._n_later = (len(values) - sum(store._n_first)) // len(store._n_first)
        store._place(store._n_later, is_exact=True)
        if room:
            store._move(store._n_later + room)
        return store

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False, room: int | None = None) -> None:
        """Add the pairs ``[B, Hkv, Q, D]`` of Q new tokens, in the room that each segment has for them.

        Args:
            keys, values: the pairs.
            is_tight: where there is too little room, make none for more than these.
            room: for how many later tokens to make room then, these included; None: for more as it sees fit.
        """
        n_new = keys.shape[2]
        if self.is_borrowed or is_frozen(self._v) or self._n_later + n_new > self._room:
            more = n_new if is_tight else n_new + self._more()
            self._move(self._n_later + (more if room is None else room), is_exact=is_tight)
        at = (self._ends[:, None] + torch.arange(n_new, device=self.device)).flatten()
        self._k[at] = keys.reshape(-1, keys.shape[3])
        self._v[at] = values.reshape(-1, values.shape[3])
        self._ends, self._n_later = self._ends + n_new, self._n_later + n_new

    def _more(self) -> int:
        """Later tokens to make room for, beside those that there are."""
        mean = sum(self._n_first) // len(self._n_first) + self._n_later
        return room_for(mean) - mean

    def part(self, n_more: int) -> RaggedPart:
        if self.room < 1 or self._blocks is None:
            self._move(self._n_later + n_more)
        assert self._blocks is not None
        for buffer in (self._k, self._v):
            stays_in_place(buffer)
        return RaggedPart.of(self._k, self._v, self._ends, self._blocks, self._n_slots)

    def next_slots(self) -> Tensor:
        return self._ends

    def part_bias(self, bias: Tensor) -> Tensor:
        own = bias.expand(*self._shape, -1).flatten(0, 1)
        flat = bias.new_zeros(len(self._v))
        for i, span in enumerate(self.spans()):
            n = self._n_first[i]
            flat[span.start : span.start + n] = own[i, :n]
            flat[span.start + n : span.stop] = own[i, self.n_first :]
        return flat.unflatten(0, (-1, self._n_slots))

    def commit(self, n: int) -> None:
        self._ends, self._n_later = self._ends + n, self._n_later + n

    def _move(self, room: int, is_exact: bool = False) -> None:
        """Move to buffers of its own, with ``room`` for later tokens in each segment."""
        before = self.spans()
        self._place(room, is_exact)
        total = max(self._ends_of_room)
        for name in ("_k", "_v"):
            old = getattr(self, name)
            new = old.new_zeros(total, old.shape[1])  # empty slots get no weight, and must not be NaN
            for source, target in zip(before, self.spans(), strict=True):
                new[target] = old[source]
            setattr(self, name, new)
        self.is_borrowed = False

    def crop(self, n: int) -> None:
        """Forget the slots from ``n`` on, which are those of later tokens."""
        dropped = self.n - n
        self._ends, self._n_later = self._ends - dropped, self._n_later - dropped

    def settle(self, n_first: int, order: Tensor, to: Tensor, stays: Tensor, n: int) -> None:
        if self.is_borrowed or is_frozen(self._v):
            self._move(self._n_later)
        stays = stays.flatten(0, 1)
        n_rest = self._n_later - stays.shape[1]
        order = (~torch.nn.functional.pad(stays, (0, n_rest), value=True)).to(torch.uint8).argsort(dim=-1, stable=True)
        first = (self._ends - self._n_later)[:, None]
        at = (first + torch.arange(self._n_later, device=self.device)).flatten()
        source = (first + order).flatten()
        for flat in (self._k, self._v):
            flat[at] = flat[source]
        self._n_first = [n + more for n, more in zip(self._n_first, stays.sum(-1).tolist(), strict=True)]
        self._n_later = n_rest
        self._find_ends()
        used = sum(self._n_first) + n_rest * len(self._n_first)
        if len(self._v) > 2 * room_for(used):
            self._move(n_rest + self._more())

    def without_first(self, n: int) -> Store:
        return DenseStore(self.keys, self.values).without_first(n)

    def without_oldest(self, counts: list[int]) -> RaggedStore:
        """A store without the first ``counts[i]`` pairs of each segment i, in memory of its own.

        As many of the newest pairs count as later ones as before, or as every segment has left.
        """
        other = copy.copy(self)
        spans = [slice(span.start + n, span.stop) for span, n in zip(self.spans(), counts, strict=True)]
        other._k, other._v = (torch.cat([flat[span] for span in spans]) for flat in (self._k, self._v))
        other._n_later = min(self._n_later, *(span.stop - span.start for span in spans))
        other._n_first = [span.stop - span.start - other._n_later for span in spans]
        other._place(other._n_later, is_exact=True)
        other.is_borrowed = False
        return other

    def index_rows(self, rows: Tensor) -> None:
        chosen = [row * self.n_heads + head for row in rows.tolist() for head in range(self.n_heads)]
        spans = self.spans()
        self._k, self._v = (torch.cat([flat[spans[i]] for i in chosen]) for flat in (self._k, self._v))
        self._shape, self._n_first = torch.Size((len(rows), self.n_heads)), [self._n_first[i] for i in chosen]
        self._place(self._n_later, is_exact=True)
        self.is_borrowed = False

    def shared(self) -> RaggedStore:
        self.is_borrowed = True
        return copy.copy(self)

    def own(self, capacity: int | None = None) -> None:
        if self.is_borrowed or capacity is not None:
            self._move(self._n_later if capacity is None else capacity - self.n_first)

    def attend(self, query: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        n_batch, n_query_heads, n_queries, _ = query.shape
        queries = query.reshape(len(self._n_first), -1, n_queries, query.shape[3])  # [B * Hkv, G, Q, D]
        if self._blocks is not None and can_attend_once(query, self._k, self._v):
            segment, first = self._blocks
            n_used = self._ends.index_select(0, segment) - first
            own = None if bias is None else torch.cat([b.reshape(-1, self._n_slots) for b in self._biases(bias)])
            output = attend_blocks(queries[:, :, 0], self._k, self._v, segment, n_used, self._n_slots, scaling, own)
            return output.view(n_batch, 1, n_query_heads, -1)
        if self._order is not None:
            queries = queries.index_select(0, self._order[0])
        biases = [None] * len(self._groups) if bias is None else self._biases(bias)
        outputs, n_before = [], 0
        for (members, start, size), longest, n_first, own in zip(
            self._groups, self._longest, self._first, biases, strict=True
        ):
            span, n = slice(start, start + len(members) * size), longest + self._n_later
            key, value = (flat[span].unflatten(0, (-1, size))[:, :n] for flat in (self._k, self._v))
            mine = queries[n_before : n_before + len(members)]
            end = None if n_first is None else n_first[..., None] + self._n_later
            own = causal_bias(n, n_queries, end, self.device) if own is None else own[..., :n]
            outputs.append(attend_group(mine, key, value, own, scaling))
            n_before += len(members)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._order is not None:
            output = output.index_select(0, self._order[1])
        return output.reshape(n_batch, n_query_heads, n_queries, -1).transpose(1, 2).contiguous()

    def _biases(self, bias: Tensor) -> list[Tensor]:
        """``bias`` over padded slots as each group of segments has its slots: ``[S, Q or 1, size]`` each."""
        own = bias.expand(*self._shape, -1, -1).flatten(0, 1)
        counts = torch.tensor(self._n_first, device=bias.device)
        found = []
        for group in self._groups:
            members = torch.tensor(group.members, device=bias.device)
            found.append(segment_bias(own[members], counts[members], self.n_first, self._n_later, group.size))
        return found


def pad_segments(segments: Sequence[Tensor], n_first: Sequence[int], n_later: int) -> Tensor:
    """Segments ``[n_first[i] + n_later, D]`` as slots ``[S, n, D]``, their first pairs padded with zeros."""
    longest = max(n_first)
    padded = segments[0].new_zeros(len(segments), longest + n_later, segments[0].shape[1])
    for i, (segment, n) in enumerate(zip(segments, n_first, strict=True)):
        padded[i, :n] = segment[:n]
        padded[i, longest:] = segment[n:]
    return padded


class _Group(NamedTuple):
    """Segments of similar length that are side by side in memory, and have as much room."""

    members: list[int]
    start: int
    size: int


def _block_of(longest: int) -> int:
    return next(n_slots for least, n_slots in _BLOCKS if longest >= least)


def _alike(order: list[int], n_first: list[int], is_exact: bool) -> list[list[int]]:
    """Cut ``order`` where lengths differ: by anything, or by more than is worth another call."""
    groups: list[list[int]] = []
    for i in order:
        longest = n_first[groups[-1][0]] if groups else 0
        spread = 0 if is_exact else max(_SPREAD_TOKENS, longest // _SPREAD_FRACTION)
        if groups and abs(longest - n_first[i]) <= spread:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
