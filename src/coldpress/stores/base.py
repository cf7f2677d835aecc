"""Store: the keys and values of one layer. Which tokens these are, the layer's slots know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from coldpress.stores.parts import Part

__all__ = ["Store", "is_frozen", "room_for"]

_GROW_MIN_TOKENS = 64
_GROW_FRACTION = 8  # a full buffer grows by an eighth of its length
_S = TypeVar("_S", bound="Store")


def room_for(n_tokens: int) -> int:
    """Slots to make when a buffer is too small for ``n_tokens``, so that copies are rare."""
    return n_tokens + max(_GROW_MIN_TOKENS, n_tokens // _GROW_FRACTION)


def is_frozen(buffer: Tensor) -> bool:
    """Whether a buffer cannot be written to: autograd or inference mode made it."""
    return buffer.requires_grad or (buffer.is_inference() and not torch.is_inference_mode_enabled())


class Store(ABC):
    """Pairs in slots ``0 .. n - 1`` of every row and head.

    A layout says where they are in memory (dense, ragged); a codec, how the older ones are stored (as they are, in few
    bits, in fewer channels). What a store cannot do it says in its capabilities:

    Attributes:
        name: of the kind of store, in the file of a saved cache.
        is_ragged: heads store different numbers of pairs, and :meth:`attend` works head by head; ``keys`` and
            ``values`` are padded copies.
        takes_codec: a codec may take its older pairs.
        moves_pairs: pairs in the middle can go and others take their slots (:meth:`settle`).
        keeps_codes: encoded pairs stay as they are when others are evicted (:meth:`taken`).
    """

    name: ClassVar[str]
    is_ragged: ClassVar[bool] = False
    takes_codec: ClassVar[bool] = False
    moves_pairs: ClassVar[bool] = False
    keeps_codes: ClassVar[bool] = False

    @property
    @abstractmethod
    def n(self) -> int:
        """Slots in use: of the longest head, where heads differ."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """B."""

    @property
    @abstractmethod
    def n_heads(self) -> int:
        """Hkv."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the pairs are."""

    @property
    @abstractmethod
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``, a view or a copy; zero where a head stores fewer pairs."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``, likewise."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that take memory; keys and values as the model made them come first."""

    @property
    @abstractmethod
    def room(self) -> int:
        """Tokens that can be added before the buffers have to be copied."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        """Add the pairs ``[B, Hkv, Q, D]`` of Q new tokens; ``is_tight``: make no room for more than these."""

    @abstractmethod
    def crop(self, n: int) -> None:
        """Forget the slots from ``n`` on, which came one by one after the others."""

    @abstractmethod
    def index_rows(self, rows: Tensor) -> None:
        """Select the rows ``rows``, int64 ``[B']``."""

    @abstractmethod
    def shared(self: _S) -> _S:
        """A store of the same pairs that goes its own way; nothing is copied until one of the two is written to."""

    @abstractmethod
    def packed(self) -> dict[str, Tensor]:
        """The tensors that make the store again, by name, without room to grow."""

    @abstractmethod
    def own(self, capacity: int | None = None) -> None:
        """Move to buffers of its own, if they are shared, with room for ``capacity`` tokens."""

    @abstractmethod
    def without_first(self, n: int) -> Store:
        """A store of the slots from ``n`` on, which :meth:`droppable` allows, in memory of its own."""

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last ``n`` slots."""
        return self.keys[:, :, self.n - n :], self.values[:, :, self.n - n :]

    def droppable(self, n: int) -> int:
        """How many of the first ``n`` slots :meth:`without_first` can leave out."""
        return n

    @property
    def n_first(self) -> int | None:
        """Slots before those of later tokens, where the store itself knows: one that is ragged."""
        return None

    @property
    def n_croppable(self) -> int:
        """The newest slots that :meth:`crop` can forget: those that are in no block of several tokens."""
        return self.n

    def encode(self) -> None:  # noqa: B027
        """Store the oldest of the pairs that are as they are by the codec, if there is one."""

    def taken(self, slots: Tensor, keys: Tensor, values: Tensor) -> Store:
        """A store of some of the slots, of a store that :attr:`keeps_codes`.

        Args:
            slots: int64 ``[B, Hkv, n]``, ascending; -1 in the last places of a head that keeps fewer.
            keys, values: ``[B, Hkv, n, D]``, the pairs in these slots; those that are not what :attr:`keys` and
                :attr:`values` have there are new ones, and are encoded in the place of the old.
        """
        raise NotImplementedError(f"{type(self).__name__} is made again of what is kept")

    def settle(self, n_first: int, order: Tensor, to: Tensor, stays: Tensor, n: int) -> None:
        """Move some later slots into the empty ones of the first, and forget the others.

        Args:
            n_first: how many slots are the first ones.
            order: int64 ``[B, Hkv, m]``, the m slots after these, the kept ones first.
            to: int64 ``[B, Hkv, m]``, where they go; ignored for those that are not kept.
            stays: bool ``[B, Hkv, m]``, which of these slots are kept, in their own order.
            n: how many slots are the first ones afterwards.
        """
        raise NotImplementedError(f"{type(self).__name__} does not move pairs")

    def part(self, n_more: int) -> Part | None:
        """The pairs as a compiled step has them, in buffers of the store's own; None: they have no fixed shape.

        Args:
            n_more: tokens to make room for, where there is none for a single one.
        """
        return None

    def next_slots(self) -> Tensor:
        """Where the next pairs go: what a :meth:`part` has as ``at``."""
        raise NotImplementedError(f"{type(self).__name__} has no part")

    def part_bias(self, bias: Tensor) -> Tensor:
        """A bias ``[B or 1, Hkv or 1, n]`` of the slots in use as its :meth:`part` has its slots; 0 in empty ones."""
        raise NotImplementedError(f"{type(self).__name__} has no part")

    def part_positions(self, positions: Tensor, last: Tensor) -> Tensor:
        """Positions as its :meth:`part` has its slots, int32; those of tokens to come follow the last one.

        Of a layer with a sliding window, in which no store has heads of different lengths but one that encodes pairs.

        Args:
            positions: int32 ``[B or 1, Hkv or 1, n]``, of the slots in use.
            last: int32 ``[B or 1, 1, 1]``, of the newest token.
        """
        raise NotImplementedError(f"{type(self).__name__} has no part")

    def commit(self, n: int) -> None:
        """Count ``n`` pairs of each head that a compiled step wrote in place, into the slots after those in use."""
        raise NotImplementedError(f"{type(self).__name__} has no part")

    def attend(self, query: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        """Attention head by head, of a store that :attr:`is_ragged`.

        Args:
            query: ``[B, Hq, Q, D]`` of the last Q tokens, which are in the store.
            bias: float32 ``[B or 1, Hkv or 1, Q or 1, n]``, added to the logits; None where the queries see all that
                their head stores, they themselves in causal order.
            scaling: of the logits.

        Returns:
            ``[B, Q, Hq, Dv]``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not attend by itself")

    def buffers_for(self, n_tokens: int) -> tuple[Tensor, Tensor] | None:
        """The buffers, to be written to from the start, if ``n_tokens`` fit without leaving most of them empty."""
        return None
