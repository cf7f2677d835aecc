"""DefensiveKV by its formulas, in float64 and in loops over heads, queries and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from coldpress import DefensiveKVPress, LayerView

Table = list[list[float]]  # by KV head and token


def attention(view: LayerView, row: int, head: int, window: int) -> list[list[float]]:
    """What each window query of each query head of a KV head's group gives to every token."""
    given, n, keys = [], view.n_tokens, view.keys[row, head].double()
    for query in view.queries[row, head * view.group_size : (head + 1) * view.group_size].double():
        for q in range(n - window, n):
            logits = [math.exp(float(query[q] @ keys[t]) * view.scaling) for t in range(q + 1)]
            given.append([x / sum(logits) for x in logits] + [0.0] * (n - q - 1))
    return given


def pooled(row: list[float], width: int) -> list[float]:
    """Means over ``width`` tokens with zeros beyond both ends, scaled to the sum that ``row`` has."""
    means = [sum(row[max(0, t - width // 2) : t + width // 2 + 1]) / width for t in range(len(row))]
    return [x * sum(row) / sum(means) for x in means]


def scores(view: LayerView, press: DefensiveKVPress, row: int, norms: Tensor) -> Table:
    """Scores of one row; ``norms`` ``[Hkv, T]`` are those of the values behind the output projection."""
    n, window, found = view.n_tokens, press.window_size, []
    for head, own in enumerate(norms.double()):
        rows = [
            pooled(given[: n - window], press.kernel_size) + given[n - window :]
            for given in attention(view, row, head, window)
        ]
        most = [max(given[t] for given in rows) for t in range(n)]
        floor = sum(most[: n - window]) / (n - window)
        mean = norms.double().mean(0) if press.norms_over == "heads" else own.mean().expand(n)
        found.append([max(most[t], floor) * float(own[t] / mean[t]) for t in range(n)])
    return found


def first_stage(
    view: LayerView, press: DefensiveKVPress, row: int, n_keep: int, always: Sequence[int]
) -> list[list[int]]:
    """Of each head, the tokens that are kept for their attention, beside those that always are."""
    n, window, found = view.n_tokens, press.window_size, []
    heads = [attention(view, row, head, window) for head in range(view.keys.shape[1])]
    means = [[sum(given[t] for given in rows) / len(rows) for t in range(n)] for rows in heads]
    bias = sum(sum(mean[max(0, n - 2 * window) : n - window]) for mean in means) / len(means)
    for mean in means:
        others = sorted((t for t in range(n) if t not in always), key=lambda t: (-mean[t], t))
        has, needs = sum(mean[t] for t in always), press.first_stage_mass * sum(mean)
        if press.window_bias == "before":
            has, needs = 0.0, (press.first_stage_mass - bias) * sum(mean[t] for t in others)
        taken: list[int] = []
        for t in others[: n_keep - len(always)]:
            has += mean[t]
            if has >= needs:
                break
            taken.append(t)
        found.append(taken)
    return found


def best(
    tables: Sequence[Table], first: Sequence[Sequence[Sequence[int]]], always: Sequence[int], n_keep: int, n_safe: int
) -> list[list[list[int]]]:
    """What heads keep that share one budget, by layer: each its ``n_safe`` best, then the best that are left."""
    kept: list[list[list[int]]] = [[[] for _ in layer] for layer in tables]
    rest = []
    for i, layer in enumerate(tables):
        for h, own in enumerate(layer):
            ranks = {t: (t not in always, t not in first[i][h], -own[t]) for t in range(len(own))}
            order = sorted(ranks, key=lambda t: (*ranks[t], t))
            least = max(n_safe, len(always))
            kept[i][h] = order[:least]
            rest += [(*ranks[t], i, h, t) for t in order[least:]]
    n_heads = sum(len(layer) for layer in tables)
    for *_, i, h, t in sorted(rest)[: n_heads * n_keep - sum(len(own) for layer in kept for own in layer)]:
        kept[i][h].append(t)
    return [[sorted(own) for own in layer] for layer in kept]
