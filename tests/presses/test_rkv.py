"""RKVPress: attention and redundancy against loops, what two equal keys come to, and the contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.examples.contract import CHECKS, Case, every_check
from tests.oracles.windows import by_head, redundancy, rkv
from tests.presses.views import MODELS, view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BoundaryPress,
    DecodingPress,
    LayerView,
    PrefillDecodingPress,
    RKVPress,
    SnapKVPress,
    make_press,
)
from coldpress.errors import PressError
from coldpress.presses import rkv as module

OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
SMALL = RKVPress(window_size=4, kernel_size=3)
CASES = {
    "prompt": Case(SMALL.with_ratio(0.5), n_most=25, lacks=("ragged",)),
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
@pytest.mark.parametrize(
    ("window", "kernel", "lam", "threshold"), [(5, 7, 0.1, 0.5), (1, 1, 1.0, 0.5), (8, 3, 0.7, 0.1), (4, 5, 0.0, -1.0)]
)
def test_rkv(model: str, window: int, kernel: int, lam: float, threshold: float) -> None:
    view = view_of(model, 21)
    expected = torch.tensor(by_head(view, lambda own: rkv(own, window, kernel, lam, threshold)))
    scores = RKVPress(window_size=window, kernel_size=kernel, lam=lam, threshold=threshold).score(view)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 100, 1 << 18])
@pytest.mark.parametrize("threshold", [0.5, -0.2])
def test_redundancy_block_by_block(at_once: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.core.pick._CPU_ELEMENTS", at_once)
    keys = torch.randn(2, 3, 19, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = [[redundancy(head.double(), threshold) for head in row] for row in keys]
    torch.testing.assert_close(module.redundancy(keys, threshold), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_memory_is_that_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.core.pick._CPU_ELEMENTS", 4000)
    largest, masked_fill = [], Tensor.masked_fill_
    monkeypatch.setattr(
        Tensor, "masked_fill_", lambda self, *given: largest.append(self.numel()) or masked_fill(self, *given)
    )
    module.redundancy(torch.randn(1, 2, 200, 8), 0.5)
    assert len(largest) == 20 and max(largest) == 4000


def with_copies(*copies: tuple[int, int]) -> LayerView:
    """A view whose keys are far from each other, but that token b has the key of token a."""
    view = view_of("llama", 21)
    keys = torch.eye(21)[:, :21].expand(*view.keys.shape[:2], 21, 21).clone()
    for a, b in copies:
        keys[:, :, b] = 3.0 * keys[:, :, a]
    queries = torch.zeros(*view.queries.shape[:3], 21)
    return replace(view, keys=keys, queries=queries, _memo={})


def test_of_two_equal_keys_the_older_one_goes() -> None:
    view = with_copies((6, 11))
    found = module.redundancy(view.keys, 0.5)[0, 0]
    others = [t for t in range(21) if t != 6]
    assert found[6] > found[others].max() * 1.04 and (found[others] == found[0]).all()
    kept = RKVPress(window_size=4).with_budget(budget_tokens=20).choose(view)
    assert kept is not None and (kept == torch.tensor(others)).all()


def test_of_three_equal_keys_the_newest_is_not_redundant() -> None:
    found = module.redundancy(with_copies((2, 9), (2, 15)).keys, 0.5)[0, 0]
    assert found[2] == found[9] > found[15] == found[0]


def test_an_equal_key_in_the_window_makes_the_older_one_redundant() -> None:
    kept = RKVPress(window_size=4).with_budget(budget_tokens=20).choose(with_copies((3, 19)))
    assert kept is not None and 3 not in kept[0, 0].tolist()


def test_without_redundancy_attention_alone_decides() -> None:
    view = view_of("gpt_neox")
    copies = replace(view, keys=view.keys.clone(), _memo={})
    press = RKVPress(0.5, lam=1.0, window_size=5)
    assert torch.equal(press.score(view), press.score(copies)) and (press.score(view) >= 0).all()
    assert not torch.equal(press.choose(view), replace(press, lam=0.0).choose(copies))


def test_bad_arguments_are_refused() -> None:
    for name, value, said in [
        ("window_size", 0, "must be an integer >= 1, got 0"),
        ("kernel_size", 4, "must be odd, got 4"),
        ("lam", 1.5, r"must be a number in \[0, 1\], got 1.5"),
        ("threshold", -2, r"must be a number in \[-1, 1\], got -2"),
    ]:
        with pytest.raises(PressError, match=rf"^RKVPress: {name} {said}\.$"):
            RKVPress(**{name: value})  # type: ignore[arg-type]
    press = make_press("decoding_rkv", 0.5)
    assert (
        isinstance(press, DecodingPress)
        and press.base_press == BoundaryPress(RKVPress())
        and press.compression_interval == 64
    )
