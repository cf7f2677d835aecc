"""Windows: every token but the first is scored exactly once, from a token before it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldpress.errors import DataError, InputError
from coldpress.eval.windows import plan_prefix, plan_strided, strided_scored_tokens


@given(st.integers(2, 300), st.integers(2, 60), st.data())
def test_every_token_but_the_first_is_scored_exactly_once(n_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    windows = plan_strided(n_tokens, length, stride)
    scored = [token for window in windows for token in range(window.first_scored, window.end)]
    assert scored == list(range(1, n_tokens))
    assert len(scored) == strided_scored_tokens(n_tokens, length, stride) == sum(w.n_scored for w in windows)
    for window in windows:
        assert 0 <= window.begin < window.first_scored < window.end <= n_tokens
        assert window.end - window.begin <= length
        assert window.first_scored - window.begin >= min(window.first_scored, length - stride)  # context of each token
    assert windows[-1].end == n_tokens


@given(st.integers(2, 300), st.integers(2, 60))
def test_side_by_side_each_window_loses_its_first_token(n_tokens: int, length: int) -> None:
    windows = plan_strided(n_tokens, length, length)
    scored = [token for window in windows for token in range(window.first_scored, window.end)]
    assert scored == [token for token in range(n_tokens) if token % length]
    assert len(scored) == strided_scored_tokens(n_tokens, length, length) == n_tokens - math.ceil(n_tokens / length)


def test_windows_of_the_transformers_documentation() -> None:
    windows = plan_strided(10, 4, 2)
    assert [(w.begin, w.end, w.first_scored) for w in windows] == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert [(w.begin, w.end) for w in plan_strided(3, 2048, 512)] == [(0, 3)]


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_texts_without_a_token_to_score(n_tokens: int) -> None:
    with pytest.raises(DataError, match="at least 2"):
        plan_strided(n_tokens, 8, 4)


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 0), (8, 9), (8, -1)])
def test_sizes_that_cannot_work(length: int, stride: int) -> None:
    with pytest.raises(InputError, match="max_length"):
        plan_strided(10, length, stride)


@given(st.integers(3, 200), st.integers(2, 40), st.integers(2, 40), st.none() | st.integers(1, 50))
def test_prefix_windows_are_whole_and_as_many_as_fit(
    n_tokens: int, context: int, target: int, stride: int | None
) -> None:
    width = context + target
    if n_tokens < width and (stride is None or stride >= target):
        with pytest.raises(DataError, match=f"{context} \\+ {target}"):
            plan_prefix(n_tokens, context, target, stride)
        return
    if stride is not None and stride < target:
        with pytest.raises(InputError, match=f"Give at least --stride {target}, or fewer --target_tokens"):
            plan_prefix(n_tokens, context, target, stride)
        return
    plan = plan_prefix(n_tokens, context, target, stride)
    scored = [i for start in plan.starts for i in range(start + context + 1, start + width)]
    assert len(scored) == len(set(scored))  # no token is in two windows' sums
    step = width if stride is None else stride
    assert plan.starts[0] == 0 and all(b - a == step for a, b in zip(plan.starts, plan.starts[1:], strict=False))
    assert plan.starts[-1] + width <= n_tokens < plan.starts[-1] + step + width
    assert plan.scored_per_window == target - 1  # the first target is predicted before anything is compressed


def test_prefix_windows_can_be_limited_and_have_least_sizes() -> None:
    assert plan_prefix(100, 6, 4, max_windows=3).starts == (0, 10, 20)
    for context, target, stride in ((0, 4, 1), (4, 1, 1), (4, 4, 0)):
        with pytest.raises(InputError, match="at least"):
            plan_prefix(100, context, target, stride)
