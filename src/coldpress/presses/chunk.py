"""ChunkPress: the same share of every stretch of the text."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import best, checked, pack, protect
from coldpress.core.counts import spread_forced
from coldpress.core.forced import as_far_as, ends
from coldpress.core.view import LayerView
from coldpress.presses.snapkv import SnapKVPress


@register("chunk_snapkv", SnapKVPress)
@dataclass(frozen=True)
class ChunkPress(WrapperPress):
    """Keep the same share of every chunk of the text, each chunk scored by itself.

    The text is cut in chunks of chunk_length tokens, the last one shorter. The inner press scores each chunk as if it
    were the whole text, but at its own positions. The layer's budget is spread over the chunks in proportion to their
    unprotected tokens; what the inner press protects in the text is kept, and what it protects in a chunk is kept as
    far as the chunk's budget goes.

    Source: kvpress's ChunkPress, https://github.com/NVIDIA/kvpress; no paper. Differs from kvpress: counts add up to
    the ratio that was asked for; queries of a chunk are taken at their own positions.

    Needs: what the inner press needs. Cost: of the inner press on texts of chunk_length tokens: linear in T.

    Args:
        press: the scorer inside, with the compression ratio.
        chunk_length: tokens of a chunk, at least 1.
    """

    can_rechoose = False

    chunk_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "chunk_length")

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        must = must.expand(view.keys.shape[:3])
        cuts, is_kept = [*range(0, view.n_tokens, self.chunk_length), view.n_tokens], torch.zeros_like(must)
        for (start, stop), counts in zip(itertools.pairwise(cuts), spread_forced(n_keep, must, cuts), strict=True):
            if counts.any():
                chunk = view.part(start, stop)
                own = ends(chunk, self.protected(chunk), max(1, int(counts.min())))
                own = as_far_as(must[..., start:stop], own, counts)
                is_kept[..., start:stop] = best(protect(checked(self.scores(chunk)), own), counts)
        return pack(is_kept)
