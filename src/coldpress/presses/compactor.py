"""Compactor: leverage of the keys, blended with attention from both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView
from coldpress.presses.leverage import LeverageScorePress
from coldpress.presses.non_causal_attention import NonCausalAttnPress


@register("compactor")
@dataclass(frozen=True)
class CompactorPress(ScorerPress):
    """Keep the tokens that stand out among the keys or that their neighbours attend to.

    score[b, h, t] = blending * LeverageScorePress's score + NonCausalAttnPress's score, both of the text without its
    first sink_size_start and last sink_size_end tokens; those are protected, and score as the best of the others.

    Source: Chari and Van Durme 2025, arXiv:2507.08143. Differs from the paper: as the two presses do; the blending
    defaults to the compression ratio, as in its authors' press for kvpress; no calibration of the ratio.

    Needs: keys, keys before rotation, values and all queries. Cost: the sum of the two presses'.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        sink_size_start: first tokens that are kept.
        sink_size_end: last tokens that are kept.
        chunk_size: as for NonCausalAttnPress.
        sketch_dimension: as for LeverageScorePress.
        blending: weight of the leverage, at least 0; None takes the compression ratio.
        seed: as for LeverageScorePress.
    """

    per_head_independent = False
    needs_all_queries = True
    can_rechoose = False

    sink_size_start: int = 8
    sink_size_end: int = 4
    chunk_size: int = 256
    sketch_dimension: int = 48
    blending: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "sink_size_start", "sink_size_end", "seed")
        check_at_least(self, 1, "chunk_size", "sketch_dimension")
        if self.blending is not None:
            check_between(self, 0, math.inf, "blending")

    def score(self, view: LayerView) -> Tensor:
        start = view.n_first(self.sink_size_start)
        end = min(self.sink_size_end, view.n_tokens - start)
        middle = view.part(start, view.n_tokens - end)
        if not middle.n_tokens:
            return view.keys.new_zeros(view.keys.shape[:3]).float()
        leverage = LeverageScorePress(sketch_dimension=self.sketch_dimension, seed=self.seed).scores(middle)
        attention = NonCausalAttnPress(chunk_size=self.chunk_size).scores(middle)
        blending = self.compression_ratio if self.blending is None else self.blending
        scores = blending * leverage + attention
        best = scores.amax(dim=-1, keepdim=True)
        return pad(scores - best, (start, end)) + best

    def scores(self, view: LayerView) -> Tensor:
        return self.score(view)  # depends on the ratio; its two parts are computed once

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.sink_size_start, self.sink_size_end
