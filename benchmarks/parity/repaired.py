"""Presses of kvpress with one expression each replaced: what kvpress would keep without the fault.

Each class has the name and parameters of the one that it repairs, and leaves everything else to it. Where a press draws
random numbers, coldpress's draws are made, so that what is done with them can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import kvpress
import torch
from benchmarks.parity import local
from kvpress.presses import entropy_gated_chunkkv_press
from kvpress.presses.base_press import is_prefilling
from kvpress.utils import compute_n_kept, get_prerope_query_states
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

# What kvpress hands to score() and compress(): module, hidden states, keys, values, attention, the layer's arguments.


@dataclass
class RandomPress(kvpress.RandomPress):
    """K: draws that depend on the layer."""

    def score(self, module: Any, hidden: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + module.layer_idx)
        return torch.rand(keys.shape[1:3], generator=generator).expand(keys.shape[:3])


def _window_attention(module: Any, hidden: Tensor, keys: Tensor, window: int, kwargs: Any) -> Tensor:
    """Attention of the last ``window`` queries to all keys, their own included: ``[B, Hq, window, T]``."""
    cos, sin = (x[:, None, -window:] for x in kwargs["position_embeddings"])
    queries = get_prerope_query_states(module, hidden[:, -window:])
    queries = queries * cos + rotate_half(queries) * sin
    repeated = repeat_kv(keys, queries.shape[1] // keys.shape[1])
    logits = queries @ repeated.transpose(2, 3) / math.sqrt(module.head_dim)
    is_later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(keys.shape[2] - window + 1)
    return logits.masked_fill(is_later, -torch.inf).softmax(-1)


@dataclass
class SnapKVPress(kvpress.SnapKVPress):
    """K: a window that does not fit is protected in half of the budget; the rest competes by its own attention."""

    def score(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any) -> Tensor:
        scores = super().score(module, hidden, keys, values, attention, kwargs)
        n_keep, window = compute_n_kept(keys.shape[2], self.compression_ratio), self.window_size
        if n_keep >= window:
            return scores
        attention = _window_attention(module, hidden, keys, window, kwargs)[..., -window:]
        inside = attention.mean(2).unflatten(1, (keys.shape[1], -1)).mean(2)
        scores[..., -window : -(n_keep // 2)] = inside[..., : -(n_keep // 2)]
        return scores


@dataclass
class PyramidKVPress(kvpress.PyramidKVPress):
    """The line of whole pairs on average, rounded so that its total is what the ratio asks for."""

    def get_layer_budget(self, module: Any, q_len: int) -> int:
        n_layers, n_keep = module.config.num_hidden_layers, compute_n_kept(q_len, self.compression_ratio)
        ends = (SimpleNamespace(config=module.config, layer_idx=i) for i in (0, n_layers - 1))
        if len({super(PyramidKVPress, self).get_layer_budget(end, q_len) for end in ends}) == 1:
            return n_keep  # no pyramid
        low = max(self.window_size, n_keep / self.beta, 2 * n_keep - (q_len - self.window_size))
        line = torch.linspace(2 * n_keep - low, low, n_layers, dtype=torch.float64)
        n_more = n_layers * n_keep - int(line.floor().sum())
        is_rounded_up = torch.zeros(n_layers, dtype=torch.bool)
        is_rounded_up[(line - line.floor()).sort(descending=True, stable=True).indices[:n_more]] = True
        return int(line[module.layer_idx].floor()) + int(is_rounded_up[module.layer_idx])


@dataclass
class StreamingLLMPress(kvpress.StreamingLLMPress):
    """B4: pairs are gathered in the order of the text, so that the next round finds sinks and recent ones."""

    def compress(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        scores = self.score(module, hidden, keys, values, *rest)
        chosen = scores.topk(compute_n_kept(keys.shape[2], self.compression_ratio), dim=-1).indices.sort(-1).values
        chosen = chosen[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, chosen), values.gather(2, chosen)


class _WholeSoftmax:
    """Section 3 of the paper: attention is a softmax over all keys, the sinks among them."""

    def score(self: Any, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        mean, covariance = self.get_query_statistics(module, hidden)
        groups, dim = mean.shape[1] // keys.shape[1], keys.shape[3]
        repeated = repeat_kv(keys, groups)
        logits = (repeated @ mean[..., None]).squeeze(-1) / math.sqrt(dim)
        if self.use_covariance:
            logits = logits + ((repeated @ covariance) * repeated).sum(-1) / dim / 2
        scores = logits.softmax(-1).unflatten(1, (-1, groups)).mean(2)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * values.norm(dim=-1)
        scores[..., : self.n_sink] = scores.max() + 1
        return scores


@dataclass
class ExpectedAttentionPress(_WholeSoftmax, kvpress.ExpectedAttentionPress):
    pass


@dataclass
class ExpectedAttentionStatsPress(_WholeSoftmax, kvpress.ExpectedAttentionStatsPress):
    pass


@dataclass
class LUKVPress(local.LUKVPress):
    """The press inside, where none is given."""

    press: Any = field(default_factory=lambda: ExpectedAttentionPress(epsilon=2e-2))


@dataclass
class LagKVPress(kvpress.LagKVPress):
    """K: a text too short for two partitions is cut in two."""

    def score(self, module: Any, hidden: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        lag = min(self.lag_size, (keys.shape[2] - self.n_sink) // 2)
        return kvpress.LagKVPress.score(replace(self, lag_size=lag), module, hidden, keys, *rest)


@dataclass
class CURPress(kvpress.CURPress):
    """K: the mean of a window instead of its sum, which matters where the last one is shorter (kv_product)."""

    def score(self, module: Any, hidden: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        scores = super().score(module, hidden, keys, *rest)
        n_last = keys.shape[2] % self.local_window_size
        scores[..., keys.shape[2] - n_last :] *= (n_last / self.local_window_size) ** 2
        return scores


def standardized(scores: Tensor) -> Tensor:
    """A z-score of each head; any z-score over all heads before it drops out."""
    return (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)


@dataclass
class NonCausalAttnPress(kvpress.NonCausalAttnPress):
    """K: no padding in the last chunk, and a z-score of each head."""

    @staticmethod
    def non_causal_chunked_attn(q: Tensor, k: Tensor, chunk_size: int) -> Tensor:
        chunks = zip(q.split(chunk_size, 2), k.split(chunk_size, 2), strict=True)
        return torch.cat([(a @ b.transpose(-1, -2)).softmax(-1).sum(-2) for a, b in chunks], dim=-1)

    def score(self, *given: Any, **named: Any) -> Tensor:
        return standardized(super().score(*given, **named))


@dataclass
class LeverageScorePress(kvpress.LeverageScorePress):
    """K: a sketch that repeats, a z-score of each head, and float64 in between, where float32 loses three digits."""

    @staticmethod
    def compute_leverage_scores(keys: Tensor, sketch_dimension: int) -> Tensor:
        sketch = torch.randn(*keys.shape[:2], keys.shape[3], sketch_dimension) / math.sqrt(sketch_dimension)
        rows = ((keys - keys.mean(-2, keepdim=True)) @ sketch).double()
        gram = rows.transpose(-1, -2) @ rows + 0.01 * torch.eye(sketch_dimension, dtype=rows.dtype)
        return (rows @ torch.linalg.inv(gram) * rows).sum(-1).float()

    def score(self, module: Any, *given: Any, **named: Any) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(module.layer_idx)
            return standardized(super().score(module, *given, **named))


@dataclass
class CompactorPress(kvpress.CompactorPress):
    """K: made of the two presses above."""

    def __post_init__(self) -> None:
        self._leverage_press = LeverageScorePress(self.compression_ratio, sketch_dimension=self.sketch_dimension)
        self._non_causal_press = NonCausalAttnPress(self.compression_ratio, chunk_size=self.chunk_size)


def _shares(press: Any, n_tokens: int, n_window: int) -> Iterator[tuple[int, int, int]]:
    """Start and end of every chunk, and how many pairs it keeps: its share by tokens outside the window."""
    n_free = n_tokens - n_window
    n_keep = compute_n_kept(n_tokens, press.compression_ratio) - n_window
    chunks = list(pairwise([*range(0, n_tokens, press.chunk_length), n_tokens]))
    free = [max(0, min(stop, n_free) - start) for start, stop in chunks]
    counts = [n_keep * own // n_free for own in free]
    by_remainder = sorted(range(len(free)), key=lambda i: -(n_keep * free[i] % n_free))  # the largest are rounded up
    for i in by_remainder[: n_keep - sum(counts)]:
        counts[i] += 1
    for (start, stop), own, count in zip(chunks, free, counts, strict=True):
        yield start, stop, count + stop - start - own


@dataclass
class ChunkPress(kvpress.ChunkPress):
    """K: positions of the chunk's own; and budgets by unprotected tokens, of which the last chunk has fewer."""

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        places = []
        for start, stop, count in _shares(self, keys.shape[2], self.press.window_size):
            at = slice(start, stop)
            own = {"position_embeddings": tuple(x[:, at] for x in kwargs["position_embeddings"])}
            scores = self.press.score(module, hidden[:, at], keys[:, :, at], values[:, :, at], attention, own)
            places.append(start + scores.topk(count, dim=-1).indices)
        chosen = torch.cat(places, dim=-1)[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, chosen), values.gather(2, chosen)


@dataclass
class ChunkKVPress(kvpress.ChunkKVPress):
    """E: every row of a batch by itself; and as many pairs as the ratio asks for, the window beside the chunks."""

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scores = self.press.score(module, hidden, keys, values, attention, kwargs).sum(1)  # [B, T]
        n_tokens, window = keys.shape[2], getattr(self.press, "window_size", 0)
        chunks = scores[:, : n_tokens - window].split(self.chunk_length, dim=1)
        means = torch.cat([chunk.mean(1, keepdim=True).expand_as(chunk) for chunk in chunks], dim=1)
        scores = torch.cat([means, torch.full((len(means), window), torch.inf)], dim=1)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, : compute_n_kept(n_tokens, self.compression_ratio)].sort(1).values
        chosen = chosen[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return keys.gather(2, chosen), values.gather(2, chosen)


@dataclass
class _Given(kvpress.ScorerPress):
    """Scores that are known."""

    scores: Any = None

    def score(self, *given: Any) -> Tensor:
        return self.scores  # type: ignore[no-any-return]


@dataclass
class EntropyGatedChunkKVPress(kvpress.EntropyGatedChunkKVPress):
    """E: every row by itself; protected tokens, here whole chunks, are in no median; and no constant in the entropy."""

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scores = self.press.score(module, hidden, keys, values, attention, kwargs)
        n_free = keys.shape[2] - getattr(self.press, "window_size", 0)
        n_keep = compute_n_kept(keys.shape[2], self.press.compression_ratio) - (keys.shape[2] - n_free)
        kept = []
        for own, k, v in zip(scores.split(1), keys.split(1), values.split(1), strict=True):
            given = _Given(1 - (n_keep + 0.5) / n_free, scores=own[..., :n_free])
            gated = kvpress.EntropyGatedChunkKVPress(given, self.chunk_length, self.low_entropy_chunk_length)
            with mock.patch.object(entropy_gated_chunkkv_press, "EPSILON", 1e-30):
                pair = gated.compress(module, hidden, k[:, :, :n_free], v[:, :, :n_free], attention, kwargs)
            kept.append([torch.cat([x, y[:, :, n_free:]], dim=2) for x, y in zip(pair, (k, v), strict=True)])
        return torch.cat([k for k, _ in kept]), torch.cat([v for _, v in kept])


@dataclass
class ComposedPress(kvpress.ComposedPress):
    """B4: every press scores the text in its order, and whole; what one of them protects, none of them removes."""

    def forward_hook(self, module: Any, inputs: Any, kwargs: Any, output: Any) -> Any:
        layer, hidden = kwargs["past_key_values"].layers[module.layer_idx], kwargs["hidden_states"]
        if not is_prefilling(kwargs["cache_position"], hidden.shape[1]):
            return output
        left, n_keep = torch.ones(layer.keys.shape[:3], dtype=torch.bool), layer.keys.shape[2]
        window = max(getattr(press, "window_size", 0) for press in self.presses)
        for press in self.presses:
            n_keep = compute_n_kept(n_keep, press.compression_ratio)
            scores = press.score(module, hidden, layer.keys, layer.values, output[1], kwargs)
            scores = scores.masked_fill(~left, -torch.inf)
            scores[..., -window:] = torch.inf
            left = torch.zeros_like(left).scatter(2, scores.topk(n_keep, dim=-1).indices, True)
        chosen = left.nonzero()[:, 2].view(*left.shape[:2], n_keep, 1).expand(-1, -1, -1, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.gather(2, chosen), layer.values.gather(2, chosen)
        return output


def _projected_norms(values: Tensor, module: Any) -> Tensor:
    """||W_O v||_1, with the head dimension that the layer says."""
    groups = module.num_key_value_groups
    heads = module.o_proj.weight.unflatten(1, (-1, module.head_dim)).permute(1, 2, 0)  # [Hq, D, hidden]
    return (repeat_kv(values, groups) @ heads).norm(p=1, dim=-1).unflatten(1, (-1, groups)).mean(2)


class CriticalKVPress(kvpress.CriticalKVPress):
    """Section 1 of the list: no config.head_dim is needed."""

    vwl1norm = staticmethod(_projected_norms)


@dataclass
class CriticalAdaKVPress(kvpress.CriticalAdaKVPress):
    """The same; and the safeguard is a number of pairs: which ones they are, the two stages say."""

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scores = self.press.score(module, hidden, keys, values, attention, kwargs)[0]  # [Hkv, T]
        n_keep = compute_n_kept(keys.shape[2], self.compression_ratio)
        safe = scores.topk(int(n_keep * self.alpha_safeguard), dim=-1).indices
        guarded = scores.scatter(-1, safe, torch.inf).flatten()
        heads = guarded.topk(n_keep * keys.shape[1]).indices // keys.shape[2]
        weighted = (scores + self.epsilon) * _projected_norms(values, module)[0]
        masked = torch.ones_like(scores, dtype=torch.bool)
        for head, count in enumerate(heads.bincount(minlength=keys.shape[1]).tolist()):
            weighted[head, scores[head].topk(int(count * self.first_stage_ratio)).indices] = torch.inf
            masked[head, weighted[head].topk(count).indices] = False
        module.masked_key_indices = torch.nonzero(masked[None], as_tuple=True)
        return keys, values


@dataclass
class ThinKPress(kvpress.ThinKPress):
    """Section 3.2 of the paper: the keys of the observation window stay whole."""

    def compress(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        pruned, values = super().compress(module, hidden, keys.clone(), values, *rest)
        return torch.cat([pruned[:, :, : -self.window_size], keys[:, :, -self.window_size :]], dim=2), values


@dataclass
class SimLayerKVPress(kvpress.SimLayerKVPress):
    """K: a lazy layer keeps n_recent tokens, and is judged by the attention to what it would keep."""

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        seen = _window_attention(module, hidden, keys, self.n_last, kwargs).mean((0, 1, 2))
        kept = torch.arange(keys.shape[2])
        kept = kept[(kept < self.n_initial) | (kept >= keys.shape[2] - self.n_recent)]
        is_lazy = self.lazy_threshold < 1 and seen[kept].sum() > self.lazy_threshold
        return (keys[:, :, kept], values[:, :, kept]) if is_lazy else (keys, values)


@dataclass
class FinchPress(local.FinchPress):
    """K: a query sees itself too; and chunks share out what the question leaves of the budget."""

    def score(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any) -> Tensor:
        n_tokens, window = keys.shape[2], self.window_size or 0
        attention = _window_attention(module, hidden, keys, window, kwargs)[..., :-window]
        attention = attention * torch.arange(n_tokens - window + 1, n_tokens + 1)[:, None]
        scores = attention.mean(2).unflatten(1, (keys.shape[1], -1)).mean(2)
        return torch.nn.functional.pad(scores, (0, window), value=float(scores.max()) + 1)

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attention: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.chunk_length is None:
            return super().compress(module, hidden, keys, values, attention, kwargs)
        scores = self.score(module, hidden, keys, values, attention, kwargs)
        shares = _shares(self, keys.shape[2], self.window_size or 0)
        places = [start + scores[..., start:stop].topk(count, dim=-1).indices for start, stop, count in shares]
        chosen = torch.cat(places, dim=-1).sort(-1).values
        moved = kvpress.KeyRerotationPress.rerotate_keys(module, chosen, keys)
        return moved, values.gather(2, chosen[..., None].expand(-1, -1, -1, values.shape[3]))


class _WholePairs:
    """A whole number of pairs for each head on average, instead of a number for all heads of the model."""

    def compress_post(self: Any, model: Any) -> None:
        n_tokens, asked = self.score_val[0].shape[-1], self.compression_ratio
        self.compression_ratio = 1 - (compute_n_kept(n_tokens, asked) - 1e-6) / n_tokens
        super().compress_post(model)  # type: ignore[misc]
        self.compression_ratio = asked


@dataclass
class KVzipPress(_WholePairs, kvpress.KVzipPress):
    """The same; and what a chat template puts before the text is kept."""

    def compress_post(self, model: Any) -> None:
        n_sink, self.n_sink = self.n_sink, max(self.n_sink, self.prefix_length)
        super().compress_post(model)
        self.n_sink = n_sink


@dataclass
class KVgradPress(_WholePairs, kvpress.KVgradPress):
    pass


@dataclass
class FastKVzipPress(_WholePairs, local.FastKVzipPress):
    pass


@dataclass
class KVComposePress(kvpress.KVComposePress):
    """C: the first layer has its own scores. A: what the second pass wrote is removed from the cache. Whole pairs."""

    def compute_composite_scores(self) -> None:
        super().compute_composite_scores()
        n_keep = compute_n_kept(self.context_len, self.compression_ratio)
        self.compression_ratio = 1 - (n_keep + 1e-6) / self.context_len
        by_head = self.composite_scores_per_head[0]
        self.composite_scores_per_layer[0] = by_head.mean(0) if self.agg_head == "mean" else by_head.amax(0)

    def compress_unstructured(self, model: Any) -> None:
        super().compress_unstructured(model)
        self.cache.crop(self.context_len)
