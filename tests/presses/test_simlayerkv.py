"""SimLayerKV against a slow version of what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.views import MODELS, view_of

from coldpress import LayerView, PressedCache, SimLayerKVPress, make_press
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError

N_TOKENS = 37


def attention_to(view: LayerView, row: int, n_last: int, kept: list[int]) -> float:
    """Mean over the heads and the last queries of their attention to the tokens ``kept``, in loops."""
    shares = []
    for head in range(view.queries.shape[1]):
        keys = view.keys[row, head // view.group_size]
        for q in range(N_TOKENS - n_last, N_TOKENS):
            logits = [float(view.queries[row, head, q] @ keys[t]) * view.scaling for t in range(q + 1)]
            weights = [math.exp(x - max(logits)) for x in logits]
            shares.append(sum(w for t, w in enumerate(weights) if t in kept) / sum(weights))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("n_last", "n_recent", "n_initial"), [(1, 9, 4), (1, 1, 0), (5, 5, 2), (3, 20, 4)])
def test_lazy_layers_keep_both_ends(model: str, layer: int, n_last: int, n_recent: int, n_initial: int) -> None:
    view = view_of(model, layer=layer, rows=3)
    both = [*range(n_initial), *range(N_TOKENS - n_recent, N_TOKENS)]
    shares = [attention_to(view, row, n_last, both) for row in range(3)]
    low, middle, high = sorted(shares)
    for threshold in ((low + middle) / 2, (middle + high) / 2, max(0.0, low - 0.01), min(1.0, high + 0.01)):
        kept = SimLayerKVPress(threshold, n_last, n_recent, n_initial).compress(view)
        expected = [both if share > threshold else list(range(N_TOKENS)) for share in shares]
        if kept is None:
            assert threshold > high
            continue
        for row, tokens_of_row in enumerate(expected):
            for head in range(view.keys.shape[1]):
                found = [t for t in kept.positions[row, head].tolist() if t >= 0]
                assert found == tokens_of_row
                assert torch.equal(kept.keys[row, head, : len(found)], view.keys[row, head, found])
                assert torch.equal(kept.values[row, head, : len(found)], view.values[row, head, found])


def test_a_window_as_long_as_what_is_looked_at_keeps_no_token_too_many() -> None:
    """K: a lazy layer kept n_recent - n_last recent tokens, and all 128 and one more where that was 0."""
    past = PressedCache(SimLayerKVPress(0.0, n_last=1, n_recent=1, n_initial=1))
    tiny("gpt_neox")(tokens(1, 128), **cache_argument(past))
    assert past.stored_lengths() == [2, 2]
    assert past.achieved_ratio() == 1 - 2 / 128


def test_layers_are_judged_one_by_one_and_freed() -> None:
    model, ids, sizes = tiny("llama"), tokens(1, 300), {}
    shares = []
    for view_layer in range(2):
        view = view_of("llama", 300, layer=view_layer, rows=1)
        shares.append(float(view.window_attention(1)[..., -20:].sum(-1).mean()))
    for threshold in (1.0, sum(shares) / 2):
        past = PressedCache(SimLayerKVPress(threshold, n_recent=20, n_initial=0))
        model(ids, **cache_argument(past))
        sizes[threshold] = past.kv_bytes()
    assert sorted(past.stored_lengths()) == [20, 300]
    assert past.achieved_ratio() == pytest.approx(280 / 600)  # both layers count
    assert sizes[sum(shares) / 2] == sizes[1.0] * (20 + 300) // 600


@pytest.mark.parametrize("n_tokens", [1, 3, 13])
def test_a_text_no_longer_than_both_ends_stays(n_tokens: int) -> None:
    past = PressedCache(SimLayerKVPress(0.0, n_recent=9, n_initial=4))
    tiny("gpt_neox")(tokens(1, n_tokens), **cache_argument(past))
    assert past.stored_lengths() == [n_tokens] * 2


def test_the_defaults_remove_nothing() -> None:
    assert make_press("simlayerkv", 0.0) == SimLayerKVPress(0.9)  # the name does, of long texts
    assert SimLayerKVPress(n_recent=2).compress(view_of("llama")) is None


def test_there_is_no_ratio() -> None:
    with pytest.raises(PressError, match=r"simlayerkv has no compression ratio: .*lazy_threshold.*Give it the ratio 0"):
        make_press("simlayerkv", 0.5)
    with pytest.raises(PressError, match="no budget in tokens or bytes"):
        make_press("simlayerkv", 0.0, budget_tokens=9)
    assert not hasattr(SimLayerKVPress(), "compression_ratio")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lazy_threshold": 1.5}, "lazy_threshold must be a number in"),
        ({"n_last": 0}, "n_last must be an integer >= 1"),
        ({"n_recent": 0}, "n_recent must be an integer >= 1"),
        ({"n_initial": -1}, "n_initial must be an integer >= 0"),
        ({"n_last": 9, "n_recent": 8}, "must be among the n_recent=8 tokens"),
    ],
)
def test_impossible_parameters(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(PressError, match=message):
        SimLayerKVPress(**parameters)
