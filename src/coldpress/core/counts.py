"""Counts: how many pairs are kept. ``choice.py`` chooses which ones, given their scores.

Everything is in integers: ``int(1000 * (1 - 0.9))`` is 99 in floating point, and 100 here. ``compression_ratio`` is the
fraction *removed*, in [0, 1), read as the decimal number its user wrote.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from coldpress.core.choice import best, checked

__all__ = [
    "adaptive_counts",
    "apportion",
    "counts_together",
    "exact_keep",
    "keep_count",
    "pyramid_counts",
    "share_of",
    "spread",
    "spread_forced",
]


def exact_keep(n_tokens: int, ratio: float) -> Fraction:
    """``n_tokens * (1 - ratio)`` as an exact fraction, not rounded."""
    return n_tokens * (1 - Fraction(repr(float(ratio))))


def keep_count(n_tokens: int, ratio: float) -> int:
    """Tokens kept of ``n_tokens``: ``floor(n_tokens * (1 - ratio))`` without rounding error, at least 1."""
    return max(1, math.floor(exact_keep(n_tokens, ratio))) if n_tokens else 0


def pyramid_counts(n_tokens: int, mean: int | Fraction, n_layers: int, *, window: int, beta: int) -> list[int]:
    """Tokens kept by each layer when the first layer keeps most and the last one least.

    A straight line from ``max`` (layer 0) to ``min = mean / beta`` (last layer), of ``n_tokens``. If ``max`` does not
    fit beside the window, the line is flattened until it does; if the last layer would fall below the window, every
    layer keeps as many. The total is exactly ``n_layers * floor(mean)``; which of the three it is, ``mean`` itself
    says, so that half of an odd number of tokens is not another shape than half of an even one.

    Source: Cai et al. 2024, arXiv:2406.02069, equations 2 and 3.
    """

    def line_of(mean: int | Fraction) -> tuple[Fraction, Fraction]:
        low = Fraction(mean) / beta
        high = min(2 * mean - low, Fraction(n_tokens - window))
        return 2 * mean - high, high

    keep = max(1, math.floor(mean))
    low, high = line_of(mean)
    if n_layers < 2 or not high >= low >= window:
        return [keep] * n_layers
    low = max(Fraction(window), line_of(keep)[0])
    high = 2 * keep - low
    line = [high - i * (high - low) / (n_layers - 1) for i in range(n_layers)]
    counts = [math.floor(x) for x in line]
    by_remainder = sorted(range(n_layers), key=lambda i: (counts[i] - line[i], i))
    for i in by_remainder[: n_layers * keep - sum(counts)]:
        counts[i] += 1
    return counts


def adaptive_counts(scores: Tensor, n_keep: int, n_safe: int) -> Tensor:
    """How many pairs each head keeps when the heads of a layer compete for its budget.

    Every head keeps its ``n_safe`` best scores; the rest of the budget of ``Hkv * n_keep`` goes to the best scores
    left, whatever head they are in.

    Args:
        scores: ``[B, Hkv, T]``, comparable across heads; infinite where protected.
        n_keep: mean over the heads.
        n_safe: least number of any head, at most ``n_keep``.

    Returns:
        int64 ``[B, Hkv]``; each row adds up to ``Hkv * n_keep``.
    """
    n_batch, n_heads, _ = scores.shape
    scores = checked(scores)
    left = scores[~best(scores, n_safe)].view(n_batch, n_heads, scores.shape[-1] - n_safe)
    return n_safe + best(left.flatten(1), n_heads * (n_keep - n_safe)).view_as(left).sum(-1)


def counts_together(scores: Sequence[Tensor], n_keep: int, n_safe: int) -> list[Tensor]:
    """:func:`adaptive_counts` where the heads of all layers compete for one budget.

    Args:
        scores: by layer, ``[B, Hkv, T]`` each.
        n_keep: mean over layers and heads.
        n_safe: least number of any head.

    Returns:
        int64 ``[B, Hkv]`` by layer, each on its layer's device.
    """
    together = torch.cat([part.to(scores[0].device) for part in scores], dim=1)  # [B, sum of Hkv, T]
    counts = adaptive_counts(together, n_keep, n_safe).split([part.shape[1] for part in scores], dim=1)
    return [own.to(part.device) for own, part in zip(counts, scores, strict=True)]


def apportion(total: int, shares: Sequence[float], low: int, high: int) -> list[int]:
    """``total`` places given out in proportion to ``shares``, as far as each may have ``low`` to ``high`` of them.

    Args:
        total: from ``len(shares) * low`` to ``len(shares) * high``.
        shares: not negative; among equal remainders the earlier one is rounded up.

    Returns:
        One count for each share; they add up to ``total`` exactly.
    """
    shares = [max(share, 1e-9) for share in shares]  # a share of 0 gets what the others have no room for

    def at(factor: float) -> list[float]:
        return [min(float(high), max(float(low), factor * share)) for share in shares]

    below, above = 0.0, high / min(shares)
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(at(middle)) <= total else (below, middle)
    wanted = at(below)
    counts = [math.floor(x) for x in wanted]
    for i in sorted(range(len(counts)), key=lambda i: (counts[i] - wanted[i], i)) * 2:
        if sum(counts) < total and counts[i] < high:
            counts[i] += 1
    return counts


def share_of(n: int, share: float) -> int:
    """``floor(n * share)`` without rounding error."""
    return math.floor(Fraction(repr(float(share))) * n)


def spread(n_keep: int, n_forced: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many tokens each part of a text keeps, in proportion to its size.

    Args:
        n_keep: tokens that all parts keep together, at least ``sum(n_forced)``.
        n_forced: protected tokens of each part; they are kept.
        sizes: tokens of each part.

    Returns:
        One count for each part; they add up to ``n_keep`` exactly. The largest remainders are rounded up, the earlier
        one among equals, so that parts of one size differ by one token at most.
    """
    free, total = n_keep - sum(n_forced), sum(sizes) - sum(n_forced)
    shares = [divmod(free * (size - forced), max(1, total)) for forced, size in zip(n_forced, sizes, strict=True)]
    counts = [forced + whole for forced, (whole, _) in zip(n_forced, shares, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-shares[i][1], i))
    for i in by_remainder[: n_keep - sum(counts)]:
        counts[i] += 1
    return counts


def spread_forced(n_keep: int, must: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    """:func:`spread` for heads that may differ in the tokens that must be kept.

    Args:
        n_keep: tokens that every head keeps of the whole text.
        must: bool ``[B, Hkv, T]``, at most ``n_keep`` of each head.
        cuts: where each part begins, and the end of the last.

    Returns:
        int64 ``[B, Hkv]`` for each part.
    """
    parts = [*itertools.pairwise(cuts)]
    n_forced = torch.stack([must[..., start:stop].sum(-1) for start, stop in parts], dim=-1)  # [B, Hkv, parts]
    sizes, known = [stop - start for start, stop in parts], {}
    for of_head in set(map(tuple, n_forced.flatten(0, 1).tolist())):
        known[of_head] = spread(n_keep, of_head, sizes)
    counts = torch.tensor([[known[tuple(head)] for head in row] for row in n_forced.tolist()], device=must.device)
    return list(counts.unbind(-1))
