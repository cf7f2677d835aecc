"""H2O: keep the heavy hitters, which have received the most attention so far, and the newest tokens.

A scorer with a state: a column of numbers that follows each pair wherever it goes. ``observe`` is shown every call and
adds what its queries gave; ``score`` reads the sums. So the same class compresses a prompt, and a text that goes on::

    PressedCache(H2OPress(0.5))
    PressedCache(DecodingPress(H2OPress(), target_size=1024, compression_interval=64))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coldpress import Column, LayerView, ScorerPress


@dataclass(frozen=True)
class H2OPress(ScorerPress):
    """Keep what has received the most attention since it came, and the newest tokens.

    score[b, h, t] = sum over all queries q >= t so far of A[q, t], mean over the group's heads, softmax in float32.
    Source: Zhang et al. 2023, arXiv:2306.14048, algorithm 1. Differs from the paper: heads of a group share a sum; the
    number of newest tokens that stay is given, and not half of the budget.
    Needs: keys and all queries. Cost: O(T * T * D) per query head for the prompt, O(held * D) per token after it.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        grace: newest tokens that stay, at least 1: sums favour age, and a token that just came has none.
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("received"),)
    estimates_attention = True
    per_head_independent = True

    grace: int = 16

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        return {"received": view.columns["received"] + view.attention_column_sums()}

    def score(self, view: LayerView) -> Tensor:
        return view.columns["received"]

    def protected(self, view: LayerView) -> tuple[int, int]:
        return 0, self.grace
