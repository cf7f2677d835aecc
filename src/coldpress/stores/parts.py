"""Parts: the pairs of one layer as a compiled step has them, in tensors of fixed shape that it writes to in place."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from coldpress.attend.functions import sdpa
from coldpress.attend.one_token import attend_blocks

__all__ = ["DensePart", "Part", "RaggedPart", "Sight", "of_segments", "stays_in_place", "whole_blocks"]

_SLOTS = 64  # buffers are whole multiples of this, so that texts of similar lengths share a compiled step


def whole_blocks(n: int) -> int:
    """``n`` slots or a few more."""
    return -(-n // _SLOTS) * _SLOTS


def stays_in_place(buffer: Tensor) -> None:
    """Tell torch.compile that a buffer keeps its address, so that a graph on CUDA writes to it in place.

    For a buffer at another address, of another cache or after a move, the graph is recorded again. With a guard, which
    older versions of torch take by default, the whole step would be compiled again, and at most eight times.
    """
    if buffer.device.type == "cuda":
        torch._dynamo.mark_static_address(buffer, guard=False)


def of_segments(sinks: Tensor | None, queries: Tensor) -> Tensor | None:
    """Sinks ``[Hq]`` as ``queries [S, G, D]`` have their heads, float32 ``[S, G]``."""
    if sinks is None:
        return None
    n_segments, group, _ = queries.shape
    return sinks.float().expand(n_segments * group // len(sinks), -1).reshape(n_segments, group)


class Sight(NamedTuple):
    """What the token of a step sees of the slots in use, where it does not see them all as they are.

    Attributes:
        bias: float32, added to the logits, minus infinity where a slot is hidden: ``[B or 1, Hkv or 1, C]``; of a
            ragged part as it has its slots, ``[N, n_slots]``; of a packed one ``[S, n]``, in the order of its pairs.
        positions: int32, likewise, of each slot, those to come included, where there is a window.
        oldest: int32 ``[B or 1, 1, 1]``: positions up to this one are out of the window.
    """

    bias: Tensor | None = None
    positions: Tensor | None = None
    oldest: Tensor | None = None


class DensePart(NamedTuple):
    """Keys ``[B, Hkv, C, D]`` and values ``[B, Hkv, C, Dv]``, and the slot of the new token, int64 ``[1]``."""

    keys: Tensor
    values: Tensor
    at: Tensor

    def going_to(self, at: Tensor) -> DensePart:
        return self._replace(at=at)

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, keys)
        self.values.index_copy_(2, self.at, values)
        return self.keys, self.values

    def bias(self, sight: Sight) -> Tensor:
        """Of the logits, float32 ``[B or 1, Hkv or 1, 1, C]``."""
        slot = torch.arange(self.keys.shape[2], device=self.keys.device)
        is_hidden = (slot > self.at)[None, None]
        if sight.positions is not None and sight.oldest is not None:
            is_hidden = is_hidden | (sight.positions <= sight.oldest)
        bias = torch.zeros(is_hidden.shape, device=slot.device) if sight.bias is None else sight.bias
        return bias.masked_fill(is_hidden, -torch.inf)[:, :, None]

    def attend(
        self, query: Tensor, sight: Sight, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        assert softcap is None and sinks is None  # the model's own attention knows them
        return sdpa(None, query, self.keys, self.values, self.bias(sight), scaling, 0.0)[0]


class RaggedPart(NamedTuple):
    """Segments of different lengths, in N blocks of slots.

    Attributes:
        keys, values: ``[N * n_slots, D]``, ``[N * n_slots, Dv]``.
        at: int64 ``[S]``, the slot of each segment's new pair.
        segment, first: int64 ``[N]``, which segment each block belongs to, and its first slot.
        n_slots: of a block.
    """

    keys: Tensor
    values: Tensor
    at: Tensor
    segment: Tensor
    first: Tensor
    n_slots: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, at: Tensor, blocks: tuple[Tensor, Tensor], n_slots: int) -> RaggedPart:
        """A part whose number of blocks is a variable of the compiled step: hardly two layers have the same."""
        for tensor in (keys, values, *blocks):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return cls(keys, values, at, *blocks, n_slots)

    def going_to(self, at: Tensor) -> RaggedPart:
        return self._replace(at=at)

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(0, self.at, keys.reshape(-1, keys.shape[3]))
        self.values.index_copy_(0, self.at, values.reshape(-1, values.shape[3]))
        return keys, values

    def attend(
        self, query: Tensor, sight: Sight, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        n_slots = self.n_slots
        n_used = self.at.index_select(0, self.segment) + 1 - self.first
        bias = sight.bias
        if bias is not None:
            is_empty = torch.arange(n_slots, device=bias.device) >= n_used[:, None]
            bias = bias.masked_fill(is_empty, -torch.inf)
        queries = query.reshape(self.at.shape[0], -1, query.shape[3])
        own = of_segments(sinks, queries)
        output = attend_blocks(
            queries, self.keys, self.values, self.segment, n_used, n_slots, scaling, bias, softcap, own
        )
        return output.reshape(query.shape[0], 1, query.shape[1], -1)


class Part(Protocol):
    """What a compiled step has of a layer: a named tuple of tensors, and of numbers that are the same in each step."""

    @property
    def keys(self) -> Tensor:
        """The buffer of the keys."""

    def going_to(self, at: Tensor) -> Part:
        """The same, with these slots for the new pairs."""

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pair ``[B, Hkv, 1, D]`` of one token for each head; keys and values for the model to hand on."""

    def attend(
        self, query: Tensor, sight: Sight, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of ``query [B, Hq, 1, D]``: ``[B, 1, Hq, Dv]``.

        Args:
            softcap: logits x are softcap * tanh(x / softcap).
            sinks: ``[Hq]``, a logit of each head that takes weight from the pairs.
        """
