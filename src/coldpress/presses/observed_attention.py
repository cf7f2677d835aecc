"""ObservedAttention: what each token received from all later ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView


@register("observed_attention")
@dataclass(frozen=True)
class ObservedAttentionPress(ScorerPress):
    """Keep the tokens that received the most attention over the prompt, per query that could see them.

    score[b, h, t] = mean over the group's heads of (sum over q >= t of A[q, t]) / (T - t), softmax in float32. The sums
    are taken block by block, so that no attention matrix is stored and no eager attention is needed.

    Source: the accumulated attention of H2O, Zhang et al. 2023, arXiv:2306.14048, section 4.1. Differs from the paper:
    applied once to the prompt, divided by the number of queries (as in kvpress), no recent tokens protected.

    Needs: keys and all queries. Cost: O(T * T * D) per query head and layer.
    """

    estimates_attention = True
    can_rechoose = False

    def score(self, view: LayerView) -> Tensor:
        sums = view.attention_column_sums()  # [B, Hkv, T]
        seen_by = torch.arange(view.n_tokens, 0, -1, device=sums.device).clamp(max=view.n_queries)
        return sums / seen_by
