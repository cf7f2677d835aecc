"""KeyDiff: keys that differ from the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView


@register("keydiff")
@dataclass(frozen=True)
class KeyDiffPress(ScorerPress):
    """Keep the keys that are least similar to the mean direction of all keys.

    score[b, h, t] = -cos(k[b, h, t], mean over s of k[b, h, s] / ||k[b, h, s]||), in float32.

    Source: Park et al. 2025, arXiv:2504.15364, section 3.3. Differs from the paper: applied once to the whole prompt,
    not block by block, unless the cache has chunk_tokens.

    Needs: keys. Cost: O(T * D) per layer.
    """

    def score(self, view: LayerView) -> Tensor:
        keys = view.keys.float()  # [B, Hkv, T, D]
        inverse = 1 / keys.norm(dim=-1).clamp(min=1e-12)
        anchor = normalize(inverse[:, :, None] @ keys, dim=-1)  # [B, Hkv, 1, D]: of the mean, whose length is no matter
        return (keys @ -anchor.transpose(-1, -2)).squeeze(-1) * inverse
