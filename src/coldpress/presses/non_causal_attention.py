"""NonCausalAttn: what each token receives from its neighbours on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView
from coldpress.errors import PressError


@register("non_causal_attention")
@dataclass(frozen=True)
class NonCausalAttnPress(ScorerPress):
    """Keep the tokens that the tokens around them, earlier and later ones, attend to.

    The text is cut in chunks of chunk_size tokens, the last one shorter. With A[q, t] = softmax over the t of q's
    chunk of q . k[t], unscaled and in float32: s[t] = mean over the group's heads of (sum over the q of t's chunk of
    A[q, t]) * ||v[t]||_2, pooled by a mean of 3 with zero padding, and score[b, h, t] = (s[t] - mean) / std over the
    head's tokens.

    Source: the attention part of Compactor, Chari and Van Durme 2025, arXiv:2507.08143. Differs from the paper: as in
    its authors' press for kvpress, logits are not scaled and scores are pooled; the last chunk is attended by itself
    and the z-score is taken per head (kvpress pads the chunk, and takes one z-score over rows, heads and tokens).

    Needs: keys, values and all queries. Cost: O(chunk_size * T * D) per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        chunk_size: tokens of a chunk, at least 1.
    """

    needs_all_queries = True
    can_rechoose = False

    chunk_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "chunk_size")

    def score(self, view: LayerView) -> Tensor:
        if view.n_queries < view.n_tokens:
            raise PressError("NonCausalAttnPress needs the queries of all tokens: compress the whole prompt at once.")
        keys, queries = view.keys, view.queries.unflatten(1, (-1, view.group_size))  # [B, Hkv, G, T, D]
        sums = []
        for start in range(0, view.n_tokens, self.chunk_size):
            part = slice(start, start + self.chunk_size)
            rows = queries[:, :, :, part].float()  # a group shares its keys: one product, no copies of them
            logits = rows.flatten(2, 3) @ keys[:, :, part].float().transpose(-1, -2)
            sums.append(logits.view(*rows.shape[:4], -1).softmax(-1).sum(-2).mean(2))
        weighted = torch.cat(sums, dim=-1) * view.value_norms()
        return standardized(avg_pool1d(weighted, 3, 1, 1))


def standardized(scores: Tensor) -> Tensor:
    """``scores`` ``[B, Hkv, T]`` with mean 0 and standard deviation 1 in each head; 0 where they are all equal."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    std = centred.square().mean(dim=-1, keepdim=True).sqrt()  # Tensor.std takes several times as long on a CPU
    is_flat = std <= 1e-5 * scores.abs().amax(dim=-1, keepdim=True)  # rounding, which must not be blown up to scores
    return (centred / std.clamp(min=torch.finfo(std.dtype).tiny)).masked_fill(is_flat, 0.0)
