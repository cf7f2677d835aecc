"""Keyformer: H2O's sums of a noisy attention, with noise that depends on nothing but seed, place and positions."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import tokens
from tests.examples.contract import CHECKS, Case, check_equal, every_check, later, read, seen_by, states
from tests.oracles.watched import Rule, State, follow
from tests.presses.views import MODELS

from coldpress import (
    AdaKVPress,
    BoundaryPress,
    CompressionRatioDecodingPress,
    DecodingPress,
    H2OPress,
    KeyformerPress,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
    make_press,
)
from coldpress.errors import PressError
from coldpress.presses import keyformer

OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
SMALL = {"n_sink": 1, "grace": 4, "seed": 5}
Watching = partial(Case, exact_crop=False)
CASES = {
    "prompt": Case(KeyformerPress(0.5, **SMALL), n_most=25, lacks=("ragged",)),
    "adakv": Case(AdaKVPress(KeyformerPress(0.5, **SMALL)), n_most=25),
    "decoding": Watching(DecodingPress(KeyformerPress(**SMALL), **OFTEN), lacks=("chunks", "ragged")),
    "adakv decoding": Watching(
        CompressionRatioDecodingPress(AdaKVPress(KeyformerPress(**SMALL)), compression_interval=3), lacks=("chunks",)
    ),
    "after snapkv": Watching(
        PrefillDecodingPress(SnapKVPress(0.5, 4), DecodingPress(KeyformerPress(**SMALL), **OFTEN)),
        n_most=25,
        lacks=("ragged",),
    ),
    "pinned": Watching(
        DecodingPress(KeyformerPress(**SMALL), **OFTEN), {"pin": [(0, 6), (20, 23)]}, lacks=("chunks", "ragged")
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def gumbel(seed: int, layer: int, head: int, query: int, key: int) -> float:
    """The same draw with Python's integers, as of 64 bits without a sign."""
    x = query * keyformer._QUERY + key * keyformer._KEY + head * keyformer._HEAD
    x = (x + layer * keyformer._LAYER + seed * keyformer._SEED) % 2**64
    for factor, shift in zip(keyformer._MIX, (30, 27), strict=True):
        x = (x ^ (x >> shift)) * factor % 2**64
    return -math.log(-math.log(((x >> 41) + 0.5) / 2**23))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    "press",
    [
        KeyformerPress(n_sink=1, grace=3, decay=0.8, noise=1.0, tau_step=0.1, seed=4),
        KeyformerPress(n_sink=1, grace=3, decay=1.0, noise=0.5, tau_step=0.0, seed=2**61 + 7),
        KeyformerPress(n_sink=1, grace=3, decay=1.0, noise=0.0, tau_step=0.5),
    ],
    ids=["both", "noise", "tau"],
)
def test_keyformer_step_by_step(press: KeyformerPress, interval: int, model: str) -> None:
    """In layer 0, whose queries and keys no eviction changes."""
    ids, n_prompt, n_keep = tokens(1, 24), 12, 9
    view = seen_by(model, ids)[0]

    def shift(logit: float, head: int, query: int, key: int) -> float:
        noise = press.noise * gumbel(press.seed or 0, 0, head, query, key)
        return (logit + noise) / (1 + press.tau_step * max(0, query + 1 - n_prompt))

    def see(states: State, q: int, weights: dict[int, float], is_prompt: bool) -> None:
        for t, weight in weights.items():
            states[t] = states[t] * (1.0 if is_prompt else press.decay) + weight

    rule = Rule(lambda t: 0.0, see, lambda states, t, end: states[t], shift)
    past = PressedCache(DecodingPress(press, compression_interval=interval, target_size=n_keep))
    read(Case(None, model=model), past, ids[:, :n_prompt])
    slow = [follow(view, head, rule, n_prompt, interval, n_keep, (1, 3)) for head in range(view.keys.shape[1])]
    for t in range(n_prompt, 24):
        read(Case(None, model=model), past, ids[:, t : t + 1])
        for head, states_of_head in enumerate(map(next, slow)):
            assert past.positions(0)[0, head].tolist() == list(states_of_head)
            own = past.layer(0).columns()["received_with_noise"][0, head]
            torch.testing.assert_close(own, torch.tensor([*states_of_head.values()]), atol=1e-5, rtol=0)
        assert (past.layer(0).columns()["steps"] == t + 1 - n_prompt).all()


@pytest.mark.parametrize("decodes", [False, True])
def test_without_noise_and_at_tau_1_it_is_h2o(decodes: bool) -> None:
    published = {"n_sink": 0, "grace": 0, "recent_ratio": 0.3, "decay": 1.0}
    plain = KeyformerPress(**published, noise=0.0, tau_step=0.0)
    almost = KeyformerPress(**published, noise=1e-30, tau_step=0.0, seed=0)  # goes the way of noise
    caches = []
    for press in (H2OPress(**published), plain, almost):
        caches.append(PressedCache(DecodingPress(press, **OFTEN) if decodes else press.with_ratio(0.5)))
        read(Case(None), caches[-1], tokens(2, 40), *later(2))
    received = [next(iter(past.layer(1).columns().values())) for past in caches]
    for past, own in zip(caches[1:], received[1:], strict=True):
        assert torch.equal(past.positions(1), caches[0].positions(1))
        torch.testing.assert_close(own, received[0], atol=1e-4, rtol=0)
    assert [*caches[1].layer(1).columns()] == ["received_with_noise", "steps"] or decodes


def test_every_query_gives_one_whatever_the_noise() -> None:
    past = PressedCache(KeyformerPress(decay=1.0, seed=1))
    read(Case(None), past, tokens(1, 30), *later())
    for layer in past.pressed_layers():
        torch.testing.assert_close(layer.columns()["received_with_noise"].sum(-1), torch.full((1, 2), 40.0))


def test_noise_is_gumbels_and_no_two_draws_go_together() -> None:
    view = seen_by("llama", tokens(1, 200))[1]
    at = torch.arange(200)
    draws = KeyformerPress(seed=3)._gumbel(view, at, at.view(1, 1, -1))[0]  # [Hkv, G, n, T]
    assert draws.shape == (2, 2, 200, 200) and draws.isfinite().all()
    assert abs(float(draws.mean()) - 0.5772) < 0.01 and abs(float(draws.var()) - math.pi**2 / 6) < 0.03
    assert draws.unique().numel() > 0.98 * draws.numel()
    flat = draws - draws.mean()
    for dim in range(4):
        both = flat.narrow(dim, 0, draws.shape[dim] - 1) * flat.narrow(dim, 1, draws.shape[dim] - 1)
        assert abs(float(both.mean())) < 0.03
    other = KeyformerPress(seed=4)._gumbel(view, at, at.view(1, 1, -1))[0]
    assert abs(float((flat * (other - other.mean())).mean())) < 0.03


def test_layers_and_seeds_draw_noise_of_their_own() -> None:
    views, at = seen_by("llama", tokens(1, 8)), torch.arange(8)
    noise = [KeyformerPress(seed=s)._gumbel(v, at, at.view(1, 1, -1)) for v in views for s in (0, 1)]
    assert all(not torch.equal(noise[i], noise[j]) for i in range(4) for j in range(i))


def test_a_new_cache_draws_new_noise_and_torchs_seed_repeats_it() -> None:
    def run(seed: int | None = None) -> PressedCache:
        if seed is not None:
            torch.manual_seed(seed)
        past = PressedCache(DecodingPress(KeyformerPress(n_sink=1, grace=4), **OFTEN))
        read(Case(None), past, tokens(1, 40), *later())
        return past

    first, second, third = run(1), run(), run(1)
    check_equal(states(first), states(third))
    assert not torch.equal(first.layer(1).columns()["steps"], torch.zeros(1))
    assert not torch.equal(states(first)[3], states(second)[3])


@pytest.mark.parametrize("how", ["file", "fork"])
def test_a_cache_goes_on_with_its_own_seed(how: str, tmp_path: Path) -> None:
    CHECKS[how](Watching(DecodingPress(KeyformerPress(n_sink=1, grace=4), **OFTEN)), tmp_path)


def test_names() -> None:
    expected = CompressionRatioDecodingPress(BoundaryPress(KeyformerPress(seed=2)), 64, target_compression_ratio=0.4)
    assert make_press("decoding_keyformer", 0.4, seed=2) == expected


@pytest.mark.parametrize("name", ["noise", "tau_step"])
def test_what_is_refused(name: str) -> None:
    with pytest.raises(PressError, match=f"KeyformerPress: {name} must be a number >= 0, got -1"):
        KeyformerPress(**{name: -1})
    with pytest.raises(PressError, match="KeyformerPress: decay must be a number above 0"):
        KeyformerPress(decay=0.0)
