"""Which pairs of one KV head a decoding query reads, in loops over pages, channels and tokens."""

from __future__ import annotations

import math


def quest(queries: list[list[float]], keys: list[list[float]], page: int, n_read: int) -> set[int]:
    """Tokens that are read; ``queries`` are those of the head's group."""
    pages = [range(start, min(start + page, len(keys))) for start in range(0, len(keys), page)]
    bounds = {}
    for p, tokens in enumerate(pages):
        low, high = ([least(keys[t][i] for t in tokens) for i in range(len(keys[0]))] for least in (min, max))
        bounds[p] = max(sum(max(q[i] * low[i], q[i] * high[i]) for i in range(len(q))) for q in queries)
    last = len(pages) - 1
    best = sorted(bounds, key=lambda p: (p != last, -bounds[p]))[:n_read]
    return {t for p in best for t in pages[p]}


def sparq(
    queries: list[list[float]], keys: list[list[float]], channels: int, n_read: int, local: int, scaling: float
) -> set[int]:
    """Tokens that are read; ``queries`` are those of the head's group."""
    sizes = {i: sum(abs(q[i]) for q in queries) for i in range(len(keys[0]))}
    chosen = sorted(sizes, key=lambda i: -sizes[i])[:channels]
    scores = {}
    for t, key in enumerate(keys):
        scores[t] = 0.0
        for q in queries:
            share = sum(abs(q[i]) for i in chosen) / sum(abs(x) for x in q)
            scores[t] += sum(q[i] * key[i] for i in chosen) * scaling / math.sqrt(share)
    newest = range(len(keys) - local, len(keys))
    return {*sorted(scores, key=lambda t: (t not in newest, -scores[t]))[:n_read]}
