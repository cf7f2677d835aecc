"""What a scorer has each pair carry, and what it observes: declared by the scorer, whatever wrapper it is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.views import view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    CAMPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    DMSPress,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    MergingPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    ScorerPress,
    ThinKPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.column import Column
from coldpress.core.press import parts

N = 37


@dataclass(frozen=True)
class Received(ScorerPress):
    """Keep what has received the most attention so far."""

    columns: ClassVar[tuple[Column, ...]] = (Column("received"), Column("recent", width=2))
    estimates_attention = True

    def score(self, view: LayerView) -> Tensor:
        return view.columns["received"] + view.columns["recent"].amax(-1)

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        return {"received": view.columns["received"] + view.attention_column_sums()}


WRAPPERS: dict[str, Callable[[float], BasePress]] = {
    "plain": lambda r: Received(r),
    "adakv": lambda r: AdaKVPress(Received(r), 0.0),
    "critical": lambda r: CriticalKVPress(Received(r)),
    "critical_adakv": lambda r: CriticalAdaKVPress(Received(r), 0.0),
    "composed": lambda r: ComposedPress([KnormPress(0.1), Received(r)]),
    "chunk": lambda r: ChunkPress(Received(r), 9),
    "chunkkv": lambda r: ChunkKVPress(Received(r), 5),
    "block": lambda r: BlockPress(Received(r), 7),
    "per_layer": lambda r: PerLayerCompressionPress(Received(), [r, r]),
    "merging": lambda r: MergingPress(AdaKVPress(Received(r))),
    "rerotated": lambda r: KeyRerotationPress(Received(r)),
    "think": lambda r: ThinKPress(0.5, press=Received(r)),
    "think_all": lambda r: ThinKPress(0.5, press=Received()),
    "dms": lambda r: DMSPress(Received(), 0.0, 4),
    "schedule": lambda r: PrefillDecodingPress(Received(r), DecodingPress(Received())),
}


def carrying(view: LayerView) -> LayerView:
    generator = torch.Generator().manual_seed(5)
    shape = view.keys.shape[:3]
    columns = {
        "received": torch.randn(shape, generator=generator),
        "recent": torch.randn(*shape, 2, generator=generator),
    }
    return replace(view, columns=columns, _memo={})


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_pairs_carry_goes_with_those_that_are_kept(name: str) -> None:
    view = carrying(view_of("llama"))
    kept = WRAPPERS[name](0.5).compress(view)
    assert kept is not None and kept.columns.keys() == view.columns.keys()
    for row, head, i in (kept.positions >= 0).nonzero().tolist():
        slot = int(kept.positions[row, head, i])
        for column, own in view.columns.items():
            assert torch.equal(kept.columns[column][row, head, i], own[row, head, slot])


def test_scores_of_heads_of_different_length_are_made_of_what_their_own_pairs_carry() -> None:
    view = carrying(view_of("llama"))
    counts, slots = torch.tensor([[N, 20], [25, N]]), torch.arange(N).expand(2, 2, N)
    later = replace(view, counts=counts, positions=slots.masked_fill(slots >= counts[..., None], -1), _memo={})
    scores = Received(0.5).scores(later)
    expected = view.columns["received"] + view.columns["recent"].amax(-1)
    assert torch.equal(scores, expected.masked_fill(slots >= counts[..., None], -torch.inf))
    for schedule in (DecodingPress, CAMPress, CompressionRatioDecodingPress):
        kept = schedule(AdaKVPress(Received())).compress_again(replace(later, n_new=4))
        assert kept is None or kept.columns.keys() == view.columns.keys()


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_observes_is_found_in_every_wrapper(name: str) -> None:
    found = [part for part in parts(WRAPPERS[name](0.5)) if part.observes]
    assert found and all(isinstance(part, Received) and part.columns == Received.columns for part in found)
    assert not any(part.observes or part.reads_part for part in parts(AdaKVPress(KnormPress(0.5))))


def test_what_is_observed_is_declared_by_defining_the_method() -> None:
    class Reads(KnormPress):
        def select(self, view: LayerView) -> Tensor | None:
            return torch.zeros(*view.keys.shape[:2], 1, dtype=torch.long)

    class Quiet(Received):
        observes = False

    class Further(Reads):
        pass

    assert Received.observes and not Received.reads_part
    assert Reads.reads_part and Further.reads_part and not Reads.observes and not Quiet.observes
    assert KnormPress(0.5).observe(view_of("llama")) == {} and KnormPress(0.5).select(view_of("llama")) is None


def test_what_a_press_observes_is_new_values_of_its_columns() -> None:
    view = carrying(view_of("llama"))
    found = Received().observe(view)
    torch.testing.assert_close(found["received"], view.columns["received"] + view.attention_column_sums())


@pytest.mark.parametrize("inner", [Received(), AdaKVPress(Received(), 0.0), CriticalKVPress(Received())], ids=repr)
def test_a_cache_asks_a_scorer_inside_wrappers_after_every_call(inner: ScorerPress) -> None:
    """What a key has received from all queries so far, against the weights of an eager model."""
    ids, past = tokens(1, 18), PressedCache(DecodingPress(inner, compression_interval=100))
    with torch.no_grad():
        tiny("llama")(ids[:, :12], **cache_argument(past))
        for i in range(12, 18):
            tiny("llama")(ids[:, i : i + 1], **cache_argument(past))
        weights = tiny("llama", "eager")(ids, output_attentions=True).attentions  # [1, Hq, Q, T] each
    for layer, attention in zip(past.pressed_layers(), weights, strict=True):
        received = attention.sum(2).unflatten(1, (layer.positions().shape[1], -1)).mean(2)
        torch.testing.assert_close(layer.columns()["received"], received, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: AdaKVPress(p, 0.0)])
def test_what_was_observed_decides_what_stays(wrap: Callable[[ScorerPress], ScorerPress]) -> None:
    ids, past = tokens(1, 30), PressedCache(DecodingPress(wrap(Received()), 4, target_size=10))
    with torch.no_grad():
        for start, stop in [(0, 16), *((i, i + 1) for i in range(16, 30))]:
            tiny("llama")(ids[:, start:stop], **cache_argument(past))
    for layer in past.pressed_layers():
        held = layer.positions() >= 0
        assert 10 <= held.sum() / 2 <= 13
        assert (layer.columns()["received"] > 0).masked_select(held).all()
        assert layer.columns()["recent"].shape == (*held.shape, 2)
