"""Scores by the queries of the last tokens, in float64 and in loops; nothing is shared with the presses.

``held`` is a head: the queries ``[T, D]`` of its group and its keys ``[T, D]``; ``n`` the tokens of the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from coldpress import LayerView

Head = tuple[Sequence[Tensor], Tensor]


def by_head(view: LayerView, score: Callable[[Head], list[float]]) -> list[list[list[float]]]:
    """Scores of all rows and heads, nested lists of ``[B, Hkv, T]``."""
    group, (rows, heads) = view.group_size, view.keys.shape[:2]
    return [
        [score((view.queries[b, h * group : (h + 1) * group].double(), view.keys[b, h].double())) for h in range(heads)]
        for b in range(rows)
    ]


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [x / sum(weights) for x in weights]


def logits(held: Head, q: int) -> list[list[float]]:
    """Of each query head of the group: the logits of token ``q`` for the tokens up to it."""
    queries, keys = held
    return [[float(own[q] @ keys[t]) / math.sqrt(keys.shape[1]) for t in range(q + 1)] for own in queries]


def apart(by_query: list[list[float]], n_older: int, n_tokens: int) -> list[list[float]]:
    """Weights of each window query: among the older tokens alone, and for the window among all that it sees."""
    return [
        softmax(own[:n_older]) + softmax(own)[n_older:] + [0.0] * (n_tokens - len(own)) if n_older else softmax(own)
        for own in by_query
    ]


def morphkv(held: Head, n: int, fusion: str) -> list[float]:
    n_tokens = len(held[1])
    sums = [[sum(column) for column in zip(*logits(held, q), strict=True)] for q in range(n_tokens - n, n_tokens)]
    fuse = {"max": max, "sum": sum}[fusion]
    return [fuse(column) for column in zip(*apart(sums, n_tokens - n, n_tokens), strict=True)]


def rkv(held: Head, n: int, kernel: int, lam: float, threshold: float) -> list[float]:
    n_tokens, reach = len(held[1]), kernel // 2
    most = [[max(column) for column in zip(*logits(held, q), strict=True)] for q in range(n_tokens - n, n_tokens)]
    mean = [sum(column) / n for column in zip(*apart(most, n_tokens - n, n_tokens), strict=True)]
    older = mean[: n_tokens - n]
    pooled = [max(older[max(0, t - reach) : t + reach + 1]) for t in range(len(older))] + mean[len(older) :]
    return [lam * x - (1 - lam) * r for x, r in zip(pooled, redundancy(held[1], threshold), strict=True)]


def redundancy(keys: Tensor, threshold: float) -> list[float]:
    n_tokens, sums = len(keys), [0.0] * len(keys)
    for i in range(n_tokens):
        cosines = [float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in range(n_tokens)]
        newest = max(j for j in range(n_tokens) if j == i or cosines[j] > threshold)
        for j in range(n_tokens):
            sums[j] += cosines[j] / n_tokens if j not in (i, newest) else 0.0
    return softmax(sums)


def gkv(held: Head, n: int) -> list[float]:
    """What the window gives, before any history."""
    n_tokens = len(held[1])
    received = [0.0] * n_tokens
    for q in range(n_tokens - n, n_tokens):
        for t, column in enumerate(zip(*(softmax(own) for own in logits(held, q)), strict=True)):
            received[t] += max(column) / n
    most = max(received[: n_tokens - n])
    return [x / most for x in received]
