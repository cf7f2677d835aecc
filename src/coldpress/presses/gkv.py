"""G-KV: attention of the newest tokens, and what is left of that of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coldpress.bases.checks import check_between
from coldpress.bases.registry import register
from coldpress.bases.window import WindowPress
from coldpress.core.column import Column
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.decoding import CompressionRatioDecodingPress
from coldpress.presses.rkv import redundancy

_SCORE = Column("global_score", fill=-1.0)  # below every score: of a token that has none yet


@register("gkv")
@dataclass(frozen=True)
class GKVPress(WindowPress):
    """Keep what the window attends to, or what earlier windows did, the less the longer ago.

    With A[g, q, t] the attention (softmax in float32 over all tokens before q) of query head g of the group at window
    query q: s[t] = mean over q of max over g of A[g, q, t], divided by the head's largest s before the window. The
    group's probabilities are reduced, by their maximum. Each time that pairs are evicted, F[t] = max(decay * F[t],
    s[t]), and those that are kept carry their F on; one that came since, or was in the window then, has s[t] alone.
    score[b, h, t] = F[t], or lam * F[t] - (1 - lam) * R[t] / max R with R the redundancy of RKVPress. The window is
    protected.

    Source: Liao et al. 2025, arXiv:2512.00504, section 3. Differs from the paper: attention is worked out at the cut; a
    text no longer than the window is scored by its later half; redundancy is that of RKVPress.

    Needs: keys and the window's queries. Cost: O(window_size * T * D) per query head and layer, one float32 for each
    pair; with redundancy as RKVPress.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        window_size: last tokens that score the others and are kept, at least 1.
        decay: what is left of a score from one eviction to the next, in [0, 1]; at 0 the window alone counts.
        fusion: "max", "mean", decay * F + (1 - decay) * s, or "sum", decay * F + s.
        lam: weight of F, in [0, 1]; the redundancy has the rest, and none by default. The paper's is 0.5.
        threshold: cosine above which two keys are alike.
    """

    columns: ClassVar[tuple[Column, ...]] = (_SCORE,)

    decay: float = 0.8
    fusion: str = "max"
    lam: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, "decay", "lam")
        check_between(self, -1, 1, "threshold")
        if self.fusion not in ("max", "mean", "sum"):
            raise PressError(f"GKVPress: fusion must be 'max', 'mean' or 'sum', got {self.fusion!r}.")

    def score(self, view: LayerView) -> Tensor:
        scores = self.global_scores(view)
        if self.lam == 1:
            return scores
        alike = redundancy(view.keys, self.threshold)
        return self.lam * scores - (1 - self.lam) * alike / alike.amax(-1, keepdim=True)

    def renew(self, view: LayerView) -> Mapping[str, Tensor]:
        return {_SCORE.name: self.global_scores(view).masked_fill(~self.older(view), _SCORE.fill)}

    def global_scores(self, view: LayerView) -> Tensor:
        """F of every token: float32 ``[B, Hkv, T]``."""
        now = view.window_attention(self.window(view)).amax(2).mean(2)
        most = now.masked_fill(~self.older(view), 0.0).amax(-1, keepdim=True)
        now = now / most.clamp(min=torch.finfo(torch.float32).tiny)
        before = view.columns.get(_SCORE.name)
        if before is None:
            return now
        if self.fusion == "max":
            return torch.maximum(self.decay * before, now)
        if self.fusion == "sum":
            return self.decay * before.clamp(min=0) + now
        return torch.where(before < 0, now, self.decay * before + (1 - self.decay) * now)


register("decoding_gkv", BoundaryPress, GKVPress, compression_interval=64)(CompressionRatioDecodingPress)
