"""Entropy-gated ChunkKV: chunks are kept whole only where their score is not the work of a token or two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.core.choice import select
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.chunkkv import ChunkKVPress
from coldpress.presses.snapkv import SnapKVPress


@register("entropy_gated_chunkkv", SnapKVPress)
@dataclass(frozen=True)
class EntropyGatedChunkKVPress(ChunkKVPress):
    """Keep the chunks of neighbouring tokens with the largest mean score, but of the spiky ones only the best tokens.

    With s[b, t] the mean of the inner press's scores over the heads, and over the unprotected tokens of each chunk:
    score = mean of s; p = s / sum of s, after adding -min(s) where that is negative; entropy = -sum p ln p / ln(number
    of tokens), 1 if all s are equal, 0 for a single token. A chunk is spiky if its score is at least the median of the
    row's chunks and its entropy is below their median (the lower one of two middle ones). Chunks are taken by
    decreasing score, spiky ones with their low_entropy_chunk_length best tokens only, the last chunk with as many of
    its best as there is room for; what room is left goes to the best tokens of all. Protected tokens are kept in any
    case. All heads of a layer keep the same tokens.

    Source: kvpress's EntropyGatedChunkKVPress, https://github.com/NVIDIA/kvpress, on Liu et al. 2025,
    arXiv:2502.00299. Differs from kvpress: every row chooses for itself; protected tokens are left out of the chunks'
    scores; equal scores are no spike.

    Needs: what the inner press needs. Cost: of the inner press, and sorting the scores.

    Args:
        press: the scorer inside, with the compression ratio.
        chunk_length: tokens of a chunk, more than low_entropy_chunk_length.
        low_entropy_chunk_length: tokens that are kept of a spiky chunk, at least 1.
    """

    chunk_length: int = 10
    low_entropy_chunk_length: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "low_entropy_chunk_length")
        if self.chunk_length <= self.low_entropy_chunk_length:
            raise PressError(
                f"EntropyGatedChunkKVPress: low_entropy_chunk_length={self.low_entropy_chunk_length} must be less than "
                f"chunk_length={self.chunk_length}."
            )

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        n_tokens = view.n_tokens
        scores = self.scores(view).mean(dim=1)  # [B, T]
        device, n_chunks = scores.device, -(-n_tokens // self.chunk_length)
        counts = (~must).all(dim=1)  # [B or 1, T]
        means, entropies = self._statistics(scores, counts, n_chunks)  # [B, C]; NaN where no token counts
        is_spiky = (means >= means.nanmedian(-1, keepdim=True).values) & (
            entropies < entropies.nanmedian(-1, keepdim=True).values
        )
        quota = torch.where(is_spiky, self.low_entropy_chunk_length, self.chunk_length)  # [B, C]
        chunk = torch.arange(n_tokens, device=device) // self.chunk_length  # [T]
        chunk_rank = _ranks(means.nan_to_num(-math.inf))[:, chunk]  # [B, T], 0 is best
        rank = _ranks(scores.masked_fill(~counts, -math.inf))  # [B, T]
        by_chunk = _ranks(-(chunk * n_tokens + rank))  # chunk after chunk, the best token of each first
        is_taken = by_chunk - chunk * self.chunk_length < quota[:, chunk]
        order = torch.where(is_taken, chunk_rank * n_tokens + rank, n_chunks * n_tokens + rank)
        best_first = -_ranks(-order).float()[:, None]  # [B, 1, T], exact up to 2 ** 24 tokens
        return select(best_first.expand(view.keys.shape[:3]), n_keep, must)

    def _statistics(self, scores: Tensor, counts: Tensor, n_chunks: int) -> tuple[Tensor, Tensor]:
        """Mean and normalised entropy of every chunk, of the tokens that count: float32 ``[B, C]``."""
        padding = n_chunks * self.chunk_length - scores.shape[1]
        inside = torch.nn.functional.pad(counts, (0, padding)).unflatten(1, (n_chunks, -1))  # [B or 1, C, L]
        parts = torch.nn.functional.pad(scores, (0, padding)).unflatten(1, (n_chunks, -1))  # [B, C, L]
        size = inside.sum(-1)  # [B or 1, C]
        means = (parts * inside).sum(-1) / size
        shift = parts.masked_fill(~inside, math.inf).amin(-1, keepdim=True).clamp(max=0)
        weights = (parts - shift) * inside
        total = weights.sum(-1, keepdim=True)
        p = torch.where(total > 0, weights / total, inside / size[..., None])
        entropies = torch.special.entr(p).sum(-1) / size.clamp(min=2).log()
        return means, entropies.masked_fill(size == 0, math.nan)


def _ranks(values: Tensor) -> Tensor:
    """How many entries of the last dimension are larger, or equal and earlier: int64."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(-1)
