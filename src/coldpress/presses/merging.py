"""Merging: the value of an evicted pair is folded into its nearest kept pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coldpress.bases.checks import check_between
from coldpress.bases.registry import register
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import unpack
from coldpress.core.counts import share_of
from coldpress.core.kept import Kept
from coldpress.core.requirements import CHOICE
from coldpress.core.view import LayerView
from coldpress.presses.snapkv import SnapKVPress

_BLOCK_ELEMENTS = 1 << 22  # similarities in memory at once (16 MiB in float32)


@register("merging_snapkv", SnapKVPress)
@dataclass(frozen=True)
class MergingPress(WrapperPress):
    """Fold values of evicted pairs into those of their nearest kept pairs: on SmolLM2 worse than the inner press alone.

    Around SnapKV the mean KL is higher than SnapKV's at each ratio there, and much the same on a small GPT-NeoX
    (docs/leaderboard.md).

    The nearest kept pair of an evicted pair e is the one t of the same head whose key has the largest cosine with e's.
    With w_e = max(0, cos(k_e, k_t)) * ||v_e|| / (||v_e|| + ||v_t||), in float32,
    v_t' = (v_t + sum over the e of t of w_e v_e) / (1 + sum of w_e).
    Keys and positions are unchanged. Of each head's evicted pairs the floor(merge_fraction * n) with the largest
    cosines are merged, and of these the ones with a cosine of at least similarity_threshold; the others are dropped.

    Source: kvpress's MergingPress, https://github.com/NVIDIA/kvpress, after Wan et al. 2024, arXiv:2406.13035, section
    3.3, and Bolya et al. 2022, arXiv:2210.09461. Differs from kvpress: any press that chooses which pairs are kept, of
    each head its own number too; similarities are computed block by block.

    Needs: what the inner press needs, keys and values. Cost: of the inner press, and O(evicted * kept * D) per head.

    Args:
        press: any press that chooses which pairs are kept, with the compression ratio.
        similarity_threshold: smallest cosine of keys that are merged, in [0, 1].
        merge_fraction: share of the evicted pairs that may be merged, in [0, 1].
    """

    can_rechoose = False
    changes = frozenset({"values"})
    needs_inside = CHOICE

    similarity_threshold: float = 0.0
    merge_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, "similarity_threshold", "merge_fraction")

    def compress(self, view: LayerView) -> Kept | None:
        kept = self.press.compress(view)
        return None if kept is None else kept._replace(values=self._merged(view, kept)[0])

    def _merged(self, view: LayerView, kept: Kept) -> tuple[Tensor, Tensor]:
        """The values of ``kept`` with those of the evicted pairs folded in, and 1 + sum of w_e of each."""
        evicted, is_real = _evicted(view, kept)  # [B, Hkv, E]
        values = view.values.gather(2, evicted[..., None].expand(-1, -1, -1, view.values.shape[3])).float()
        cosines, nearest = _nearest(view, kept, evicted)
        cosines = cosines.masked_fill(~is_real, -torch.inf)
        limits = [[share_of(n, self.merge_fraction) for n in row] for row in is_real.sum(-1).tolist()]
        rank = cosines.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        is_merged = rank < torch.tensor(limits, device=rank.device)[..., None]
        is_merged &= cosines >= self.similarity_threshold
        own_norms = values.norm(dim=-1)
        norms = own_norms + kept.values.float().norm(dim=-1).gather(2, nearest)
        weights = torch.where(is_merged & (norms > 0), cosines * own_norms / norms, 0.0)  # [B, Hkv, E]
        total = kept.values.float().scatter_add(2, nearest[..., None].expand_as(values), weights[..., None] * values)
        sums = torch.ones_like(total[..., 0]).scatter_add(2, nearest, weights)
        return (total / sums[..., None]).to(kept.values.dtype), sums


@register("mass_merging_snapkv", SnapKVPress)
@dataclass(frozen=True)
class MassMergingPress(MergingPress):
    """Merge as MergingPress does, with weights in the softmax: worse than the inner press alone at 0.9 and above.

    ln(1 + sum of w_e) is added to the logits of each kept pair, with the w_e of MergingPress: a pair that another one
    just like it was merged into (w_e = 1/2, where their values are as long) weighs 3/2. Around SnapKV the mean
    KL is a little lower than SnapKV's at 0.5 and 0.75, and higher at 0.9 and 0.95 (docs/leaderboard.md).

    Source: MergingPress, with the bias of token merging, Bolya et al. 2022, arXiv:2210.09461, section 3, where ln of
    the number of merged tokens is added. Differs from it: each counts with the weight that its value has.

    Needs: what the inner press needs, keys and values. Cost: as MergingPress, and one number more for each pair.

    Args:
        press, similarity_threshold, merge_fraction: as for MergingPress.
    """

    adds_bytes = 4

    def compress(self, view: LayerView) -> Kept | None:
        kept = self.press.compress(view)
        if kept is None:
            return None
        values, sums = self._merged(view, kept)
        return kept._replace(values=values, bias=sums.log())


def _evicted(view: LayerView, kept: Kept) -> tuple[Tensor, Tensor]:
    """Positions of the pairs that are not in ``kept``, int64 ``[B, Hkv, E]``, and where a head has that many: bool."""
    is_kept = unpack(kept.positions, view.n_tokens)
    counts = (~is_kept).sum(-1)  # [B, Hkv]
    evicted = is_kept.int().argsort(dim=-1, stable=True)[..., : int(counts.max())]
    return evicted, torch.arange(evicted.shape[-1], device=evicted.device) < counts[..., None]


def _nearest(view: LayerView, kept: Kept, evicted: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine with the nearest kept key, float32 ``[B, Hkv, E]``, and which of the kept ones that is."""
    targets = normalize(kept.keys.float(), dim=-1).transpose(-1, -2)  # [B, Hkv, D, n]
    is_empty = (kept.positions < 0)[:, :, None]
    found = []
    for part in evicted.split(max(1, _BLOCK_ELEMENTS // kept.positions.numel()), dim=2):
        keys = view.keys.gather(2, part[..., None].expand(-1, -1, -1, view.keys.shape[3]))
        cosines = normalize(keys.float(), dim=-1) @ targets  # [B, Hkv, e, n]
        found.append(cosines.masked_fill_(is_empty, -torch.inf).max(dim=-1))
    return torch.cat([part.values for part in found], dim=2), torch.cat([part.indices for part in found], dim=2)
