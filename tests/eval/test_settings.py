"""Presses as the command line asks for them, and the check that they did what was asked."""

from __future__ import annotations

import pytest
from tests.contract.architectures import tiny, tokens

from coldpress import (
    CompactorPress,
    ComposedPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LeverageScorePress,
    PerLayerCompressionPress,
    PressedCache,
    PyramidKVPress,
    RandomPress,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    press_names,
)
from coldpress.errors import PressError, SelfCheckError
from coldpress.eval.checks import check_stored_pairs
from coldpress.eval.settings import Settings, make_jobs


def presses(**options: object) -> list[object]:
    return [job.press for job in make_jobs(Settings(compression_ratio=(0.5,), **options))]  # type: ignore[arg-type]


def test_the_seed_reaches_every_press_that_takes_one() -> None:
    assert presses(press=("random", "leverage", "snapkv"), seed=7) == [
        RandomPress(0.5, seed=7),
        LeverageScorePress(0.5, seed=7),
        SnapKVPress(0.5),
    ]
    assert presses(press=("leverage",), seed=7, press_args=(("seed", 3),)) == [LeverageScorePress(0.5, seed=3)]


def test_a_press_without_a_ratio_is_measured_once() -> None:
    jobs = make_jobs(Settings(press=("knorm", "simlayerkv"), compression_ratio=(0.25, 0.5)))
    assert [(job.name, job.ratio) for job in jobs] == [("knorm", 0.25), ("knorm", 0.5), ("simlayerkv", None)]
    assert presses(press=("simlayerkv",), press_args=(("lazy_threshold", 0.9),)) == [SimLayerKVPress(0.9)]
    jobs = make_jobs(Settings(press=("all",), compression_ratio=(0.25, 0.5)))
    assert [job.ratio for job in jobs if job.name == "simlayerkv"] == [None]
    assert {job.name for job in jobs} == {"no_press", *press_names(kind="training-free")}


def test_parameters_may_be_none_by_default_or_belong_to_the_press_inside() -> None:
    assert presses(press=("compactor",), press_args=(("blending", 0.3),)) == [CompactorPress(0.5, blending=0.3)]
    (press,) = presses(press=("critical_expected_attention",), press_args=(("n_sink", 2), ("epsilon", 0.5)))
    assert press.press == ExpectedAttentionPress(0.5, n_sink=2, use_vnorm=False) and press.epsilon == 0.5
    with pytest.raises(PressError, match="use_vnorm must be bool, got 0"):
        presses(press=("adakv_expected_attention_e2",), press_args=(("use_vnorm", 0),))


@pytest.mark.parametrize(
    "press",
    [
        PerLayerCompressionPress(KnormPress(), [0.25, 0.6]),
        ComposedPress([KnormPress(0.3), KeyDiffPress(0.3)]),
        ComposedPress([KnormPress(0.3), PyramidKVPress(0.4, window_size=2, beta=4)]),
    ],
    ids=repr,
)
def test_stored_pairs_are_those_that_were_asked_for(press: ScorerPress) -> None:
    cache = PressedCache(press)
    tiny("gpt_neox")(tokens(1, 37), past_key_values=cache)
    check_stored_pairs(press, cache, 37)
    with pytest.raises(SelfCheckError, match="pairs should have been stored"):
        check_stored_pairs(press.with_ratio(0.1), cache, 37)
