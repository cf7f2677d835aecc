"""Merging against a slow version of what it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.examples.contract import CHECKS, Case, every_check
from tests.presses.views import MODELS, view_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coldpress import (
    AdaKVPress,
    ChunkKVPress,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    MassMergingPress,
    MergingPress,
    ScorerPress,
    SnapKVPress,
    make_press,
)
from coldpress.errors import PressError

every_model = pytest.mark.parametrize("model", MODELS)
INNER = [KnormPress(0.6), ChunkKVPress(SnapKVPress(0.4, window_size=4), 5), AdaKVPress(SnapKVPress(0.7, 4), 0.0)]


def length(vector: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def merged(
    keys: Tensor, values: Tensor, kept: list[int], threshold: float, fraction: float
) -> tuple[list[Tensor], list[float]]:
    """The values of the kept pairs of one head, keys ``[T, D]``, and the sum of the weights of each."""
    evicted = [t for t in range(len(keys)) if t not in kept]
    nearest = {}
    for e in evicted:
        cosines = {t: float(keys[e] @ keys[t]) / length(keys[e]) / length(keys[t]) for t in kept}
        nearest[e] = max((cosine, -t) for t, cosine in cosines.items())
    most_similar = sorted(evicted, key=lambda e: -nearest[e][0])[: math.floor(fraction * len(evicted) + 1e-9)]
    out = {t: (values[t].double(), 1.0) for t in kept}
    for e in most_similar:
        cosine, t = nearest[e][0], -nearest[e][1]
        if cosine >= threshold:
            weight = max(0.0, cosine) * length(values[e]) / (length(values[e]) + length(values[t]))
            out[t] = (out[t][0] + weight * values[e].double(), out[t][1] + weight)
    return [(out[t][0] / out[t][1]).float() for t in kept], [out[t][1] for t in kept]


def check(view: LayerView, press: MergingPress) -> None:
    kept, plain = press.compress(view), press.press.compress(view)
    assert kept is not None and plain is not None
    assert torch.equal(kept.positions, plain.positions) and torch.equal(kept.keys, plain.keys)
    for row in range(view.keys.shape[0]):
        for head in range(view.keys.shape[1]):
            mine = [t for t in kept.positions[row, head].tolist() if t >= 0]
            states = view.keys[row, head], view.values[row, head]
            expected, weights = merged(*states, mine, press.similarity_threshold, press.merge_fraction)
            torch.testing.assert_close(kept.values[row, head, : len(mine)], torch.stack(expected), atol=1e-5, rtol=1e-5)
            if isinstance(press, MassMergingPress):
                assert kept.bias is not None
                bias = torch.tensor([math.log(weight) for weight in weights])
                torch.testing.assert_close(kept.bias[row, head, : len(mine)], bias, atol=1e-5, rtol=1e-5)
            else:
                assert kept.bias is None


@every_model
@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize(("threshold", "fraction"), [(0.0, 1.0), (0.0, 0.3), (0.5, 1.0), (0.4, 0.7)])
@pytest.mark.thinned(7)
def test_merging(model: str, inner: ScorerPress, threshold: float, fraction: float) -> None:
    check(view_of(model), MergingPress(inner, threshold, fraction))
    check(view_of(model), MassMergingPress(inner, threshold, fraction))


CASES = {
    "snapkv": Case(MassMergingPress(SnapKVPress(0.5, 4)), lacks=("chunks", "ragged", "rerotated")),
    "adakv": Case(MassMergingPress(AdaKVPress(SnapKVPress(0.5, 4))), model="gpt_neox", lacks=("chunks", "rerotated")),
}


@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def test_merging_is_a_press_of_the_catalogue() -> None:
    assert make_press("merging_snapkv", 0.5, merge_fraction=0.75) == MergingPress(SnapKVPress(0.5), merge_fraction=0.75)
    assert MergingPress(KnormPress(0.0)).compress(view_of("llama")) is None


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_similarities_are_taken_block_by_block(inner: ScorerPress, monkeypatch: pytest.MonkeyPatch) -> None:
    view, largest = view_of("llama", 200), 0
    whole = MergingPress(inner).compress(view)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return out

    monkeypatch.setattr("coldpress.presses.merging._BLOCK_ELEMENTS", 1000)
    with Largest():
        blocks = MergingPress(inner).compress(view)
    assert largest <= view.keys.numel()  # and not kept times evicted
    torch.testing.assert_close(blocks.values, whole.values, atol=1e-6, rtol=1e-5)


def test_nothing_is_merged_that_is_not_similar() -> None:
    view = view_of("gpt_neox")
    for press in (MergingPress(KnormPress(0.5), merge_fraction=0.0), MergingPress(KnormPress(0.5), 1.0)):
        assert torch.equal(press.compress(view).values, KnormPress(0.5).compress(view).values)


def test_keys_and_values_of_length_zero() -> None:
    view = view_of("gpt_neox")
    empty = replace(view, keys=torch.zeros_like(view.keys), values=torch.zeros_like(view.values), _memo={})
    assert (MergingPress(KnormPress(0.5)).compress(empty).values == 0).all()


def test_merged_pairs_may_be_rerotated() -> None:
    view, inner = view_of("llama"), MergingPress(KnormPress(0.5))
    both = KeyRerotationPress(inner).compress(view)
    assert torch.equal(both.values, inner.compress(view).values)
    assert torch.equal(both.keys, KeyRerotationPress(KnormPress(0.5)).compress(view).keys)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergingPress(KnormPress(), similarity_threshold=-0.1), "similarity_threshold must be a number in"),
        (lambda: MergingPress(KnormPress(), merge_fraction=1.1), "merge_fraction must be a number in"),
        (
            lambda: MergingPress(KeyRerotationPress(KnormPress())),
            r"outside: KeyRerotationPress\(press=MergingPress",
        ),
        (lambda: MergingPress(MergingPress(KnormPress())), "MergingPress changes the pairs it keeps"),
        (lambda: MergingPress(None), "wraps a press"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(PressError, match=message):
        make()
