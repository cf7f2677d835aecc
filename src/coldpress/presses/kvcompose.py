"""KVCompose: layers get the budget that their composite tokens earn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.replay import ReplayPress, chunk_view
from coldpress.core.call import LayerCall
from coldpress.core.counts import adaptive_counts
from coldpress.errors import PressError

if TYPE_CHECKING:
    from coldpress.cache.layer import PressedLayer
    from coldpress.cache.pressed import PressedCache


@register("kvcompose")
@dataclass(frozen=True)
class KVComposePress(ReplayPress):
    """Keep in each layer as many tokens as its composite tokens are worth; each head chooses its own.

    After the prefill the text is read a second time. With A[q, t] the attention of token q of the second reading to
    token t of the first: s[h, t] = agg_group over the group's heads of agg_task over q of A[q, t], times ||v[t]||_2
    with add_v_norm, plus the mean over the layer's heads with add_mean_across_heads. The heads' scores are sorted; the
    j-th composite token of a layer has the score agg_head over its heads of their j-th largest s. The best composite
    tokens of all layers are kept: a layer of which n are kept, keeps the n best tokens of each head. Without structured
    the best s of all layers and heads are kept, so that heads keep different numbers.

    Source: Akulov et al. 2025, arXiv:2509.05165, section 3, as in kvpress. Differs from kvpress: the ratio is met
    exactly, whatever each layer keeps at least; the first layer is not made the largest one; without structured what is
    evicted is freed; the model's own attention backend is used, and no attention matrix is ever stored.

    Needs: the model once more after the prefill, one text at a time. Cost: a second pass over the text, attending to
    both readings, and twice the keys and values while it lasts.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1), over all layers.
        structured: all heads of a layer keep the same number.
        agg_task: "max" or "mean", over the tokens of the second reading.
        agg_group: "max" or "mean", over the query heads of a KV head.
        agg_head: "max" or "mean", over the heads of a layer, for composite tokens.
        add_v_norm: weigh by the norm of the values.
        add_mean_across_heads: add to each score the mean over the layer's heads.
        keep_token_lower_bound: tokens that each head keeps at least, as far as the budget goes.
    """

    structured: bool = True
    agg_task: str = "max"
    agg_group: str = "mean"
    agg_head: str = "mean"
    add_v_norm: bool = False
    add_mean_across_heads: bool = True
    keep_token_lower_bound: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("agg_task", "agg_group", "agg_head"):
            if getattr(self, name) not in ("max", "mean"):
                raise PressError(f"KVComposePress: {name} must be 'max' or 'mean', got {getattr(self, name)!r}.")
        check_at_least(self, 0, "keep_token_lower_bound")

    def counts(self, scores: Sequence[Tensor], n_keep: int, n_safe: int) -> list[Tensor]:
        n_safe = max(n_safe, min(self.keep_token_lower_bound, n_keep))
        if not self.structured:
            return super().counts(scores, n_keep, n_safe)
        composites = [_aggregate(part.sort(dim=-1, descending=True).values, 1, self.agg_head) for part in scores]
        together = torch.stack([part.to(scores[0].device) for part in composites], dim=1)  # [1, layers, T]
        counts = adaptive_counts(together, n_keep, n_safe)
        return [counts[:, i, None].expand(part.shape[:2]).to(part.device) for i, part in enumerate(scores)]

    def scores(
        self, cache: PressedCache, model: nn.Module, token_ids: Tensor, layers: Sequence[PressedLayer]
    ) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        indices = {layer.index for layer in layers}

        def on_attention(layer: PressedLayer, call: LayerCall) -> None:
            if layer.index in indices:
                found[layer.index] = self._score(layer, call)

        self.run(cache, model, on_attention, token_ids.shape[1], input_ids=token_ids)
        return [found[layer.index] for layer in layers]

    def _score(self, layer: PressedLayer, call: LayerCall) -> Tensor:
        """Scores of the first reading by the second one, which ``call`` is about: float32 ``[1, Hkv, T]``."""
        assert layer.values is not None
        n_tokens = call.query.shape[2]
        view = chunk_view(layer, call, torch.arange(n_tokens, device=call.query.device))
        per_head = torch.zeros(*view.keys.shape[:2], view.group_size, n_tokens, device=view.keys.device)
        for _, attention in view.attention_blocks():
            attention = attention[..., :n_tokens]  # [1, Hkv, G, n, T]
            if self.agg_task == "max":
                per_head = torch.maximum(per_head, attention.amax(dim=3))
            else:
                per_head += attention.sum(dim=3) / n_tokens
        scores = _aggregate(per_head, 2, self.agg_group)
        if self.add_v_norm:
            scores = scores * layer.values[:, :, :n_tokens].float().norm(dim=-1)
        if self.add_mean_across_heads:
            scores = scores + scores.mean(dim=1, keepdim=True)
        return scores


def _aggregate(scores: Tensor, dim: int, how: str) -> Tensor:
    return scores.amax(dim) if how == "max" else scores.mean(dim)
