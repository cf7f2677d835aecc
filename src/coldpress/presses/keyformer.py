"""Keyformer: H2O with Gumbel noise in what is summed, and a softmax that grows flatter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coldpress.bases.checks import check_between
from coldpress.bases.registry import register
from coldpress.core.column import Column
from coldpress.core.forced import positions_of
from coldpress.core.view import LayerView
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.decoding import CompressionRatioDecodingPress
from coldpress.presses.h2o import H2OPress

_QUERY, _KEY, _HEAD, _LAYER, _SEED = (  # odd numbers of 64 bits: what a draw depends on is mixed by them
    0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB,
)  # fmt: skip
_MIX = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 23  # of a draw; one more and the largest would be rounded to 1 in float32


@dataclass(frozen=True)
class KeyformerPress(H2OPress):
    """Keep the tokens with the largest sums of an attention with noise, the first ones and the newest.

    As H2OPress, with A[q, t] = softmax over t of (s[q, t] + noise * g[q, t]) / tau, where s are the attention logits
    and g is Gumbel noise, drawn anew for every query, key and head; tau = 1 for the queries of the prompt, and
    1 + tau_step * n for that of the n-th token after it. Noise gives tokens a chance that sums favour least, and a
    larger tau spreads what each query gives. A draw is a function of the seed, the layer, the head and the two
    positions, so that a row of a batch keeps what it keeps alone, and a prompt in pieces meets the same noise.

    The published rule is KeyformerPress(n_sink=0, grace=0, recent_ratio=0.3, decay=1.0). Without noise and with
    tau_step=0 it is H2O's with as many newest tokens.

    Source: Adnan et al. 2024, arXiv:2403.09054, section 3. Differs from the paper: decay, first tokens and a fixed
    number of newest ones that stay, as H2OPress has them; sums of each KV head, not of the whole batch; tau grows by a
    fixed step, whatever the length of the answer; the budget is given, not a share of the prompt.

    Needs: keys and the queries of every call. Cost: as H2OPress, and a draw of noise for each query, key and query
    head, which takes longer than the attention itself; one float32 and one int32 for each pair.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_sink: first tokens that stay.
        grace: newest tokens that stay.
        recent_ratio: share of what is kept that is newest, in [0, 1]; the larger of this and grace holds.
        decay: what all sums are multiplied with for each token after the prompt, in (0, 1]; 1: they are not.
        by_lifetime: divide by the number of queries since the token came; wants decay=1.0.
        noise: what the Gumbel noise is multiplied with, at least 0.
        tau_step: what each token after the prompt adds to tau, at least 0.
        seed: of the noise; None takes a new one for every cache from torch's default generator.
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("received_with_noise"), Column("steps", 0, torch.int32))
    per_head_independent = False  # noise depends on the number of the head

    noise: float = 1.0
    tau_step: float = 0.01
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, float("inf"), "noise", "tau_step")

    @property
    def draws(self) -> bool:
        return self.seed is None

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        steps = view.columns["steps"]
        if not self.is_prompt(view):
            steps = (self._steps(view) + view.n_queries).int().expand_as(steps)
        return {**super().observe(view), "steps": steps}

    def received(self, view: LayerView, decay: float) -> Tensor:
        if not self.noise and not self.tau_step:
            return super().received(view, decay)
        total = torch.zeros_like(view.keys[..., 0], dtype=torch.float32)
        for at, weights in self._noisy_weights(view):
            fading = decay ** (view.end - 1 - at)
            total[..., : weights.shape[-1]] += (weights * fading[:, None]).sum(3).mean(2)
        return total

    def _steps(self, view: LayerView) -> Tensor:
        """How many tokens each row has got since its prompt, before this call: ``[B, 1, 1]``."""
        return view.columns["steps"].masked_fill(positions_of(view) < 0, 0).amax((1, 2), keepdim=True)

    def _noisy_weights(self, view: LayerView) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions of the queries of a block, and what they give: float32 ``[B, Hkv, G, n, T']``."""
        first, steps, key_at = view.end - view.n_queries, self._steps(view), positions_of(view)
        for start, weights in view.attention_blocks():
            n = weights.shape[3]
            at = torch.arange(first + start, first + start + n, device=weights.device)
            logits = weights.log_()  # but for a number of each query, which the softmax takes out
            if self.noise:
                logits = logits + self.noise * self._gumbel(view, at, key_at[..., : weights.shape[4]])
            if self.tau_step and not self.is_prompt(view):
                since = steps + 1 + start + torch.arange(n, device=at.device)[:, None]  # [B, n, 1]
                logits = logits / (1 + self.tau_step * since[:, None, None])
            yield at, logits.softmax(-1).nan_to_num_(0.0)  # a query all of whose keys are gone gives nothing

    def _gumbel(self, view: LayerView, query_at: Tensor, key_at: Tensor) -> Tensor:
        """Noise of queries ``[n]`` and keys ``[B or 1, Hkv or 1, T']``: float32 ``[B or 1, Hkv, G, n, T']``."""
        group, (_, own) = view.group_size, view.row_head
        seed = view.seed if self.seed is None else self.seed
        heads = torch.arange(view.queries.shape[1], device=query_at.device).view(-1, group, 1, 1) + own * group
        drawn = key_at[:, :, None, None] * _signed(_KEY) + query_at[:, None] * _signed(_QUERY)
        drawn = drawn + (heads * _signed(_HEAD) + _signed(seed * _SEED + view.layer_idx * _LAYER))
        for factor, shift in zip(_MIX, (30, 27), strict=True):
            drawn = (drawn ^ ((drawn >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
        uniform = (((drawn >> (64 - _BITS)) & ((1 << _BITS) - 1)).float() + 0.5) / (1 << _BITS)
        return -(-uniform.log()).log()


def _signed(number: int) -> int:
    """The int64 that has the last 64 bits of ``number``."""
    return (number + 2**63) % 2**64 - 2**63


register("decoding_keyformer", BoundaryPress, KeyformerPress, compression_interval=64)(CompressionRatioDecodingPress)
