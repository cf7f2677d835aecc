"""Merging: what is evicted goes into the pair that is most like it, which then counts for as many tokens.

A press that stores something else than what the model made. ``Kept.bias`` is added to the logits of a pair: with ln m
it weighs as much in the softmax as m pairs with its key. Around any press that chooses which pairs are kept::

    PressedCache(MassMergingPress(SnapKVPress(0.5)))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coldpress import Kept, LayerView, WrapperPress
from coldpress.core.requirements import CHOICE


@dataclass(frozen=True)
class MassMergingPress(WrapperPress):
    """Keep what the inner press keeps, and merge each evicted pair into the kept one with the most similar key.

    A pair that stands for m tokens has the mean of their keys and of their values, and ln m is added to its logits. So
    m pairs that are equal, merged into one, give the attention of all m. Pairs that are less alike are dropped.
    Source: the mean is D2O's, Wan et al. 2024, arXiv:2406.13035, section 3.3; ln m is that of token merging, Bolya et
    al. 2022, arXiv:2210.09461, section 3. Needs: what the inner press needs. Cost: O(T * kept * D) per head.

    Args:
        press: chooses which pairs are kept.
        least: smallest cosine of two keys that are merged.
    """

    per_head_independent = True
    needs_inside = CHOICE
    changes = frozenset({"keys", "values"})
    least: float = 0.5

    def compress(self, view: LayerView) -> Kept | None:
        kept = self.press.compress(view)
        if kept is None:
            return None
        cosines = normalize(view.keys.float(), dim=-1) @ normalize(kept.keys.float(), dim=-1).mT  # [B, Hkv, T, n]
        token, into = torch.arange(view.n_tokens, device=cosines.device), kept.positions[:, :, None]
        cosines = cosines.masked_fill(into < 0, -torch.inf).masked_fill(token[:, None] == into, torch.inf)
        similar, nearest = cosines.max(-1)  # [B, Hkv, T]; of a kept pair, itself
        mass = view.columns["bias"].exp() if "bias" in view.columns else torch.ones_like(similar)
        mass = mass * (similar >= self.least)
        mass = (mass if view.positions is None else mass * (view.positions >= 0))[..., None]

        def sums(states: Tensor) -> Tensor:
            total = torch.zeros(*kept.positions.shape, states.shape[-1], device=states.device)
            return total.scatter_add(2, nearest[..., None].expand_as(states), states)

        m = sums(mass).clamp(min=1)
        keys, values = (sums(mass * states.float()) / m for states in (view.keys, view.values))
        return kept._replace(keys=keys.to(kept.keys.dtype), values=values.to(kept.values.dtype), bias=m[..., 0].log())
