"""LU-KV's curves against what they are said to be, in loops; and where the press finds them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.presses.views import MODELS, views_of

from coldpress import ExpectedAttentionPress, KnormPress, LayerView, LUKVPress, PressedCache
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.io.artefacts import Artefact, artefact_path
from coldpress.learned.budget_curves import concave_slopes, future_importance, removed_shares
from coldpress.learned.calibration import calibrate

NAME = "meta-llama/Llama-3.1-8B-Instruct"
SAMPLES = [tokens(1, n, seed=n)[0] for n in (40, 33)]


def output_of(view: LayerView, head: int, value: torch.Tensor) -> torch.Tensor:
    """What ``value`` of a query head adds to the layer's output, by the layer's own projection."""
    projection = getattr(view.module, "o_proj", None) or view.module.dense
    heads = torch.zeros(view.queries.shape[1], value.shape[0])
    heads[head] = value
    return projection(heads.flatten()) - projection(torch.zeros(heads.numel()))


@pytest.mark.parametrize("model", MODELS)
def test_importance_is_the_most_that_a_token_gives_to_any_later_one(model: str) -> None:
    view, n_context = views_of(model, tokens(1, 16))[1], 12
    found = future_importance(view, n_context)
    group = view.group_size
    for head, j in itertools.product(range(found.shape[1]), range(n_context)):
        expected = 0.0
        for q_head in range(head * group, (head + 1) * group):
            largest = 0.0
            for q in range(n_context, 16):
                logits = view.keys[0, head, : q + 1] @ view.queries[0, q_head, q] * view.scaling
                given = logits.softmax(0)[j] * view.values[0, head, j]
                largest = max(largest, float(output_of(view, q_head, given).norm()))
            expected += largest / group
        assert float(found[0, head, j]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@given(steps=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=12))
def test_concave_slopes(steps: list[float]) -> None:
    slopes = concave_slopes(torch.tensor(steps)).tolist()
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(slopes))
    sums, hull = (np.concatenate([[0.0], np.cumsum(x)]) for x in (steps, slopes))
    n = len(steps)
    for m in range(n + 1):  # the largest chord over m, by trying all
        chords = [
            sums[a] + (sums[b] - sums[a]) * (m - a) / (b - a) if b > a else sums[a]
            for a in range(m + 1)
            for b in range(m, n + 1)
        ]
        assert hull[m] == pytest.approx(max(chords))


def test_places_go_to_the_largest_gains() -> None:
    gains = torch.tensor([[[9.0, 5.0, 1.0, 0.1], [8.0, 0.5, 0.4, 0.3]], [[7.0, 6.0, 4.0, 3.0], [2.0, 0.2, 0.05, 0.0]]])
    removed = removed_shares(gains)
    for percent in range(1, 100):
        n_kept = round(16 * (100 - percent) / 100)
        best = sorted(((g, i // 4) for i, g in enumerate(gains.flatten().tolist())), reverse=True)[:n_kept]
        counts = torch.tensor([sum(owner == head for _, owner in best) for head in range(4)])
        assert torch.equal(removed[..., percent - 1].flatten(), 1 - counts.double() / 4)
    assert removed[..., 49].flatten().tolist() == [0.5, 0.75, 0.0, 0.75]


@pytest.mark.parametrize("inner", [KnormPress(), ExpectedAttentionPress(epsilon=2e-2)], ids=repr)
def test_curves_of_a_model(inner: KnormPress) -> None:
    found = calibrate(LUKVPress(inner), tiny("llama"), SAMPLES)["removed"]
    assert found.shape == (2, 2, 99)
    expected = torch.zeros(2, 2, 99, dtype=torch.float64)
    for ids in SAMPLES:
        gains = []
        n_context = len(ids) - len(ids) // 4
        for view in views_of("llama", ids[None]):
            scores = inner.score(view.part(0, n_context))
            importance = future_importance(view, n_context)
            for head in range(2):
                ends = [*range(4), n_context - 1]
                rest = sorted(set(range(n_context)) - set(ends), key=lambda t: -float(scores[0, head, t]))
                gains.append(concave_slopes(importance[0, head, ends + rest]))
        expected += removed_shares(torch.stack(gains).view(2, 2, -1)) / len(SAMPLES)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    by_ratio = found.mean((0, 1))
    torch.testing.assert_close(by_ratio, torch.arange(1, 100) / 100, atol=0.02, rtol=0)
    assert (found.diff(dim=-1) >= -1e-6).all() and found.std() > 0


def test_samples_may_be_too_short() -> None:
    with pytest.raises(PressError, match="samples of at least 4 tokens"):
        calibrate(LUKVPress(), tiny("llama"), [tokens(1, 3)[0]])


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path))
    model = BY_NAME["llama"].build()
    model.config._name_or_path = NAME
    return model


def positions(press: LUKVPress, model: object) -> list[torch.Tensor]:
    past = PressedCache(press)
    with press(model):
        model(tokens(1, 30), **cache_argument(past))
    return [past.positions(i) for i in range(2)]


def test_curves_that_were_measured(named: object) -> None:
    removed = torch.rand(2, 2, 99, generator=torch.Generator().manual_seed(0))
    press = LUKVPress(KnormPress(0.5))
    path = artefact_path("lukv", NAME, press.variant())
    Artefact("lukv", {"removed": removed}).save(path)
    given = positions(LUKVPress(KnormPress(0.5), curves=removed.permute(2, 0, 1)), named)
    for each in (press, LUKVPress(KnormPress(0.5), curves=path)):
        assert all(torch.equal(a, b) for a, b in zip(given, positions(each, named), strict=True))
    monkey = LUKVPress(KnormPress(0.5), window=2)  # whose curves are others
    assert monkey.variant() != press.variant() == press.with_ratio(0.1).variant()
    with pytest.raises(PressError, match=rf"needs budget curves of {NAME}: there is no .*KnormPress-.*none are publ"):
        positions(monkey, named)


def test_the_published_curves_are_fetched(named: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    curves = torch.rand(99, 2, 2, generator=torch.Generator().manual_seed(1))

    def fetch(url: str, copy: Path) -> Path:
        asked.append(url)
        copy.parent.mkdir(parents=True, exist_ok=True)
        np.save(copy, curves.numpy())
        return copy

    monkeypatch.setattr("coldpress.presses.lukv.fetch_url", fetch)
    found = positions(LUKVPress(compression_ratio=0.5), named)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, positions(LUKVPress(compression_ratio=0.5, curves=curves), named), strict=True)
    )
    assert asked[0] == (
        "https://raw.githubusercontent.com/baidu-baige/LU-KV/main/evaluation/curve_data/llama-3.1-8b/"
        "ea_0.02_sink4_win1_llama_avg_ratio.npy"
    )
    for other in (LUKVPress(sink=5), LUKVPress(ExpectedAttentionPress()), LUKVPress(KnormPress())):
        assert other.published(NAME) is None
