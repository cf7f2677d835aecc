"""BlockPress: the budget is never exceeded by more than a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import select
from coldpress.core.forced import as_far_as, must_keep
from coldpress.core.pick import column_at
from coldpress.core.requirements import SCORER
from coldpress.core.view import LayerView
from coldpress.presses.keydiff import KeyDiffPress


@register("block_keydiff", KeyDiffPress)
@dataclass(frozen=True)
class BlockPress(WrapperPress):
    """Keep what survives when the text arrives block by block and the budget is restored after each block.

    With n the number that the inner press keeps: the first n tokens are kept; then, for each block of block_size
    tokens, the inner press scores what is kept together with the block, and keeps the n best. It sees the queries
    of the block, as it would if the blocks came one after the other, and keys at their own positions.

    Source: Park et al. 2025, arXiv:2504.15364, section 3.3 (block prompt processing). Differs from the paper: the
    prompt's attention is computed at once, so evicted tokens have been seen by later ones, and memory is freed at the
    end; PressedCache(press, chunk_tokens=block_size) with the press inside is the paper's.

    Needs: what the inner press needs. Cost: of the inner press on n + block_size tokens, (T - n) / block_size times.

    Args:
        press: the scorer inside, with the compression ratio; one that needs no more queries than a block's.
        block_size: tokens of a block, at least 1.
    """

    can_rechoose = False
    needs_inside = (*SCORER, "queries_of_a_block")

    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "block_size")

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        n_tokens, protected = view.n_tokens, self.protected(view)
        text = torch.arange(n_tokens, device=view.keys.device).expand(view.keys.shape[:3])
        kept = text[..., :n_keep]
        for start in range(n_keep, n_tokens, self.block_size):
            stop = min(start + self.block_size, n_tokens)
            candidates = torch.cat([kept, text[..., start:stop]], dim=-1)
            then = view.among(candidates, stop, stop - start)
            assert then.positions is not None
            both = must_keep(then.positions, then.end, protected, n_keep, n_gone=view.first_position)
            stays = as_far_as(column_at(must.expand(text.shape), candidates), both, n_keep)
            kept = candidates.gather(2, select(self.scores(then), n_keep, stays))
        return kept
