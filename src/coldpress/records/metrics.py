"""From per-token losses to numbers with error bars.

Tokens of one window share their context, so they are not independent: the window is the unit of sampling, and every
difference to the baseline is taken on the same tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


_AT_ONCE = 2_000_000  # drawn numbers that are held together
FEW_WINDOWS = 30  # with fewer, the bootstrap stands beside Student's t
FEWEST_QUESTIONS = 8  # with fewer, answers decide nothing: an interval of two that are alike has no width


class Paired(NamedTuple):
    """Mean difference of losses to the baseline, in nats a token; to a baseline of 0, the mean loss itself."""

    delta: float  # mean over tokens of (loss - baseline loss)
    se: float | None  # its standard error, clustered by window; None with a single window
    # two-sided 95 % confidence interval (Student's t, windows - 1 degrees of freedom); None likewise
    ci95: tuple[float, float] | None


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def paired_difference(
    counts: Sequence[int], losses: Sequence[float], baseline: Sequence[float] | None = None
) -> Paired:
    """Compare sums of losses window by window; without a baseline they are compared with 0, which gives their mean.

    With n_w tokens and d_w = losses_w - baseline_w in window w: delta = sum d_w / sum n_w and
    se**2 = W / (W - 1) * sum (d_w - delta * n_w)**2 / (sum n_w)**2. Of a mean loss, exp of the interval's ends is the
    interval of the perplexity.

    Args:
        counts: scored tokens of each window.
        losses, baseline: sums of the losses of those tokens, in nats.
    """
    total = sum(counts)
    differences = _differences(losses, baseline)
    delta = math.fsum(differences) / total
    n_windows = len(counts)
    if n_windows < 2:
        return Paired(delta, None, None)
    squares = math.fsum((d - delta * n) ** 2 for d, n in zip(differences, counts, strict=True))
    se = math.sqrt(n_windows / (n_windows - 1) * squares) / total
    half = student_t_975(n_windows - 1) * se
    return Paired(delta, se, (delta - half, delta + half))


def _differences(losses: Sequence[float], baseline: Sequence[float] | None) -> list[float]:
    return [a - b for a, b in zip(losses, [0.0] * len(losses) if baseline is None else baseline, strict=True)]


def bootstrap_difference(
    counts: Sequence[int], losses: Sequence[float], baseline: Sequence[float] | None = None, **options: int
) -> tuple[float, float] | None:
    """:func:`bootstrap` of the mean difference, sum d_w / sum n_w, as :func:`paired_difference` is given it."""
    return bootstrap([_differences(losses, baseline), counts], lambda d, n: d / n, **options)


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Callable[..., Tensor], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of a statistic of sums over windows that are drawn anew, as many as there are, with replacement.

    The ends are its 2.5 % and 97.5 % points over the draws, the same ones every time: no normal distribution is
    assumed, as by Student's t. With very few windows it is too narrow: it never sees a window that was not drawn.

    Args:
        columns: numbers of each window, or of each context.
        statistic: of the sum of each column; draws for which it is not finite do not count.

    Returns:
        None with a single window, or where no draw counts.
    """
    import torch  # which a report does without

    n = min(map(len, columns), default=0)
    if n < 2:
        return None
    numbers = [torch.tensor(column, dtype=torch.float64) for column in columns]
    generator = torch.Generator().manual_seed(seed)
    found, step = [], max(1, _AT_ONCE // n)
    for start in range(0, resamples, step):
        drawn = torch.randint(n, (min(step, resamples - start), n), generator=generator)
        found.append(statistic(*(column[drawn].sum(-1) for column in numbers)))
    values = torch.cat(found)
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def iid_se(values: Tensor) -> float | None:
    """The standard error that llama.cpp's perplexity tool prints, which takes tokens for independent.

    sqrt((mean(v**2) - mean(v)**2) / (n - 1)). Tokens of one text are not independent, so it is too small; it is for
    comparison with what that tool says. Of its log-ratio of perplexities, ``values`` are the differences of the losses,
    which is its Var_Q + Var_base - 2 Cov.

    Args:
        values: losses, or their differences to the baseline's, of single tokens, any shape.

    Returns:
        None for fewer than two.
    """
    v = values.double().flatten()
    return None if len(v) < 2 else float((v.var(correction=0) / (len(v) - 1)).sqrt())


def bits_per_byte(nll: float, n_bytes: int) -> float | None:
    """Bits for each byte of text, ``nll / (n_bytes * ln 2)``: comparable between tokenizers, as perplexity is not.

    ``nll``: sum of the losses of the tokens that stand for ``n_bytes``, in nats. None without any bytes.
    """
    return nll / (n_bytes * math.log(2)) if n_bytes else None


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


Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson(score: float, n: int) -> tuple[float, float]:
    """95 % interval of a mean of ``n`` scores in [0, 1], which stays in there: Wilson's, of proportions.

    For scores between 0 and 1 it is too wide rather than too narrow: nothing in [0, 1] of that mean varies more.
    """
    middle = (score + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(max(0.0, score * (1 - score)) / n + Z * Z / (4 * n * n))
    return max(0.0, min(score, middle - half)), min(1.0, max(score, middle + half))


def score_difference(scores: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean paired difference of scores in [0, 1]; stays in [-1, 1], has a width for a few alike.

    Newcombe 1998 (Statistics in Medicine 17:2635), method 8: Wilson's intervals of both means, their distances to the
    means squared and added, less the part that the correlation of the pairs takes away.
    """
    n = len(scores)
    a, b = math.fsum(scores) / n, math.fsum(baseline) / n
    spread_a, spread_b = (math.fsum((x - m) ** 2 for x in own) for own, m in ((scores, a), (baseline, b)))
    both = math.fsum((x - a) * (y - b) for x, y in zip(scores, baseline, strict=True))
    r = both / math.sqrt(spread_a * spread_b) if spread_a > 0 and spread_b > 0 else 0.0
    (low_a, high_a), (low_b, high_b) = wilson(a, n), wilson(b, n)

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * r * x * y + y * y))

    return a - b - distance(a - low_a, high_b - b), a - b + distance(high_a - a, b - low_b)
