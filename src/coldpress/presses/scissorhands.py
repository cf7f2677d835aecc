"""Scissorhands: tokens that few of the last queries have passed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.observer import ObserverPress
from coldpress.bases.registry import register
from coldpress.core.column import Column
from coldpress.core.forced import positions_of
from coldpress.core.view import LayerView
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.decoding import CompressionRatioDecodingPress

_BITS = 64  # queries in a word


@dataclass(frozen=True)
class ScissorhandsPress(ObserverPress):
    """Keep the tokens to which the fewest of the last queries gave less than an even share.

    With A[q, t] the attention (softmax in float32) of query q to token t as the cache was then, mean over the group's
    heads, and n[q] how many tokens q saw: score[b, h, t] = -(number of the last ``history`` queries q >= t with
    A[q, t] < 1 / n[q]). Of tokens with equal numbers the newer one stays. A token that just came has few queries that
    could have passed it over, and so stays for a while by itself.

    Works on a prompt alone, and as DecodingPress(ScissorhandsPress(), target_size=..., compression_interval=...). The
    paper drops half of a budget of 2 n at once: target_size=n, compression_interval=n.

    Source: Liu et al. 2023, arXiv:2305.17118, algorithm 2: the count of weights below 1 / t over a history of queries,
    the highest counts that go, and newest tokens that stay (grace). Differs from the paper: n[q] is what is held and
    not the length of the text; the heads of a group share a count; first tokens stay; ties, which it leaves open; all
    layers have one budget; the history is 64 queries, where it reads several hundred.

    Needs: keys and the queries of every call. Cost: 8 bytes for each pair and 64 queries of history;
    O(history * T * D) per query head for the prompt; for every token after it another pass over the stored keys,
    O(held * D) per query head, whether it is cut back then or not.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_sink: first tokens that stay.
        grace: newest tokens that stay.
        history: queries that are counted, at least 1.
    """

    history: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "history")

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]
        """One bit for each of the last queries, in the place that its position has modulo ``history``."""
        return (Column("passed_over", 0, torch.int64, -(-self.history // _BITS)),)

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        n = min(view.n_queries, self.history)
        at = torch.arange(view.end - n, view.end, device=view.keys.device)
        low = self._passed_over(view, at).long()  # [B, Hkv, n, T]
        words = view.columns["passed_over"].clone()
        place = at % self.history
        for word in range(words.shape[3]):
            own = place // _BITS == word
            bit = torch.bitwise_left_shift(torch.ones_like(at), place % _BITS)[own]
            words[..., word] &= ~bit.sum()
            words[..., word] |= (low[:, :, own] * bit[:, None]).sum(2)
        return {"passed_over": words}

    def _passed_over(self, view: LayerView, at: Tensor) -> Tensor:
        """Which keys the last queries, at positions ``at [n]``, saw and gave less than an even share."""
        n, key_at = len(at), positions_of(view)[:, :, None]
        if n == 1:
            weights = view.attention_column_sums(1)[:, :, None]
        else:
            weights = view.window_attention(n).mean(2)
        sees = (key_at <= at[:, None]) & (key_at >= 0)  # [B or 1, Hkv or 1, n, T]
        if view.sliding_window is not None:
            sees = sees & (key_at > at[:, None] - view.sliding_window)
        return sees & (weights * sees.sum(-1, keepdim=True) < 1)

    def score(self, view: LayerView) -> Tensor:
        counts = _ones(self.state(view)["passed_over"]).sum(-1).float()
        newer = torch.arange(view.n_tokens, device=counts.device) / (2 * view.n_tokens)  # slots, not positions: these
        return newer - counts  # grow until float32 tells them apart no more; less than a half decides among equals


def _ones(words: Tensor) -> Tensor:
    """How many bits of each int64 are set: in pairs, in fours, in bytes, and all bytes together in the highest."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56) & 0xFF


register("decoding_scissorhands", BoundaryPress, ScissorhandsPress, compression_interval=64)(
    CompressionRatioDecodingPress
)
