"""DenseStore: the keys and values of one layer in two buffers with room to grow."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.core.pick import pick
from coldpress.stores.base import Store, is_frozen, room_for
from coldpress.stores.parts import DensePart, stays_in_place, whole_blocks

__all__ = ["DenseStore"]

_LEAST_TOKENS = 64  # of room that may be empty
_D = TypeVar("_D", bound="DenseStore")


class DenseStore(Store):
    """Keys ``[B, Hkv, capacity, D]`` and values ``[B, Hkv, capacity, Dv]``, of which the first ``n`` slots are in use.

    Attributes:
        n: slots in use.
        is_borrowed: the buffers are shared, and others rely on them: they are copied before the first
            write.
    """

    name = "dense"
    takes_codec = True
    moves_pairs = True

    n_apart = 0  # first slots whose keys are not in ``_k``

    def __init__(self, keys: Tensor, values: Tensor, is_borrowed: bool = False):
        self._k, self._v = keys, values
        self._n = values.shape[2]
        self.is_borrowed = is_borrowed

    @property
    def n(self) -> int:
        return self._n

    def part(self, n_more: int) -> DensePart | None:
        if self.n_apart:
            return None
        if self.room < 1:
            self.own(whole_blocks(self.n + n_more))
        for buffer in (self._k, self._v):
            buffer[:, :, self.n :] = 0  # hidden, but multiplied by zero, so they have to be finite
            stays_in_place(buffer)
        return DensePart(self._k, self._v, self.next_slots())

    def next_slots(self) -> Tensor:
        return torch.full((1,), self.n, device=self.device)  # filled there: a copy from the host would wait

    def part_bias(self, bias: Tensor) -> Tensor:
        return pad(bias, (0, self._v.shape[2] - bias.shape[2]))

    def part_positions(self, positions: Tensor, last: Tensor) -> Tensor:
        later = last + 1 + torch.arange(self._v.shape[2] - self.n, dtype=torch.int32, device=self.device)
        shape = torch.broadcast_shapes(positions.shape[:2], later.shape[:2])
        return torch.cat([positions.expand(*shape, -1), later.expand(*shape, -1)], dim=2)

    def commit(self, n: int) -> None:
        self._n += n

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a view of the buffer."""
        return self._k[:, :, : self.n]

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a view of the buffer."""
        return self._v[:, :, : self.n]

    @property
    def n_rows(self) -> int:
        return self._v.shape[0]

    @property
    def n_heads(self) -> int:
        return self._v.shape[1]

    @property
    def device(self) -> torch.device:
        return self._v.device

    def tensors(self) -> tuple[Tensor, ...]:
        return self._k, self._v

    @property
    def room(self) -> int:
        return 0 if self.is_borrowed or is_frozen(self._v) else self._v.shape[2] - self.n

    def packed(self) -> dict[str, Tensor]:
        return {"keys": self._k[:, :, : self.n - self.n_apart], "values": self.values}

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int) -> DenseStore:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = cls(parts["keys"], parts["values"])
        if room:
            store.own(store.n + room)
        return store

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        needed = self.n + keys.shape[2]
        if self.is_borrowed or is_frozen(self._v) or needed > self._v.shape[2]:
            self.own(needed if is_tight else room_for(needed))
        self._k[:, :, self.n - self.n_apart : needed - self.n_apart] = keys
        self._v[:, :, self.n : needed] = values
        self._n = needed

    def own(self, capacity: int | None = None) -> None:
        if capacity is None:
            if not self.is_borrowed:
                return
            capacity = self.n
        buffers = []
        for old, n_apart in ((self._k, self.n_apart), (self._v, 0)):
            new = old.new_empty(*old.shape[:2], capacity - n_apart, old.shape[3])
            new[:, :, : self.n - n_apart] = old[:, :, : self.n - n_apart]
            buffers.append(new)
        self._k, self._v = buffers
        self.is_borrowed = False

    def crop(self, n: int) -> None:
        self._n = n

    def settle(self, n_first: int, order: Tensor, to: Tensor, stays: Tensor, n: int) -> None:
        if self.is_borrowed or is_frozen(self._v):
            self.own(self.n)
        m = order.shape[2]
        n_rest = self.n - n_first - m
        for states in (self._k, self._v):
            new, rest = states[:, :, n_first : n_first + m], states[:, :, n_first + m : self.n]
            rest = rest.clone() if n < n_first + m else rest
            if n_first:
                moved = pick(new, order)
                states.scatter_(2, to[..., None].expand_as(moved), moved)
            else:
                states[:, :, :n] = pick(new, order[..., :n])
            if n < n_first + m:
                states[:, :, n : n + n_rest] = rest
        self._n = n + n_rest
        if self._v.shape[2] > 2 * room_for(self.n):
            self.own(room_for(self.n))

    def without_first(self, n: int) -> DenseStore:
        keys, values = (
            part[:, :, n:].clone(memory_format=torch.contiguous_format) for part in (self.keys, self.values)
        )
        return DenseStore(keys, values)

    def index_rows(self, rows: Tensor) -> None:
        self._k = self._k[:, :, : self.n - self.n_apart].index_select(0, rows)
        self._v = self._v[:, :, : self.n].index_select(0, rows)
        self.is_borrowed = False

    def shared(self: _D) -> _D:
        self.is_borrowed = True
        return copy.copy(self)

    def buffers_for(self, n_tokens: int) -> tuple[Tensor, Tensor] | None:
        if self.is_borrowed or is_frozen(self._v):
            return None
        fits = n_tokens <= self._v.shape[2] <= 2 * (n_tokens + _LEAST_TOKENS)
        return (self._k, self._v) if fits else None
