"""Scissorhands: how many of the last queries passed a token over."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import tokens
from tests.examples.contract import CHECKS, Case, every_check, read, seen_by
from tests.oracles.watched import Rule, State, follow, weights
from tests.presses.views import MODELS, view_of

from coldpress import (
    AdaKVPress,
    BoundaryPress,
    CompressionRatioDecodingPress,
    DecodingPress,
    PrefillDecodingPress,
    PressedCache,
    ScissorhandsPress,
    SnapKVPress,
    make_press,
)
from coldpress.errors import PressError
from coldpress.presses.scissorhands import _ones

OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
SMALL = {"n_sink": 1, "grace": 4, "history": 9}
Watching = partial(Case, exact_crop=False)
CASES = {
    "prompt": Case(ScissorhandsPress(0.5, **SMALL), n_most=25, lacks=("ragged",)),
    "adakv": Case(AdaKVPress(ScissorhandsPress(0.5, n_sink=1, grace=4, history=70)), n_most=25),
    "decoding": Watching(DecodingPress(ScissorhandsPress(**SMALL), **OFTEN), lacks=("chunks", "ragged")),
    "adakv decoding": Watching(
        CompressionRatioDecodingPress(AdaKVPress(ScissorhandsPress(**SMALL)), compression_interval=3),
        lacks=("chunks",),
    ),
    "after snapkv": Watching(
        PrefillDecodingPress(SnapKVPress(0.5, 4), DecodingPress(ScissorhandsPress(**SMALL), **OFTEN)),
        n_most=25,
        lacks=("ragged",),
    ),
    "pinned": Watching(
        DecodingPress(ScissorhandsPress(**SMALL), **OFTEN), {"pin": [(0, 6), (20, 23)]}, lacks=("chunks", "ragged")
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def counts(past: PressedCache) -> list[list[int]]:
    """How often each pair of layer 0 was passed over, by head."""
    words = past.layer(0).columns()["passed_over"][0]
    return [[sum(f"{word % 2**64:b}".count("1") for word in pair) for pair in head] for head in words.tolist()]


def rule(history: int) -> Rule:
    def see(states: State, q: int, weights: dict[int, float], is_prompt: bool) -> None:
        for t, weight in weights.items():
            states[t] = [*states[t], weight < 1 / len(weights)][-history:]

    return Rule(lambda t: [], see, lambda states, t, end: (-sum(states[t]), t))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("history", [1, 5, 64, 70])
def test_scissorhands_step_by_step(history: int, interval: int, model: str) -> None:
    """In layer 0, whose queries and keys no eviction changes."""
    ids, n_prompt, n_keep = tokens(1, 24), 12, 9
    view = seen_by(model, ids)[0]
    press = ScissorhandsPress(n_sink=1, grace=2, history=history)
    past = PressedCache(DecodingPress(press, compression_interval=interval, target_size=n_keep))
    read(Case(None, model=model), past, ids[:, :n_prompt])
    slow = [follow(view, head, rule(history), n_prompt, interval, n_keep, (1, 2)) for head in range(view.keys.shape[1])]
    for t in range(n_prompt, 24):
        read(Case(None, model=model), past, ids[:, t : t + 1])
        expected = [next(own) for own in slow]
        assert past.positions(0)[0].tolist() == [list(own) for own in expected]
        assert counts(past) == [[sum(lows) for lows in own.values()] for own in expected]


def test_the_ring_forgets_what_is_older_than_the_history() -> None:
    """Longer than two words, read in a turn and then token by token."""
    ids, history = tokens(1, 150), 70
    view = seen_by("llama", ids)[0]
    past = PressedCache(ScissorhandsPress(history=history))
    read(Case(None), past, ids[:, :20], ids[:, 20:110], *ids[:, 110:].split(1, dim=1))
    for head in range(2):
        expected = [0] * 150
        for q in range(150 - history, 150):
            for t, weight in weights(view, head, q, list(range(q + 1)), rule(1).shift).items():
                expected[t] += weight < 1 / (q + 1)
        assert counts(past)[head] == expected


def test_pieces_and_turns_count_what_one_call_counts() -> None:
    found = []
    for cuts in ([40], [17, 23], [10] * 4, [30, *[1] * 10]):
        past = PressedCache(ScissorhandsPress(history=12))
        read(Case(None), past, *tokens(1, 40).split(cuts, dim=1))
        found.append(counts(past))
    assert found[0] == found[1] == found[2] == found[3]


def test_a_sliding_window_is_all_that_a_query_sees() -> None:
    view = seen_by("mistral", tokens(1, 50))[0]
    window = view.sliding_window
    assert window is not None and view.first_position > 0
    bits = ScissorhandsPress(history=30).state(view)["passed_over"]
    expected = torch.zeros(bits.shape[:3], dtype=torch.long)
    attention = view.window_attention(view.n_queries).mean(2)
    for q in range(view.n_tokens - min(30, view.n_queries), view.n_tokens):
        first = max(0, q - window + 1)
        own = attention[:, :, q - view.n_tokens, first : q + 1]
        expected[:, :, first : q + 1] += (own < 1 / (q + 1 - first)).long()
    assert torch.equal(_ones(bits).sum(-1), expected)


def test_bits_are_counted() -> None:
    words = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
    assert _ones(words).tolist() == [0, 1, 64, 63, 1, 32]


def test_of_equal_numbers_the_newer_one_stays() -> None:
    past = PressedCache(ScissorhandsPress(0.5, n_sink=0, grace=0, history=1))
    read(Case(None), past, tokens(1, 40))
    view = seen_by("llama", tokens(1, 40))[0]
    for head, held in enumerate(past.positions(0)[0].tolist()):
        low = [weight < 1 / 40 for weight in weights(view, head, 39, list(range(40)), rule(1).shift).values()]
        order = sorted(range(40), key=lambda t: (low[t], -t))
        assert (held == sorted(order[:20]) and len({low[t] for t in held}) == 2) or sum(low) < 20


@pytest.mark.parametrize(("history", "start"), [(64, 300_000), (512, 100_000)])
def test_far_into_a_text_the_newer_one_of_equal_numbers_stays(history: int, start: int) -> None:
    """Positions themselves would be too large to tell equal numbers apart in float32."""
    press, view = ScissorhandsPress(history=history), view_of("llama")
    words = torch.full((*view.keys.shape[:3], -(-history // 64)), -1)  # passed over by all
    at = torch.arange(start, start + view.n_tokens).expand(view.keys.shape[:3])
    score = press.score(replace(view, positions=at, columns={"passed_over": words}, _memo={}))
    assert bool((score.diff(dim=-1) > 0).all())


def test_names() -> None:
    expected = CompressionRatioDecodingPress(
        BoundaryPress(ScissorhandsPress(history=9)), 64, target_compression_ratio=0.4
    )
    assert make_press("decoding_scissorhands", 0.4, history=9) == expected


def test_what_is_refused() -> None:
    with pytest.raises(PressError, match="ScissorhandsPress: history must be an integer >= 1, got 0"):
        ScissorhandsPress(history=0)
    with pytest.raises(PressError, match="ScissorhandsPress: grace must be an integer >= 0, got -1"):
        ScissorhandsPress(grace=-1)
