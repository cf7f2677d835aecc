"""SimLayerKV: layers that look at both ends of the text only keep both ends only."""

from __future__ import annotations

from dataclasses import dataclass

from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.press import BasePress
from coldpress.bases.registry import register
from coldpress.core.choice import pack
from coldpress.core.forced import ends, forced
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView
from coldpress.errors import PressError


@register("simlayerkv", lazy_threshold=0.9)
@dataclass(frozen=True)
class SimLayerKVPress(BasePress):
    """Keep the first and the recent tokens in the layers that attend to nothing else, and everything in the others.

    With E the first n_initial and the last n_recent tokens and A[q, t] the attention of query q to token t, a layer is
    lazy for a row if the mean over all heads and the last n_last queries of sum over t in E of A[q, t] is above
    lazy_threshold. A lazy layer keeps E. How much is removed depends on the text; ``PressedCache.achieved_ratio()``
    tells. The rows of a batch are judged, and freed, one by one. Thresholds
    that kvpress names: Llama 3 0.9, Llama 2 0.65, Mistral 0.8, Qwen 0.85. The registered name takes the most careful of
    them, 0.9; the class by itself removes nothing. Texts of up to n_initial + n_recent tokens are kept whole.

    Source: Zhang et al. 2024, arXiv:2410.13846, section 4. Differs from the paper: judged once, after the prompt.
    Differs from kvpress: exactly n_recent recent tokens are kept (kvpress keeps n_recent - n_last, and everything and
    one more when that is 0), and each row is judged by its own attention.

    Needs: keys and the last queries. Cost: O(n_last * T * D) per query head and layer.

    Args:
        lazy_threshold: share of the attention above which a layer is lazy, in [0, 1]; at 1 no layer is.
        n_last: last queries that are looked at, from 1 to n_recent.
        n_recent: last tokens that a lazy layer keeps, at least 1.
        n_initial: first tokens that a lazy layer keeps, at least 0.
    """

    per_layer = True

    lazy_threshold: float = 1.0
    n_last: int = 1
    n_recent: int = 1024
    n_initial: int = 4

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "lazy_threshold")
        check_at_least(self, 1, "n_last", "n_recent")
        check_at_least(self, 0, "n_initial")
        if self.n_last > self.n_recent:
            raise PressError(
                f"SimLayerKVPress: the n_last={self.n_last} queries that are looked at must be among the "
                f"n_recent={self.n_recent} tokens that are kept."
            )

    def compress(self, view: LayerView) -> Kept | None:
        both = self.n_initial, self.n_recent
        is_end = ends(view, both).expand(view.keys.shape[:3])[0, 0]  # [T]
        if self.lazy_threshold == 1 or is_end.all():
            return None
        attention = view.window_attention(min(self.n_last, view.n_queries)).mean(dim=(1, 2, 3))  # [B, T]
        is_lazy = attention[:, is_end].sum(-1) > self.lazy_threshold  # [B]
        if not is_lazy.any():
            return None
        is_kept = forced(view, both) | ~is_lazy[:, None, None]  # [B, 1 or Hkv, T]
        return view.take(pack(is_kept.expand(view.keys.shape[:3])))
