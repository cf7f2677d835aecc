"""CriticalKV: attention weights first, then what the values weigh behind the output projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_between
from coldpress.bases.registry import register
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import best, select, select_counts
from coldpress.core.counts import share_of
from coldpress.core.requirements import SCORER
from coldpress.core.view import LayerView
from coldpress.presses.adakv import AdaKVPress
from coldpress.presses.expected_attention import ExpectedAttentionPress
from coldpress.presses.snapkv import SnapKVPress


@register("critical_snapkv", SnapKVPress)
@register("critical_expected_attention", ExpectedAttentionPress, use_vnorm=False)
@dataclass(frozen=True)
class CriticalKVPress(WrapperPress):
    """Keep the pairs with the most attention, then those with the most attention times weight in the layer's output.

    With n the number that the inner press keeps of each head and s its scores:
    1. the floor(first_stage_ratio * n) pairs with the largest s are kept, the protected ones among them;
    2. the other places go to the largest (s[b, h, t] + epsilon) * mean over the group's heads of ||W_O v[b, h, t]||_1,
    W_O the slice of the output projection that belongs to the head.

    Source: Feng et al. 2025, arXiv:2502.03805, algorithm 1. Differs from the paper: any scorer that estimates
    attention; with grouped queries the norm is the mean over the group's heads (as in kvpress).

    Needs: what the inner press needs, values and the output projection. Cost: of the inner press, and
    O(T * D * hidden) per query head and layer.

    Args:
        press: the scorer inside, with the compression ratio; its scores must estimate attention, without a weight of
            the values.
        epsilon: added to the scores before they are weighted, at least 0.
        first_stage_ratio: share of the budget that goes by the scores alone, in [0, 1].
    """

    per_head_independent = False  # the output projection may be in parts
    needs_inside = (*SCORER, "attention")

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, math.inf, "epsilon")
        check_between(self, 0, 1, "first_stage_ratio")

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        first = share_of(n_keep, self.first_stage_ratio)
        scores = self.scores(view)
        weighted = (scores + self.epsilon) * view.projected_value_norms()
        return select(two_stages(view, scores, first, weighted, must), n_keep)


@register("critical_adakv_snapkv", SnapKVPress)
@register("critical_adakv_expected_attention", ExpectedAttentionPress, use_vnorm=False)
@dataclass(frozen=True)
class CriticalAdaKVPress(AdaKVPress):
    """Keep in each head as many pairs as AdaKV does, and choose them as CriticalKV does.

    The heads' budgets are those of AdaKVPress; within a head, the two stages of CriticalKVPress share its budget.

    Source: Feng et al. 2025, arXiv:2502.03805, algorithm 1, on the budgets of Feng et al. 2024, arXiv:2407.11550.
    Differs from the paper: as the two presses do. Budgets belong to each row of a batch, and the safeguard to the
    budget alone (kvpress adds the budgets of all rows, and keeps the safeguard's pairs whatever they weigh).

    Needs: what the inner press needs, values and the output projection. Cost: as CriticalKVPress.

    Args:
        press: the scorer inside, as for CriticalKVPress.
        alpha_safeguard: share of the mean budget that no head falls below, in [0, 1].
        epsilon: added to the scores before they are weighted, at least 0.
        first_stage_ratio: share of each head's budget that goes by the scores alone, in [0, 1].
    """

    needs_inside = (*SCORER, "attention")

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, math.inf, "epsilon")
        check_between(self, 0, 1, "first_stage_ratio")

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        counts = self.counts(view, n_keep, must)
        first = torch.tensor([[share_of(n, self.first_stage_ratio) for n in row] for row in counts.tolist()])
        scores = self.scores(view)
        weighted = (scores + self.epsilon) * view.projected_value_norms()
        return select_counts(two_stages(view, scores, first.to(counts.device), weighted, must), counts)


def two_stages(view: LayerView, scores: Tensor, first: int | Tensor, weighted: Tensor, must: Tensor) -> Tensor:
    """``weighted``, with the largest number there is at the ``first`` best ``scores``, and infinity where must be.

    Args:
        scores, weighted: float32 ``[B, Hkv, T]``.
        first: a number, or int64 ``[B, Hkv]``; tokens that must be kept are the first of them.
        must: bool ``[B or 1, Hkv or 1, T]``.
    """
    is_first = best(view.guard(scores, must), first)
    return view.guard(weighted.masked_fill(is_first, torch.finfo(weighted.dtype).max), must)
