"""MorphKV: what any of the newest tokens attends to, among the older ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coldpress.bases.registry import register
from coldpress.bases.window import WindowPress
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.decoding import CompressionRatioDecodingPress


@register("morphkv")
@dataclass(frozen=True)
class MorphKVPress(WindowPress):
    """Keep the newest tokens, and the older ones that any of the newest attends to.

    With s[g, q, t] the attention logit of query head g of the group, at window query q, for key t, in float32:
    score[b, h, t] = max (or sum) over q of the softmax over the tokens before the window of sum over g of s[g, q, t].
    The group's logits are added before the softmax. Scores of the window itself, which is protected, are weights among
    all tokens; they matter only when the budget is smaller than the window.

    Source: Ghadia et al. 2025, arXiv:2503.00979, section 3. Differs from the paper: inside DecodingPress the cache is
    cut back every compression_interval tokens, and not at every step; logits of the last queries are worked out at the
    cut, over the keys that are left, and not remembered from the steps; a text no longer than the window is scored by
    its later half. The authors' code cuts back when the cache is longer than its size by a given share.

    Needs: keys and the window's queries. Cost: O(window_size * T * D) per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        window_size: last tokens that score the others and are kept, at least 1; the paper ran 200 for 4,000 pairs.
            Inside DecodingPress, hidden_states_buffer_size of these at most, as no more queries are stored.
        fusion: "max" or "sum", over the window's queries.
    """

    estimates_attention = True

    window_size: int = 32
    fusion: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in ("max", "sum"):
            raise PressError(f"MorphKVPress: fusion must be 'max' or 'sum', got {self.fusion!r}.")

    def score(self, view: LayerView) -> Tensor:
        logits = view.window_logits(self.window(view)).sum(2)  # [B, Hkv, window, T]
        weights = self.weights(view, logits)
        return weights.amax(2) if self.fusion == "max" else weights.sum(2)


register("decoding_morphkv", BoundaryPress, MorphKVPress, compression_interval=64)(CompressionRatioDecodingPress)
