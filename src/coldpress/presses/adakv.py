"""AdaKV: the heads of a layer share its budget."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coldpress.bases.checks import check_between
from coldpress.bases.registry import register
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import select_counts
from coldpress.core.counts import adaptive_counts, share_of
from coldpress.core.view import LayerView
from coldpress.presses.expected_attention import ExpectedAttentionPress
from coldpress.presses.snapkv import SnapKVPress


@register("adakv_snapkv", SnapKVPress)
@register("adakv_expected_attention_e2", ExpectedAttentionPress, epsilon=1e-2)
@dataclass(frozen=True)
class AdaKVPress(WrapperPress):
    """Keep the best scores of a layer, whatever head they are in, and some of every head.

    With n the number that the inner press keeps of each head: every head keeps its floor(alpha_safeguard * n) best
    pairs and its protected ones; the rest of the layer's n * Hkv places go to the best scores left in any head. What is
    evicted is freed in every head, and attention goes by each head's own length.

    Source: Feng et al. 2024, arXiv:2407.11550, algorithm 1. Differs from the paper: any scorer; protected tokens count
    towards the budget, and every head has them. Scores should be comparable across heads, as attention weights are.

    Needs: what the inner press needs. Cost: of the inner press, and sorting the scores.

    Args:
        press: the scorer inside, with the compression ratio.
        alpha_safeguard: share of the mean budget that no head falls below, in [0, 1]; at 1 all heads keep the same.
    """

    per_head = True
    per_head_independent = False

    alpha_safeguard: float = 0.20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, "alpha_safeguard")

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        return select_counts(view.guard(self.scores(view), must), self.counts(view, n_keep, must))

    def counts(self, view: LayerView, n_keep: int, must: Tensor | None = None) -> Tensor:
        """How many pairs each head keeps, ``n_keep`` on average: int64 ``[B, Hkv]``.

        Args:
            must: those that are among them, as :meth:`chosen` takes it; None for what this press says by itself.
        """
        must = self.forced(view, n_keep) if must is None else must
        n_safe = max(share_of(n_keep, self.alpha_safeguard), int(must.sum(-1).max()))
        counts = adaptive_counts(view.guard(self.scores(view), must), n_keep, n_safe)
        return counts if view.counts is None else counts.minimum(view.counts)
