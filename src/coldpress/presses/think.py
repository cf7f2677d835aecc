"""ThinK: keys in fewer channels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import select
from coldpress.core.counts import keep_count
from coldpress.core.kept import Kept
from coldpress.core.ratio import check_ratio
from coldpress.core.requirements import PRESS
from coldpress.core.view import LayerView
from coldpress.presses.knorm import KnormPress
from coldpress.presses.snapkv import SnapKVPress


@register("think", key_channel_compression_ratio=0.4)
@register("snap_think", SnapKVPress, key_channel_compression_ratio=0.4)
@dataclass(frozen=True)
class ThinKPress(WrapperPress):
    """Keep of every key the channels that queries and keys use most; the last ``window_size`` keys are stored whole.

    Of the D channels of each KV head, the floor(D * (1 - key_channel_compression_ratio)) with the largest
    score[b, h, d] = mean over the group's heads and the last window_size queries of q[d]^2 * mean over the kept keys of
    k[d]^2 are kept, in float32, after rotation; the others count as 0. Memory is freed: the layer stores narrow keys,
    a list of channels for each head, full keys for the last window_size pairs of each head and for all next tokens, and
    widens the keys of one layer at a time for its attention. Values are unchanged, so the bytes freed are at most
    half of key_channel_compression_ratio; ``PressedCache.kv_bytes()`` counts them. The registered names remove 0.4 of
    the channels, as some of the paper's tables do; the class by itself removes none. ``think`` has no ratio, as
    the press inside it keeps every pair; the ratio of ``snap_think`` is SnapKV's.

    Source: Xu et al. 2024, arXiv:2407.21018, section 3.2 (equation 4). Differs from the paper: the number of channels
    is the same in every head. Differs from kvpress: memory is freed, and the last window_size keys are whole, as in
    the paper; ThinKPress(0.5, press=SnapKVPress(0.5)) is its ComposedPress([SnapKVPress(0.5), ThinKPress(0.5)]).

    Needs: keys and the window's queries, and what the press inside needs. Cost: O(T * D) per layer after the prefill,
    and O(T * D) copied per layer and decoding step.

    Args:
        key_channel_compression_ratio: fraction of the key channels to remove, in [0, 1).
        window_size: last tokens whose queries score the channels and whose keys are stored whole, at least 1.
        press: keyword only; the press that chooses which pairs are kept, with the compression ratio. By default one
            that keeps all.
    """

    can_rechoose = False
    needs_inside = (*PRESS, "channels")
    exact_at_0 = False

    press: ScorerPress = field(default_factory=KnormPress, kw_only=True)
    key_channel_compression_ratio: float = 0.0
    window_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.key_channel_compression_ratio, "key_channel_compression_ratio")
        check_at_least(self, 1, "window_size")

    @property
    def changes(self) -> frozenset[str]:
        return frozenset({"channels"} if self.key_channel_compression_ratio else ())

    def compress(self, view: LayerView) -> Kept | None:
        kept = self.press.compress(view)
        n_channels = view.keys.shape[3]
        n_kept = keep_count(n_channels, self.key_channel_compression_ratio)
        if n_kept == n_channels:
            return kept
        if kept is None:
            everything = torch.arange(view.n_tokens, device=view.keys.device)
            kept = Kept(view.keys, view.values, everything.expand(view.keys.shape[:3]), columns=view.columns)
        queries = view.queries[:, :, -self.window_size :].float().square().mean(dim=2)  # [B, Hq, D]
        by_head = queries.view(queries.shape[0], -1, view.group_size, n_channels).mean(dim=2)  # [B, Hkv, D]
        is_filled = (kept.positions >= 0)[..., None]
        keys = (kept.keys.float().square() * is_filled).sum(dim=2) / is_filled.sum(dim=2)
        return kept._replace(channels=select(by_head * keys, n_kept), n_wide=self.window_size)
