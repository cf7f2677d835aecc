"""A scorer: one number for each pair, larger means keep. All else (budgets, padding, storage) is done for it.

This one keeps large values behind keys that stand apart, after KeyDiff (Park et al. 2025, arXiv:2504.15364)::

    cache = PressedCache(DistinctPress(compression_ratio=0.5))
    model.generate(**inputs, cache=cache)

Once this file is imported, the name works too: ``make_press("distinct", 0.5)``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from coldpress import LayerView, ScorerPress, register


@register("distinct")
@dataclass(frozen=True)
class DistinctPress(ScorerPress):
    """Keep large values whose keys are unlike the others.

    score[b, h, t] = ||v[b, h, t]|| * (1 - cos(k[b, h, t], mean over s of k[b, h, s] / ||k[b, h, s]||)), in float32.
    Source: the cosine is KeyDiff's, Park et al. 2025, arXiv:2504.15364; the product is an example.
    Needs: keys and values. Cost: O(T * D) per layer.
    """

    per_head_independent = True

    def score(self, view: LayerView) -> Tensor:
        keys = normalize(view.keys.float(), dim=-1)  # [B, Hkv, T, D]
        mean = normalize(keys.mean(dim=2, keepdim=True), dim=-1)
        return view.value_norms() * (1 - (keys * mean).sum(-1))
