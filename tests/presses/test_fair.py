"""FairPress: quotas against a count by hand, and what holds of them whatever the scores are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.oracles.choices import ends
from tests.oracles.fair import fair
from tests.presses.views import MODELS, view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    ChunkKVPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    FairPress,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    prefill,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.counts import keep_count
from coldpress.errors import PressError
from coldpress.presses.fair import _quotas

N = 37
SPANS: list[list[tuple[int, int]]] = [[(0, N)], [(3, 9), (9, 11)], [(20, 500), (0, 2)], [(50, 60)], [(5, 6), (30, 37)]]


def heads_of(positions: Tensor | None) -> list[list[list[int]]]:
    assert positions is not None
    return [[[t for t in head if t >= 0] for head in row] for row in positions.tolist()]


def expected(view: LayerView, inner: Any, counts: Tensor, spans: list[tuple[int, int]], *always: int) -> Any:
    """What each head of a view of a prompt keeps."""
    return [
        [fair(dict(enumerate(head.tolist())), int(n), spans, [*always], N) for head, n in zip(row, own, strict=True)]
        for row, own in zip(inner.score(view), counts, strict=True)
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("spans", SPANS, ids=str)
@pytest.mark.filterwarnings("ignore:FairPress")  # of a span that lies beyond the text
def test_fair(model: str, ratio: float, spans: list[tuple[int, int]]) -> None:
    """Beside a window, which is in one span or two; and in heads that keep different numbers."""
    view, inner, n = view_of(model), SnapKVPress(ratio, window_size=4), keep_count(N, ratio)
    counts, window = torch.full(view.keys.shape[:2], n), ends(N, 0, 4)
    assert heads_of(FairPress(inner, spans).choose(view)) == expected(view, inner, counts, spans, *window)
    adaptive = AdaKVPress(inner, alpha_safeguard=0.0)
    counts = adaptive.counts(view, n, adaptive.forced(view, n))
    assert heads_of(FairPress(adaptive, spans).choose(view)) == expected(view, inner, counts, spans, *window)


@dataclass(frozen=True)
class Late(KnormPress):
    """Likes later tokens better."""

    def score(self, view: LayerView) -> Tensor:
        at = view.positions if view.positions is not None else torch.arange(view.n_tokens)
        return at.float().expand(view.keys.shape[:3])


def n_in(past: PressedCache, span: tuple[int, int]) -> list[int]:
    """How many pairs of a span each head of each layer holds."""
    held = [(layer.positions() >= span[0]) & (layer.positions() < span[1]) for layer in past.pressed_layers()]
    return torch.cat([own.sum(-1).flatten() for own in held]).tolist()


def test_each_span_keeps_its_share_whatever_the_scores_are() -> None:
    spans, rest = [(0, 10), (10, 30)], (30, 40)
    unfair, past = PressedCache(Late(0.5)), PressedCache(FairPress(Late(0.5), spans))
    for cache in (unfair, past):
        tiny("llama")(tokens(1, 40), **cache_argument(cache))
    assert [set(n_in(unfair, span)) for span in (*spans, rest)] == [{0}, {10}, {10}]
    assert [set(n_in(past, span)) for span in (*spans, rest)] == [{5}, {10}, {5}]
    assert past.positions(0)[0, 0].tolist() == [*range(5, 10), *range(20, 30), *range(35, 40)]


def test_what_rounding_leaves_goes_by_score() -> None:
    past = PressedCache(FairPress(Late(budget_tokens=7), [(0, 10), (10, 20), (20, 30)]))
    tiny("llama")(tokens(1, 30), **cache_argument(past))
    assert past.positions(0)[0, 0].tolist() == [8, 9, 18, 19, 27, 28, 29]


def test_one_span_for_all_is_the_press_inside() -> None:
    view = view_of("llama")
    for inner in (SnapKVPress(0.6, window_size=4), StreamingLLMPress(0.5), PyramidKVPress(0.5, window_size=4)):
        for spans in ([(0, N)], [(0, 99)], [(N, N + 3)]):
            with pytest.warns(UserWarning, match="beyond") if spans[0][0] == N else nullcontext():
                assert torch.equal(FairPress(inner, spans).choose(view), inner.choose(view))


def test_pins_count_towards_the_quota_of_their_span() -> None:
    for pin, kept in (
        ([(0, 2)], [0, 1, 7, 8, 9, *range(25, 30), *range(35, 40)]),  # 2 of the 5 of the first span
        ([(0, 8)], [*range(8), *range(26, 30), *range(36, 40)]),  # 8: the others share what is left
    ):
        past = PressedCache(FairPress(Late(budget_tokens=len(kept)), [(0, 10), (20, 30)]), pin=pin)
        tiny("llama")(tokens(1, 30), **cache_argument(past))
        own = [t for t in kept if t < 10] + [t for t in kept if 20 <= t < 30]
        left = len(kept) - len(own)
        assert past.positions(0)[0, 0].tolist() == sorted(own + list(range(20 - left, 20)))


@given(st.data())
def test_quotas(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum))
    n_forced = [data.draw(st.integers(0, size)) for size in sizes]
    n = data.draw(st.integers(max(1, sum(n_forced)), max(1, sum(sizes))))
    quotas = _quotas(torch.tensor([[n]]), torch.tensor([[n_forced]]), torch.tensor(sizes))[0, 0].tolist()
    assert sum(quotas) <= n and all(q >= f for q, f in zip(quotas, n_forced, strict=True))
    floors = [n * size // sum(sizes) for size in sizes]
    if all(f <= q for f, q in zip(n_forced, floors, strict=True)):
        assert quotas == floors and sum(quotas) > n - len(sizes)
    per_token = [q / size for q, f, size in zip(quotas, n_forced, sizes, strict=True) if size and q > f]
    assert not per_token or max(per_token) <= n / sum(sizes)  # nobody's share grows by what others must keep


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_heads_that_hold_different_tokens(is_adaptive: bool) -> None:
    """Every second token from 30 on, fewer in some heads; nothing is held of what came before, and of the newest 45."""
    view, n, spans = view_of("llama"), 17, [(0, 20), (30, 50), (60, 70)]
    held = torch.tensor([[N, 20], [25, N]])
    slots = torch.arange(N).expand(2, 2, N)
    positions = (2 * slots + 30).masked_fill(slots >= held[..., None], -1)
    later = replace(
        view, positions=positions, counts=held, first_position=150 - N, queries=view.queries[:, :, -4:], _memo={}
    )
    inner = AdaKVPress(KnormPress(budget_tokens=n), 0.0) if is_adaptive else KnormPress(budget_tokens=n)
    scores = KnormPress().score(view)
    counts = inner.counts(later, n, inner.forced(later, n)) if isinstance(inner, AdaKVPress) else torch.full((2, 2), n)
    for row, head in ((b, h) for b in range(2) for h in range(2)):
        own = {2 * t + 30: float(scores[row, head, t]) for t in range(int(held[row, head]))}
        kept = fair(own, int(counts[row, head]), spans, [], 150)
        found = heads_of(FairPress(inner, spans).choose(later))[row][head]
        assert [int(positions[row, head, slot]) for slot in found] == kept


@pytest.mark.parametrize("inner", [Late(), AdaKVPress(KnormPress(), 0.0)], ids=repr)
def test_while_decoding_spans_hold_their_share_of_the_text_so_far(inner: Any) -> None:
    """Spans of the prompt, of which no pair comes back; what is generated is outside of them."""
    spans, ids = [(0, 12), (12, 24)], tokens(1, 80)
    past = PressedCache(DecodingPress(FairPress(inner, spans), compression_interval=4, target_size=20))
    with torch.no_grad():
        tiny("llama")(ids[:, :40], **cache_argument(past))
        for i in range(40, 80):
            tiny("llama")(ids[:, i : i + 1], **cache_argument(past))
            if i % 4 == 3:
                for layer in past.pressed_layers():
                    held = (layer.positions() >= 0).sum(-1)[0].tolist()
                    assert sum(held) == 40
                for span in spans:
                    heads = [(p >= 0).sum(-1)[0].tolist() for p in map(past.positions, range(2))]
                    least = [n * 12 // (i + 1) for own in heads for n in own]
                    assert all(n >= q for n, q in zip(n_in(past, span), least, strict=True))


def test_a_prompt_in_pieces_is_fair_to_the_text_so_far() -> None:
    past = PressedCache(FairPress(Late(0.5), [(0, 10), (40, 60)]), chunk_tokens=20)
    prefill(tiny("llama"), tokens(1, 60), past)
    assert set(n_in(past, (0, 10))) == {5} and set(n_in(past, (40, 60))) == {10} and past.stored_lengths() == [30, 30]


def test_what_does_not_go_together() -> None:
    press = FairPress(SnapKVPress(0.5), [(0, 4)])
    for outer in (AdaKVPress, CriticalKVPress, ChunkKVPress, lambda inner: FairPress(inner, [(0, 3)])):
        with pytest.raises(PressError, match="FairPress makes that choice in its own way"):
            outer(press)
    for inner in (CriticalKVPress(SnapKVPress(0.5)), CriticalAdaKVPress(SnapKVPress(0.5)), ChunkKVPress(KnormPress())):
        with pytest.raises(PressError, match=rf"{type(inner).__name__} makes that choice in its own way"):
            FairPress(inner, [(0, 4)])
    KeyRerotationPress(press)

    class Chooses(AdaKVPress):
        def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
            return super().chosen(view, n_keep, must)

    with pytest.raises(PressError, match="Chooses makes that choice in its own way"):
        FairPress(Chooses(SnapKVPress(0.5)), [(0, 4)])


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([], "spans must name at least one"),
        (None, "spans are pairs"),
        ([(3, 3)], "spans are pairs"),
        ([(-1, 3)], "spans are pairs"),
        ([(0, 3.0)], "spans are pairs"),
        ([(0, True)], "spans are pairs"),
        ([(0, 3, 4)], "spans are pairs"),
        ([5], "spans are pairs"),
        ([(4, 9), (0, 5)], "spans must not overlap, and position 4 is in two"),
    ],
)
def test_spans_are_checked(spans: Any, said: str) -> None:
    with pytest.raises(PressError, match=said):
        FairPress(SnapKVPress(0.5), spans)


def test_a_budget_is_that_of_the_press_inside() -> None:
    press = FairPress(SnapKVPress(0.5), [[0, 4], (9, 12)])
    assert press.spans == ((0, 4), (9, 12)) and press.compression_ratio == 0.5
    assert press.with_budget(budget_tokens=9) == FairPress(SnapKVPress(budget_tokens=9), [(0, 4), (9, 12)])
    assert replace(press, spans=[(1, 2)]).spans == ((1, 2),)


SOME = [(0, 9), (9, 12), (30, 45)]
OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
PINS: Sequence[list[tuple[int, int]]] = [[(0, 4), (20, 22)], [(3, 5)], []]
snapkv = SnapKVPress(0.5, window_size=4)
CASES = {
    "prompt": Case(FairPress(snapkv, SOME), n_most=25, lacks=("ragged",)),
    "neox": Case(FairPress(snapkv, SOME), model="gpt_neox", n_most=25, lacks=("ragged",)),
    "adakv": Case(FairPress(AdaKVPress(snapkv), SOME), n_most=25),
    "decoding": Case(DecodingPress(FairPress(SnapKVPress(window_size=4), SOME), **OFTEN), lacks=("chunks", "ragged")),
    "adakv decoding": Case(
        CompressionRatioDecodingPress(FairPress(AdaKVPress(KnormPress()), SOME), compression_interval=3),
        lacks=("chunks",),
    ),
    "both": Case(
        PrefillDecodingPress(AdaKVPress(KnormPress(0.3)), DecodingPress(FairPress(KnormPress(), SOME), **OFTEN)),
        n_most=35,
        lacks=("ragged",),
    ),
    "pins": Case(
        FairPress(snapkv, SOME), rows=lambda rows: {"pin": [PINS[row] for row in rows]}, n_most=25, lacks=("ragged",)
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)
