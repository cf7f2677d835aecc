"""Choosing among the pairs of all layers when the prefill is over: what presses with ``chooses_together`` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.bases.scorer import BudgetPress
from coldpress.cache.place import place_of_layer
from coldpress.core.choice import select_counts
from coldpress.core.counts import counts_together
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView

if TYPE_CHECKING:
    from coldpress.cache.pressed import PressedCache

__all__ = ["carrying", "keep_best"]

_Counts = Callable[[Sequence[Tensor], int, int], list[Tensor]]


def carrying(view: LayerView, scores: Tensor) -> Kept:
    """All pairs of ``view``, each with its score: float32 ``[B, Hkv, T]``, infinite where it must be kept."""
    slots = torch.arange(view.n_tokens, device=scores.device).expand(scores.shape)
    return Kept(view.keys, view.values, slots, scores, columns=view.columns)


def keep_best(press: BudgetPress, cache: PressedCache, counts: _Counts = counts_together) -> None:
    """Keep, of the layers whose pairs carry a score, the best ones: each row of the batch by itself.

    A row whose pairs carry none, because its budget takes all of them, keeps all.

    Args:
        press: says how many, mean over layers and heads.
        cache: stores all of the prefill.
        counts: how many pairs each head keeps, as :func:`coldpress.core.counts.counts_together`; given the scores by
            layer, ``[1, Hkv, T]``, the mean, and how many pairs of a head must be kept.
    """
    layers, carried = [], []
    for layer in cache.pressed_layers():
        if (own := layer.carried()) is not None:
            is_empty = layer.positions() < 0
            layers.append(layer)
            carried.append(own.masked_fill(own.isnan(), torch.inf).masked_fill(is_empty, -torch.inf))
    slots: list[list[Tensor]] = [[] for _ in layers]  # by layer, then by row: [Hkv, n]
    for row in range(len(carried[0]) if layers else 0):
        n_stored = int((layers[0].positions()[row, 0] >= 0).sum())  # in every head
        n_keep = press.keep_of(n_stored, place_of_layer(layers[0], 0, len(layers)))
        scores = [own[row : row + 1] for own in carried]
        n_must = max(int((own == torch.inf).sum(-1).max()) for own in scores)
        for of_layer, part, n in zip(slots, scores, counts(scores, n_keep, n_must), strict=True):
            of_layer.append(select_counts(part, n)[0])
    for layer, rows in zip(layers, slots, strict=True):
        longest = max(part.shape[1] for part in rows)
        layer.keep(torch.stack([pad(part, (0, longest - part.shape[1]), value=-1) for part in rows]))
