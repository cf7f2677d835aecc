"""RaaS: timestamps that a look renews, the oldest that go, and a prompt that stays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check, read, seen_by
from tests.oracles.watched import Rule, State, follow
from tests.presses.views import MODELS
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    BoundaryPress,
    ChunkKVPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    DecodingPress,
    KnormPress,
    LayerView,
    LUKVPress,
    PrefillDecodingPress,
    PressedCache,
    RaaSPress,
    SnapKVPress,
    make_press,
    prefill,
)
from coldpress.errors import PressError

OFTEN = {"compression_interval": 3, "hidden_states_buffer_size": 8}
SMALL = {"n_sink": 1, "grace": 4, "alpha": 0.03}
LOOSE = {**SMALL, "keep_prompt": False}
Watching = partial(Case, exact_crop=False)
CASES = {
    "prompt": Case(RaaSPress(0.5, **LOOSE), n_most=25, lacks=("ragged",)),
    "adakv": Case(AdaKVPress(RaaSPress(0.5, **LOOSE)), n_most=25),
    "decoding": Watching(DecodingPress(RaaSPress(**LOOSE), target_size=24, **OFTEN), lacks=("chunks", "ragged")),
    "keeps the prompt": Watching(
        DecodingPress(RaaSPress(**SMALL), target_size=56, **OFTEN),
        lacks=("chunks", "ragged", "memory"),  # whose prompt is longer
    ),
    "adakv decoding": Watching(
        CompressionRatioDecodingPress(AdaKVPress(RaaSPress(**LOOSE)), compression_interval=3), lacks=("chunks",)
    ),
    "after snapkv": Watching(
        PrefillDecodingPress(SnapKVPress(0.5, 4), DecodingPress(RaaSPress(**SMALL), target_size=30, **OFTEN)),
        n_most=25,
        lacks=("ragged", "memory"),
    ),
    "adakv keeps the prompt": Watching(
        PrefillDecodingPress(
            SnapKVPress(0.5, 4), DecodingPress(AdaKVPress(RaaSPress(**SMALL), 0.0), target_size=32, **OFTEN)
        ),
        n_most=25,
        lacks=("memory",),
    ),
    "pinned": Watching(
        DecodingPress(RaaSPress(**LOOSE), target_size=24, **OFTEN),
        {"pin": [(0, 6), (20, 23)]},
        lacks=("chunks", "ragged"),
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def rule(alpha: float) -> Rule:
    def see(states: State, q: int, weights: dict[int, float], is_prompt: bool) -> None:
        for t, weight in weights.items():
            states[t] = q if weight > alpha else states[t]

    return Rule(lambda t: t, see, lambda states, t, end: (states[t], t))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.08, 0.15, 1.0])
@pytest.mark.parametrize("keep_prompt", [False, True])
@pytest.mark.thinned(7)
def test_raas_step_by_step(keep_prompt: bool, alpha: float, interval: int, model: str) -> None:
    """In layer 0, whose queries and keys no eviction changes."""
    n_prompt = 6 if keep_prompt else 12
    ids, n_keep = tokens(1, 24), 11
    view = seen_by(model, ids)[0]
    press = RaaSPress(n_sink=1, grace=2, alpha=alpha, keep_prompt=keep_prompt)
    past = PressedCache(DecodingPress(press, compression_interval=interval, target_size=n_keep))
    read(Case(None, model=model), past, ids[:, :n_prompt])
    ends = (n_prompt if keep_prompt else 1, 2)
    slow = [follow(view, head, rule(alpha), n_prompt, interval, n_keep, ends) for head in range(view.keys.shape[1])]
    for t in range(n_prompt, 24):
        read(Case(None, model=model), past, ids[:, t : t + 1])
        for head, states in enumerate(map(next, slow)):
            assert past.positions(0)[0, head].tolist() == list(states)
            assert past.layer(0).columns()["looked_at"][0, head].tolist() == [*states.values()]
    assert past.stored_lengths()[0] == n_keep + (24 - n_prompt) % interval


@pytest.mark.parametrize("cuts", [[30], [12, 1, 17], [12, *[1] * 18]])
def test_alpha_0_makes_every_timestamp_now(cuts: list[int]) -> None:
    past = PressedCache(RaaSPress(alpha=0.0))
    read(Case(None), past, *tokens(1, 30).split(cuts, dim=1))
    for layer in past.pressed_layers():
        assert (layer.columns()["looked_at"] == 29).all()


def test_ties_go_by_position() -> None:
    """With equal timestamps the newest tokens stay, in every head, whatever has gone before."""
    past = PressedCache(DecodingPress(RaaSPress(n_sink=2, grace=0, alpha=0.0, keep_prompt=False), 2, 12))
    read(Case(None), past, tokens(1, 20), *tokens(1, 10, seed=1).split(1, dim=1))
    for layer in past.pressed_layers():
        assert layer.positions()[0].tolist() == [[0, 1, *range(20, 30)]] * 2


def test_a_turn_renews_as_its_tokens_one_by_one() -> None:
    found = []
    for cuts in ([40], [17, 23], [10] * 4, [30, *[1] * 10]):
        past = PressedCache(RaaSPress(alpha=0.04))
        read(Case(None), past, *tokens(1, 40).split(cuts, dim=1))
        found.append([layer.columns()["looked_at"] for layer in past.pressed_layers()])
    for own in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(own, found[0], strict=True))
    assert len(found[0][0].unique()) > 5


@pytest.mark.parametrize("wraps", [False, True])
def test_the_prompt_is_never_evicted(wraps: bool) -> None:
    base = RaaSPress(n_sink=0, grace=3, alpha=1.0)  # nothing is ever looked at
    press = DecodingPress(AdaKVPress(base, 0.0) if wraps else base, 2, 25)
    ids, mask = tokens(2, 20), torch.ones(2, 20 + 30, dtype=torch.long)
    mask[1, :6] = 0
    past = PressedCache(press)
    read(Case(None), past, ids, *tokens(2, 30, seed=1).split(1, dim=1), mask=mask)
    for layer in past.pressed_layers():
        for row, first in ((0, 0), (1, 6)):
            for head in layer.positions()[row].tolist():
                assert set(range(first, 20)) <= set(head) and set(range(47, 50)) <= set(head)
                assert len([t for t in head if t >= 20]) == (5 if row == 0 else 11)


def test_what_another_press_left_of_the_prompt_is_never_evicted() -> None:
    for chunk in (None, 16):
        press = PrefillDecodingPress(SnapKVPress(0.5, 4), DecodingPress(RaaSPress(grace=3), 2, 25))
        past = PressedCache(press, chunk_tokens=chunk)
        prefill(tiny("llama"), tokens(1, 40), past)
        left = past.positions(1)[0].tolist()
        read(Case(None), past, *tokens(1, 30, seed=1).split(1, dim=1))
        assert [len(head) for head in left] == [20] * 2 and past.stored_lengths() == [25] * 2
        for head, before in zip(past.positions(1)[0].tolist(), left, strict=True):
            assert head[:20] == before


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        (
            RaaSPress(grace=5),
            "RaaSPress keeps the prompt: 20 tokens of it, pinned ones among them, and the newest 5 "
            "are 25 that must stay, and the budget keeps 24 of each head: keep 25 or more",
        ),
        (
            AdaKVPress(RaaSPress(grace=5)),
            "20 pinned tokens, 4 sinks and a window of 5 are 25 tokens that must stay, and the budget keeps 24",
        ),
    ],
    ids=["alone", "adakv"],
)
def test_a_budget_below_the_prompt_is_refused_with_the_numbers(base: RaaSPress, sentence: str) -> None:
    past = PressedCache(DecodingPress(base, 8, 24))
    with pytest.raises(PressError, match=sentence):
        read(Case(None), past, tokens(1, 20), *tokens(1, 9, seed=1).split(1, dim=1))
    enough = PressedCache(DecodingPress(base, 8, 25))
    read(Case(None), enough, tokens(1, 20), *tokens(1, 8, seed=1).split(1, dim=1))
    assert enough.achieved_ratio() == pytest.approx(1 - 25 / 28)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_prompt_that_stays_cannot_be_compressed(wraps: bool) -> None:
    press = AdaKVPress(RaaSPress(0.5)) if wraps else RaaSPress(0.5)
    with pytest.raises(PressError, match="RaaSPress keeps the prompt, all 40 tokens of it: use DecodingPress"):
        read(Case(None), PressedCache(press), tokens(1, 40))
    whole = PressedCache(RaaSPress())
    read(Case(None), whole, tokens(1, 40))
    assert whole.achieved_ratio() == 0


@dataclass(frozen=True)
class Odd(KnormPress):
    """Lets nothing evict tokens whose position is odd."""

    def pins(self, view: LayerView) -> Tensor | None:
        at = torch.arange(view.n_tokens) if view.positions is None else view.positions
        return (at % 2 == 1).expand(view.keys.shape[:3])


@pytest.mark.parametrize(
    ("press", "n_kept"),
    [
        (Odd(0.3), 28),
        (LUKVPress(Odd(0.3), curves=[[[0.1, 0.5]] * 2] * 99), 28),
        (ChunkKVPress(Odd(0.3), 4), 28),
        (BlockPress(Odd(0.3), 6), 28),
        (ComposedPress([KnormPress(0.1), Odd(0.2)]), 28),
        (PrefillDecodingPress(AdaKVPress(Odd(0.3), 0.0), DecodingPress(KnormPress(), 2, 30)), 28),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_press_pins_stays_in_any_wrapper(press: BasePress, n_kept: int) -> None:
    past = PressedCache(press, pin=[(0, 3)])
    read(Case(None), past, tokens(1, 40))
    assert past.achieved_ratio() == pytest.approx(1 - n_kept / 40, abs=0.01)
    for layer in past.pressed_layers():
        assert all({0, 2, *range(1, 40, 2)} <= set(head) for head in layer.positions()[0].tolist())
    with pytest.raises(PressError, match="21 pinned tokens"):
        read(Case(None), PressedCache(Odd(0.5), pin=[(0, 2)]), tokens(1, 40))


def test_names() -> None:
    expected = CompressionRatioDecodingPress(
        BoundaryPress(RaaSPress(keep_prompt=False)), 64, target_compression_ratio=0.4
    )
    assert make_press("decoding_raas", 0.4) == expected


@pytest.mark.parametrize("alpha", [-0.1, 1.1, True])
def test_what_is_refused(alpha: float) -> None:
    with pytest.raises(PressError, match=r"RaaSPress: alpha must be a number in \[0, 1\]"):
        RaaSPress(alpha=alpha)
