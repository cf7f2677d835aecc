"""WindowPress: what the newest tokens' queries say of the older ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.scorer import ScorerPress
from coldpress.core.forced import ends
from coldpress.core.view import LayerView

__all__ = ["WindowPress"]


@dataclass(frozen=True)
class WindowPress(ScorerPress):
    """A scorer whose last tokens score the older ones and are kept themselves.

    A text that is no longer than window_size is scored by its later half. A budget that is smaller than the window
    shrinks the part that is kept in any case to half of the budget; the others then compete by their own scores.

    Args:
        window_size: last tokens that score the others and are kept, at least 1.
    """

    window_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "window_size")

    def protected(self, view: LayerView) -> tuple[int, int]:
        return 0, self.window(view)

    def window(self, view: LayerView) -> int:
        """How many of the last tokens score the others, at least 1."""
        window = self.window_size if view.n_tokens > self.window_size else max(1, view.n_tokens // 2)
        return min(window, view.n_queries)

    def older(self, view: LayerView) -> Tensor:
        """Which tokens came before the window: bool ``[B or 1, Hkv or 1, T]``."""
        is_older = ~ends(view, (0, self.window(view)))
        return is_older if view.positions is None else is_older & (view.positions >= 0)

    def weights(self, view: LayerView, logits: Tensor) -> Tensor:
        """Softmax of logits ``[B, Hkv, window, T]`` over the older tokens alone; for the window, over all tokens."""
        is_older = self.older(view)[:, :, None]
        apart = logits.masked_fill(~is_older, -torch.inf).softmax(-1)
        return torch.where(is_older, apart, logits.softmax(-1)).nan_to_num(0.0)  # a query may see nothing
