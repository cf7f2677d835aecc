"""Fitted values and weights against the least squares they promise, and what a fit must never do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.presses.views import MODELS, view_of
from tests.presses.words import Words
from torch import Tensor

from coldpress import (
    AdaKVPress,
    AttentionMatchingPress,
    ExpectedAttentionPress,
    KnormPress,
    KVzipPress,
    LayerDefensiveKVPress,
    PressedCache,
    PyramidKVPress,
    RestoreKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.presses.attention_matching import _weights, fit

SMALL: dict[str, Any] = {"n_queries": 16, "n_sink": 1, "n_recent": 4}


def softmax(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.mT).softmax(-1)


def case(n: int, n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one head, float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(k, 8, dtype=torch.float64, generator=generator) for k in (n, n_tokens, n_tokens))  # type: ignore[return-value]


def left_out(n: int) -> Tensor:
    return torch.arange(n) // 8 % 4 == 3


def free(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize("bias", [False, True])
def test_all_kept_is_as_it_was(bias: bool) -> None:
    queries, keys, values = case(64, 10)
    fitted, weights = fit(softmax(queries, keys), values, torch.arange(10), free(10), left_out(64), bias)
    torch.testing.assert_close(fitted, values, atol=1e-9, rtol=0)
    torch.testing.assert_close(weights, torch.ones(10, dtype=torch.float64), atol=1e-9, rtol=0)


def mass(attention: Tensor, chosen: Tensor) -> Tensor:
    """Weights of the pairs ``chosen``, all free, that bring back the attention to the others."""
    kept = attention[:, chosen]
    return _weights(kept, 1 - kept.sum(-1), free(len(chosen)))


def test_a_pair_that_stood_there_twice_weighs_two() -> None:
    queries, keys, values = case(256, 6)
    attention = softmax(queries, keys.repeat(2, 1))
    weights = mass(attention, torch.arange(6))
    torch.testing.assert_close(weights, torch.full_like(weights, 2), atol=0.15, rtol=0)
    torch.testing.assert_close(
        (attention[:, :6] * weights).sum(-1).mean(), torch.ones((), dtype=torch.float64), atol=0.01, rtol=0
    )
    # the output is the same without weights and fit, which decides: nothing is changed
    fitted, weights = fit(attention, values.repeat(2, 1), torch.arange(6), free(6), left_out(256), True)
    torch.testing.assert_close(fitted, values)
    assert torch.equal(weights, torch.ones_like(weights))


def test_weights_of_equal_attention_add_up_to_all() -> None:
    """With queries of zero every pair has the same attention, so the weights of the kept ones add up to T."""
    attention = softmax(torch.zeros(64, 8, dtype=torch.float64), case(64, 12)[1])
    weights = mass(attention, torch.tensor([0, 3, 7]))
    torch.testing.assert_close(weights.sum(), torch.tensor(12.0, dtype=torch.float64), atol=0.1, rtol=0)


def test_the_whole_mass_is_made_up_for() -> None:
    """With queries of zero but for one pair, the output is that of the whole."""
    _, keys, values = case(64, 12)
    attention = softmax(torch.zeros(64, 8, dtype=torch.float64), keys)
    attention[:, 0] *= 2  # else no weights are as good as some
    attention = attention / attention.sum(-1, keepdim=True)
    chosen = torch.tensor([0, 3, 7])
    fitted, weights = fit(attention, values, chosen, free(3), left_out(64), True)
    out = (attention[:, chosen] * weights) @ fitted / (attention[:, chosen] * weights).sum(-1, keepdim=True)
    torch.testing.assert_close(out, attention @ values, atol=5e-3, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_queries_that_were_not_fitted_to_are_answered_better(bias: bool, seed: int) -> None:
    queries, keys, values = case(800, 40, seed)
    base = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    queries = base[torch.arange(800) % 3] * 2 + 0.3 * queries  # like each other, as those of a text are
    attention, chosen = softmax(queries, keys), torch.arange(0, 40, 4)
    fitted, weights = fit(attention[:400], values, chosen, free(10), left_out(400), bias)

    def error(own: Tensor, weight: Tensor) -> float:
        part = attention[400:, chosen] * weight
        return float((part / part.sum(-1, keepdim=True) @ own - attention[400:] @ values).square().sum())

    assert error(fitted, weights) < 0.2 * error(values[chosen], torch.ones_like(weights))


def test_a_fit_that_does_not_carry_over_is_not_used() -> None:
    """What is left out has other queries than the rest, and the fit to those makes it worse."""
    queries, keys, values = case(64, 24)
    attention = softmax(3 * queries, keys)
    chosen, is_left_out = torch.arange(12), left_out(64)
    # those that are left out look at kept pairs alone, and are right as they are
    attention[is_left_out, 12:] = 0
    attention = attention / attention.sum(-1, keepdim=True)
    fitted, weights = fit(attention, values, chosen, free(12), is_left_out, True)
    assert torch.equal(fitted, values[chosen]) and torch.equal(weights, torch.ones_like(weights))


def test_a_pair_that_hardly_counts_is_not_made_to_answer_for_all() -> None:
    """What is gone is as large as ten thousand times the attention to the one pair that may change."""
    _, _, values = case(64, 3)
    gone = torch.linspace(0.1, 0.5, 64, dtype=torch.float64)
    attention = torch.stack([1 - 1.0001 * gone, 1e-4 * gone, gone], dim=1)
    for bias in (False, True):
        fitted, _ = fit(attention, values, torch.tensor([0, 1]), torch.tensor([False, True]), left_out(64), bias)
        assert float(fitted.norm(dim=-1).max()) <= 2 * float(values.norm(dim=-1).max())


def test_equal_keys_and_few_queries_give_finite_values() -> None:
    queries, keys, values = case(3, 40)
    keys[:] = keys[0]
    fitted, weights = fit(softmax(queries, keys), values, torch.arange(30), free(30), left_out(3), True)
    assert bool(fitted.isfinite().all()) and bool((weights > 0).all())
    assert float(fitted.abs().max()) < 10 * float(values.abs().max())


def ridge(attention: Tensor, values: Tensor, chosen: Tensor, is_free: Tensor, strength: float) -> Tensor:
    """The normal equations, term by term."""
    part = attention[:, chosen] / attention[:, chosen].sum(-1, keepdim=True)
    lacks = attention @ values - part @ values[chosen]
    own = part[:, is_free]
    normal = own.mT @ own
    normal = normal + strength * torch.linalg.eigvalsh(normal)[-1] * torch.eye(len(normal), dtype=normal.dtype)
    fitted = values[chosen].clone()
    fitted[is_free] += torch.linalg.inv(normal) @ own.mT @ lacks
    return fitted


@pytest.mark.parametrize("n", [24, 200])
def test_values_solve_the_normal_equations(n: int) -> None:
    queries, keys, values = case(n, 60)
    attention, chosen = softmax(queries, keys), torch.arange(0, 60, 2)
    is_free = torch.arange(30) > 3
    fitted, _ = fit(attention, values, chosen, is_free, left_out(n), False)
    assert torch.equal(fitted[:4], values[chosen[:4]])
    found = [values[chosen], *(ridge(attention, values, chosen, is_free, s) for s in (1e-2, 1e-3))]
    assert min(float((fitted - one).abs().max()) for one in found) < 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_fitted_to_queries_in_place_and_moved_on(model: str) -> None:
    """Against attention by hand, and queries that are rotated once more, by as many positions as there are."""
    view, n = view_of(model), 16
    kept = AttentionMatchingPress(SnapKVPress(0.6, 4), bias=False, n_queries=n, n_sink=0, n_recent=0).compress(view)
    rope, n_tokens = view.find_rope(), view.n_tokens
    assert kept is not None and rope is not None
    queries = view.queries[:, :, -n:].float()
    moved = rope.rotate(queries, *rope.cos_sin(torch.tensor([n])))
    hidden = torch.arange(n_tokens) > torch.arange(n_tokens - n, n_tokens)[:, None]
    changed = 0
    for row, head in itertools.product(range(2), range(kept.positions.shape[1])):
        group = slice(head * view.group_size, (head + 1) * view.group_size)
        keys, values = view.keys[row, head].double(), view.values[row, head].double()
        logits = [own[row, group].double() @ keys.mT * view.scaling for own in (queries, moved)]
        logits[0] = logits[0].masked_fill(hidden, -torch.inf)
        attention = torch.cat(logits, dim=1).softmax(-1).flatten(0, 1)
        chosen = kept.positions[row, head]
        found = [values[chosen], *(ridge(attention, values, chosen, free(len(chosen)), s) for s in (1e-2, 1e-3))]
        off = [float((kept.values[row, head].double() - one).abs().max()) for one in found]
        assert min(off) < 2e-2 * float(values.abs().max())
        changed += min(off) != off[0]
    assert changed


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "press", [SnapKVPress(0.6, 4), AdaKVPress(SnapKVPress(0.6, 4)), KnormPress(0.5), ExpectedAttentionPress(0.5)]
)
def test_keys_and_ends_are_as_the_model_made_them(model: str, press: Any) -> None:
    view = view_of(model)
    kept = AttentionMatchingPress(press, **SMALL).compress(view)
    assert kept is not None and kept.bias is not None
    own = view.take(kept.positions)
    assert torch.equal(kept.keys, own.keys)
    n_last = min(4, press.keep(view) // 8)
    first, last = kept.positions < 1, kept.positions >= view.n_tokens - n_last
    fixed = (kept.positions >= 0) & (first | last)
    assert n_last and int(fixed.sum()) == (1 + n_last) * fixed.shape[0] * fixed.shape[1]  # every head has them
    assert torch.equal(kept.values[fixed], own.values[fixed]) and not kept.bias[fixed].any()
    plain = press.compress(view)
    assert plain is not None and int((plain.positions >= 0).sum()) == int((kept.positions >= 0).sum())


@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("queries", ["window", "repeat"])
def test_few_places_stay_those_of_the_inner_press(ratio: float, queries: Any) -> None:
    """Newest tokens that stay for the fit's sake would leave the inner press no choice in a small budget."""
    ids, inner = tokens(1, 80), KnormPress(ratio) if queries == "window" else KVzipPress(ratio, tokenizer=Words())
    press = AttentionMatchingPress(inner, queries=queries, n_sink=0, tokenizer=Words())
    own, plain = (
        {
            (layer.index, head, at)
            for layer in after(one, ids).pressed_layers()
            for head, row in enumerate(layer.positions()[0].tolist())
            for at in row
            if at >= 0
        }
        for one in (press, inner)
    )
    assert len(own) == len(plain) and len(own & plain) >= 7 / 8 * len(own)


def test_bias_is_left_out() -> None:
    kept = AttentionMatchingPress(SnapKVPress(0.6, 4), bias=False, **SMALL).compress(view_of("llama"))
    assert kept is not None and kept.bias is None


CASES = {
    "snapkv": Case(
        AttentionMatchingPress(SnapKVPress(0.5, 4), **SMALL), lacks=("chunks", "ragged", "rerotated"), solves=5e-3
    ),
    "adakv": Case(
        AttentionMatchingPress(AdaKVPress(SnapKVPress(0.5, 4)), **SMALL), lacks=("chunks", "rerotated"), solves=5e-3
    ),
    "neox": Case(
        AttentionMatchingPress(PyramidKVPress(0.5, 4), bias=False, **SMALL),
        model="gpt_neox",
        solves=5e-2,
        lacks=("chunks", "ragged", "rerotated"),
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def after(press: Any, ids: Tensor) -> PressedCache:
    model, cache = tiny("llama"), PressedCache()
    with torch.no_grad(), press(model):
        model(ids, **cache_argument(cache, model))
    return cache


TOGETHER = LayerDefensiveKVPress(0.6, window_size=4, n_sink=1)  # chooses among the pairs of all layers


@pytest.mark.parametrize(
    ("inner", "queries"),
    [
        (KVzipPress(0.6, tokenizer=Words()), "repeat"),
        (SnapKVPress(0.6, 4), "repeat"),
        (AdaKVPress(KnormPress(0.6)), "repeat"),
        (TOGETHER, "repeat"),
        (TOGETHER, "window"),
    ],
)
def test_when_the_prefill_is_over(inner: Any, queries: Any) -> None:
    ids = tokens(1, 48)
    press = AttentionMatchingPress(inner, queries=queries, tokenizer=Words(), **SMALL)
    full, plain, fitted = after(SnapKVPress(0.0), ids), after(inner, ids), after(press, ids)
    assert sum(x.positions().ge(0).sum() for x in plain.pressed_layers()) == sum(
        x.positions().ge(0).sum() for x in fitted.pressed_layers()
    )
    changed = 0
    for whole, layer in zip(full.pressed_layers(), fitted.pressed_layers(), strict=True):
        at = layer.positions()
        own = whole.values.gather(2, at.clamp(min=0)[..., None].expand_as(layer.values))  # type: ignore[union-attr,arg-type]
        is_same = (own == layer.values).all(-1) | (at < 0)
        fixed = (at >= 0) & ((at < 1) | (at >= 46))  # an eighth of 19
        assert int(fixed.sum()) == 3 * at.shape[1] and bool(is_same[fixed].all())
        changed += int((~is_same).sum())
        assert layer.references == []
    assert changed


@pytest.mark.parametrize("bias", [False, True])
def test_rows_with_padding_are_fitted_as_they_are_alone(bias: bool) -> None:
    press = AttentionMatchingPress(TOGETHER, bias=bias, **SMALL)
    ids, n_padding = tokens(3, 48), 9
    shown = torch.ones(3, 48, dtype=torch.long)
    shown[1, :n_padding] = 0
    model, cache = tiny("llama"), PressedCache()
    with torch.no_grad(), press(model):
        model(ids, attention_mask=shown, **cache_argument(cache, model))
    for row in range(3):
        start = n_padding if row == 1 else 0
        alone = after(press, ids[row : row + 1, start:])
        for ours, theirs in zip(cache.pressed_layers(), alone.pressed_layers(), strict=True):
            at, own = ours.positions()[row], theirs.positions()[0]
            assert at[at >= 0].sub(start).tolist() == own[own >= 0].tolist()
            torch.testing.assert_close(ours.values[row][at >= 0], theirs.values[0][own >= 0], atol=2e-3, rtol=0)  # type: ignore[index]
            if bias:
                mine, other = ours.columns()["bias"][row][at >= 0], theirs.columns()["bias"][0][own >= 0]
                torch.testing.assert_close(mine, other, atol=5e-3, rtol=0)


@pytest.mark.parametrize("n_queries", [4, 6, 12])
def test_few_reference_queries_are_fitted_to_as_well(n_queries: int) -> None:
    view = view_of("llama")
    kept = AttentionMatchingPress(SnapKVPress(0.6, 4), n_queries=n_queries, n_sink=1, n_recent=4).compress(view)
    assert kept is not None
    assert not torch.equal(kept.values, view.take(kept.positions).values)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PressError, match="queries='repeat'"):
        AttentionMatchingPress(KVzipPress(0.5))
    with pytest.raises(PressError, match="'window' or 'repeat'"):
        AttentionMatchingPress(SnapKVPress(0.5), queries="self-study")  # type: ignore[arg-type]
    with pytest.raises(PressError, match="n_queries must be an integer >= 4"):
        AttentionMatchingPress(SnapKVPress(0.5), n_queries=3)
    with pytest.raises(PressError, match="changes the pairs"):
        AttentionMatchingPress(RestoreKVPress(0.5), queries="repeat")
    with pytest.raises(PressError, match="one text a second time"):
        after(AttentionMatchingPress(SnapKVPress(0.5), queries="repeat", tokenizer=Words()), tokens(2, 40))


def test_ratio_0_runs_nothing_again() -> None:
    press = AttentionMatchingPress(StreamingLLMPress(0.0), queries="repeat", tokenizer=Words())
    cache = after(press, tokens(1, 20))
    assert cache.achieved_ratio() == 0


def test_a_budget_without_room_for_the_ends_is_the_inner_presss() -> None:
    inner = KVzipPress(0.9, tokenizer=Words())
    plain, fitted = after(inner, tokens(1, 30)), after(AttentionMatchingPress(inner, queries="repeat"), tokens(1, 30))
    for ours, theirs in zip(fitted.pressed_layers(), plain.pressed_layers(), strict=True):
        assert torch.equal(ours.positions(), theirs.positions())
