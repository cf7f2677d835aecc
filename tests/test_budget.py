"""How many are kept, and which ones, against slow and obvious versions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from coldpress.core.choice import best, pack, select, select_counts, unpack
from coldpress.core.counts import adaptive_counts, apportion, exact_keep, keep_count, pyramid_counts
from coldpress.core.forced import must_keep, shrink_protected
from coldpress.core.ratio import check_ratio
from coldpress.errors import PressError

ratios = st.integers(0, 9999).map(lambda n: n / 10_000)
lengths = st.integers(1, 200_000)


@given(lengths, st.integers(0, 9999))
@example(1000, 9000)  # int(1000 * (1 - 0.9)) is 99
def test_keep_count_is_exact_in_decimals(n_tokens: int, ten_thousandths: int) -> None:
    exact = math.floor(n_tokens * (1 - Fraction(ten_thousandths, 10_000)))
    assert keep_count(n_tokens, ten_thousandths / 10_000) == max(1, exact)


@given(lengths, st.floats(0, 1, exclude_max=True))
def test_keep_count_is_in_range(n_tokens: int, ratio: float) -> None:
    assert 1 <= keep_count(n_tokens, ratio) <= n_tokens
    assert keep_count(n_tokens, 0.0) == n_tokens and keep_count(0, ratio) == 0


@given(lengths, ratios, ratios)
def test_keep_count_is_monotone(n_tokens: int, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert keep_count(n_tokens, low) >= keep_count(n_tokens, high)
    assert keep_count(n_tokens + 1, low) - keep_count(n_tokens, low) in (0, 1)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 50, math.nan, math.inf, "0.5", None, True, 0.5j])
def test_ratios_that_are_refused(ratio: object) -> None:
    with pytest.raises(PressError, match=r"number in \[0, 1\)"):
        check_ratio(ratio)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.999, Fraction(1, 3)])
def test_ratios_that_are_allowed(ratio: object) -> None:
    check_ratio(ratio)


@given(st.integers(1, 20_000), ratios, st.integers(1, 80), st.integers(1, 128), st.integers(1, 50))
@example(1024, 0.5, 12, 64, 20)
@example(45, 0.5, 2, 8, 20)
@example(767, 0.5, 30, 64, 20)
def test_pyramid(n_tokens: int, ratio: float, n_layers: int, window: int, beta: int) -> None:
    mean = exact_keep(n_tokens, ratio)
    counts = pyramid_counts(n_tokens, mean, n_layers, window=window, beta=beta)
    assert len(counts) == n_layers and sum(counts) == n_layers * keep_count(n_tokens, ratio)
    assert all(1 <= count <= n_tokens for count in counts)
    assert counts == sorted(counts, reverse=True)
    if len(set(counts)) > 1:  # a straight line, up to rounding, that leaves room for the window
        assert counts[-1] >= window and counts[0] <= n_tokens - window + 1
        step = (counts[0] - counts[-1]) / (n_layers - 1)
        assert all(abs(counts[0] - i * step - count) < 2 for i, count in enumerate(counts))


def test_pyramid_by_hand() -> None:
    assert pyramid_counts(1000, 200, 5, window=8, beta=4) == [350, 275, 200, 125, 50]  # 50 = 200 / 4, mean 200
    assert pyramid_counts(1000, 500, 3, window=64, beta=20) == [936, 500, 64]  # flattened to fit beside the window
    assert pyramid_counts(1000, 100, 3, window=64, beta=20) == [100] * 3  # the last layer would lose its window
    assert pyramid_counts(1000, 500, 1, window=8, beta=20) == [500]
    assert pyramid_counts(1000, 500, 4, window=8, beta=1) == [500] * 4


def test_a_pyramid_of_half_of_an_odd_text_is_one_too() -> None:
    """Whole pairs on average, 383 of 767 at 0.5, would leave the last layer 63 of 64, and so make all layers equal."""
    even = pyramid_counts(766, exact_keep(766, 0.5), 30, window=64, beta=20)
    odd = pyramid_counts(767, exact_keep(767, 0.5), 30, window=64, beta=20)
    assert even == odd and odd[0] == 702 and odd[-1] == 64 and sum(odd) == 30 * 383
    assert pyramid_counts(767, 383, 30, window=64, beta=20) == [383] * 30  # 383 were asked for, as budget_tokens


@given(st.integers(1, 300), st.integers(0, 100), st.integers(0, 100))
def test_shrink_protected(n_keep: int, n_sink: int, n_window: int) -> None:
    sink, window = shrink_protected(n_keep, n_sink, n_window)
    assert 0 <= sink <= n_sink and 0 <= window <= n_window and sink + window <= n_keep
    assert (window > 0) == (n_window > 0)
    if n_sink + n_window <= n_keep:
        assert (sink, window) == (n_sink, n_window)
    elif n_window:  # half of the budget stays free for what the scores ask for, unless the sinks need it
        assert window == min(n_window, max(1, n_keep // 2))


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[float], int, int, int]:
    n_tokens = draw(st.integers(1, 40))
    value = st.one_of(st.integers(-2, 2).map(float), st.floats(-5, 5, width=32), st.sampled_from([math.inf, -math.inf]))
    scores = draw(st.lists(value, min_size=n_tokens, max_size=n_tokens))
    sink, window = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    return scores, draw(st.integers(1, n_tokens)), sink, window


def slow_select(scores: list[float], n_keep: int, n_sink: int, n_window: int) -> list[int]:
    """Protected tokens first, then the best scores; among equals the earlier token."""
    n_sink, n_window = shrink_protected(n_keep, n_sink, n_window)
    n_tokens = len(scores)
    raised = [math.inf if t < n_sink or t >= n_tokens - n_window else score for t, score in enumerate(scores)]
    return sorted(sorted(range(n_tokens), key=lambda t: (-raised[t], t))[:n_keep])


@given(selections())
def test_select(drawn: tuple[list[float], int, int, int]) -> None:
    scores, n_keep, n_sink, n_window = drawn
    reverse = scores[::-1]
    must = must_keep(torch.arange(len(scores))[None, None], len(scores), (n_sink, n_window), n_keep)
    index = select(torch.tensor([[scores, reverse]]), n_keep, must)
    assert index.dtype == torch.long and index.shape == (1, 2, n_keep)
    finite = math.inf not in scores  # an infinite score is as good as protection, and may take its place
    for found, row in zip(index[0].tolist(), (scores, reverse), strict=True):
        assert found == slow_select(row, n_keep, n_sink, n_window)
        if finite:
            sink, window = shrink_protected(n_keep, n_sink, n_window)
            kept = set(found)
            assert kept >= set(range(sink)) | set(range(len(row) - window, len(row)))


def test_select_takes_heads_and_rows_apart_and_leaves_the_scores_alone() -> None:
    scores = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    index = select(scores, 20, must_keep(torch.arange(50)[None, None], 50, (4, 3), 20))
    assert torch.equal(scores, before)
    for row in range(3):
        for head in range(2):
            assert index[row, head].tolist() == slow_select(scores[row, head].tolist(), 20, 4, 3)


def test_select_refuses_nan() -> None:
    scores = torch.zeros(1, 2, 10)
    scores[0, 1, 3] = torch.nan
    with pytest.raises(PressError, match="NaN"):
        select(scores, 5)


@st.composite
def competing_heads(draw: st.DrawFn) -> tuple[list[list[float]], int, int]:
    """Scores of some heads with equal ones among them, the mean number kept, and the least."""
    n_heads, n_tokens = draw(st.integers(1, 4)), draw(st.integers(2, 20))
    value = st.one_of(st.integers(-2, 2).map(float), st.sampled_from([math.inf, -math.inf]))
    row = st.lists(value, min_size=n_tokens, max_size=n_tokens)
    heads = draw(st.lists(row, min_size=n_heads, max_size=n_heads))
    n_keep = draw(st.integers(1, n_tokens - 1))
    return heads, n_keep, draw(st.integers(0, n_keep))


@given(competing_heads(), st.data())
def test_best_and_a_number_of_its_own_for_every_head(
    drawn: tuple[list[list[float]], int, int], data: st.DataObject
) -> None:
    heads, n_keep, _ = drawn
    n_tokens = len(heads[0])
    counts = [data.draw(st.integers(0, n_tokens)) for _ in heads]
    scores = torch.tensor([heads])
    expected = [slow_select(row, n, 0, 0) for row, n in zip(heads, counts, strict=True)]
    found = best(scores, torch.tensor([counts]))[0]
    assert [row.nonzero()[:, 0].tolist() for row in found] == expected
    same = best(scores, n_keep)[0]
    assert [row.nonzero()[:, 0].tolist() for row in same] == [slow_select(row, n_keep, 0, 0) for row in heads]
    assert not best(scores, 0).any()
    positions = select_counts(scores, torch.tensor([counts]))[0].tolist()
    assert positions == [row + [-1] * (max(counts) - len(row)) for row in expected]


@given(competing_heads())
def test_adaptive_counts(drawn: tuple[list[list[float]], int, int]) -> None:
    heads, n_keep, n_safe = drawn
    counts = [n_safe] * len(heads)
    left = [(-x, h) for h, row in enumerate(heads) for x in sorted(row, reverse=True)[n_safe:]]
    for _, head in sorted(left)[: len(heads) * (n_keep - n_safe)]:
        counts[head] += 1
    assert adaptive_counts(torch.tensor([heads]), n_keep, n_safe).tolist() == [counts]


def test_two_layers_are_a_pyramid_too() -> None:
    assert pyramid_counts(100, 50, 2, window=4, beta=5) == [90, 10]


def test_all_places_are_given_out_where_shares_differ_most() -> None:
    assert apportion(30, [1.0, 0.1, 0.001], 0, 10) == [10, 10, 10]
    assert apportion(29, [0.001, 1.0, 0.1], 1, 10) == [9, 10, 10]
    assert apportion(6, [10.0, 20.0, 30.0], 0, 10) == [1, 2, 3]  # shares that are larger than what they get


def test_packed_positions_end_with_minus_one() -> None:
    is_kept = torch.tensor([[[True, False, True, True], [False, False, True, False]]])
    positions = pack(is_kept)
    assert positions.tolist() == [[[0, 2, 3], [2, -1, -1]]]
    assert torch.equal(unpack(positions, 4), is_kept)
