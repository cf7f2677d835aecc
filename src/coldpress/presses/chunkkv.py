"""ChunkKV: chunks of neighbouring tokens are kept or evicted together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import select
from coldpress.core.view import LayerView
from coldpress.presses.snapkv import SnapKVPress


@register("chunkkv", SnapKVPress)
@dataclass(frozen=True)
class ChunkKVPress(WrapperPress):
    """Keep the chunks of neighbouring tokens with the largest mean score, the same ones in every head of a layer.

    The text is cut in chunks of chunk_length tokens, the last one shorter; with s the scores of the inner press,
    score[b, h, t] = mean over the heads and over the unprotected tokens u of t's chunk of s[b, head, u].
    The last place of the budget rarely falls on the end of a chunk: of the last chunk that is kept its first tokens
    are, so that the ratio is the one asked for. Protected tokens are kept in any case.

    Source: Liu et al. 2025, arXiv:2502.00299, algorithm 1. Differs from the paper: any scorer; indices are not reused
    across layers; the last chunk may be kept in part (kvpress keeps whole chunks, and those of row 0 in every row).

    Needs: what the inner press needs. Cost: of the inner press.

    Args:
        press: the scorer inside, with the compression ratio.
        chunk_length: tokens of a chunk, at least 1.
    """

    can_rechoose = False
    per_head_independent = False

    chunk_length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "chunk_length")

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        n_tokens = view.n_tokens
        scores = self.scores(view).mean(dim=1)  # [B, T]
        chunk = torch.arange(n_tokens, device=scores.device) // self.chunk_length
        counted = (~must).all(dim=1).float()  # [B or 1, T]
        n_chunks = -(-n_tokens // self.chunk_length)
        sums = scores.new_zeros(scores.shape[0], n_chunks).index_add_(1, chunk, scores * counted)
        sizes = counted.new_zeros(counted.shape[0], n_chunks).index_add_(1, chunk, counted)
        by_chunk = (sums / sizes.clamp(min=1))[:, chunk]  # [B, T]; equal within a chunk, and the earlier one wins a tie
        return select(by_chunk[:, None].expand(view.keys.shape[:3]), n_keep, must)
