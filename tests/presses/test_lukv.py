"""LU-KV against a slow version of what it promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.architectures import tiny, tokens
from tests.presses.views import MODELS, view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyRerotationPress,
    KnormPress,
    LUKVPress,
    PressedCache,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.counts import apportion, keep_count
from coldpress.errors import PressError
from coldpress.eval.point_run import check_stored_pairs

N_TOKENS = 37


def curves_of(n_layers: int, n_heads: int, seed: int = 0) -> Tensor:
    """Some heads lose more than others, all lose more as the ratio grows, and the mean is the ratio."""
    lean = torch.rand(n_layers, n_heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    ratios = torch.arange(1, 100, dtype=torch.float64)[:, None, None] / 100
    return (ratios + (lean - lean.mean()) * ratios * (1 - ratios)).clamp(0, 1)


def rounded(wanted: list[float], total: int) -> list[int]:
    """Largest remainders."""
    counts = [int(x) for x in wanted]
    for i in sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])[: total - sum(counts)]:
        counts[i] += 1
    return counts


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("inner", [KnormPress(), ExpectedAttentionPress(epsilon=2e-2, n_future_positions=20)], ids=repr)
def test_lukv(model: str, layer: int, ratio: float, inner: ScorerPress) -> None:
    view = view_of(model, layer=layer)
    n_heads, n_keep = view.keys.shape[1], keep_count(N_TOKENS, ratio)
    curves = curves_of(2, n_heads)
    at = (1 - n_keep / N_TOKENS) * 100  # the ratio that whole tokens make of it, in percent
    below = int(at)
    shares = 1 - (curves[below - 1] + (at - below) * (curves[below] - curves[below - 1]))  # [layers, heads]
    by_layer = shares.mean(1)
    layers = rounded((by_layer / by_layer.sum() * 2 * n_keep).tolist(), 2 * n_keep)
    heads = shares[layer] / shares[layer].sum() * n_heads * layers[layer]
    counts = rounded(heads.tolist(), n_heads * layers[layer])
    assert len(set(counts)) > 1  # else this tests little
    scores = inner.score(view)
    positions = LUKVPress(inner, compression_ratio=ratio, sink=2, window=3, curves=curves).choose(view)
    assert positions is not None
    for row in range(view.keys.shape[0]):
        for head, n in enumerate(counts):
            n_sink = 4 if isinstance(inner, ExpectedAttentionPress) else 2
            n_window = 3
            if n_sink + n_window > n:
                n_window = min(n_window, n // 2)
                n_sink = min(n_sink, n - n_window)
            always = [*range(n_sink), *range(N_TOKENS - n_window, N_TOKENS)]
            order = sorted(range(N_TOKENS), key=lambda t: (t not in always, -float(scores[row, head, t])))
            slots = positions[row, head].tolist()
            assert slots == sorted(order[:n]) + [-1] * (len(slots) - n)


def test_the_whole_cache_keeps_what_was_asked_for_and_frees_the_rest() -> None:
    model, ids, curves = tiny("llama"), tokens(2, 203), curves_of(2, 2, seed=5)
    full = PressedCache()
    model(ids, **cache_argument(full))
    for ratio in (0.1, 0.505, 0.777, 0.99, 0.999):
        press = LUKVPress(KnormPress(ratio), curves=curves)
        past = PressedCache(press)
        model(ids, **cache_argument(past))
        check_stored_pairs(press, past, 203)
        kept = sum(int((past.positions(i) >= 0).sum()) for i in range(2))
        assert kept == 2 * 2 * 2 * keep_count(203, ratio)
        assert 1 <= past.kv_bytes() / (kept * full.kv_bytes() // (2 * 2 * 2 * 203)) <= 1.01
    past = PressedCache(LUKVPress(KnormPress(budget_tokens=50), curves=curves))
    model(ids, **cache_argument(past))
    assert sum(int((past.positions(i) >= 0).sum()) for i in range(2)) == 2 * 2 * 2 * 50


@settings(max_examples=60)
@given(data=st.data(), n=st.integers(1, 12), high=st.integers(1, 60))
def test_places_are_given_out_exactly(data: st.DataObject, n: int, high: int) -> None:
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1 / 3, 0.5, 1.0]), min_size=n, max_size=n))
    total = data.draw(st.integers(n, n * high))
    counts = apportion(total, shares, 1, high)
    assert sum(counts) == total and all(1 <= c <= high for c in counts)
    for a, b in ((i, j) for i in range(n) for j in range(n) if shares[i] > shares[j]):
        assert counts[a] >= counts[b]
    if all(1 <= total * share / (sum(shares) or 1) <= high for share in shares):
        assert all(abs(c - total * share / sum(shares)) < 1 for c, share in zip(counts, shares, strict=True))


def test_the_ratio_may_stand_outside_or_inside() -> None:
    curves = curves_of(2, 2)
    inside = LUKVPress(ExpectedAttentionPress(0.5, epsilon=2e-2), curves=curves)
    assert LUKVPress(compression_ratio=0.5, curves=curves) == inside == make_press("lukv", 0.5, curves=curves)
    assert inside.compression_ratio == 0.5 and inside.with_ratio(0.25).compression_ratio == 0.25
    assert inside.with_budget(budget_tokens=9).budget_tokens == 9
    assert LUKVPress(KnormPress(0.5), compression_ratio=0.5).press == KnormPress(0.5)
    with pytest.raises(PressError, match="both say how much is kept"):
        LUKVPress(KnormPress(0.5), compression_ratio=0.25)
    with pytest.raises(PressError, match="both say how much is kept"):
        LUKVPress(KnormPress(budget_tokens=9), compression_ratio=0.25)


def test_curves_from_a_file(tmp_path: Path) -> None:
    path, view = tmp_path / "curves.npy", view_of("llama")
    np.save(path, curves_of(2, 2).numpy())
    given, read = (LUKVPress(KnormPress(0.6), curves=curves) for curves in (curves_of(2, 2), str(path)))
    assert torch.equal(given.choose(view), read.choose(view))
    assert torch.equal(KeyRerotationPress(read).compress(view).positions, read.choose(view))
    (tmp_path / "text.npy").write_text("no numbers")
    for name in ("nothing.npy", "text.npy"):
        with pytest.raises(PressError, match=f"cannot read the curves .*{name}"):
            LUKVPress(curves=tmp_path / name)


def test_without_curves_it_says_how_to_make_them() -> None:
    with pytest.raises(PressError, match=r"coldpress calibrate lukv --model MODEL --dataset wikitext"):
        tiny("llama")(tokens(1, 9), **cache_argument(PressedCache(LUKVPress(compression_ratio=0.5))))
    assert LUKVPress().compress(view_of("llama")) is None  # nothing to remove, nothing needed


def test_curves_of_another_model_are_refused() -> None:
    with pytest.raises(PressError, match="have 3 layers with 2 KV heads; the model compresses 2 layers with 2"):
        LUKVPress(KnormPress(0.5), curves=curves_of(3, 2)).compress(view_of("llama"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sink": -1}, "sink must be an integer >= 0"),
        ({"window": 0.5}, "window must be an integer >= 0"),
        ({"compression_ratio": 1.0}, "compression_ratio is the fraction"),
        ({"curves": [[0.5]]}, "curves must be a tensor or lists of finite numbers with 3 dimensions"),
        ({"curves": [[[0.5]]]}, "got 1 ratios"),
        ({"curves": [[[1.5]]] * 99}, "shares from 1.5 to 1.5"),
        ({"press": PyramidKVPress(0.5)}, "PyramidKVPress does so too"),
        ({"press": AdaKVPress(SnapKVPress(0.5))}, "makes that choice in its own way"),
    ],
)
def test_impossible_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PressError, match=message):
        LUKVPress(**parameters)
