"""DenseStore: the keys and values of one layer in a buffer with room to grow; what a store is.

A store holds the pairs of one layer of a cache in slots ``0 .. n - 1`` of every row and head, and nothing else: which
tokens these are, and who sees them, is the business of the layer (``layer.py``). All stores have the members of
:class:`DenseStore`; the others are in ``thin.py``, ``ragged.py`` and ``quantised.py``.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor

from coldpress.core.pick import pick

__all__ = ["DenseStore", "is_frozen", "room_for"]

_GROW_MIN_TOKENS = 64
_GROW_FRACTION = 8  # a full buffer grows by an eighth of what it holds
_D = TypeVar("_D", bound="DenseStore")


def room_for(n_tokens: int) -> int:
    """Slots to make when a buffer is too small for ``n_tokens``, so that copies stay rare."""
    return n_tokens + max(_GROW_MIN_TOKENS, n_tokens // _GROW_FRACTION)


def is_frozen(buffer: Tensor) -> bool:
    """Whether a buffer cannot be written to: autograd or inference mode made it."""
    return buffer.requires_grad or (buffer.is_inference() and not torch.is_inference_mode_enabled())


class DenseStore:
    """Keys ``[B, Hkv, capacity, D]`` and values ``[B, Hkv, capacity, Dv]``, of which the first ``n`` slots are in use.

    Attributes:
        n: slots in use.
        is_borrowed: the buffers belong to somebody else as well, who relies on them: they are copied before the first
            write.
    """

    n_apart = 0  # first slots whose keys are not in ``_k``

    def __init__(self, keys: Tensor, values: Tensor, is_borrowed: bool = False):
        self._k, self._v = keys, values
        self.n = values.shape[2]
        self.is_borrowed = is_borrowed

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
        """What takes memory."""
        return self._k, self._v

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last ``n`` slots."""
        return self.keys[:, :, self.n - n :], self.values[:, :, self.n - n :]

    @property
    def room(self) -> int:
        """Tokens that can be added before the buffers have to be copied."""
        return 0 if self.is_borrowed or is_frozen(self._v) else self._v.shape[2] - self.n

    def packed(self) -> dict[str, Tensor]:
        """What it takes to make the store again, by name, and nothing of the room to grow."""
        return {"keys": self._k[:, :, : self.n - self.n_apart], "values": self.values}

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int) -> DenseStore:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = cls(parts["keys"], parts["values"])
        if room:
            store.own(store.n + room)
        return store

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        """Add the pairs ``[B, Hkv, Q, D]`` of Q new tokens; ``is_tight``: make no room for more than these."""
        needed = self.n + keys.shape[2]
        if self.is_borrowed or is_frozen(self._v) or needed > self._v.shape[2]:
            self.own(needed if is_tight else room_for(needed))
        self._k[:, :, self.n - self.n_apart : needed - self.n_apart] = keys
        self._v[:, :, self.n : needed] = values
        self.n = needed

    def own(self, capacity: int) -> None:
        """Move to buffers that nobody else has, with room for ``capacity`` tokens."""
        buffers = []
        for old, n_apart in ((self._k, self.n_apart), (self._v, 0)):
            new = old.new_empty(*old.shape[:2], capacity - n_apart, old.shape[3])
            new[:, :, : self.n - n_apart] = old[:, :, : self.n - n_apart]
            buffers.append(new)
        self._k, self._v = buffers
        self.is_borrowed = False

    def crop(self, n: int) -> None:
        """Forget the slots from ``n`` on, which came one by one after the others."""
        self.n = n

    def settle(self, n_first: int, order: Tensor, to: Tensor, n: int) -> None:
        """Move some later slots into the empty ones of the first, and forget the others.

        Args:
            n_first: how many slots are the first ones.
            order: int64 ``[B, Hkv, m]``, the m slots after these, those that stay first.
            to: int64 ``[B, Hkv, m]``, where they go; those that do not stay are of no account.
            n: how many slots are the first ones afterwards.
        """
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
        self.n = n + n_rest
        if self._v.shape[2] > 2 * room_for(self.n):
            self.own(room_for(self.n))

    def droppable(self, n: int) -> int:
        """How many of the first ``n`` slots :meth:`without_first` can leave out."""
        return n

    def without_first(self, n: int) -> DenseStore:
        """A store of the slots from ``n`` on, in memory of its own."""
        keys, values = (
            part[:, :, n:].clone(memory_format=torch.contiguous_format) for part in (self.keys, self.values)
        )
        return DenseStore(keys, values)

    def index_rows(self, rows: Tensor) -> None:
        """Hold the rows ``rows`` of what is held, int64 ``[B']``."""
        self._k = self._k[:, :, : self.n - self.n_apart].index_select(0, rows)
        self._v = self._v[:, :, : self.n].index_select(0, rows)
        self.is_borrowed = False

    def shared(self: _D) -> _D:
        """A store of the same pairs that goes its own way; nothing is copied until one of the two is written to."""
        self.is_borrowed = True
        return copy.copy(self)

    def buffers_for(self, n_tokens: int) -> tuple[Tensor, Tensor] | None:
        """The buffers, to be written to from the start, if ``n_tokens`` fit without leaving most of them empty."""
        if self.is_borrowed or is_frozen(self._v):
            return None
        fits = n_tokens <= self._v.shape[2] <= 2 * (n_tokens + _GROW_MIN_TOKENS)
        return (self._k, self._v) if fits else None
