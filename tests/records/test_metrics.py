"""Numbers with error bars, against tables and direct computation."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coldpress.records.metrics import (
    bootstrap_difference,
    iid_se,
    paired_difference,
    perplexity,
    score_difference,
    student_t_975,
    wilson,
)


@pytest.mark.parametrize(
    ("degrees", "value"),
    [
        *((1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (5, 2.570582), (9, 2.262157), (10, 2.228139)),
        *((20, 2.085963), (30, 2.042272), (60, 2.000298), (120, 1.979930), (1000, 1.962339), (1_000_000, 1.959966)),
    ],
)
def test_student_t_agrees_with_the_tables(degrees: int, value: float) -> None:
    assert student_t_975(degrees) == pytest.approx(value, abs=2e-6)


def test_paired_difference_of_equal_windows_is_the_one_sample_t_test() -> None:
    losses, baseline = [11.0, 12.5, 9.0, 14.0], [10.0, 12.0, 9.5, 12.0]
    paired = paired_difference([5] * 4, losses, baseline)
    means = [(a - b) / 5 for a, b in zip(losses, baseline, strict=True)]
    se = statistics.stdev(means) / math.sqrt(4)
    assert paired.delta == pytest.approx(statistics.mean(means))
    assert paired.se == pytest.approx(se)
    assert paired.ci95 == pytest.approx((paired.delta - 3.182446 * se, paired.delta + 3.182446 * se), abs=1e-5)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 50), st.floats(0, 50)), min_size=2, max_size=12))
def test_paired_difference_of_unequal_windows(windows: list[tuple[int, float, float]]) -> None:
    counts, losses, baseline = (list(column) for column in zip(*windows, strict=True))
    total, n = sum(counts), len(counts)
    delta = sum(a - b for a, b in zip(losses, baseline, strict=True)) / total
    squares = 0.0
    for count, a, b in windows:
        squares += (a - b - delta * count) ** 2
    se = (n / (n - 1) * squares / total**2) ** 0.5
    paired = paired_difference(counts, losses, baseline)
    assert paired.delta == pytest.approx(delta, abs=1e-9)
    assert paired.se == pytest.approx(se, abs=1e-9)
    assert paired.ci95 is not None
    assert sum(paired.ci95) / 2 == pytest.approx(delta, abs=1e-9)


def test_one_window_has_no_error_bar() -> None:
    paired = paired_difference([4], [8.0], [6.0])
    assert (paired.delta, paired.se, paired.ci95) == (0.5, None, None)


def test_columns_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([4, 4], [8.0, 8.0], [6.0])


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 50)), min_size=2, max_size=12))
def test_a_clustered_mean_has_the_error_of_a_ratio(windows: list[tuple[int, float]]) -> None:
    """Sum of losses over sum of counts: its error by the residuals of each window around that ratio."""
    counts, losses = (list(column) for column in zip(*windows, strict=True))
    ratio, n = sum(losses) / sum(counts), len(counts)
    residuals = [loss - ratio * count for count, loss in windows]
    variance = n * statistics.variance(residuals, 0.0) / sum(counts) ** 2  # the residuals sum to zero
    mean, se, ci = paired_difference(counts, losses)
    assert mean == pytest.approx(ratio, abs=1e-9)
    assert se == pytest.approx(math.sqrt(variance), abs=1e-7)
    assert ci is not None and ci[1] - ci[0] == pytest.approx(2 * student_t_975(n - 1) * math.sqrt(variance), abs=1e-6)
    assert paired_difference(counts[:1], losses[:1]) == (losses[0] / counts[0], None, None)


def test_windows_of_one_token_have_the_error_of_a_plain_mean() -> None:
    losses = [2.0, 3.5, 1.0, 4.0, 2.5]
    assert paired_difference([1] * 5, losses).se == pytest.approx(statistics.stdev(losses) / math.sqrt(5))


def test_the_bootstrap_draws_from_all_that_can_be_drawn() -> None:
    """Against the exact distribution: each of the 5**5 ordered draws once."""
    counts, losses, baseline = [3, 5, 2, 4, 6], [9.0, 11.0, 7.5, 9.0, 20.0], [6.0, 10.0, 4.0, 8.5, 12.0]
    drawn = [
        sum(losses[i] - baseline[i] for i in draw) / sum(counts[i] for i in draw)
        for draw in itertools.product(range(5), repeat=5)
    ]
    low, high = numpy.quantile(drawn, (0.025, 0.975))
    found = bootstrap_difference(counts, losses, baseline, resamples=40_000)
    assert found == pytest.approx((low, high), abs=0.02)
    many = [1.7**i for i in range(20)]
    assert bootstrap_difference([1] * 20, many) == bootstrap_difference([1] * 20, many)
    assert bootstrap_difference([1] * 20, many) != bootstrap_difference([1] * 20, many, seed=1)
    assert bootstrap_difference(counts, losses) == bootstrap_difference(counts, losses, [0.0] * 5)
    assert bootstrap_difference([3], [9.0], [6.0]) is None
    with pytest.raises(ValueError, match="zip"):
        bootstrap_difference(counts, losses, baseline[:4])


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=2, max_size=40))
def test_the_error_of_independent_tokens_is_that_of_the_log_ratio(pairs: list[tuple[float, float]]) -> None:
    """llama.cpp's: Var_Q + Var_base - 2 Cov of the single losses, each over n - 1."""
    own, base = ([float(v) for v in column] for column in zip(*pairs, strict=True))
    n = len(own)

    def covariance(a: list[float], b: list[float]) -> float:
        return (sum(x * y for x, y in zip(a, b, strict=True)) / n - sum(a) / n * sum(b) / n) / (n - 1)

    assert iid_se(torch.tensor(own).double()) == pytest.approx(math.sqrt(max(0, covariance(own, own))), abs=1e-4)
    ratio = covariance(own, own) + covariance(base, base) - 2 * covariance(own, base)
    values = torch.tensor(own).double() - torch.tensor(base).double()
    assert iid_se(values.reshape(1, -1)) == pytest.approx(math.sqrt(max(0.0, ratio)), abs=1e-4)
    assert iid_se(values[:1]) is None


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(math.log(20)) == pytest.approx(20)
    assert perplexity(1e6) == math.inf


def by_search(score: float, n: int) -> tuple[float, float]:
    """Wilson's interval as it is defined: all means whose own standard error, times z, reaches to ``score``."""
    z = statistics.NormalDist().inv_cdf(0.975)

    def end(outside: float) -> float:
        inside = score
        for _ in range(200):
            middle = (inside + outside) / 2
            reaches = abs(score - middle) <= z * math.sqrt(middle * (1 - middle) / n)
            inside, outside = (middle, outside) if reaches else (inside, middle)
        return inside

    return end(0.0), end(1.0)


@pytest.mark.parametrize("n", [1, 2, 10, 500])
@pytest.mark.parametrize("score", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_wilson_s_interval_is_what_it_is_defined_as(score: float, n: int) -> None:
    assert wilson(score, n) == pytest.approx(by_search(score, n), abs=1e-9)


def by_counts(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Newcombe's interval of a paired difference from the four counts of a table, with phi of the table."""
    n = both + first + second + neither
    a, b = (both + first) / n, (both + second) / n
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = (both * neither - first * second) / math.sqrt(margins) if margins else 0.0
    (l1, u1), (l2, u2) = by_search(a, n), by_search(b, n)
    down = (a - l1) ** 2 - 2 * phi * (a - l1) * (u2 - b) + (u2 - b) ** 2
    up = (b - l2) ** 2 - 2 * phi * (b - l2) * (u1 - a) + (u1 - a) ** 2
    return a - b - math.sqrt(max(0, down)), a - b + math.sqrt(max(0, up))


@pytest.mark.parametrize("counts", [*itertools.product([0, 1, 7], [0, 3, 8], [0, 2, 9], [1, 6])])
def test_the_interval_of_a_paired_difference_is_that_of_its_table(counts: tuple[int, int, int, int]) -> None:
    answers = [(1, 1), (1, 0), (0, 1), (0, 0)]
    pairs = [pair for pair, n in zip(answers, counts, strict=True) for _ in range(n)]
    low, high = score_difference(*([float(x) for x in column] for column in zip(*pairs, strict=True)))
    assert (low, high) == pytest.approx(by_counts(*counts), abs=1e-9)
    assert -1 <= low <= high <= 1


def test_the_interval_of_a_paired_difference_covers_it() -> None:
    """The true difference is inside for about 95 of 100 samples of 20 pairs, half of them alike."""
    draw, inside = random.Random(0), 0
    for _ in range(1000):
        own, base = [], []
        for _ in range(20):
            a, b = draw.random(), draw.random()
            alike = draw.random() < 0.5
            own.append(float(a < 0.6))
            base.append(float((a if alike else b) < 0.8))
        low, high = score_difference(own, base)
        inside += low <= -0.2 <= high
    assert 930 <= inside <= 980
