"""Presses as the command line asks for them, and the check that they did what was asked."""

from __future__ import annotations

import pytest
from tests.contract.architectures import tiny, tokens

import coldpress
from coldpress import (
    AdaKVPress,
    BoundaryPress,
    CompactorPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVBits,
    LeverageScorePress,
    Mixed,
    PerLayerCompressionPress,
    PressedCache,
    PyramidKVPress,
    RandomPress,
    RotatedBits,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    catalogue,
    make_press,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import CacheError, InputError, PressError, SelfCheckError
from coldpress.eval.jobs import make_jobs
from coldpress.eval.point_run import check_stored_pairs
from coldpress.eval.settings import Settings
from coldpress.stores.bits import bits_from, bits_name


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
    assert {job.name for job in jobs} == {"no_press", *press_names(kind="training-free", at_prefill=True)}


def test_schedules_are_measured_where_they_compress_something() -> None:
    (press,) = presses(press=("decoding_snapkv",), press_args=(("window_size", 8),))
    inside = BoundaryPress(SnapKVPress(window_size=8))
    assert press == CompressionRatioDecodingPress(inside, 64, target_compression_ratio=0.5)
    assert not {"decoding_knorm", "decoding_snapkv"} & {job.name for job in make_jobs(Settings(press=("all",)))}
    for how in ({"ppl_apply_press": True}, {"ppl_only": True}):
        with pytest.raises(
            PressError, match=r"decoding_tova compresses what is generated.*speed_only.*PrefillDecoding"
        ):
            make_jobs(Settings(press=("no_press", "decoding_tova"), **how))
    with pytest.raises(PressError, match=r"would compress nothing within --max_new_tokens 64: .*compression_interval"):
        make_jobs(Settings(press=("decoding_tova",), max_new_tokens=64))
    assert len(make_jobs(Settings(press=("decoding_tova",), max_new_tokens=65))) == 1


def test_names_of_schedules() -> None:
    info = next(info for info in catalogue() if info.name == "decoding_knorm")
    assert (info.kind, info.at_prefill, info.can_rechoose, info.has_ratio) == ("training-free", False, True, True)
    made = eval(info.call, vars(coldpress.public) | {"compression_ratio": 0.3})
    assert made == make_press("decoding_knorm", 0.3) and made.base_press == BoundaryPress(KnormPress(), share=0.1)
    assert make_press("decoding_knorm", 0.3, share=0.2).base_press.share == 0.2
    for name in press_names(at_prefill=False):
        if name.startswith("decoding_"):
            assert isinstance(make_press(name, 0.3).base_press, BoundaryPress), name
    assert made.target_compression_ratio == 0.3
    assert make_press("decoding_knorm", 0.3, compression_interval=5).compression_interval == 5
    with pytest.raises(PressError, match=r"share of the text so far; .*DecodingPress\(KnormPress\(\), target_size"):
        make_press("decoding_knorm", 0.0, budget_tokens=9)
    with pytest.raises(PressError, match="compression_ratio is the fraction"):
        make_press("decoding_knorm", 1.0)
    with pytest.raises(PressError, match="has no parameter 'target_compression_ratio'"):
        make_press("decoding_knorm", 0.3, target_compression_ratio=0.5)


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
    assert {job.name for job in jobs} == {"no_press", *press_names(kind="training-free", at_prefill=True)}
    assert [job.budget_tokens for job in jobs if job.name == "simlayerkv"] == [None]
    with pytest.raises(PressError, match="simlayerkv has no budget"):
        make_jobs(Settings(press=("all", "simlayerkv"), budget_tokens=(8,)))
    with pytest.raises(InputError, match="--compression_ratio and --budget_bytes both say how much is kept"):
        Settings(compression_ratio=(0.5,), budget_bytes=(8,))
    assert Settings().compression_ratio == (0.5,) and Settings(budget_tokens=(8,)).compression_ratio == ()


def test_bits_multiply_the_points() -> None:
    settings = Settings(press=("no_press", "knorm"), compression_ratio=(0.5, 0.25), kv_bits=(8, 4, 8), kv_group_size=32)
    found = [(job.name, job.ratio, job.kv_bits) for job in make_jobs(settings)]
    in_8, in_4 = KVBits(8, 32, 128), KVBits(4, 32, 128)
    sizes = [("no_press", 0.0), ("knorm", 0.5), ("knorm", 0.25)]
    assert found == [(name, ratio, bits) for name, ratio in sizes for bits in (in_8, in_4)]
    names = {job.name for job in make_jobs(Settings(press=("all",), kv_bits=(4,)))}
    assert {job.name for job in make_jobs(Settings(press=("all",)))} - names == {"snap_think", "think"}
    for name in ("think", "decoding_knorm"):
        with pytest.raises(CacheError, match="kv_bits"):
            make_jobs(Settings(press=("no_press", name), kv_bits=(4,), speed_only=True))
    with pytest.raises(CacheError, match="8, 4 or 2"):
        make_jobs(Settings(kv_bits=(3,)))


def test_names_of_bits_are_rotated_pairs() -> None:
    """And these may go on being evicted."""
    settings = Settings(press=("decoding_knorm",), kv_bits=("k8v4",), kv_residual_tokens=32, speed_only=True)
    assert [job.kv_bits for job in make_jobs(settings)] == [RotatedBits(8, 4, newest=32)]
    both = make_jobs(Settings(press=("knorm",), kv_bits=(4, "k4v4")))
    assert [job.kv_bits for job in both] == [KVBits(4), RotatedBits(4, 4)]
    with pytest.raises(CacheError, match="there are no groups"):
        make_jobs(Settings(kv_bits=("k8v4",), kv_group_size=32))


def test_a_budget_of_bytes_is_spent_over_pairs_and_bits() -> None:
    (job,) = make_jobs(Settings(press=("snapkv",), compression_ratio=(), budget_bytes=(600_000,), kv_bits=("mixed",)))
    assert job.kv_bits == Mixed() and bits_from(vars(job.kv_bits)) == job.kv_bits and bits_name(job.kv_bits) == "mixed"
    for given, why in (
        ({"press": ("snapkv",)}, "--budget_bytes, and snapkv has none"),
        ({"press": ("no_press",)}, "say k8v4"),
    ):
        with pytest.raises(CacheError, match=why):
            make_jobs(Settings(**given, kv_bits=("mixed",)))


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
    tiny("gpt_neox")(tokens(1, 37), **cache_argument(cache))
    check_stored_pairs(press, cache, 37)
    with pytest.raises(SelfCheckError, match="pairs should have been stored"):
        check_stored_pairs(press.with_ratio(0.1), cache, 37)


def test_wrappers_of_different_presses_are_different_points() -> None:
    """Whose parameters are the same: one's windows and streams would be taken for the other's."""
    names = ("streaming_llm", "tova", "keydiff", "knorm", "h2o")
    jobs = make_jobs(Settings(press=names, ppl_mode="streaming", budget_tokens=(64,)))
    assert len({job.point.key for job in jobs}) == len(names)
