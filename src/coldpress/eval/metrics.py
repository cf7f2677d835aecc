"""From per-token losses to numbers with error bars.

Tokens of one window share their context, so they are not independent: the window is the unit of sampling, and every
difference to the baseline is taken on the same tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Paired", "paired_difference", "perplexity", "quantiles", "student_t_975"]


@dataclass(frozen=True)
class Paired:
    """Mean difference of losses to the baseline, in nats a token.

    Attributes:
        delta: mean over tokens of (loss - baseline loss).
        se: its standard error, clustered by window; None with a single window.
        ci95: two-sided 95 % confidence interval (Student's t, windows - 1 degrees of freedom); None likewise.
    """

    delta: float
    se: float | None
    ci95: tuple[float, float] | None


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def paired_difference(counts: Sequence[int], losses: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare sums of losses window by window.

    With n_w tokens and d_w = losses_w - baseline_w in window w: delta = sum d_w / sum n_w and
    se**2 = W / (W - 1) * sum (d_w - delta * n_w)**2 / (sum n_w)**2.

    Args:
        counts: scored tokens of each window.
        losses, baseline: sums of the losses of those tokens, in nats.
    """
    total = sum(counts)
    differences = [a - b for a, b in zip(losses, baseline, strict=True)]
    delta = math.fsum(differences) / total
    n_windows = len(counts)
    if n_windows < 2:
        return Paired(delta, None, None)
    squares = math.fsum((d - delta * n) ** 2 for d, n in zip(differences, counts, strict=True))
    se = math.sqrt(n_windows / (n_windows - 1) * squares) / total
    half = student_t_975(n_windows - 1) * se
    return Paired(delta, se, (delta - half, delta + half))


@functools.cache
def student_t_975(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution, to six digits."""
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)

    def density(x: float) -> float:
        return math.exp(log_norm - (degrees + 1) / 2 * math.log1p(x * x / degrees))

    def mass(x: float, n: int = 2000) -> float:  # Simpson's rule from 0 to x, x = tan(u) keeps heavy tails in reach
        step = math.atan(x) / n
        values = [density(math.tan(i * step)) / math.cos(i * step) ** 2 for i in range(n + 1)]
        return step / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))

    low, high = 1.9, 13.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < 0.475 else (low, middle)
    return (low + high) / 2


def quantiles(values: Sequence[float], points: Sequence[float]) -> list[float]:
    """Linearly interpolated quantiles of ``values`` at ``points`` in [0, 1]."""
    ordered = sorted(values)
    result = []
    for point in points:
        at = point * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        result.append(ordered[low] + (ordered[high] - ordered[low]) * (at - low))
    return result
