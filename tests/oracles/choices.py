"""Which tokens are kept, given their scores, by sorting lists."""

from __future__ import annotations

from torch import Tensor


def best(scores: dict[int, float], n: int, *always: int) -> list[int]:
    """The ``n`` best tokens, ``always`` among them, the earlier one of equals."""
    order = sorted(scores, key=lambda t: (t not in always, -scores[t], t))
    return sorted(order[:n])


def ends(n_tokens: int, n_sink: int, n_window: int) -> list[int]:
    return [*range(n_sink), *range(n_tokens - n_window, n_tokens)]


def adaptive(scores: Tensor, n_keep: int, n_safe: int, always: list[int]) -> list[list[int]]:
    """What the heads of one row keep, given scores ``[Hkv, T]``: a queue of (score, head, token)."""
    n_heads, n_tokens = scores.shape
    order = [sorted(range(n_tokens), key=lambda t: (t not in always, -float(row[t]), t)) for row in scores]
    least = max(n_safe, len(always))
    kept = [head[:least] for head in order]
    rest = [(-float(scores[h, t]), h, i, t) for h in range(n_heads) for i, t in enumerate(order[h]) if i >= least]
    for _, h, _, t in sorted(rest)[: n_heads * (n_keep - least)]:
        kept[h].append(t)
    return [sorted(head) for head in kept]
