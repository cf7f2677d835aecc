"""ExpectedAttention: what queries to come will attend to, if they are distributed like those seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.pick import at_once
from coldpress.core.view import LayerView
from coldpress.errors import PressError


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttentionPress(ScorerPress):
    """Keep the tokens that future queries are expected to attend to, weighted by the norm of their values.

    With mu and Sigma the mean and covariance over tokens of the queries before rotation (the first n_sink tokens left
    out), and R the mean rotation of the next n_future_positions positions:
    p[t] = softmax over t of (k[t] . R mu * s + k[t]' R Sigma R' k[t] * s**2 / 2), s the attention's scaling, and
    score[b, h, t] = (mean over the group's heads of p[t] + epsilon) * ||v[b, h, t]||_2, in float32. Sinks are
    protected.

    Source: Devoto et al. 2025, arXiv:2510.00636, section 3. Differs from the paper: a uniform budget over heads; wrap
    it in a head-wise budget for the paper's. Differs from kvpress: the sinks are part of the softmax, as in the paper.

    Needs: keys, values, all queries before rotation. Cost: O(T * D * D) per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_future_positions: how many positions ahead the rotation is averaged over, at least 1.
        n_sink: first tokens that are kept, and whose queries do not count.
        use_covariance: use the term with Sigma.
        use_vnorm: weight by the norm of the values.
        epsilon: added to p before weighting.
    """

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "n_future_positions")
        check_at_least(self, 0, "n_sink")
        if not 0 <= self.epsilon < math.inf:
            raise PressError(f"ExpectedAttentionPress: epsilon must be a finite number >= 0, got {self.epsilon!r}.")

    @property
    def estimates_attention(self) -> bool:
        return not self.use_vnorm

    def statistics(self, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """Mean ``[B or 1, Hq, 1, D]`` and covariance ``[B or 1, Hq, D, D]`` of queries before rotation, in float32."""
        queries = view.unrotated_queries()  # [B, Hq, Q, D]
        skip = max(0, self.n_sink - (view.end - view.n_queries))
        if skip < view.n_queries:
            queries = queries[:, :, skip:]
        mean = queries.mean(dim=2, keepdim=True)
        return mean, _covariance(queries, mean) if self.use_covariance else None

    def score(self, view: LayerView) -> Tensor:
        mean, covariance = self.statistics(view)
        n_kv_heads, keys = view.keys.shape[1], view.keys.float()
        ahead = view.mean_future_rotation(mean, self.n_future_positions).squeeze(2).unflatten(1, (n_kv_heads, -1))
        logits = (keys @ ahead.transpose(-1, -2)).transpose(-1, -2) * view.scaling  # [B, Hkv, G, T]
        if covariance is not None:
            half = view.mean_future_rotation(covariance, self.n_future_positions)  # Sigma R'
            covariance = view.mean_future_rotation(half.transpose(-1, -2), self.n_future_positions)  # R Sigma R'
            by_head = covariance.unflatten(1, (n_kv_heads, -1)).unbind(2)
            spread = torch.stack([_quadratic(keys, matrix) for matrix in by_head], dim=2)
            logits = logits + spread * (view.scaling**2 / 2)
        expected = logits.softmax(dim=-1).mean(dim=2)  # [B, Hkv, T]
        if self.use_vnorm:
            expected = (expected + self.epsilon) * view.value_norms()
        return expected

    def protected(self, view: LayerView) -> tuple[int, int]:
        return min(self.n_sink, view.n_tokens), 0


def _covariance(states: Tensor, mean: Tensor) -> Tensor:
    """Covariance ``[B, H, D, D]`` over the tokens of ``[B, H, T, D]`` with mean ``[B, H, 1, D]``."""
    total = torch.zeros(*states.shape[:2], states.shape[3], states.shape[3], device=states.device)
    for part in _parts(states):
        centred = part - mean
        total = total + centred.transpose(-1, -2) @ centred
    return total / states.shape[2]


def _quadratic(states: Tensor, matrix: Tensor) -> Tensor:
    """x' M x for every x of ``[B, H, T, D]`` and M of ``[B, H, D, D]``: ``[B, H, T]``."""
    return torch.cat([((part @ matrix) * part).sum(-1) for part in _parts(states)], dim=-1)


def _parts(states: Tensor) -> Sequence[Tensor]:
    return states.split(at_once(states.device, states[:, :, :1].numel()), dim=2)
