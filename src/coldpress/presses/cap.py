"""Cap: values that add to what the kept ones can express, where queries look."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView
from coldpress.presses.leverage import leverage_scores


@register("cap")
@dataclass(frozen=True)
class CapPress(ScorerPress):
    """Keep the tokens that future queries look for and whose values the other values do not cover.

    With mu = R mean(q) the mean query before rotation (the first n_sink tokens left out), rotated by the mean of the
    next n_future_positions positions, and per query head, over the tokens after the sinks:
    w[t] = exp(tau * (cos(k[t], mu) - max over u of cos(k[u], mu))), A = I + sum over t of (w[t] + epsilon) v[t] v[t]'
    and score[b, h, t] = mean over the group's heads of w[t] * v[t]' A^-1 v[t]. Sinks are protected.

    Source: CapKV, arXiv:2604.25975. Differs from the paper: keys and mu are normalised, weights are relative to the
    largest, mu is rotated to the positions to come, and the values stand for the output's directions (all as in
    kvpress).

    Needs: keys, values, all queries before rotation. Cost: O(T * D * D), partly in float64, per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        tau: sharpness of the weights, at least 0.
        n_future_positions: how many positions ahead the rotation is averaged over, at least 1.
        n_sink: first tokens that are kept, and whose queries do not count.
        epsilon: added to the weights in A, at least 0.
    """

    tau: float = 5.0
    n_future_positions: int = 512
    n_sink: int = 4
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "n_future_positions")
        check_at_least(self, 0, "n_sink")
        check_between(self, 0, math.inf, "tau", "epsilon")

    def score(self, view: LayerView) -> Tensor:
        n_batch, n_kv_heads, n_tokens, dim = view.keys.shape
        n_sink = view.n_first(self.n_sink)
        if n_sink >= n_tokens:
            return torch.zeros(view.keys.shape[:3], device=view.keys.device)
        queries = view.unrotated_queries()  # [B, Hq, Q, D]
        skip = max(0, self.n_sink - (view.end - view.n_queries))
        mean = queries[:, :, skip if skip < view.n_queries else 0 :].mean(dim=2, keepdim=True)
        anchor = view.mean_future_rotation(mean, self.n_future_positions).view(n_batch, n_kv_heads, -1, dim)
        keys = view.keys[:, :, n_sink:].float()  # [B, Hkv, n, D]
        along = keys @ normalize(anchor, dim=-1).transpose(-1, -2)  # [B, Hkv, n, G]
        cosine = along.transpose(-1, -2) / keys.norm(dim=-1).clamp(min=1e-12)[:, :, None]
        weights = (self.tau * (cosine - cosine.amax(-1, keepdim=True))).exp()  # [B, Hkv, G, n]
        values = view.values[:, :, n_sink:]
        floored = (weights + self.epsilon).clamp(min=torch.finfo(torch.float32).tiny)
        covered = torch.stack([leverage_scores(values, 1.0, w) for w in floored.unbind(2)], dim=2)
        return pad((covered * weights / floored).mean(2), (n_sink, 0))

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.n_sink, 0
