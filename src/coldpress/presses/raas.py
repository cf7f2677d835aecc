"""RaaS: tokens that a query has looked at not long ago, and the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coldpress.bases.checks import check_between
from coldpress.bases.observer import ObserverPress
from coldpress.bases.registry import register
from coldpress.core.column import PINNED, Column
from coldpress.core.forced import forced, positions_of
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.decoding import CompressionRatioDecodingPress


@dataclass(frozen=True)
class RaaSPress(ObserverPress):
    """Keep the prompt, and of what comes after it the tokens that were looked at last.

    With A[q, t] the attention (softmax in float32) of query q to token t as the cache was then, mean over the group's
    heads: the timestamp of t is the position of the last query with A[q, t] > alpha, or its own where there is none.
    The oldest timestamps go; of tokens with the same one, those that came first. score[b, h, t] is the rank of t among
    the pairs of all heads of its layer by timestamp, then by position.

    For DecodingPress(RaaSPress(), target_size=..., compression_interval=...), where target_size has to be more than the
    prompt, or what another press has left of it. The prompt is what the first call brings, or coldpress.prefill in
    pieces; with keep_prompt=False it competes with the rest, which is how the name decoding_raas is registered, whose
    budget is a share of the text. Alone on a prompt, with keep_prompt=False, it keeps what late queries looked at.

    Source: Hu et al. 2025, arXiv:2502.11147, section 3: timestamps, alpha and the prompt that stays. Differs from the
    paper: single tokens and not pages of them; all weights are looked at, not those of representative keys; the heads
    of a group share a timestamp; newest tokens stay, and first ones where the prompt need not.

    Needs: keys and the queries of every call. Cost: one int32 and one bool for each pair; O(T * T * D) per query head
    for the prompt; for every token after it another pass over the stored keys, O(held * D) per query head, whether it
    is cut back then or not.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_sink: first tokens that stay.
        grace: newest tokens that stay.
        alpha: a weight above it renews the timestamp, in [0, 1].
        keep_prompt: nothing of the prompt is evicted.
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("looked_at", -1, torch.int32), Column("prompt", False, torch.bool))

    alpha: float = 1e-4
    keep_prompt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, "alpha")

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        last = torch.maximum(view.columns["looked_at"], positions_of(view).int())
        for at, weights in self.weights(view):
            seen = torch.where(weights > self.alpha, at[:, None].int(), -1).amax(2)  # [B, Hkv, T']
            n = seen.shape[2]
            last[..., :n] = torch.maximum(last[..., :n], seen)
        prompt = view.columns["prompt"]
        return {"looked_at": last, "prompt": torch.ones_like(prompt) if self.is_prompt(view) else prompt}

    def score(self, view: LayerView) -> Tensor:
        if self.keep_prompt and self.is_prompt(view):
            raise PressError(
                f"RaaSPress keeps the prompt, all {view.n_tokens} tokens of it: use DecodingPress(RaaSPress(), "
                "target_size=...), or give keep_prompt=False."
            )
        if view.whole is not None:  # heads are compared with each other
            row, head = view.row_head
            return self._ranks(view.whole)[row : row + 1, head : head + 1, : view.n_tokens]
        return self._ranks(view)

    def _ranks(self, view: LayerView) -> Tensor:
        """How many pairs of a row's layer have an earlier timestamp, or the same and an earlier position."""

        def compute() -> Tensor:
            at = positions_of(view)
            order = (self.state(view)["looked_at"].long() * (view.end + 1) + at).masked_fill(at < 0, -1).flatten(1)
            return torch.searchsorted(order.sort(-1).values, order).view(view.keys.shape[:3]).float()

        return view.once((self.with_ratio(0.0), "ranks"), compute)

    def pins(self, view: LayerView) -> Tensor | None:
        if not self.keep_prompt or self.is_prompt(view):  # what another press has evicted of the prompt is gone
            return None
        return view.columns["prompt"] & (positions_of(view) >= 0)

    def forced(self, view: LayerView, n_keep: int) -> Tensor:
        if self.keep_prompt and PINNED in view.columns:
            n_most = int(forced(view, self.protected(view)).sum(-1).max())
            if n_most > n_keep:
                raise PressError(
                    f"RaaSPress keeps the prompt: {int(view.columns[PINNED].sum(-1).max())} tokens of it, pinned ones "
                    f"among them, and the newest {self.grace} are {n_most} that must stay, and the budget keeps "
                    f"{n_keep} of each head: keep {n_most} or more, compress the prompt by another press before "
                    "(PrefillDecodingPress), or give keep_prompt=False."
                )
        return super().forced(view, n_keep)


register("decoding_raas", BoundaryPress, RaaSPress, compression_interval=64, keep_prompt=False)(
    CompressionRatioDecodingPress
)
