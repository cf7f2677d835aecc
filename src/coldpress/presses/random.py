"""Random: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView


@register("random")
@dataclass(frozen=True)
class RandomPress(ScorerPress):
    """Keep tokens drawn at random, independently for every layer and head.

    score[b, h, t] = u[layer, h, t], uniform in [0, 1) and the same for all rows, so that a row of a batch keeps what
    it keeps alone.

    Source: none; a baseline.

    Needs: nothing. Cost: O(T) per layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        seed: draws are a function of it, the layer, the number of tokens and the position of the first one; None takes
            a new seed for every cache from torch's default generator, so ``torch.manual_seed`` repeats those too.
    """

    per_head_independent = False

    seed: int | None = None

    @property
    def draws(self) -> bool:
        return self.seed is None

    def score(self, view: LayerView) -> Tensor:
        seed = view.seed if self.seed is None else self.seed
        _, head = view.row_head
        seed = (seed * 1_000_003 + view.first_position * 1_009 + view.layer_idx + head * 10_007) % 2**63
        generator = torch.Generator().manual_seed(seed)
        n_batch, n_heads, n_tokens = view.keys.shape[:3]
        draws = torch.rand(n_heads, n_tokens, generator=generator)
        return draws.to(view.keys.device).expand(n_batch, -1, -1)
