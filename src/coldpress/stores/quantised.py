"""Stores that hold most of their pairs as integers of few bits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from coldpress.stores.bits import KVBits
from coldpress.stores.codes import Codes
from coldpress.stores.dense import DenseStore, is_frozen
from coldpress.stores.ragged import RaggedStore, attend_segments, pad_segments

if TYPE_CHECKING:
    pass

__all__ = ["QuantizedRaggedStore", "QuantizedStore"]

_Q = TypeVar("_Q", bound="_Quantized")


class _Quantized:
    """What the two stores have in common: segments, each of some blocks of g coded pairs and then others as they are.

    A segment is what one KV head of one row holds. The pairs of a block are quantised once, when they are no longer
    among the newest, and its codes are never made again.

    Attributes:
        how: bits, group size and newest pairs that stay.
    """

    _tail: DenseStore | RaggedStore
    _kind: type[DenseStore] | type[RaggedStore]  # of the tail

    @property
    def n(self) -> int:
        """Slots in use."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy."""
        raise NotImplementedError

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a copy."""
        raise NotImplementedError

    def __init__(self, how: KVBits):
        self.how = how
        self._codes: tuple[Codes, Codes] | None = None  # keys and values, the blocks of each segment in order
        self._n_blocks: list[int] = []  # of each segment

    @property
    def n_rows(self) -> int:
        return self._tail.n_rows

    @property
    def n_heads(self) -> int:
        return self._tail.n_heads

    @property
    def device(self) -> torch.device:
        return self._tail.device

    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory."""
        codes = () if self._codes is None else (*self._codes[0].tensors(), *self._codes[1].tensors())
        return *self._tail.tensors(), *codes

    @property
    def room(self) -> int:
        """Tokens that can be added before the buffers have to be copied."""
        return self._tail.room

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last ``n`` slots."""
        return self.keys[:, :, self.n - n :], self.values[:, :, self.n - n :]

    def packed(self) -> dict[str, Tensor]:
        """What it takes to make the store again, by name, and nothing of the room to grow."""
        parts = {f"tail.{name}": tensor for name, tensor in self._tail.packed().items()}
        parts["how"] = torch.tensor([self.how.bits, self.how.group_size, self.how.residual_tokens])
        if self._codes is not None:
            parts["n_blocks"] = torch.tensor(self._n_blocks)
            for which, codes in zip(("keys", "values"), self._codes, strict=True):
                parts |= {f"{which}.{name}": getattr(codes, name) for name in ("packed", "scale", "zero")}
        return parts

    @classmethod
    def unpacked(cls: type[_Q], parts: dict[str, Tensor], room: int) -> _Q:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = cls.__new__(cls)
        how = KVBits(*parts["how"].tolist())
        _Quantized.__init__(store, how)
        tail = {name.removeprefix("tail."): tensor for name, tensor in parts.items() if name.startswith("tail.")}
        store._tail = cls._kind.unpacked(tail, room)
        if "n_blocks" in parts:
            store._n_blocks = parts["n_blocks"].tolist()
            keys, values = (
                Codes(parts[f"{which}.packed"], parts[f"{which}.scale"], parts[f"{which}.zero"], how.bits)
                for which in ("keys", "values")
            )
            store._codes = keys, values
        return store

    def shared(self: _Q) -> _Q:
        """A store of the same pairs that goes its own way; nothing is copied until one of the two is written to."""
        other = copy.copy(self)
        other._tail = self._tail.shared()
        return other

    def buffers_for(self, n_tokens: int) -> None:
        """None: nothing else can be written into these buffers."""
        return None

    def _add(self, keys: Tensor, values: Tensor, n_new: list[int]) -> None:
        """Quantise the blocks ``keys [N, g, D]``, ``values [N, g, Dv]``, ``n_new`` for each segment in order."""
        how = self.how
        new = Codes.of(keys, how.bits, None), Codes.of(values, how.bits, how.channels(values.shape[-1]))
        if self._codes is None:
            self._codes, self._n_blocks = new, n_new
            return
        n_old, at, blocks = sum(self._n_blocks), 0, []
        at_new = n_old
        for old, more in zip(self._n_blocks, n_new, strict=True):
            blocks += [*range(at, at + old), *range(at_new, at_new + more)]
            at, at_new = at + old, at_new + more
        order = torch.tensor(blocks, device=self.device)
        self._codes = tuple(own.and_then(other).take(order) for own, other in zip(self._codes, new, strict=True))  # type: ignore[assignment]
        self._n_blocks = [old + more for old, more in zip(self._n_blocks, n_new, strict=True)]

    def _take_rows(self, rows: Tensor) -> None:
        """Hold the coded blocks of the rows ``rows``."""
        if self._codes is None:
            return
        n_heads, starts = self.n_heads, [0]
        for n in self._n_blocks:
            starts.append(starts[-1] + n)
        chosen = [row * n_heads + head for row in rows.tolist() for head in range(n_heads)]
        blocks = torch.tensor([at for i in chosen for at in range(starts[i], starts[i + 1])], device=self.device).long()
        self._codes = self._codes[0].take(blocks), self._codes[1].take(blocks)
        self._n_blocks = [self._n_blocks[i] for i in chosen]


class QuantizedStore(_Quantized):
    """The first pairs of every row and head in few bits, the others in a :class:`DenseStore`.

    ``keys`` and ``values`` are copies, made for the attention of one layer at a time.

    Args:
        store: the pairs, the store's own from now on.
        how: bits, group size and newest pairs that stay.
    """

    _tail: DenseStore
    _kind = DenseStore

    def __init__(self, store: DenseStore, how: KVBits):
        super().__init__(how)
        self._tail = store
        self.quantise()

    @property
    def n_coded(self) -> int:
        """Slots whose pairs are in few bits: the first ones."""
        return self._n_blocks[0] * self.how.group_size if self._n_blocks else 0

    @property
    def n(self) -> int:
        return self.n_coded + self._tail.n

    @property
    def n_exact(self) -> int:
        """The newest slots whose pairs are as they were, in every row and head."""
        return self._tail.n

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy."""
        return self._whole(0, self._tail.keys)

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a copy."""
        return self._whole(1, self._tail.values)

    def _whole(self, which: int, tail: Tensor) -> Tensor:
        if self._codes is None:
            return tail
        n_coded = self.n_coded
        whole = tail.new_empty(*tail.shape[:2], n_coded + tail.shape[2], tail.shape[3])
        self._codes[which].write(whole[:, :, :n_coded].unflatten(2, (-1, self.how.group_size)))
        whole[:, :, n_coded:] = tail
        return whole

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        """Add the pairs ``[B, Hkv, Q, D]`` of Q new tokens, as they are."""
        tail = self._tail
        needed = tail.n + keys.shape[2]
        if tail.is_borrowed or is_frozen(tail.tensors()[1]) or needed > tail.tensors()[1].shape[2]:
            tail.own(max(needed, self.how.residual_tokens + self.how.group_size))
        tail.append(keys, values)

    def quantise(self) -> None:
        """Quantise the oldest of the pairs that are held as they are, in whole groups, and leave the newest."""
        m, g, tail = self.how.n_groups(self._tail.n), self.how.group_size, self._tail
        if m:
            keys, values = (part[:, :, : m * g].unflatten(2, (m, g)).flatten(0, 2) for part in (tail.keys, tail.values))
            self._add(keys, values, [m] * (self.n_rows * self.n_heads))
            self._tail = tail.without_first(m * g)

    def crop(self, n: int) -> None:
        """Forget the slots from ``n`` on, which are among the ``n_exact`` newest."""
        self._tail.crop(n - self.n_coded)

    def index_rows(self, rows: Tensor) -> None:
        """Hold the rows ``rows`` of what is held, int64 ``[B']``."""
        self._take_rows(rows)
        self._tail.index_rows(rows)

    def droppable(self, n: int) -> int:
        """How many of the first ``n`` slots :meth:`without_first` can leave out: coded ones go in whole blocks."""
        return n if n >= self.n_coded else n // self.how.group_size * self.how.group_size

    def without_first(self, n: int) -> QuantizedStore:
        """A store of the slots from ``n`` on, which :meth:`droppable` allows, in memory of its own."""
        other = copy.copy(self)
        n_coded = self.n_coded
        if n >= n_coded:
            other._codes, other._n_blocks = None, []
            other._tail = self._tail.without_first(n - n_coded)
            return other
        assert self._codes is not None
        n_blocks, first = self._n_blocks[0], n // self.how.group_size
        blocks = torch.arange(len(self._n_blocks) * n_blocks, device=self.device).view(-1, n_blocks)[:, first:]
        other._codes = self._codes[0].take(blocks.flatten()), self._codes[1].take(blocks.flatten())
        other._n_blocks = [n_blocks - first] * len(self._n_blocks)
        other._tail = self._tail.without_first(0)
        return other


class QuantizedRaggedStore(_Quantized):
    """Rows and heads that hold different numbers of pairs: the first of each in few bits, the others as they are.

    Each segment is quantised in groups of its own pairs, so that it holds what it would hold alone. As slots its pairs
    are those of :class:`~coldpress.stores.ragged.RaggedStore`.

    Args:
        store: the pairs, the store's own from now on.
        how: bits, group size and newest pairs that stay.
    """

    _tail: RaggedStore
    _kind = RaggedStore

    def __init__(self, store: RaggedStore, how: KVBits):
        super().__init__(how)
        self._tail = store
        self._n_first, self._n_later = store.counts(), store.n_later
        self.quantise()

    @property
    def n(self) -> int:
        """Slots in use, as the longest segment counts them."""
        return max(self._n_first) + self._n_later

    @property
    def n_first(self) -> int:
        """Slots for the pairs that are not of later tokens."""
        return max(self._n_first)

    @property
    def has_gaps(self) -> bool:
        """Whether some head holds fewer pairs than another one."""
        return min(self._n_first) < max(self._n_first)

    @property
    def n_exact(self) -> int:
        """The newest slots whose pairs are as they were, in every row and head."""
        return self._tail.n_later

    def packed(self) -> dict[str, Tensor]:
        """What it takes to make the store again, by name, and nothing of the room to grow."""
        return super().packed() | {"counts": torch.tensor([*self._n_first, self._n_later])}

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int) -> QuantizedRaggedStore:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = super().unpacked(parts, room)
        *store._n_first, store._n_later = parts["counts"].tolist()
        return store

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy, zero where a head holds fewer pairs."""
        return self._padded(0)

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a copy, zero where a head holds fewer pairs."""
        return self._padded(1)

    def _padded(self, which: int) -> Tensor:
        padded = pad_segments(self._segments(which), self._n_first, self._n_later)
        return padded.unflatten(0, (self.n_rows, self.n_heads))

    def _segments(self, which: int) -> list[Tensor]:
        """What each segment holds, ``[n, D]`` each."""
        flat = self._tail.tensors()[which]
        tails = [flat[span] for span in self._tail.spans()]
        if self._codes is None:
            return tails
        coded = self._codes[which].numbers(flat.dtype, flat.shape[1]).flatten(0, 1)
        parts = coded.split([n * self.how.group_size for n in self._n_blocks])
        return [torch.cat(pair) if len(pair[0]) else pair[1] for pair in zip(parts, tails, strict=True)]

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        """Add the pairs ``[B, Hkv, Q, D]`` of Q new tokens, as they are."""
        longest = max(span.stop - span.start for span in self._tail.spans())
        until_next = self.how.residual_tokens + self.how.group_size - longest
        self._tail.append(keys, values, room=max(keys.shape[2], until_next))
        self._n_later += keys.shape[2]

    def quantise(self) -> None:
        """Quantise the oldest of the pairs that are held as they are, in whole groups, and leave the newest."""
        g, spans = self.how.group_size, self._tail.spans()
        n_new = [self.how.n_groups(span.stop - span.start) for span in spans]
        if not any(n_new):
            return
        first = [slice(span.start, span.start + n * g) for span, n in zip(spans, n_new, strict=True) if n]
        keys, values = (torch.cat([flat[s] for s in first]).unflatten(0, (-1, g)) for flat in self._tail.tensors())
        self._add(keys, values, n_new)
        self._tail = self._tail.without_first([n * g for n in n_new])

    def crop(self, n: int) -> None:
        """Forget the slots from ``n`` on, which are among the ``n_exact`` newest."""
        dropped = self.n - n
        self._tail.crop(self._tail.n - dropped)
        self._n_later -= dropped

    def index_rows(self, rows: Tensor) -> None:
        """Hold the rows ``rows`` of what is held, int64 ``[B']``."""
        self._take_rows(rows)
        chosen = [row * self.n_heads + head for row in rows.tolist() for head in range(self.n_heads)]
        self._n_first = [self._n_first[i] for i in chosen]
        self._tail.index_rows(rows)

    def attend(self, query: Tensor, scaling: float | None) -> Tensor:
        """Attention of the newest tokens over what each head holds: as :meth:`RaggedStore.attend`."""
        return attend_segments(query, self._segments(0), self._segments(1), scaling)
