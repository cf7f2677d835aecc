"""StreamingLLM: the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLMPress(ScorerPress):
    """Keep the first ``n_sink`` tokens, which serve as attention sinks, and the most recent ones.

    score[b, h, t] = t, with the first n_sink tokens protected.

    Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2. Differs from the paper: applied once to the prompt,
    or with chunk_tokens after each piece of it, where the paper evicts token by token; kept tokens keep their
    positions.

    Needs: positions. Cost: O(T) per layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_sink: first tokens that are always kept.
    """

    n_sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "n_sink")

    def score(self, view: LayerView) -> Tensor:
        recency = torch.arange(view.n_tokens, dtype=torch.float32, device=view.keys.device)
        return recency.expand(view.keys.shape[:3])

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.n_sink, min(1, view.n_tokens)
