"""Scores of presses by their formulas, in loops over rows, heads and tokens; nothing is shared with the presses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coldpress import (
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LayerView,
    ObservedAttentionPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)

N = 21


def heads_of(view: LayerView) -> list[tuple[Tensor, Tensor, list[Tensor], tuple[int, int]]]:
    """For each row and KV head: keys ``[T, D]``, values, the queries ``[T, D]`` of its group's heads, (row, head)."""
    group = view.queries.shape[1] // view.keys.shape[1]
    return [
        (view.keys[b, h], view.values[b, h], list(view.queries[b, h * group : (h + 1) * group]), (b, h))
        for b in range(view.keys.shape[0])
        for h in range(view.keys.shape[1])
    ]


def attention(query: Tensor, keys: Tensor, at: int) -> list[float]:
    """What the query of token ``at`` gives to each token; nothing to later ones."""
    logits = [math.exp(float(query @ keys[t]) / math.sqrt(len(query))) for t in range(at + 1)]
    return [x / sum(logits) for x in logits] + [0.0] * (len(keys) - at - 1)


def rotation(position: int, n_rotary: int, dim: int) -> Tensor:
    """The matrix ``[D, D]`` that rotates a state at ``position``; halves, frequencies of base 10,000."""
    matrix, half = torch.eye(dim, dtype=torch.float64), n_rotary // 2
    for d in range(half):
        angle = position * 10_000.0 ** (-2 * d / n_rotary)
        matrix[d, d] = matrix[d + half, d + half] = math.cos(angle)
        matrix[d, d + half], matrix[d + half, d] = -math.sin(angle), math.sin(angle)
    return matrix


def knorm(view: LayerView, press: KnormPress, n_rotary: int) -> dict[tuple[int, int], list[float]]:
    return {at: [-math.sqrt(sum(float(x) ** 2 for x in key)) for key in keys] for keys, _, _, at in heads_of(view)}


def keydiff(view: LayerView, press: KeyDiffPress, n_rotary: int) -> dict[tuple[int, int], list[float]]:
    scores = {}
    for keys, _, _, at in heads_of(view):
        anchor = sum(key / math.sqrt(float(key @ key)) for key in keys) / len(keys)
        scores[at] = [-float(key @ anchor) / math.sqrt(float(key @ key) * float(anchor @ anchor)) for key in keys]
    return scores


def streaming_llm(view: LayerView, press: StreamingLLMPress, n_rotary: int) -> dict[tuple[int, int], list[float]]:
    return {at: [float(t) for t in range(len(keys))] for keys, _, _, at in heads_of(view)}


def random(view: LayerView, press: RandomPress, n_rotary: int) -> dict[tuple[int, int], list[float]]:
    generator = torch.Generator().manual_seed(press.seed * 1_000_003 + view.layer_idx)
    draws = [[float(torch.rand(1, generator=generator)) for _ in range(N)] for _ in range(view.keys.shape[1])]
    return {at: draws[at[1]] for *_, at in heads_of(view)}


def tova(view: LayerView, press: TOVAPress, n_rotary: int) -> dict[tuple[int, int], list[float]]:
    scores: dict[tuple[int, int], list[float]] = {}
    for row in range(view.keys.shape[0]):
        mine = [(keys, query) for keys, _, queries, (b, _) in heads_of(view) if b == row for query in queries]
        rows = [attention(query[-1], keys, N - 1) for keys, query in mine]
        mean = [sum(weights[t] for weights in rows) / len(rows) for t in range(N)]
        scores |= {(row, head): mean for head in range(view.keys.shape[1])}
    return scores


def observed_attention(
    view: LayerView, press: ObservedAttentionPress, n_rotary: int
) -> dict[tuple[int, int], list[float]]:
    scores = {}
    for keys, _, queries, at in heads_of(view):
        matrices = [[attention(query[q], keys, q) for q in range(N)] for query in queries]
        scores[at] = [
            sum(sum(matrix[q][t] for q in range(t, N)) / (N - t) for matrix in matrices) / len(matrices)
            for t in range(N)
        ]
    return scores


def snapkv(view: LayerView, press: SnapKVPress, n_rotary: int) -> dict[tuple[int, int], list[float]]:
    window = press.window_size if press.window_size < N else N // 2
    scores = {}
    for keys, _, queries, at in heads_of(view):
        total = [0.0] * N
        for query in queries:
            rows = [attention(query[q], keys, q) for q in range(N - window, N)]
            received = [sum(row[t] for row in rows) / window for t in range(N)]
            reach = press.kernel_size // 2
            for t in range(N):
                if t < N - window:  # zero padding on both sides, which counts
                    around = range(max(0, t - reach), min(N - window, t + reach + 1))
                    total[t] += sum(received[s] for s in around) / press.kernel_size / len(queries)
                else:
                    total[t] += received[t] / len(queries)
        scores[at] = total
    return scores


def expected_attention(
    view: LayerView, press: ExpectedAttentionPress, n_rotary: int
) -> dict[tuple[int, int], list[float]]:
    dim, scores = view.keys.shape[-1], {}
    ahead = range(N, N + press.n_future_positions)
    mean_rotation = sum(rotation(p, n_rotary, dim) for p in ahead) / press.n_future_positions
    for keys, values, queries, at in heads_of(view):
        total = [0.0] * N
        for query in queries:
            before = [rotation(t, n_rotary, dim).T @ query[t].double() for t in range(press.n_sink, N)]
            mean = sum(before) / len(before)
            covariance = sum(torch.outer(q - mean, q - mean) for q in before) / len(before)
            mean, covariance = mean_rotation @ mean, mean_rotation @ covariance @ mean_rotation.T
            logits = []
            for key in keys.double():
                logit = float(key @ mean) / math.sqrt(dim)
                if press.use_covariance:
                    logit += float(key @ covariance @ key) / (2 * dim)
                logits.append(logit)
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            total = [x + w / sum(weights) / len(queries) for x, w in zip(total, weights, strict=True)]
        if press.use_vnorm:
            norms = [math.sqrt(sum(float(x) ** 2 for x in value)) for value in values]
            total = [(p + press.epsilon) * norm for p, norm in zip(total, norms, strict=True)]
        scores[at] = total
    return scores


def standardized(scores: list[float]) -> list[float]:
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    return [(s - mean) / std for s in scores]


def lag_weights(states: Tensor, part: range, reference: range) -> list[float]:
    """Softmax over ``part`` of the standard deviation over channels, on the scale of ``reference``."""
    stds = []
    for t in part:
        channels = []
        for d in range(states.shape[1]):
            low = min(float(states[r, d]) for r in reference)
            high = max(float(states[r, d]) for r in reference)
            channels.append((float(states[t, d]) - low) / ((high - low) or 1))
        mean = sum(channels) / len(channels)
        stds.append(math.sqrt(sum((c - mean) ** 2 for c in channels) / (len(channels) - 1)))
    total = sum(math.exp(s) for s in stds)
    return [math.exp(s) / total for s in stds]


def non_causal(view: LayerView, b: int, h: int, span: range, chunk: int) -> list[float]:
    sums = dict.fromkeys(span, 0.0)
    for start in range(span.start, span.stop, chunk):
        part = range(start, min(start + chunk, span.stop))
        for g in range(view.group_size):
            for q in part:
                query = view.queries[b, h * view.group_size + g, q].double()
                logits = [float(query @ view.keys[b, h, t].double()) for t in part]
                total = sum(math.exp(x - max(logits)) for x in logits)
                for t, x in zip(part, logits, strict=True):
                    sums[t] += math.exp(x - max(logits)) / total / view.group_size
    weighted = [sums[t] * float(view.values[b, h, t].norm()) for t in span]
    padded = [0.0, *weighted, 0.0]
    return standardized([sum(padded[i : i + 3]) / 3 for i in range(len(weighted))])


def sketch_of(keys: Tensor, layer: int, dimension: int, seed: int) -> Tensor:
    """Random projections ``[Hkv, D, m]`` of the heads of a layer."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    return torch.randn(keys.shape[1], keys.shape[3], dimension, generator=generator) / math.sqrt(dimension)


def leverage(keys: Tensor, sketch: Tensor | None) -> list[float]:
    """Of one head's keys before rotation, ``[T, D]``."""
    rows = (keys - keys.mean(0)).double()
    if sketch is not None:
        rows = rows @ sketch.double()
    inverse = torch.linalg.inv(rows.T @ rows + 0.01 * torch.eye(rows.shape[1], dtype=torch.float64))
    return standardized([float(row @ inverse @ row) for row in rows])
