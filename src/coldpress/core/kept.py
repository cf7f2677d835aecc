"""Kept: what a press keeps of a view; Place: where a layer stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from coldpress.core.choice import unpack
from coldpress.errors import PressError

__all__ = ["Kept", "Place", "checked_kept"]


class Kept(NamedTuple):
    """What a press keeps of a view.

    Attributes:
        keys, values: ``[B, Hkv, n, D]``, ``[B, Hkv, n, Dv]``.
        positions: int64 ``[B, Hkv, n]``, ascending positions in the view; -1 in the last places of a head that keeps
            fewer.
        carry: float32 ``[B, Hkv, n]`` or None, a number that each of them brings along: ``carried`` of later views.
        channels: int64 ``[B, Hkv, d]``, ascending, or None: the stored channels of the keys.
        n_wide: with channels, how many of each head's last keys are stored with all channels.
        rounding_residual: ``[B, Hkv, m, Drot]`` in the keys' dtype or None: float32 key minus stored key, of the first
            m keys, which were rotated more precisely than they can be stored.
        bias: float32 ``[B, Hkv, n]`` or None, added to the logits of each: ln m where a pair stands for m of them. What
            earlier pairs have is unchanged, unless this replaces it.
        columns: what else each of them carries, by name, ``[B, Hkv, n, ...]``: ``columns`` of later views.
        references: views that ``choose_together`` is given back by ``layer.references``, once the prefill is over.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    carry: Tensor | None = None
    channels: Tensor | None = None
    n_wide: int = 0
    rounding_residual: Tensor | None = None
    columns: Mapping[str, Tensor] = MappingProxyType({})
    bias: Tensor | None = None
    references: Sequence[Any] = ()


def checked_kept(press: object, kept: object, pinned: Tensor | None = None) -> Kept | None:
    """What ``compress`` returned.

    Args:
        pinned: bool ``[B, Hkv, T]``, tokens of the view that have to be kept; None if there are none.

    Raises:
        PressError: it does not say which pairs are kept, or leaves out one that is pinned.
    """
    if kept is None:
        return None
    if isinstance(kept, Kept):
        if pinned is not None:
            lost = int((pinned & ~unpack(kept.positions, pinned.shape[2])).sum())
            if lost:
                raise PressError(
                    f"{type(press).__name__} evicts {lost} pairs of pinned tokens: it chooses in its own way and knows "
                    "no pins. Use a scorer such as SnapKVPress, or a cache without pin=."
                )
        return kept
    raise PressError(
        f"{type(press).__name__}.compress returned a {type(kept).__name__}, and has to return view.take(positions), or "
        "None to keep everything."
    )


class Place(NamedTuple):
    """Where a layer stands, and what a token costs there: what a budget may depend on.

    Attributes:
        layer_idx, n_layers: this layer among the layers that are compressed, counted from 0.
        token_bytes: keys and values of one token of one row, in all heads of the layer, as the model made them.
        stored_bytes: of n pairs of every head of the layer, of one row, as the cache stores them; None: n times
            ``token_bytes``.
    """

    layer_idx: int
    n_layers: int
    token_bytes: int
    stored_bytes: Callable[[int], int] | None = None

    def n_within(self, n_bytes: int, n_tokens: int) -> int:
        """How many of ``n_tokens`` pairs every head can keep so that all layers take at most ``n_bytes``; 0 if none."""
        if self.stored_bytes is None:
            return min(n_tokens, n_bytes // (self.n_layers * self.token_bytes))
        return next((n for n in range(n_tokens, 0, -1) if self.n_layers * self.stored_bytes(n) <= n_bytes), 0)
