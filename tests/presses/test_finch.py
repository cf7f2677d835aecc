"""Finch: scores by the question, wherever it begins, and keys that move together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.presses.views import MODELS, rotated, unrotated, views_of
from torch import Tensor
from transformers import DynamicCache

from coldpress import (
    AdaKVPress,
    DecodingPress,
    FinchPress,
    KeyRerotationPress,
    LayerView,
    PressedCache,
    SnapKVPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.counts import keep_count
from coldpress.errors import PressError

N, WINDOW = 30, 5
IDS = tokens(2, N)


def oracle(view: LayerView, row: int, head: int, window: int, normalize: bool) -> list[float]:
    """The mean over the window's queries and the group's heads of attention (times what the query sees)."""
    totals = [0.0] * N
    group = range(head * view.group_size, (head + 1) * view.group_size)
    for q in range(N - window, N):
        for i in group:
            logits = [float(view.queries[row, i, q] @ view.keys[row, head, t]) * view.scaling for t in range(q + 1)]
            sizes = [math.exp(x - max(logits)) for x in logits]
            for t, size in enumerate(sizes):
                totals[t] += size / sum(sizes) * (len(sizes) if normalize else 1) / window / len(group)
    return totals


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("normalize", [True, False])
def test_scores(model: str, normalize: bool) -> None:
    press = FinchPress(0.5, window_size=WINDOW, normalize_scores=normalize)
    for view in views_of(model, IDS):
        scores, kept = press.score(view), press.choose(view)
        for row in range(2):
            for head in range(view.keys.shape[1]):
                expected = oracle(view, row, head, WINDOW, normalize)
                torch.testing.assert_close(scores[row, head], torch.tensor(expected), atol=1e-4, rtol=1e-4)
                best = sorted(range(N - WINDOW), key=lambda t, s=expected: -s[t])[: 15 - WINDOW]
                assert kept[row, head].tolist() == sorted(best) + list(range(N - WINDOW, N))


def test_normalising_matters() -> None:
    """K: a query was weighed by the number of tokens before it, one less than it sees."""
    (view, _) = views_of("llama", IDS)
    plain, normal = (FinchPress(0.5, window_size=WINDOW, normalize_scores=n).scores(view) for n in (False, True))
    ratio = normal / plain
    assert ratio.min() > N - WINDOW + 0.99 and ratio.max() < N + 0.01 and ratio.std() > 0.1


@pytest.mark.parametrize("model", MODELS)
def test_next_tokens_follow_the_kept_ones_without_a_gap(model: str) -> None:
    """The oracle: keys of the kept tokens before rotation, rotated to 0 .. n - 1, in a cache of length n."""
    net, ids, more = tiny(model), tokens(1, N), tokens(1, 4, seed=2)
    past, side_by_side = PressedCache(FinchPress(0.6, window_size=WINDOW)), DynamicCache()
    with torch.no_grad():
        net(ids, **cache_argument(past))
    for i, layer in enumerate(past.pressed_layers()):
        _, keys = unrotated(model, ids, i)
        kept = layer.positions()[0]
        placed = [
            torch.stack([rotated(model, keys[0, h, t], j) for j, t in enumerate(head.tolist())])
            for h, head in enumerate(kept)
        ]
        side_by_side.update(torch.stack(placed)[None], layer.values, i)
    with torch.no_grad():
        expected = net(more, **cache_argument(side_by_side)).logits
        torch.testing.assert_close(net(more, **cache_argument(past)).logits, expected, atol=1e-4, rtol=0)
        past = PressedCache(FinchPress(0.6, window_size=WINDOW, rerotate_keys=False))
        net(ids, **cache_argument(past))
        assert (net(more, **cache_argument(past)).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("ratio", "chunk"), [(0.5, 8), (0.3, 11), (0.9, 7), (0.5, 100), (0.99, 4)])
def test_chunks_keep_their_shares(ratio: float, chunk: int) -> None:
    press = FinchPress(ratio, chunk_length=chunk, window_size=WINDOW)
    n_keep = keep_count(N, ratio)
    for view in views_of("llama", IDS):
        kept = press.choose(view)
        assert kept.shape == (2, 2, n_keep)
        if chunk >= N:
            assert torch.equal(kept, replace(press, chunk_length=None).choose(view))
        scores = press.scores(view)
        for row in range(2):
            for head in range(2):
                mine = kept[row, head].tolist()
                assert mine == sorted(set(mine))
                if n_keep > WINDOW:
                    assert mine[-WINDOW:] == list(range(N - WINDOW, N))
                for start in range(0, N - WINDOW, chunk):  # the best of each chunk, outside the question
                    inside = range(start, min(start + chunk, N - WINDOW))
                    own = [t for t in mine if t in inside]
                    best = sorted(inside, key=lambda t, s=scores[row, head]: -float(s[t]))[: len(own)]
                    assert own == sorted(best)
                    if n_keep > WINDOW:
                        assert abs(len(own) - len(inside) * (n_keep - WINDOW) / (N - WINDOW)) < 1


# -- where the question begins -----------------------------------------------------------------------------------------


def compressed(press: FinchPress, ids: Tensor, name: str = "llama") -> PressedCache:
    past, model = PressedCache(), tiny(name)
    with torch.no_grad(), press(model):
        model(ids, **cache_argument(past))
    return past


@pytest.mark.parametrize("delimiter", [2, [1, 2], (2, 1, 2)])
def test_a_delimiter_says_where_the_question_begins(delimiter: Any) -> None:
    mark = [delimiter] if isinstance(delimiter, int) else list(delimiter)
    ids = tokens(2, N)
    for row, first in zip(ids, (4, 7), strict=True):
        row[first : first + len(mark)] = torch.tensor(mark)  # an earlier one, which does not count
        row[N - WINDOW - len(mark) : N - WINDOW] = torch.tensor(mark)
    found = compressed(FinchPress(0.5, delimiter_token_id=delimiter), ids)
    told = compressed(FinchPress(0.5, window_size=WINDOW), ids)
    for ours, theirs in zip(found.pressed_layers(), told.pressed_layers(), strict=True):
        assert torch.equal(ours.positions(), theirs.positions()) and torch.equal(ours.keys, theirs.keys)
    assert found.positions()[..., -WINDOW:].eq(torch.arange(N - WINDOW, N)).all()


def test_what_is_wrong_with_a_delimiter() -> None:
    press, ids = FinchPress(0.5, delimiter_token_id=2), tokens(1, N)
    with pytest.raises(PressError, match="the delimiter 2 is not in the text"):
        compressed(press, ids)
    with pytest.raises(PressError, match=r"the delimiter \[2, 1\] is not in the text"):
        compressed(FinchPress(0.5, delimiter_token_id=[2, 1]), ids)
    with pytest.raises(PressError, match="is not in the text"):
        compressed(FinchPress(0.5, delimiter_token_id=[2, 1, 2]), tokens(1, 2))
    ids[0, -1] = 2
    with pytest.raises(PressError, match="the last token of the text"):
        compressed(press, ids)
    ids = tokens(2, N)
    ids[0, 20] = ids[1, 22] = 2
    with pytest.raises(PressError, match=r"questions of this batch have \[7, 9\] tokens"):
        compressed(press, ids)
    with pytest.raises(PressError, match=r"inside 'with press\(model\):'"):
        tiny("llama")(ids, **cache_argument(PressedCache(press)))


def test_padded_rows_have_questions_of_their_own() -> None:
    model, ids, mask = BY_NAME["llama"].build(), tokens(2, N), torch.ones(2, N, dtype=torch.long)
    mask[1, :6] = 0
    ids[0, 20] = ids[1, 24] = 2
    past, alone = PressedCache(), PressedCache()
    press = FinchPress(0.5, delimiter_token_id=2)
    with torch.no_grad(), press(model):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **cache_argument(past))
        model(ids[1:, 6:], **cache_argument(alone))
    kept = past.positions()[1]
    assert torch.equal(kept[kept >= 0], alone.positions()[0].flatten() + 6)


def test_short_texts() -> None:
    for n_tokens in (1, 2, WINDOW, WINDOW + 1):
        past = compressed(FinchPress(0.5, window_size=WINDOW), tokens(1, n_tokens))
        assert past.stored_lengths() == [max(1, n_tokens // 2)] * 2


def test_the_name_takes_the_last_tokens_or_a_delimiter() -> None:
    assert make_press("finch", 0.5) == FinchPress(0.5, window_size=64)
    assert make_press("finch", 0.5, window_size=9) == FinchPress(0.5, window_size=9)
    press = make_press("finch", 0.5, delimiter_token_id=[7, 8])
    assert press == FinchPress(0.5, window_size=64, delimiter_token_id=(7, 8)) and hash(press)


def test_refused_at_construction() -> None:
    with pytest.raises(PressError, match=r"delimiter_token_id .* or window_size"):
        FinchPress(0.5)
    with pytest.raises(PressError, match="got none"):
        FinchPress(0.5, delimiter_token_id=[])
    for options in ({"window_size": 0}, {"window_size": 4, "chunk_length": 0}):
        with pytest.raises(PressError, match="must be an integer >= 1"):
            FinchPress(0.5, **options)
    press = FinchPress(0.5, window_size=4)
    for make in (lambda: AdaKVPress(press), lambda: DecodingPress(press.with_ratio(0.0)), lambda: SnapKVPress(press)):
        with pytest.raises(PressError):
            make()
    with pytest.raises(PressError, match="FinchPress changes the keys that it keeps; use it by itself"):
        KeyRerotationPress(press)
