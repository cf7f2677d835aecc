"""SnapKV: what the last window of tokens attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView
from coldpress.errors import PressError


@register("snapkv")
@dataclass(frozen=True)
class SnapKVPress(ScorerPress):
    """Keep the tokens that the last ``window_size`` tokens attend to, and those last tokens themselves.

    With A[q, t] the attention (softmax in float32) of window query q to token t:
    score[b, h, t] = mean over the group's heads of avgpool(mean over q of A[q, t]) for t before the window, pooled
    along t with zero padding, and mean over the group's heads and q of A[q, t], not pooled, for t in the window. The
    window is protected, so its scores matter only when the budget is smaller than the window.

    Source: Li et al. 2024, arXiv:2404.14469, section 4. Differs from the paper: pooling by mean instead of maximum (as
    in kvpress); a prompt no longer than the window is scored by its later half; a budget below the window shrinks the
    protected part to half of the budget.

    Needs: keys and the window's queries. Cost: O(window_size * T * D) per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        window_size: last tokens that score the others and are kept, at least 1.
        kernel_size: width of the pooling in tokens, odd.
    """

    estimates_attention = True

    window_size: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "window_size", "kernel_size")
        if self.kernel_size % 2 == 0:
            raise PressError(f"{type(self).__name__}: kernel_size must be odd, got {self.kernel_size}.")

    def score(self, view: LayerView) -> Tensor:
        window = self._window(view)
        attention = view.window_attention(window).mean(dim=3)  # [B, Hkv, G, T]
        before, inside = attention.split([view.n_tokens - window, window], dim=-1)
        if before.shape[-1]:
            before = avg_pool1d(before.flatten(1, 2), self.kernel_size, 1, self.kernel_size // 2).view_as(before)
        return torch.cat([before, inside], dim=-1).mean(dim=2)

    def protected(self, view: LayerView) -> tuple[int, int]:
        return 0, self._window(view)

    def _window(self, view: LayerView) -> int:
        window = self.window_size if view.n_tokens > self.window_size else max(1, view.n_tokens // 2)
        return min(window, view.n_queries)
