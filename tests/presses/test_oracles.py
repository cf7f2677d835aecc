"""Each press's scores against its formula, written out in loops over rows, heads and tokens.

The oracles get keys, values and queries as the layer attended with them, and the queries before rotation from an
explicit rotation back; they share no code with the presses.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, Look, tiny, tokens
from tests.oracles.scores import (
    N,
    expected_attention,
    keydiff,
    knorm,
    observed_attention,
    random,
    snapkv,
    streaming_llm,
    tova,
)
from tests.presses import (
    test_attention_matching,
    test_boundary,
    test_calibrated,
    test_decoding,
    test_defensive,
    test_dms,
    test_duo_attention,
    test_entropy_gated_chunkkv,
    test_fair,
    test_fastkvzip,
    test_finch,
    test_gkv,
    test_h2o,
    test_key_rerotation,
    test_keyformer,
    test_kvzap,
    test_lukv,
    test_merging,
    test_momentkv,
    test_morphkv,
    test_quality,
    test_quest,
    test_raas,
    test_replay,
    test_restorekv,
    test_rkv,
    test_sampled_defensive,
    test_scissorhands,
    test_scorers,
    test_simlayerkv,
    test_sparq,
    test_think,
    test_triattention,
    test_wrappers,
)
from tests.presses.others import WITH_RATIO

import coldpress
from coldpress import (
    AdaKVPress,
    AttentionMatchingPress,
    BasePress,
    BlockPress,
    BoundaryPress,
    CAMPress,
    CapPress,
    ChunkKVPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DecodingPress,
    DefensiveKVPress,
    DMSPress,
    DuoAttentionPress,
    EntropyGatedChunkKVPress,
    ExpectedAttentionPress,
    ExpectedAttentionStatsPress,
    FairPress,
    FastKVzipPress,
    FinchPress,
    GKVPress,
    H2OPress,
    KeyDiffPress,
    KeyformerPress,
    KeyRerotationPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzapPress,
    KVzipPress,
    LagKVPress,
    LayerDefensiveKVPress,
    LayerView,
    LeverageScorePress,
    LUKVPress,
    MassCAMPress,
    MassMergingPress,
    MergingPress,
    MomentKVPress,
    MorphKVPress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    QFilterPress,
    QualityPress,
    QuestPress,
    RaaSPress,
    RandomPress,
    RestoreKVPress,
    RKVPress,
    SampledDefensiveKVPress,
    ScissorhandsPress,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    SparQPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
    TriAttentionPress,
    catalogue,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.counts import exact_keep, keep_count, pyramid_counts
from coldpress.core.press import parts

MODELS = {"gpt_neox": 4, "gpt_neox_full_rotary": 8, "llama": 8}  # name -> rotary dimensions of a head


def views_of(name: str) -> list[LayerView]:
    look = Look()
    tiny(name)(tokens(2, N), **cache_argument(PressedCache(look)))
    return look.views


Oracle = Callable[..., dict[tuple[int, int], list[float]]]
CASES: list[tuple[ScorerPress, Oracle]] = [
    (KnormPress(0.5), knorm),
    (KeyDiffPress(0.5), keydiff),
    (StreamingLLMPress(0.5), streaming_llm),
    (RandomPress(0.5, seed=11), random),
    (TOVAPress(0.5), tova),
    (ObservedAttentionPress(0.5), observed_attention),
    (SnapKVPress(0.5, window_size=6), snapkv),
    (SnapKVPress(0.5, window_size=3, kernel_size=7), snapkv),
    (SnapKVPress(0.5), snapkv),  # a prompt shorter than the window
    (PyramidKVPress(0.5, window_size=4), snapkv),
    (ExpectedAttentionPress(0.5), expected_attention),
    (ExpectedAttentionPress(0.5, n_future_positions=7, n_sink=2, epsilon=0.02), expected_attention),
    (ExpectedAttentionPress(0.5, use_covariance=False), expected_attention),
    (ExpectedAttentionPress(0.5, use_vnorm=False, n_sink=0), expected_attention),
]


ELSEWHERE: dict[type[BasePress], Callable[..., None]] = {  # the tests that hold the others against their oracles
    AdaKVPress: test_wrappers.test_adakv,
    AttentionMatchingPress: test_attention_matching.test_fitted_to_queries_in_place_and_moved_on,
    BlockPress: test_wrappers.test_block_keydiff,
    BoundaryPress: test_boundary.test_the_other_places_go_to_what_the_inner_press_would_choose,
    CapPress: test_scorers.test_cap,
    ChunkKVPress: test_wrappers.test_chunkkv,
    ChunkPress: test_wrappers.test_chunk_press_scores_each_chunk_as_a_text_of_its_own,
    CompactorPress: test_scorers.test_compactor,
    CriticalAdaKVPress: test_wrappers.test_critical_adakv,
    CriticalKVPress: test_wrappers.test_criticalkv,
    CURPress: test_scorers.test_cur,
    DefensiveKVPress: test_defensive.test_what_the_heads_of_a_layer_keep,
    DMSPress: test_dms.test_every_head_keeps_what_reaches_the_threshold,
    DuoAttentionPress: test_duo_attention.test_streaming_heads_keep_both_ends,
    EntropyGatedChunkKVPress: test_entropy_gated_chunkkv.test_entropy_gated_chunkkv,
    ExpectedAttentionStatsPress: test_calibrated.test_expected_attention_with_stats,
    KeyRerotationPress: test_key_rerotation.test_next_tokens_follow_the_kept_ones_without_a_gap,
    LagKVPress: test_scorers.test_lagkv,
    LayerDefensiveKVPress: test_defensive.test_what_all_layers_keep,
    SampledDefensiveKVPress: test_sampled_defensive.test_what_all_layers_keep,
    LeverageScorePress: test_scorers.test_leverage,
    LUKVPress: test_lukv.test_lukv,
    MassMergingPress: test_merging.test_merging,
    MergingPress: test_merging.test_merging,
    MomentKVPress: test_momentkv.test_reference_queries_are_answered_better_or_as_before,
    FairPress: test_fair.test_fair,
    FastKVzipPress: test_fastkvzip.test_scores_and_what_is_kept,
    FinchPress: test_finch.test_scores,
    H2OPress: test_h2o.test_h2o_step_by_step,
    KeyformerPress: test_keyformer.test_keyformer_step_by_step,
    RaaSPress: test_raas.test_raas_step_by_step,
    ScissorhandsPress: test_scissorhands.test_scissorhands_step_by_step,
    GKVPress: test_gkv.test_gkv,
    KVComposePress: test_replay.test_kvcompose,
    KVgradPress: test_replay.test_kvzip,
    KVzapPress: test_kvzap.test_scores,
    KVzipPress: test_replay.test_kvzip,
    MorphKVPress: test_morphkv.test_morphkv,
    NonCausalAttnPress: test_scorers.test_non_causal_attention,
    ThinKPress: test_think.test_attention_is_that_of_zeroed_channels,
    TriAttentionPress: test_triattention.test_triattention,
    QuestPress: test_quest.test_quest,
    SparQPress: test_sparq.test_sparq,
    QualityPress: test_quality.test_each_row_takes_the_largest_ratio_that_misses_little,
    QFilterPress: test_calibrated.test_qfilter,
    RestoreKVPress: test_restorekv.test_what_is_stored,
    RKVPress: test_rkv.test_rkv,
    CAMPress: test_decoding.test_cam_by_hand,
    MassCAMPress: test_decoding.test_mass_cam_by_hand,
    ComposedPress: test_wrappers.test_composed_press,
    CompressionRatioDecodingPress: test_decoding.test_scores_by_queries_against_a_slow_simulation,
    DecodingPress: test_decoding.test_scores_by_queries_against_a_slow_simulation,
    PerLayerCompressionPress: test_wrappers.test_per_layer_compression,
    PrefillDecodingPress: test_decoding.test_scores_by_queries_against_a_slow_simulation,
    SimLayerKVPress: test_simlayerkv.test_lazy_layers_keep_both_ends,
}


def parameters(test: Callable[..., None]) -> list[Any]:
    """Every value that a test is run with."""
    found: list[Any] = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            for value in mark.args[1]:
                found += value if isinstance(value, (tuple, list)) else [value]
    return found


def makes(test: Callable[..., None], cls: type[BasePress]) -> bool:
    """Whether a test makes presses of a class, or is given one."""
    inside = [part for value in parameters(test) if isinstance(value, BasePress) for part in parts(value)]
    made = rf"{cls.__name__}\(|class \w+\({cls.__name__}\)"
    return bool(re.search(made, inspect.getsource(test))) or any(type(press) is cls for press in inside)


def test_every_press_has_an_oracle() -> None:
    here = {type(press) for press, _ in CASES}
    assert here.isdisjoint(ELSEWHERE)
    public = [getattr(coldpress, name) for name in coldpress.__all__]
    presses = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, BasePress)}
    presses -= {BasePress, ScorerPress, WrapperPress}  # which others are made of
    assert {cls.__name__ for cls in presses} >= {info.class_name for info in catalogue()}
    assert here | ELSEWHERE.keys() == presses
    for cls, test in ELSEWHERE.items():
        assert makes(test, cls), f"{test.__name__} does not make a {cls.__name__}"


def test_oracles_are_asked_with_partial_and_with_full_rotation() -> None:
    """GPT-NeoX with rotary_pct 0.25 and 1.0."""
    assert [BY_NAME[name].config["rotary_pct"] for name in ("gpt_neox", "gpt_neox_full_rotary")] == [0.25, 1.0]
    for test in (test_scores, *ELSEWHERE.values()):
        given = {str(value) for value in parameters(test)}
        assert {"gpt_neox", "gpt_neox_full_rotary"} <= given, test.__name__


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("press", "oracle"), CASES, ids=lambda x: repr(x) if isinstance(x, ScorerPress) else "")
def test_scores(name: str, press: ScorerPress, oracle: Oracle) -> None:
    for view in views_of(name):
        scores = press.score(view)
        assert scores.dtype == torch.float32 and scores.shape == view.keys.shape[:3]
        for (row, head), expected in oracle(view, press, MODELS[name]).items():
            torch.testing.assert_close(scores[row, head], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("press", [press for press, _ in CASES], ids=repr)
def test_keeps_the_best_scores_and_what_is_protected(press: ScorerPress) -> None:
    views = views_of("llama")
    for view in views:
        kept = press.compress(view)
        assert kept is not None
        n_keep = keep_count(N, 0.5)
        if isinstance(press, PyramidKVPress):
            n_keep = pyramid_counts(N, exact_keep(N, 0.5), 2, window=4, beta=20)[view.layer_idx]
        assert kept.positions.shape == (*view.keys.shape[:2], n_keep)
        scores = press.score(view)
        n_sink, n_window = press.protected(view)
        for row, head in ((b, h) for b in range(2) for h in range(2)):
            found = kept.positions[row, head].tolist()
            assert found == sorted(set(found))
            assert torch.equal(kept.keys[row, head], view.keys[row, head, found])
            assert torch.equal(kept.values[row, head], view.values[row, head, found])
            if n_sink + n_window <= n_keep:
                protected = [*range(n_sink), *range(N - n_window, N)]
                others = [t for t in range(N) if t not in protected]
                best = sorted(others, key=lambda t: -float(scores[row, head, t]))[: n_keep - len(protected)]
                assert found == sorted(protected + best)


def test_random_differs_between_layers_and_heads_but_not_between_rows() -> None:
    first, second = (RandomPress(seed=1).score(view) for view in views_of("llama"))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0, 0], first[0, 1]) and not torch.equal(first, second)


@pytest.mark.parametrize("press", [press for press, _ in CASES], ids=repr)
def test_scores_do_not_depend_on_the_ratio_and_are_computed_once(press: ScorerPress) -> None:
    view = views_of("llama")[0]
    assert press.scores(view) is press.with_ratio(0.9).scores(view)
    assert torch.equal(press.with_ratio(0.1).score(view), press.with_ratio(0.9).score(view))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "granite"])
def test_attention_is_that_of_the_model(name: str) -> None:
    """With soft caps, sinks and scaling: against the weights that the model's own eager attention returns."""
    look, model, ids = Look(), tiny(name, "coldpress_eager"), tokens(2, N)
    own = tiny(name, "eager")(ids, output_attentions=True).attentions
    model(ids, **cache_argument(PressedCache(look)))
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    for view in look.views:
        weights = own[modules.index(view.module)]  # [B, Hq, N, N]
        torch.testing.assert_close(view.window_attention(N).flatten(1, 2), weights, atol=1e-5, rtol=1e-4)
        sums = weights.sum(2).view(*view.keys.shape[:2], -1, N).mean(2)
        torch.testing.assert_close(view.attention_column_sums(), sums, atol=1e-4, rtol=1e-4)


def test_column_sums_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole, *_), (blocks, *_) = views_of("llama"), views_of("llama")
    monkeypatch.setattr("coldpress.core.pick._CPU_ELEMENTS", 1)  # 16 queries of one KV head at a time
    torch.testing.assert_close(
        blocks.attention_column_sums(), whole.window_attention(N).sum(3).mean(2), atol=1e-5, rtol=1e-5
    )


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("press", WITH_RATIO)
def test_scores_do_not_depend_on_how_much_is_worked_on_at_once(
    model: str, press: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make_press(press, 0.5)
    if not isinstance(scorer, ScorerPress):
        pytest.skip("no scores")
    torch.manual_seed(0)
    whole = [scorer.scores(view) for view in views_of(model)]
    monkeypatch.setattr("coldpress.core.pick._CPU_ELEMENTS", 1)  # a token at a time
    torch.manual_seed(0)
    parts = [scorer.scores(view) for view in views_of(model)]
    # z-scores of a dozen nearly equal leverages enlarge the last digits a thousandfold; a lost block is off by far more
    torch.testing.assert_close(parts, whole, atol=1e-2, rtol=2e-2)
