"""LeverageScore: keys that the other keys cannot stand in for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.pick import at_once
from coldpress.core.view import LayerView
from coldpress.presses.non_causal_attention import standardized


@register("leverage")
@dataclass(frozen=True)
class LeverageScorePress(ScorerPress):
    """Keep the keys with the largest statistical leverage: those that the other keys of the head do not explain.

    With X [T, m] the head's keys before rotation, minus their mean over the text, times a Gaussian matrix [D, m] of
    variance 1 / m where m = sketch_dimension < D (with m >= D, X is the centred keys themselves):
    l[t] = x[t]' (X'X + 0.01 I)^-1 x[t] and score[b, h, t] = (l[t] - mean) / std over the head's tokens.

    Source: the geometric part of Compactor, Chari and Van Durme 2025, arXiv:2507.08143. Differs from the paper: a
    Cholesky factor instead of a decomposition of X, and the ridge (as in its authors' press for kvpress); the z-score
    is per head and the sketch a function of the seed (kvpress draws a new one every time and takes one z-score over
    rows, heads and tokens).

    Needs: keys before rotation. Cost: O(T * D * m + T * m * m) per head and layer, partly in float64.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        sketch_dimension: m, at least 1.
        seed: the sketch is a function of it, the layer and the head.
    """

    per_head_independent = False

    sketch_dimension: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "sketch_dimension")
        check_at_least(self, 0, "seed")

    def score(self, view: LayerView) -> Tensor:
        keys = view.unrotated_keys()
        centred = keys - keys.mean(dim=2, keepdim=True)
        if self.sketch_dimension < keys.shape[3]:
            centred = centred @ self._sketch(view).to(keys.device)
        return standardized(leverage_scores(centred, 0.01))

    def _sketch(self, view: LayerView) -> Tensor:
        """``[Hkv, D, m]``, the same for all rows, so that a row of a batch keeps what it keeps alone."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + view.layer_idx) % 2**63)
        shape = (view.keys.shape[1], view.keys.shape[3], self.sketch_dimension)
        return torch.randn(shape, generator=generator) / self.sketch_dimension**0.5


def leverage_scores(rows: Tensor, ridge: float, weights: Tensor | None = None) -> Tensor:
    """x' (X'X + ridge I)^-1 x of every row x of X: float32 ``[..., T]`` for X ``[..., T, m]``.

    With ``weights`` ``[..., T]``, not negative, a row of X is the square root of its weight times the one in ``rows``.

    The matrix and its factor are in float64 where the device has it, so that keys of any size leave it positive
    definite.
    """
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    block = at_once(rows.device, 2 * rows[..., :1, :].numel())  # float64
    parts = rows.split(block, dim=-2)
    scale = [None] * len(parts) if weights is None else weights[..., None].split(block, dim=-2)
    gram = ridge * torch.eye(rows.shape[-1], dtype=dtype, device=rows.device)
    for part, weight in zip(parts, scale, strict=True):
        wide = part.to(dtype)
        gram = gram + (wide if weight is None else wide * weight).transpose(-1, -2) @ wide
    factor = torch.linalg.cholesky_ex(gram).L
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(rows.shape[-1], dtype=dtype, device=rows.device), upper=False
    )
    whiten = inverse.transpose(-1, -2).float()
    scores = torch.cat([(part.float() @ whiten).square_().sum(-1) for part in parts], dim=-1)
    return scores if weights is None else scores * weights
