"""Pairs that stand for what was evicted: their moments, by loops; exact where one pair says it all; never worse."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.examples.contract import CHECKS, Case, every_check
from tests.presses.views import MODELS, view_of
from torch import Tensor

from coldpress import AdaKVPress, KnormPress, LayerView, MomentKVPress, SnapKVPress
from coldpress.bases.moved import queries_moved_on
from coldpress.core.kept import Kept
from coldpress.errors import PressError
from coldpress.presses.momentkv import sigma_points

SMALL: dict[str, Any] = {"n_queries": 16, "n_sink": 1, "n_recent": 4}


def pairs(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    return keys * torch.tensor([4, 3, 2, 1, 0.5, 0.1]), values + keys @ torch.ones(6, 6, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_the_moments_are_those_of_the_pairs(rank: int) -> None:
    keys, values = pairs(50)
    own_keys, own_values, bias = sigma_points(keys, values, rank)
    weight = math.exp(bias)
    assert len(own_keys) * weight == pytest.approx(50)
    torch.testing.assert_close(own_keys.mean(0), keys.mean(0))
    torch.testing.assert_close(own_values.mean(0), values.mean(0))
    covariance, crossed = (torch.zeros(6, 6, dtype=torch.float64) for _ in range(2))
    for key, value in zip(keys, values, strict=True):
        covariance += torch.outer(key - keys.mean(0), key - keys.mean(0)) / 50
        crossed += torch.outer(value - values.mean(0), key - keys.mean(0)) / 50
    directions = torch.linalg.eigh(covariance)[1][:, -rank:]
    for i, j in itertools.product(range(rank), repeat=2):
        variance = sum(
            weight / 50 * float((k - keys.mean(0)) @ directions[:, i]) * float((k - keys.mean(0)) @ directions[:, j])
            for k in own_keys
        )
        assert variance == pytest.approx(float(directions[:, i] @ covariance @ directions[:, j]), abs=1e-9)
    own_crossed = (own_values - values.mean(0)).mT @ (own_keys - keys.mean(0)) * weight / 50
    torch.testing.assert_close(own_crossed @ directions, crossed @ directions)


def test_equal_pairs_are_one_of_them() -> None:
    keys, values = (states[:1].expand(7, -1) for states in pairs(1))
    for rank in (0, 2):
        own_keys, own_values, bias = sigma_points(keys, values, rank)
        query = torch.randn(5, 6, dtype=torch.float64)
        mass = (query @ own_keys.mT + bias).exp()
        torch.testing.assert_close(mass.sum(-1), 7 * (query @ keys[0]).exp(), atol=0, rtol=1e-4)
        torch.testing.assert_close(mass @ own_values / mass.sum(-1, keepdim=True), values[:5], atol=1e-4, rtol=1e-4)


def test_small_queries_are_answered_to_second_order() -> None:
    """Of all pairs at once: what is left out is of the third order in the query."""
    keys, values = pairs(200)
    own_keys, own_values, bias = sigma_points(keys, values, 6)
    off = []
    for size in (0.02, 0.01):
        query = size * torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        exact, mass = (query @ keys.mT).exp(), (query @ own_keys.mT + bias).exp()
        off.append(float((exact.sum(-1) / mass.sum(-1) - 1).abs().max()))
        found = mass @ own_values / mass.sum(-1, keepdim=True)
        assert float((found - exact @ values / exact.sum(-1, keepdim=True)).abs().max()) < 100 * size**2
    assert off[1] < off[0] / 6


def outputs(view: LayerView, kept: Kept, row: int, head: int) -> tuple[Tensor, Tensor]:
    """What the reference queries of one head get of the whole cache, and of ``kept``, by hand."""
    ahead = queries_moved_on(view, 16).queries
    query = ahead[row, head * view.group_size : (head + 1) * view.group_size].flatten(0, 1).double()
    is_there = kept.positions[row, head] >= 0
    bias = torch.zeros(int(is_there.sum())) if kept.bias is None else kept.bias[row, head][is_there]
    whole = (query @ view.keys[row, head].double().mT * view.scaling).softmax(-1) @ view.values[row, head].double()
    logits = query @ kept.keys[row, head][is_there].double().mT * view.scaling + bias
    return whole, logits.softmax(-1) @ kept.values[row, head][is_there].double()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("inner", [SnapKVPress(0.6, 4), AdaKVPress(SnapKVPress(0.6, 4))], ids=["snapkv", "adakv"])
def test_reference_queries_are_answered_better_or_as_before(model: str, inner: Any) -> None:
    view = view_of(model)
    kept = MomentKVPress(inner, rank=4, **SMALL).compress(view)
    plain = MomentKVPress(inner, n_sink=1, n_recent=4).choose(view)
    assert kept is not None and kept.bias is not None and plain is not None
    assert torch.equal(kept.positions, plain)
    before, better = view.take(plain), 0
    for row, head in itertools.product(range(2), range(plain.shape[1])):
        whole, own = outputs(view, kept, row, head)
        old = outputs(view, before, row, head)[1]
        now, then = (float((found - whole).square().sum()) for found in (own, old))
        assert now <= then * (1 + 1e-5)
        better += now < 0.99 * then
        changed = kept.bias[row, head] != 0
        assert int(changed.sum()) in (0, 1, 2, 4, 8)
        assert torch.equal(kept.keys[row, head][~changed], before.keys[row, head][~changed])
        at = kept.positions[row, head][changed]
        assert bool(((at >= 1) & (at < view.n_tokens - 4)).all())  # sinks and the newest are left alone
    assert better


def test_layers_with_a_sliding_window_keep_what_the_inner_press_keeps() -> None:
    view = replace(view_of("llama"), sliding_window=30, _memo={})
    kept, plain = MomentKVPress(KnormPress(0.5), **SMALL).compress(view), KnormPress(0.5)
    assert kept is not None and kept.bias is None and plain.compress(view) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": -1}, "rank must"), ({"n_queries": 0}, "n_queries must"), ({"n_sink": -1}, "n_sink")],
)
def test_bad_numbers_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(PressError, match=message):
        MomentKVPress(SnapKVPress(0.5), **options)


LACKS = ("chunks", "rerotated")
CASES = {
    "snapkv": Case(MomentKVPress(SnapKVPress(0.5, 4), rank=4, **SMALL), lacks=(*LACKS, "ragged"), solves=5e-3),
    "adakv": Case(MomentKVPress(AdaKVPress(SnapKVPress(0.5, 4)), rank=2, **SMALL), lacks=LACKS, solves=5e-3),
    "neox": Case(MomentKVPress(SnapKVPress(0.5, 4), **SMALL), model="gpt_neox", lacks=(*LACKS, "ragged"), solves=5e-3),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)
