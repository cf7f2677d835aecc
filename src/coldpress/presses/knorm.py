"""Knorm: small keys first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView


@register("knorm")
@dataclass(frozen=True)
class KnormPress(ScorerPress):
    """Keep the keys with the smallest L2 norm: they tend to receive the most attention.

    score[b, h, t] = -||k[b, h, t]||_2, in float32.

    Source: Devoto et al. 2024, arXiv:2406.11430, section 3. Differs from the paper: no layers are skipped.

    Needs: keys. Cost: O(T * D) per layer.
    """

    pointwise = True

    def score(self, view: LayerView) -> Tensor:
        return -view.keys.float().norm(dim=-1)
