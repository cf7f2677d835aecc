"""MorphKVPress: against loops, its kinship with TOVA, the order of older keys, and the contract."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import Look, tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.oracles.windows import by_head, morphkv
from tests.presses.test_decoding import Text, decode, held
from tests.presses.views import MODELS, view_of

from coldpress import (
    AdaKVPress,
    CriticalKVPress,
    DecodingPress,
    LayerView,
    MorphKVPress,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
    TOVAPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.window import WindowPress
from coldpress.errors import PressError

OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
Watching = partial(Case, exact_crop=False)
SMALL = MorphKVPress(window_size=5)
CASES = {
    "prompt": Case(SMALL.with_ratio(0.5), n_most=25, lacks=("ragged",)),
    "critical": Case(CriticalKVPress(SMALL.with_ratio(0.5)), n_most=25, lacks=("ragged",)),
    "adakv decoding": Case(DecodingPress(AdaKVPress(SMALL), **OFTEN), lacks=("chunks",)),
    "both": Case(
        PrefillDecodingPress(SnapKVPress(0.3, 4), DecodingPress(SMALL, **OFTEN)), n_most=35, lacks=("ragged",)
    ),
    "pins": Case(DecodingPress(SMALL, **OFTEN), {"pin": [(0, 3), (20, 23)]}, lacks=("chunks", "ragged")),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("window", "fusion"), [(6, "max"), (6, "sum"), (1, "max"), (30, "max")])
def test_morphkv(model: str, window: int, fusion: str) -> None:
    view = view_of(model, 21)
    expected = torch.tensor(by_head(view, lambda own: morphkv(own, min(window, 10 if window > 20 else window), fusion)))
    scores = MorphKVPress(window_size=window, fusion=fusion).score(view)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_logits_of_a_group_are_added_and_not_its_probabilities() -> None:
    """One head of the group is sure of token 0, and the other rules it out."""
    view = view_of("llama", 6, rows=1)
    keys, queries = torch.zeros(1, 2, 6, 8), torch.zeros(1, 4, 6, 8)
    keys[..., 0, 0], keys[..., 1, 1], queries[:, ::2, -1, 0], queries[:, 1::2, -1, 0] = 1.0, 1.0, 20.0, -30.0
    queries[..., -1, 1] = 1.0
    view = replace(view, keys=keys, queries=queries, _memo={})
    score = MorphKVPress(window_size=1).score(view)[0, 0]
    assert score.argmax() == 1 and score[0] < 0.2 < view.window_attention(1)[0, 0, :, 0, 0].max()


def one_head(model: str) -> LayerView:
    view = view_of(model, rows=1).of_head(0, 0)
    return replace(view, queries=view.queries[:, :1], whole=None, _memo={})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_one_query_and_one_head_are_tova(model: str, ratio: float) -> None:
    view = one_head(model)
    mine, theirs = (press.choose(view) for press in (MorphKVPress(ratio, window_size=1), TOVAPress(ratio)))
    assert mine is not None and theirs is not None and torch.equal(mine, theirs)
    assert not torch.equal(MorphKVPress(ratio, window_size=9).choose(view), theirs)


@pytest.mark.parametrize("model", MODELS)
def test_older_keys_in_another_order_are_chosen_in_that_order(model: str) -> None:
    view, press = view_of(model), MorphKVPress(0.6, window_size=7)
    order = torch.cat([torch.randperm(30, generator=torch.Generator().manual_seed(3)), torch.arange(30, 37)])
    other = replace(view, keys=view.keys[:, :, order], values=view.values[:, :, order], _memo={})
    torch.testing.assert_close(press.score(other), press.score(view)[..., order])
    mine, theirs = press.choose(view), press.choose(other)
    assert mine is not None and theirs is not None
    assert torch.equal(order[theirs].sort(-1).values, mine)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "mistral", "gpt_oss"])
def test_window_logits_are_what_attention_is_the_softmax_of(name: str) -> None:
    look = Look()
    tiny(name)(tokens(2, 21), **cache_argument(PressedCache(look)))
    for view in look.views:
        weights, logits = view.window_attention(5), view.window_logits(5)
        assert logits.shape == weights.shape and torch.equal(logits == -torch.inf, weights == 0)
        if view.sinks is not None:
            weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(logits.softmax(-1), weights, atol=1e-6, rtol=1e-5)


def test_while_decoding_against_loops() -> None:
    """Held pairs of every head of layer 0 after every token; the window stays, although others may weigh more."""
    ids, n_keep, window = torch.randperm(90, generator=torch.Generator().manual_seed(1))[None, :46] + 3, 14, 3
    text = Text("gpt_neox", ids)
    kept = [list(range(16)) for _ in range(4)]
    press = DecodingPress(MorphKVPress(window_size=window), 5, n_keep, 7)
    for past, _ in decode(press, 46, 16, "gpt_neox", ids):
        n_seen = past.seen_tokens
        if n_seen > 16:
            kept = [[*head, n_seen - 1] for head in kept]
        if n_seen > 16 and (n_seen - 16) % 5 == 0:
            for h, head in enumerate(kept):
                older = [t for t in head if t < n_seen - window]
                rows = [text.attention(h, q, older) for q in range(n_seen - window, n_seen)]
                most = {t: max(row[i] for row in rows) for i, t in enumerate(older)}
                best = sorted(older, key=lambda t, most=most: -most[t])[: n_keep - window]
                kept[h] = sorted([*best, *range(n_seen - window, n_seen)])
        assert held(past) == kept, n_seen


def test_a_small_budget_shrinks_the_window_and_leaves_room_for_scores() -> None:
    view, press = view_of("llama"), MorphKVPress(window_size=16).with_budget(budget_tokens=8)
    kept = press.choose(view)
    assert kept is not None and torch.isfinite(press.score(view)).all()
    assert (kept[..., -4:] == torch.arange(33, 37)).all() and (kept[..., :4] < 33).all()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(PressError, match=r"^MorphKVPress: window_size must be an integer >= 1, got 0\.$"):
        MorphKVPress(window_size=0)
    with pytest.raises(PressError, match=r"^MorphKVPress: fusion must be 'max' or 'sum', got 'mean'\.$"):
        MorphKVPress(fusion="mean")
    assert isinstance(make_press("morphkv", 0.5), WindowPress)
    assert repr(make_press("decoding_morphkv", 0.25)).endswith("target_compression_ratio=0.25)")
