"""H2O: the heavy hitters, which have received the most attention so far, and the newest tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coldpress.bases.checks import check_between, check_share
from coldpress.bases.observer import ObserverPress
from coldpress.bases.registry import register
from coldpress.core.column import Column
from coldpress.core.counts import share_of
from coldpress.core.forced import positions_of
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.decoding import CompressionRatioDecodingPress


@register("h2o")
@dataclass(frozen=True)
class H2OPress(ObserverPress):
    """Keep the tokens that have received the most attention since they came, the first ones and the newest.

    With A[q, t] the attention (softmax in float32) of query q to token t as the cache was then, mean over the group's
    heads: sum[t] = sum over q >= t of A[q, t] * decay^a(q), where a(q) is how many tokens have come after q, those of
    the prompt not counted. So the prompt's queries count alike until something is generated, and without eviction and
    decay sum[t] is a column sum of the full attention. score[b, h, t] = sum[t], or sum[t] divided by the number of
    queries since t came (by_lifetime).

    The published rule, H2OPress(n_sink=0, grace=0, recent_ratio=0.5, decay=1.0), favours age: a new token has a sum of
    0, so what was kept first stays, and what comes goes. Decay and grace, which are on by default, cure this; so does
    by_lifetime with decay=1.0.

    Works on a prompt alone, and as DecodingPress(H2OPress(), target_size=1024, compression_interval=64).

    Source: Zhang et al. 2023, arXiv:2306.14048, section 4 and algorithm 1. Differs from the paper: decay, first tokens
    and a fixed number of newest ones that stay, as above; the heads of a group share a sum; each head evicts for itself
    and for real, and the budget is given, not a share of the prompt.

    Needs: keys and the queries of every call. Cost: one float32 for each pair; O(T * T * D) per query head for the
    prompt; for every token after it another pass over the stored keys, O(held * D) per query head, whether it is cut
    back then or not.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_sink: first tokens that stay.
        grace: newest tokens that stay. A budget that has no room for these and one more pair shrinks them.
        recent_ratio: share of what is kept that is newest, in [0, 1]; the larger of this and grace holds.
        decay: what all sums are multiplied with for each token after the prompt, in (0, 1]; 1: they are not.
        by_lifetime: divide by the number of queries since the token came; wants decay=1.0.
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("received"),)
    estimates_attention = True

    recent_ratio: float = 0.0
    decay: float = 0.98
    by_lifetime: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, "recent_ratio")
        check_share(self, "decay")
        name = type(self).__name__
        if self.by_lifetime and self.decay != 1:
            raise PressError(
                f"{name}: by_lifetime and decay={self.decay!r} both make up for age; give by_lifetime decay=1.0."
            )

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.n_sink, max(self.grace, share_of(self.keep(view), self.recent_ratio))

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        name, decay = self.columns[0].name, 1.0 if self.is_prompt(view) else self.decay
        return {name: view.columns[name] * decay**view.n_queries + self.received(view, decay)}

    def received(self, view: LayerView, decay: float) -> Tensor:
        """What each key gets from the queries of this call, each decayed by those after it: ``[B, Hkv, T]``."""
        if decay == 1 or view.n_queries == 1:
            return view.attention_column_sums()
        total = torch.zeros_like(view.keys[..., 0], dtype=torch.float32)
        for at, weights in self.weights(view):
            fading = decay ** (view.end - 1 - at)
            total[..., : weights.shape[-1]] += (weights * fading[:, None]).sum(2)
        return total

    def score(self, view: LayerView) -> Tensor:
        received = self.state(view)[self.columns[0].name]
        return received / (view.end - positions_of(view)) if self.by_lifetime else received


register("decoding_h2o", BoundaryPress, H2OPress, compression_interval=64)(CompressionRatioDecodingPress)
