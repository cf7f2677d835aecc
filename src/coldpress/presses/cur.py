"""CUR: large keys and large values, compared with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView
from coldpress.errors import PressError, nearest

_Leverage = Literal["key", "value", "kv_avg", "kv_product"]
_RANDOM_DIMENSIONS = 20


@register("cur")
@dataclass(frozen=True)
class CURPress(ScorerPress):
    """Keep the tokens whose keys and values are large in their neighbourhood: an estimate of their leverage.

    l(x)[t] = ||x[t]||_2^2, divided by its mean over t's window of local_window_size tokens (the last one shorter) with
    use_local_approximation. score[b, h, t] = l(k)[t] * l(v)[t], or as leverage_type says l(k)[t], l(v)[t] or their
    mean, divided by the sum over the head's tokens; in float32. Sinks are protected.

    Source: Sengupta et al. 2025, arXiv:2509.15038, algorithm 1. Differs from the paper: the local approximation (as in
    kvpress, which divides by sums, so that tokens of a short last window get too much); the random projection is a
    function of the seed.

    Needs: keys and values. Cost: O(T * D) per layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        num_sinks: first tokens that are kept.
        leverage_type: "kv_product", "kv_avg", "key" or "value".
        use_random_leverage: take the norms of 20 random projections instead of those of all dimensions.
        use_local_approximation: compare tokens within windows.
        local_window_size: tokens of a window, at least 1.
        seed: random projections are a function of it and the layer.
    """

    num_sinks: int = 4
    leverage_type: _Leverage = "kv_product"
    use_random_leverage: bool = False
    use_local_approximation: bool = True
    local_window_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "num_sinks", "seed")
        check_at_least(self, 1, "local_window_size")
        if self.leverage_type not in get_args(_Leverage):
            known = get_args(_Leverage)
            raise PressError(
                f"CURPress: leverage_type must be one of {', '.join(known)}, got {self.leverage_type!r}."
                f"{nearest(str(self.leverage_type), known)}"
            )

    def score(self, view: LayerView) -> Tensor:
        key, value = (self._leverage(view, states.float()) for states in (view.keys, view.values))
        scores = {
            "key": lambda: key,
            "value": lambda: value,
            "kv_avg": lambda: (key + value) / 2,
            "kv_product": lambda: key * value,
        }[self.leverage_type]()
        return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.num_sinks, 0

    def _leverage(self, view: LayerView, states: Tensor) -> Tensor:
        if self.use_random_leverage:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + view.layer_idx) % 2**63)
            projection = torch.randn(states.shape[3], _RANDOM_DIMENSIONS, generator=generator)
            states = states @ projection.to(states.device) / _RANDOM_DIMENSIONS**0.5
        squares = states.norm(dim=-1).square()  # [B, Hkv, T]
        if not self.use_local_approximation:
            return squares
        size = self.local_window_size
        n_whole = squares.shape[-1] // size * size
        windows = [squares[..., :n_whole].unflatten(-1, (-1, size)), squares[..., None, n_whole:]]  # [B, Hkv, n, size]
        tiny = torch.finfo(torch.float32).tiny
        parts = [part / part.mean(-1, keepdim=True).clamp(min=tiny) for part in windows if part.numel()]
        return torch.cat([part.flatten(-2) for part in parts], dim=-1)
