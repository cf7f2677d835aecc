"""Every wrapper and schedule around every kind of press: it is made, or refused at once with a sentence that helps."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.contract.architectures import tiny, tokens
from tests.presses.words import Words

from coldpress import (
    AdaKVPress,
    AttentionMatchingPress,
    BasePress,
    BlockPress,
    CAMPress,
    ChunkKVPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    EntropyGatedChunkKVPress,
    ExpectedAttentionPress,
    ExpectedAttentionStatsPress,
    FastKVzipPress,
    FinchPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzapPress,
    KVzipPress,
    LUKVPress,
    MassCAMPress,
    MassMergingPress,
    MergingPress,
    MomentKVPress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    QFilterPress,
    SimLayerKVPress,
    SnapKVPress,
    ThinKPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.scorer import BudgetPress
from coldpress.errors import PressError

# what may stand inside, by kind: of the presses of one kind, every wrapper takes all or none
KINDS: dict[str, list[object]] = {
    "score": [KnormPress(0.5), QFilterPress(0.5)],  # of each token alone
    "hidden": [KVzapPress(0.5)],
    "compare": [KeyDiffPress(0.5), ExpectedAttentionStatsPress(0.5)],
    "attention": [SnapKVPress(0.5), ExpectedAttentionPress(0.5, use_vnorm=False)],
    "observed": [ObservedAttentionPress(0.5)],
    "once": [CompactorPress(0.5), NonCausalAttnPress(0.5)],  # chooses from a whole prompt
    "pyramid": [PyramidKVPress(0.5)],  # has budgets by layer
    "adaptive": [AdaKVPress(SnapKVPress(0.5)), CriticalKVPress(SnapKVPress(0.5)), CriticalAdaKVPress(SnapKVPress(0.5))],
    "chunks": [
        ChunkPress(KnormPress(0.5)),
        ChunkKVPress(SnapKVPress(0.5)),
        EntropyGatedChunkKVPress(SnapKVPress(0.5)),
        BlockPress(KnormPress(0.5)),
    ],
    "composed": [ComposedPress([KnormPress(0.5), SnapKVPress(0.5)])],
    "by_layer": [PerLayerCompressionPress(KnormPress(), [0.5, 0.5]), LUKVPress(KnormPress(0.5))],
    "merging": [MergingPress(KnormPress(0.5)), AttentionMatchingPress(SnapKVPress(0.5))],
    "rerotated": [KeyRerotationPress(KnormPress(0.5))],
    "finch": [FinchPress(0.5, window_size=8)],
    "channels": [ThinKPress(0.5), ThinKPress(0.5, press=KnormPress(0.5))],
    "all_layers": [KVzipPress(0.5), KVgradPress(0.5), KVComposePress(0.5), FastKVzipPress(0.5)],
    "no_ratio": [DMSPress(KnormPress(), 0.0), DuoAttentionPress(0.5), SimLayerKVPress(0.5)],
    "goes_on": [DMSPress(KnormPress(), 0.0, decoding=True)],
    "schedule": [
        DecodingPress(KnormPress()),
        CompressionRatioDecodingPress(KnormPress()),
        CAMPress(KnormPress()),
        MassCAMPress(KnormPress()),
    ],
    "both": [PrefillDecodingPress(KnormPress(0.5), DecodingPress(KnormPress()))],
    "none": [None],
    "no_press": [KnormPress, "knorm", 0.5],
}


def without_budget(press: object) -> object:
    """The same press for those who want it so; some cannot be without."""
    is_free = isinstance(press, (BudgetPress, ThinKPress)) and not isinstance(
        press, (ComposedPress, PerLayerCompressionPress)
    )
    return press.with_budget(compression_ratio=0.0) if is_free else press  # type: ignore[attr-defined]


SCORERS = {"score", "hidden", "compare", "attention", "observed", "once"}
CHOICES = SCORERS | {"pyramid", "adaptive", "chunks", "composed", "by_layer"}
AT_PREFILL = CHOICES | {"merging", "rerotated", "finch", "all_layers", "no_ratio", "none"}
AGAIN = {"score", "compare", "attention", "pyramid", "adaptive"}

# wrapper -> how it is made, and the kinds that it takes
WRAPPERS: dict[str, tuple[Callable[..., BasePress], set[str]]] = {
    "AdaKVPress": (AdaKVPress, SCORERS | {"pyramid"}),
    "CriticalKVPress": (CriticalKVPress, {"attention", "observed", "pyramid"}),
    "CriticalAdaKVPress": (CriticalAdaKVPress, {"attention", "observed", "pyramid"}),
    "ChunkPress": (ChunkPress, SCORERS | {"pyramid"}),
    "ChunkKVPress": (ChunkKVPress, SCORERS | {"pyramid"}),
    "EntropyGatedChunkKVPress": (EntropyGatedChunkKVPress, SCORERS | {"pyramid"}),
    "BlockPress": (BlockPress, {"score", "compare", "attention", "observed", "pyramid"}),
    "KeyRerotationPress": (KeyRerotationPress, CHOICES | {"merging"}),
    "MergingPress": (MergingPress, CHOICES),
    "ThinKPress": (lambda press: ThinKPress(0.5, press=press), CHOICES | {"merging", "rerotated", "finch"}),
    "PerLayerCompressionPress": (
        lambda press: PerLayerCompressionPress(without_budget(press), [0.5, 0.5]),
        SCORERS | {"adaptive", "chunks", "composed"},
    ),
    "LUKVPress": (LUKVPress, SCORERS),
    "ComposedPress": (lambda press: ComposedPress([KnormPress(0.5), press]), SCORERS | {"pyramid"}),
    "DMSPress": (lambda press: DMSPress(without_budget(press), 0.0), SCORERS),
    "DMSPress decoding": (lambda press: DMSPress(without_budget(press), 0.0, decoding=True), {"score", "hidden"}),
    "DecodingPress": (lambda press: DecodingPress(without_budget(press)), AGAIN),
    "CompressionRatioDecodingPress": (lambda press: CompressionRatioDecodingPress(without_budget(press)), AGAIN),
    "CAMPress": (lambda press: CAMPress(without_budget(press)), AGAIN),
    "MassCAMPress": (lambda press: MassCAMPress(without_budget(press)), AGAIN),
    "PrefillDecodingPress before": (lambda press: PrefillDecodingPress(press, DecodingPress(KnormPress())), AT_PREFILL),
    "PrefillDecodingPress while decoding": (
        lambda press: PrefillDecodingPress(KnormPress(0.5), press),
        {"goes_on", "schedule", "none"},
    ),
}
OUTSIDE = re.compile(r"put it outside: (\w+)\((\w+)=(\w+)\(\.\.\.\)\)")


def check_advice(message: str, make: Callable[..., BasePress], press: Any) -> None:
    """What a refusal tells to put outside can be made so."""
    advised = OUTSIDE.search(message)
    assert advised is not None or "outside" not in message
    if advised is None or advised[1] != type(press).__name__:  # else what is advised is of a press further inside
        return
    made = replace(press, **{advised[2]: make(getattr(press, advised[2]))})
    assert type(getattr(made, advised[2])).__name__ == advised[3]


HINT = re.compile(r"\b(use|give|put|call|takes|wraps?|must be|leave|such as|run|inside|outside)\b")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_made_or_refused_with_a_sentence(wrapper: str, kind: str) -> None:
    make, allowed = WRAPPERS[wrapper]
    for press in KINDS[kind]:
        if kind in allowed:
            assert isinstance(make(press), BasePress)
            continue
        with pytest.raises(PressError) as refused:
            make(press)
        message = str(refused.value)
        names = {wrapper.split()[0], type(press).__name__, *re.findall(r"(\w+Press)\(", repr(press))}
        check_advice(message, make, press)
        is_named = any(name in message for name in names)
        is_helpful = message.endswith(".") and len(message.split()) > 6 and HINT.search(message) is not None
        assert is_named and is_helpful, message


@pytest.mark.parametrize("outer", [AttentionMatchingPress, MergingPress, MassMergingPress, MomentKVPress])
@pytest.mark.parametrize("inner", [AttentionMatchingPress, MergingPress, MassMergingPress, MomentKVPress])
def test_two_that_change_values_do_not_send_each_other_outside(outer: Any, inner: Any) -> None:
    with pytest.raises(PressError, match=r"changes the pairs it keeps; use one of the two\.$"):
        outer(inner(SnapKVPress(0.5)))
    with pytest.raises(PressError, match=r"changes the pairs it keeps; put it outside: \w+\(press=AdaKVPress\("):
        AdaKVPress(inner(SnapKVPress(0.5)))


def test_two_choices_two_budgets_or_two_ways_of_holding_keys() -> None:
    """What kvpress takes and then ignores, or fails at in the middle of a prefill."""
    for make, message in (
        (lambda: AdaKVPress(ThinKPress(0.5)), r"put it outside: ThinKPress\(press=AdaKVPress"),
        (lambda: AdaKVPress(KeyRerotationPress(KnormPress(0.5))), r"put it outside: KeyRerotationPress\(press=AdaKV"),
        (lambda: DecodingPress(KVzapPress()), "KVzapPress chooses once"),
        (lambda: DecodingPress(KnormPress(0.5)), "KnormPress has a ratio or budget; leave it out"),
        (lambda: AdaKVPress(KVzipPress(0.5)), "chooses among the pairs of all layers"),
        (lambda: DecodingPress(FastKVzipPress(0.5)), "FastKVzipPress"),
        (lambda: PrefillDecodingPress(KnormPress(0.5), SnapKVPress(0.5)), "SnapKVPress does nothing while decoding"),
        (
            lambda: PrefillDecodingPress(DecodingPress(KnormPress())),
            "DecodingPress begins after it; give it as decoding_press",
        ),
        (lambda: PrefillDecodingPress(DMSPress(KnormPress(), 0.0, decoding=True)), "goes on while decoding by itself"),
        (lambda: PrefillDecodingPress(None, DMSPress(KnormPress(), 0.0)), "DMSPress does nothing while decoding"),
        (lambda: PerLayerCompressionPress(PyramidKVPress(), [0.5, 0.5]), "PyramidKVPress"),
        (lambda: KnormPress(0.5, budget_tokens=9), "both say how much is kept; give one of them"),
    ):
        with pytest.raises(PressError, match=message):
            make()


@pytest.mark.parametrize("press", [KVzipPress(0.5), KVgradPress(0.5), KVComposePress(0.5)], ids=repr)
def test_one_text_at_a_time(press: BasePress) -> None:
    with (
        pytest.raises(PressError, match=r"this prefill is a batch of 2: run texts one by one"),
        press.prepared(tiny("llama"), Words())(tiny("llama")),
    ):
        tiny("llama")(tokens(2, 20), **cache_argument(PressedCache()))


@pytest.mark.parametrize(
    ("press", "command"),
    [
        (QFilterPress(0.5), "coldpress calibrate qfilter"),
        (ExpectedAttentionStatsPress(0.5), "coldpress calibrate expected_attention_with_stats"),
        (DuoAttentionPress(0.5), "coldpress calibrate duo_attention"),
        (LUKVPress(ExpectedAttentionPress(0.5)), "coldpress calibrate lukv"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BasePress) else "",
)
def test_a_missing_artefact_names_the_command_that_makes_it(
    press: BasePress, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path))
    with pytest.raises(PressError, match=command), press(tiny("llama")):
        pass
