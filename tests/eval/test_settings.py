"""Presses as the command line asks for them, and the check that they did what was asked."""

from __future__ import annotations

import pytest
from tests.contract.architectures import tiny, tokens

from coldpress import (
    AdaKVPress,
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
from coldpress.errors import InputError, PressError, SelfCheckError
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


def test_a_budget_takes_the_place_of_the_ratio() -> None:
    jobs = make_jobs(Settings(press=("no_press", "knorm", "adakv_snapkv"), budget_tokens=(8, 16, 8)))
    assert [(job.name, job.ratio, job.budget_tokens, job.budget_bytes) for job in jobs] == [
        ("no_press", 0.0, None, None),
        ("knorm", None, 8, None),
        ("knorm", None, 16, None),
        ("adakv_snapkv", None, 8, None),
        ("adakv_snapkv", None, 16, None),
    ]
    assert [job.press for job in jobs[1:4]] == [
        KnormPress(budget_tokens=8),
        KnormPress(budget_tokens=16),
        AdaKVPress(SnapKVPress(budget_tokens=8)),
    ]
    (job,) = make_jobs(Settings(press=("knorm",), budget_bytes=(4096,)))
    assert (job.ratio, job.budget_bytes, job.press) == (None, 4096, KnormPress(budget_bytes=4096))
    jobs = make_jobs(Settings(press=("all",), budget_tokens=(8,)))
    assert {job.name for job in jobs} == {"no_press", *press_names(kind="training-free")}
    assert [job.budget_tokens for job in jobs if job.name == "simlayerkv"] == [None]
    with pytest.raises(PressError, match="simlayerkv has no budget"):
        make_jobs(Settings(press=("all", "simlayerkv"), budget_tokens=(8,)))
    with pytest.raises(InputError, match="--compression_ratio and --budget_bytes both say how much is kept"):
        Settings(compression_ratio=(0.5,), budget_bytes=(8,))
    assert Settings().compression_ratio == (0.5,) and Settings(budget_tokens=(8,)).compression_ratio == ()


def test_all_is_every_press_that_needs_only_the_model() -> None:
    names = [job.name for job in make_jobs(Settings(press=("all",)))]
    assert {"kvzip", "kvzip_plus", "kvgrad", "kvcompose", "finch", "think", "simlayerkv"} <= set(names)
    assert not {"qfilter", "kvzap", "fastkvzip", "duo_attention", "lukv"} & set(names)


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
