"""Scores under a press beside those of the uncompressed cache, on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from coldpress.eval.benchmarks.benchmark import Share

__all__ = ["bootstrap_interval", "mcnemar", "mean"]

_AT_ONCE = 2_000_000  # drawn numbers that are held together


def mean(shares: Sequence[Share]) -> float | None:
    """What was reached out of all; None where nothing could be."""
    total = math.fsum(share.of for share in shares)
    return math.fsum(share.reached for share in shares) / total if total else None


def bootstrap_interval(
    own: Sequence[Share], base: Sequence[Share], contexts: Sequence[int], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the difference of two means, from contexts that are drawn anew, with all their questions.

    Questions about one context share a compressed cache, so they are not independent; contexts are.

    Args:
        own, base: shares of each question, under a press and uncompressed.
        contexts: which one each question is about.
        resamples, seed: how often is drawn, and the seed of the drawing: the same every time.

    Returns:
        The 2.5 % and 97.5 % points; None with a single context, or where nothing could be reached.
    """
    places = {context: i for i, context in enumerate(dict.fromkeys(contexts))}
    n = len(places)
    if n < 2:
        return None
    sums = torch.zeros(4, n, dtype=torch.float64)
    for mine, other, context in zip(own, base, contexts, strict=True):
        sums[:, places[context]] += torch.tensor([*mine, *other], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    differences, step = [], max(1, _AT_ONCE // n)
    for start in range(0, resamples, step):
        drawn = torch.randint(n, (min(step, resamples - start), n), generator=generator)
        reached, of, reached_base, of_base = sums[:, drawn].sum(-1)
        differences.append(reached / of - reached_base / of_base)
    found = torch.cat(differences)
    found = found[found.isfinite()]
    if not len(found):
        return None
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mcnemar(own: Sequence[Share], base: Sequence[Share]) -> tuple[int, int, float] | None:
    """Questions that a press gets right and the uncompressed cache wrong, the other way round, and the exact p.

    The two-sided p of McNemar's test: how likely so uneven a split of the changed ones is if both sides are equally so.

    Returns:
        None where an answer can be right in part.
    """
    if any(share.of != 1 or share.reached not in (0, 1) for share in (*own, *base)):
        return None
    gained = sum(mine.reached > other.reached for mine, other in zip(own, base, strict=True))
    lost = sum(mine.reached < other.reached for mine, other in zip(own, base, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return gained, lost, min(1.0, 2 * tail / 2**changed)
