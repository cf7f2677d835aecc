"""BoundaryPress: both ends of the prompt stay, however much is generated, in whatever it is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.presses.test_decoding import decode, decoded
from tests.presses.views import MODELS, view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    BoundaryPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    EntropyGatedChunkKVPress,
    GKVPress,
    KeyRerotationPress,
    KnormPress,
    LUKVPress,
    MergingPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    WrapperPress,
    prefill,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError

OFTEN = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}
SNAP = SnapKVPress(window_size=4)


def inside(**how: Any) -> AdaKVPress:
    return AdaKVPress(BoundaryPress(SNAP.with_budget(**how) if how else SNAP), 0.0)


def outside(**how: Any) -> BoundaryPress:
    return BoundaryPress(AdaKVPress(SNAP.with_budget(**how) if how else SNAP, 0.0))


half = {"compression_ratio": 0.5}
CASES = {
    "outside adakv": Case(outside(**half), model="gpt_neox", n_most=25),
    "inside adakv decoding": Case(DecodingPress(inside(), **OFTEN), lacks=("chunks",)),
    "gkv decoding": Case(DecodingPress(BoundaryPress(GKVPress(window_size=4)), **OFTEN), lacks=("chunks", "ragged")),
    "both": Case(
        PrefillDecodingPress(BoundaryPress(SNAP.with_ratio(0.3)), DecodingPress(BoundaryPress(SNAP), **OFTEN)),
        n_most=35,
        lacks=("ragged",),
    ),
    "pins": Case(DecodingPress(BoundaryPress(SNAP), **OFTEN), {"pin": [(8, 12)]}, lacks=("chunks", "ragged")),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def has_ends(head: Tensor, n: int, n_prompt: int) -> bool:
    return {*range(n), *range(n_prompt - n, n_prompt)} <= {*head.tolist()}


PROMPT, N_KEEP = 40, 24
SCHEDULES: dict[str, tuple[BasePress, Callable[[int], int]]] = {
    "snapkv": (DecodingPress(BoundaryPress(SNAP), 5, N_KEEP, 8), lambda n: N_KEEP),
    "share": (DecodingPress(BoundaryPress(SNAP, 0.3), 5, N_KEEP, 8), lambda n: N_KEEP),
    "inside": (DecodingPress(inside(), 5, N_KEEP, 8), lambda n: N_KEEP),
    "outside": (DecodingPress(outside(), 5, N_KEEP, 8), lambda n: N_KEEP),
    "both": (
        PrefillDecodingPress(BoundaryPress(KnormPress(0.3)), DecodingPress(BoundaryPress(KnormPress()), 5, N_KEEP)),
        lambda n: N_KEEP,
    ),
    "twice": (DecodingPress(BoundaryPress(BoundaryPress(SNAP, 0.25), 0.05), 5, N_KEEP, 8), lambda n: N_KEEP),
}
N_EACH = {"share": 7, "twice": 6}  # floor(24 * 0.3); else floor(24 * 0.1)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SCHEDULES)
def test_both_ends_stay_for_300_steps(name: str) -> None:
    n_steps = 300 if name in ("snapkv", "inside") else 60
    press, n_keep = SCHEDULES[name]
    n = N_EACH.get(name, 2)
    for past, _ in decode(press, PROMPT + n_steps, PROMPT):
        for layer in past.pressed_layers():
            assert all(has_ends(head, n, PROMPT) for head in layer.positions()[0])
            if past.seen_tokens > PROMPT and (past.seen_tokens - PROMPT) % 5 == 0:
                assert int((layer.positions() >= 0).sum()) == 4 * n_keep(past.seen_tokens)
                newest = torch.arange(past.seen_tokens - 1, past.seen_tokens)
                assert name == "both" or (layer.positions() == newest).any(-1).all()
    assert past.seen_tokens == PROMPT + n_steps


def test_without_it_the_end_of_the_prompt_goes() -> None:
    past = decoded(DecodingPress(AdaKVPress(SNAP, 0.0), 5, N_KEEP, 8), PROMPT + 60, PROMPT)
    assert not all(has_ends(head, 2, PROMPT) for layer in past.pressed_layers() for head in layer.positions()[0])


def test_a_share_of_a_budget_that_grows() -> None:
    """Tokens that are still there when the share would cover them stay from then on."""
    press = CompressionRatioDecodingPress(BoundaryPress(SNAP, 0.2), 5, 8, 0.5)
    for past, _ in decode(press, PROMPT + 60, PROMPT):
        n = (PROMPT + 5) // 2 // 5  # of the first cut
        assert all(has_ends(head, n, PROMPT) for layer in past.pressed_layers() for head in layer.positions()[0])


@pytest.mark.parametrize("model", MODELS)
def test_the_other_places_go_to_what_the_inner_press_would_choose(model: str) -> None:
    view, n_keep = view_of(model), 20
    inner = SnapKVPress(window_size=3).with_budget(budget_tokens=n_keep)
    kept, scores = BoundaryPress(inner, 0.2).choose(view), inner.scores(view)
    assert kept is not None
    for row in range(2):
        for head in range(kept.shape[1]):
            must = [*range(4), *range(33, 37)]
            others = sorted(set(range(37)) - {*must}, key=lambda t: -float(scores[row, head, t]))
            assert kept[row, head].tolist() == sorted([*must, *others[: n_keep - 8]])
    assert torch.equal(BoundaryPress(inner, 0.0).choose(view), inner.choose(view))


def ratio(r: float) -> dict[str, Callable[[], ScorerPress]]:
    curves = [[[k / 100] * 2] * 2 for k in range(1, 100)]
    return {
        "plain": lambda: BoundaryPress(SNAP.with_ratio(r)),
        "pyramid": lambda: BoundaryPress(PyramidKVPress(r, window_size=2)),
        "in adakv": lambda: AdaKVPress(BoundaryPress(SNAP.with_ratio(r)), 0.0),
        "around adakv": lambda: BoundaryPress(AdaKVPress(SNAP.with_ratio(r), 0.0)),
        "in critical": lambda: CriticalKVPress(BoundaryPress(SNAP.with_ratio(r))),
        "around critical": lambda: BoundaryPress(CriticalKVPress(SNAP.with_ratio(r))),
        "in critical adakv": lambda: CriticalAdaKVPress(BoundaryPress(SNAP.with_ratio(r)), 0.0),
        "around critical adakv": lambda: BoundaryPress(CriticalAdaKVPress(SNAP.with_ratio(r), 0.0)),
        "in chunks": lambda: ChunkPress(BoundaryPress(KnormPress(r)), 9),
        "around chunks": lambda: BoundaryPress(ChunkPress(KnormPress(r), 9)),
        "in chunkkv": lambda: ChunkKVPress(BoundaryPress(KnormPress(r)), 5),
        "around chunkkv": lambda: BoundaryPress(ChunkKVPress(KnormPress(r), 5)),
        "around entropy": lambda: BoundaryPress(EntropyGatedChunkKVPress(KnormPress(r), 6, low_entropy_chunk_length=2)),
        "in blocks": lambda: BlockPress(BoundaryPress(KnormPress(r)), 4),
        "around blocks": lambda: BoundaryPress(BlockPress(KnormPress(r), 4)),
        "in composed": lambda: ComposedPress([KnormPress(0.0), BoundaryPress(KnormPress(r))]),
        "around composed": lambda: BoundaryPress(ComposedPress([KnormPress(0.0), KnormPress(r)])),
        "in layers": lambda: PerLayerCompressionPress(BoundaryPress(KnormPress()), [r, r]),
        "around layers": lambda: BoundaryPress(PerLayerCompressionPress(KnormPress(), [r, r])),
        "in lukv": lambda: LUKVPress(BoundaryPress(KnormPress(r)), curves=curves),
        "in merging": lambda: MergingPress(BoundaryPress(KnormPress(r))),
        "in rerotation": lambda: KeyRerotationPress(BoundaryPress(KnormPress(r))),
    }


@pytest.mark.parametrize("name", ratio(0.5))
@pytest.mark.parametrize("r", [0.3, 0.7])
def test_in_and_around_other_wrappers(name: str, r: float) -> None:
    view, press = view_of("llama"), ratio(r)[name]()
    n_keep = press.keep(view)
    kept = press.compress(view)
    assert kept is not None and int((kept.positions >= 0).sum()) == 4 * n_keep
    n = n_keep // 10
    assert n and all(has_ends(head, n, 37) for row in kept.positions for head in row)


def test_the_end_of_a_prompt_in_pieces_is_that_of_the_whole() -> None:
    ids = tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    past = PressedCache(BoundaryPress(KnormPress(budget_tokens=30)), chunk_tokens=16)
    prefill(tiny("llama"), ids, past, attention_mask=mask)
    for layer in past.pressed_layers():
        lengths = layer.columns()["prompt_tokens"]
        assert (lengths[0] == 70).all() and (lengths[1] == 61).all() and lengths.dtype == torch.int32
        assert all(has_ends(head, 3, 70) for head in layer.positions()[0])
        assert all(has_ends(head - 9, 3, 61) for head in layer.positions()[1])


def test_a_window_that_does_not_fit_in_beside_the_ends_shrinks() -> None:
    view = view_of("llama")
    later = torch.arange(37).expand(view.keys.shape[:3]) + 100 * (torch.arange(37) >= 20)
    lengths = torch.full(later.shape, 20, dtype=torch.int32).masked_fill(later > 20, 0)

    def choose(press: ScorerPress) -> list[int]:
        seen = replace(view, positions=later, first_position=100, _memo={})
        seen.columns = {"prompt_tokens": lengths}
        kept = press.choose(seen)
        assert kept is not None
        return kept[0, 0].tolist()

    streaming = StreamingLLMPress(n_sink=4).with_budget(budget_tokens=10)
    assert choose(BoundaryPress(streaming, 0.3)) == [0, 1, 2, 17, 18, 19, 33, 34, 35, 36]
    kept = choose(BoundaryPress(SnapKVPress(window_size=8).with_budget(budget_tokens=10), 0.3))
    assert {0, 1, 2, 17, 18, 19, 35, 36} <= {*kept} and len(kept) == 10  # half of four places
    assert {0, 19} <= {*choose(BoundaryPress(SnapKVPress(window_size=8).with_budget(budget_tokens=3), 0.5))}


def test_pins_come_first_and_the_end_of_the_prompt_before_its_start() -> None:
    ids, press = tokens(1, 40), BoundaryPress(KnormPress(budget_tokens=10), 0.4)
    for n_pinned, expected in [(1, 4), (6, 0), (10, 0)]:
        past = PressedCache(press, pin=[(10, 10 + n_pinned)])
        prefill(tiny("llama"), ids, past)
        for head in past.positions(0)[0]:
            found = head.tolist()
            assert {*range(10, 10 + n_pinned)} <= {*found} and len(found) == 10
            assert {*range(40 - min(4, 10 - n_pinned), 40)} <= {*found} and {*range(expected)} <= {*found}
    with pytest.raises(PressError, match="11 pinned tokens"):
        prefill(tiny("llama"), ids, PressedCache(press, pin=[(10, 21)]))


def test_it_is_asked_about_the_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding costs nothing more; a compiled step, which asks nobody, is not refused either."""
    n_asked, observe = [], BoundaryPress.observe
    monkeypatch.setattr(BoundaryPress, "observe", lambda self, view: n_asked.append(1) or observe(self, view))
    past = PressedCache(BoundaryPress(SNAP.with_ratio(0.5)))
    with torch.no_grad():
        for n in (30, 3, 1, 1):
            tiny("llama")(tokens(1, n), **cache_argument(past))
    assert len(n_asked) == 2 and not past.session.roles.observers  # once for each layer


def test_a_later_turn_is_no_prompt() -> None:
    past = PressedCache(BoundaryPress(SNAP.with_ratio(0.5)))
    with torch.no_grad():
        for n in (30, 12):
            tiny("llama")(tokens(1, n), **cache_argument(past))
    assert (past.layer(0).columns()["prompt_tokens"][0, 0] == torch.tensor([30] * 15 + [0] * 12)).all()


def test_what_does_not_go_together_is_refused() -> None:
    class Passes(WrapperPress):
        """Changes nothing."""

    for share in (-0.1, 0.6):
        with pytest.raises(PressError, match=rf"^BoundaryPress: share must be a number in \[0, 0\.5\], got {share}\.$"):
            BoundaryPress(KnormPress(), share)
    with pytest.raises(PressError, match=r"LUKVPress makes that choice in its own way; put it outside: LUKVPress\("):
        BoundaryPress(LUKVPress(KnormPress()))
    with pytest.raises(PressError, match="Passes makes that choice in its own way"):
        BoundaryPress(AdaKVPress(Passes(KnormPress())))
    with pytest.raises(PressError, match="KeyRerotationPress changes the pairs it keeps"):
        BoundaryPress(KeyRerotationPress(KnormPress()))
    with pytest.raises(PressError, match="BoundaryPress gives scores that are no attention"):
        CriticalKVPress(BoundaryPress(KnormPress()))
