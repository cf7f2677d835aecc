"""LagKV: what stands out against the tokens that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView
from coldpress.errors import PressError


@register("lagkv")
@dataclass(frozen=True)
class LagKVPress(ScorerPress):
    """Keep the tokens whose keys and values vary most across channels, on the scale of the tokens that follow them.

    After the sinks the text is cut in partitions of lag_size tokens, and what remains. With min and max, per channel,
    over the next partition: s(x)[t] = softmax over t's partition of std over channels of (x[t] - min) / (max - min),
    and score[b, h, t] = rank of (s(k)[t] + s(v)[t]) / 2 in t's partition, divided by the partition's length; with
    cross_scoring that mean itself, times length / lag_size. All in float32. The last partition and what remains have
    no next one: they are protected, and use the last partition's own scale, which matters only when the budget is
    smaller than them.

    Source: Liang et al. 2025, arXiv:2504.04704, section 3. Differs from the paper: applied once to the prompt; a text
    too short for two partitions is cut in two halves (kvpress keeps its newest tokens, whatever they say); a channel
    that is constant in the next partition is not divided.

    Needs: keys and values. Cost: O(T * D) per layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_sink: first tokens that are kept.
        lag_size: tokens of a partition, at least 1.
        cross_scoring: let the partitions of a head compete with each other.
    """

    n_sink: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "n_sink")
        check_at_least(self, 1, "lag_size")
        if not isinstance(self.cross_scoring, bool):
            raise PressError(f"LagKVPress: cross_scoring must be True or False, got {self.cross_scoring!r}.")

    def score(self, view: LayerView) -> Tensor:
        n_sink, lag, n_whole = self._partitions(view)
        key_parts = self._weights(view.keys.float(), n_sink, lag, n_whole)
        value_parts = self._weights(view.values.float(), n_sink, lag, n_whole)
        parts = [torch.ones(*view.keys.shape[:2], n_sink, device=view.keys.device)]
        for weights in ((k + v) / 2 for k, v in zip(key_parts, value_parts, strict=True)):  # [B, Hkv, n, length]
            length = weights.shape[-1]
            if self.cross_scoring:
                score = weights * (length / lag)
            else:
                score = weights.argsort(dim=-1, stable=True).argsort(-1) / max(1, length)
            parts.append(score.flatten(2))
        return torch.cat(parts, dim=-1)

    def protected(self, view: LayerView) -> tuple[int, int]:
        n_sink, lag, n_whole = self._partitions(view)
        return self.n_sink, view.n_tokens - n_sink - max(0, n_whole - 1) * lag

    def _partitions(self, view: LayerView) -> tuple[int, int, int]:
        """Sinks that are in the view, tokens of a partition, whole partitions."""
        n_sink = view.n_first(self.n_sink)
        lag = min(self.lag_size, max(1, (view.n_tokens - n_sink) // 2))
        return n_sink, lag, (view.n_tokens - n_sink) // lag

    @staticmethod
    def _weights(states: Tensor, n_sink: int, lag: int, n_whole: int) -> list[Tensor]:
        """Softmax weights of the whole partitions ``[B, Hkv, n, lag]`` and of what remains ``[B, Hkv, 1, rest]``."""
        end = n_sink + n_whole * lag
        if not n_whole:
            return []
        whole, rest = states[:, :, n_sink:end].unflatten(2, (n_whole, lag)), states[:, :, None, end:]
        low, high = whole.amin(3, keepdim=True), whole.amax(3, keepdim=True)  # [B, Hkv, n, 1, D]
        low, high = (torch.cat([x[:, :, 1:], x[:, :, -1:], x[:, :, -1:]], dim=2) for x in (low, high))
        span = torch.where(high > low, high - low, 1.0)
        parts = [(whole, slice(0, n_whole))]
        if rest.shape[3]:
            parts.append((rest, slice(n_whole, None)))
        return [_std((part - low[:, :, at]) / span[:, :, at]).softmax(-1) for part, at in parts]


def _std(states: Tensor) -> Tensor:
    """Standard deviation over the last dimension; ``Tensor.std`` takes several times as long on a CPU."""
    centred = states - states.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1) / (states.shape[-1] - 1) ** 0.5
