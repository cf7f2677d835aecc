"""TOVA: what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView


@register("tova")
@dataclass(frozen=True)
class TOVAPress(ScorerPress):
    """Keep the tokens that the last token attends to most, the same ones in every head of a layer.

    score[b, h, t] = mean over all query heads of the attention of token T - 1 to token t, in float32; the last token
    is protected.

    Source: Oren et al. 2024, arXiv:2401.06104, section 3.3. Differs from the paper: applied once to the prompt.

    Needs: keys and the last query. Cost: O(T * D) per query head and layer.
    """

    per_head_independent = False
    estimates_attention = True

    def score(self, view: LayerView) -> Tensor:
        attention = view.window_attention(1)  # [B, Hkv, G, 1, T]
        return attention.mean(dim=(1, 2, 3))[:, None].expand(view.keys.shape[:3])

    def protected(self, view: LayerView) -> tuple[int, int]:
        return 0, 1
