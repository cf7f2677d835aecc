"""The cases: how each press is made, and why results differ where they do."""

from __future__ import annotations

from typing import Any

from benchmarks.parity.artefacts import (
    budget_curves,
    gates,
    head_pattern,
    predictors,
    query_filters,
    query_statistics,
)
from benchmarks.parity.case import Case, Library
from benchmarks.parity.defaults import DEFAULTS
from benchmarks.parity.models import MODELS, TINY
from benchmarks.parity.reasons import (
    DRAWS,
    FIRST_LAYER,
    IN_ORDER_OF_SCORES,
    MEDIANS,
    NO_HEAD_DIM,
    OF_THE_LAST_CHUNK,
    ONE_LESS,
    PADDING,
    PRUNED_WINDOW,
    SAFEGUARD,
    SEED,
    SINKS,
    SKETCH,
    SUMS,
    WHOLE_CHUNKS,
    Z_SCORES,
)
from transformers import PreTrainedModel


def _snapkv(p: Library, r: float = 0.0, window: int = 16) -> Any:
    return p.SnapKVPress(r, window_size=window)


def _expected(p: Library, r: float = 0.0, **parameters: Any) -> Any:
    return p.ExpectedAttentionPress(r, **parameters)


def _falling(ratio: float, model: PreTrainedModel) -> list[float]:
    """A ratio for every layer, from 1.25 times ``ratio`` to 0.75 times."""
    n = model.config.num_hidden_layers
    return [round(ratio * (1.25 - 0.5 * i / (n - 1)), 4) for i in range(n)]


_ADAPTER = "needs an adapter that was trained for the model"

CASES = [
    Case("no_press", lambda p, r, m: None, ratios=(0.0,), models=MODELS),
    # -- scorers
    Case(
        "random",
        lambda p, r, m: p.RandomPress(r, seed=3),
        why=SEED,
        letter="K",
        repaired=True,
    ),
    Case("knorm", lambda p, r, m: p.KnormPress(r)),
    Case("keydiff", lambda p, r, m: p.KeyDiffPress(r)),
    Case("streaming_llm", lambda p, r, m: p.StreamingLLMPress(r)),
    Case("snapkv", lambda p, r, m: _snapkv(p, r)),
    Case(
        "snapkv, budget below the window",
        lambda p, r, m: _snapkv(p, r, window=100),
        ratios=(0.75,),
        models=TINY,
        why="all tokens of the window tie, so that an arbitrary part of it is kept and nothing else",
        letter="K",
        repaired=True,
    ),
    Case("pyramidkv", lambda p, r, m: p.PyramidKVPress(r, window_size=16, beta=2), one_by_one=True),
    Case("tova", lambda p, r, m: p.TOVAPress(r)),
    Case("observed_attention", lambda p, r, m: p.ObservedAttentionPress(r), kvpress_attention="eager"),
    Case("expected_attention", lambda p, r, m: _expected(p, r), why=SINKS, letter="paper", repaired=True),
    Case("expected_attention, no sinks", lambda p, r, m: _expected(p, r, n_sink=0), models=TINY),
    Case("cap", lambda p, r, m: p.CapPress(r)),
    Case("lagkv", lambda p, r, m: p.LagKVPress(r, lag_size=16)),
    Case("lagkv, cross_scoring", lambda p, r, m: p.LagKVPress(r, lag_size=16, cross_scoring=True), models=TINY),
    Case(
        "lagkv, short text",
        lambda p, r, m: p.LagKVPress(r, lag_size=1024),
        ratios=(0.25, 0.3125, 0.375),  # the protected half fits
        why="the branch called no compression keeps the newest tokens, whatever they say",
        letter="K",
        repaired=True,
        models=TINY,
    ),
    Case("cur", lambda p, r, m: p.CURPress(r)),
    Case(
        "cur, short last window",
        lambda p, r, m: p.CURPress(r, local_window_size=36),
        why=SUMS,
        letter="K",
        repaired=True,
        models=TINY,
    ),
    Case("non_causal_attention", lambda p, r, m: p.NonCausalAttnPress(r, chunk_size=32)),
    Case(
        "non_causal_attention, short last chunk",
        lambda p, r, m: p.NonCausalAttnPress(r, chunk_size=100),
        why=PADDING,
        letter="K",
        repaired=True,
        models=TINY,
    ),
    Case(
        "leverage",
        lambda p, r, m: p.LeverageScorePress(r, sketch_dimension=12),
        why=SKETCH,
        letter="K",
        repaired=True,
    ),
    Case(
        "compactor",
        lambda p, r, m: p.CompactorPress(r, chunk_size=37, sketch_dimension=12),
        why=Z_SCORES,
        letter="K",
        repaired=True,
    ),
    # -- wrappers
    Case("adakv_snapkv", lambda p, r, m: p.AdaKVPress(_snapkv(p, r)), scope="layer", one_by_one=True),
    Case(
        "adakv_expected_attention_e2",
        lambda p, r, m: p.AdaKVPress(_expected(p, r, epsilon=1e-2)),
        scope="layer",
        one_by_one=True,
        why=SINKS,
        letter="paper",
        repaired=True,
    ),
    Case(
        "critical_snapkv",
        lambda p, r, m: p.CriticalKVPress(_snapkv(p, r)),
        breaks=("qwen2", "phi3"),
        breaks_why=NO_HEAD_DIM,
        repaired=True,
    ),
    Case(
        "critical_adakv_snapkv",
        lambda p, r, m: p.CriticalAdaKVPress(_snapkv(p, r)),
        scope="layer",
        one_by_one=True,
        breaks=("qwen2", "phi3"),
        breaks_why=NO_HEAD_DIM,
        repaired=True,
        why=SAFEGUARD,
        letter="paper",
    ),
    Case(
        "critical_adakv_snapkv, large safeguard",
        lambda p, r, m: p.CriticalAdaKVPress(_snapkv(p, r), alpha_safeguard=0.9),
        scope="layer",
        one_by_one=True,
        breaks=("qwen2", "phi3"),
        breaks_why=NO_HEAD_DIM,
        why=SAFEGUARD,
        letter="paper",
        repaired=True,
        models=TINY,
    ),
    Case("chunk_knorm", lambda p, r, m: p.ChunkPress(p.KnormPress(r), chunk_length=32)),
    Case(
        "chunk_snapkv",
        lambda p, r, m: p.ChunkPress(_snapkv(p, r, window=4), chunk_length=32),
        why=OF_THE_LAST_CHUNK,
        letter="K",
        repaired=True,
    ),
    Case("chunkkv_knorm", lambda p, r, m: p.ChunkKVPress(p.KnormPress(r), chunk_length=10)),
    Case("chunkkv_snapkv", lambda p, r, m: p.ChunkKVPress(_snapkv(p, r, window=20), chunk_length=20)),
    Case(
        "chunkkv_snapkv, cut chunks",
        lambda p, r, m: p.ChunkKVPress(_snapkv(p, r), chunk_length=14),
        one_by_one=True,
        models=TINY,
        why=WHOLE_CHUNKS,
        letter="decision",
        repaired=True,
    ),
    Case(
        "chunkkv_knorm, two rows",
        lambda p, r, m: p.ChunkKVPress(p.KnormPress(r), chunk_length=10),
        rows=2,
        why="the chunks of row 0 are kept in every row",
        letter="E",
        repaired=True,
        models=TINY,
    ),
    Case("block_keydiff", lambda p, r, m: p.BlockPress(p.KeyDiffPress(r), block_size=16)),
    Case("rerotated_streaming_llm", lambda p, r, m: p.KeyRerotationPress(p.StreamingLLMPress(r)), rerotated=True),
    Case("rerotated_knorm", lambda p, r, m: p.KeyRerotationPress(p.KnormPress(r)), rerotated=True, models=TINY),
    Case(
        "per_layer_knorm",
        lambda p, r, m: p.PerLayerCompressionPress(p.KnormPress(), _falling(r, m)),
        one_by_one=True,
    ),
    Case(
        "composed, keydiff and snapkv",
        lambda p, r, m: p.ComposedPress([p.KeyDiffPress(r / 2), _snapkv(p, r / 2)]),
        why=IN_ORDER_OF_SCORES,
        letter="B4",
        repaired=True,
    ),
    # -- presses that were calibrated or trained, with random files
    Case("qfilter", lambda p, r, m: p.QFilterPress(r, filters=query_filters(m))),
    Case(
        "expected_attention_stats",
        lambda p, r, m: p.ExpectedAttentionStatsPress(r, stats_folder=query_statistics(m)),
        why=SINKS,
        letter="paper",
        repaired=True,
    ),
    Case("kvzap", lambda p, r, m: p.KVzapPress(r, weights=predictors(m, "mlp"))),
    Case("kvzap, linear", lambda p, r, m: p.KVzapPress(r, "linear", weights=predictors(m, "linear")), models=TINY),
    Case(
        "dms_kvzap",
        lambda p, r, m: p.DMSPress(p.KVzapPress(weights=predictors(m, "mlp")), threshold=r - 1, sliding_window_size=20),
        one_by_one=True,
    ),
    Case("fastkvzip", lambda p, r, m: p.FastKVzipPress(r, weights=gates(m)), scope="model", one_by_one=True),
    Case(
        "fastkvzip, layerwise",
        lambda p, r, m: p.FastKVzipPress(r, layerwise=True, weights=gates(m)),
        models=TINY,
        scope="layer",
        one_by_one=True,
    ),
    Case("restorekv", lambda p, r, m: p.RestoreKVPress(r), not_compared=_ADAPTER),
    Case(
        "lukv_snapkv",
        lambda p, r, m: p.LUKVPress(_snapkv(p), compression_ratio=r, curves=budget_curves(m, 1 / 160)),
        one_by_one=True,
    ),
    Case(
        "lukv_snapkv, between percents",
        lambda p, r, m: p.LUKVPress(_snapkv(p), compression_ratio=r, curves=budget_curves(m, 1 / 160)),
        ratios=(0.255, 0.505, 0.755),
        one_by_one=True,
        models=TINY,
        why="kvpress takes the curve of a neighbouring percent; in coldpress pairs add up to the ratio asked for",
        letter="decision",
    ),
    Case(
        "duo_attention",
        lambda p, r, m: p.DuoAttentionPress(r, pattern=head_pattern(m, 8, 32)),
        one_by_one=True,
    ),
    # -- presses that run the model again
    Case("kvzip", lambda p, r, m: p.KVzipPress(r), scope="model", one_by_one=True),
    Case(
        "kvzip, layerwise", lambda p, r, m: p.KVzipPress(r, layerwise=True), models=TINY, scope="layer", one_by_one=True
    ),
    Case(
        "kvzip, several chunks",
        lambda p, r, m: p.KVzipPress(r, chunk_size=48),
        models=TINY,
        scope="model",
        one_by_one=True,
    ),
    Case(
        "kvzip, in a chat",
        lambda p, r, m: p.KVzipPress(r),
        chat=True,
        models=TINY,
        scope="model",
        one_by_one=True,
        why="in kvpress what a chat template puts before the text, but for the sinks, has the score 0 and goes first; "
        "in coldpress it is kept, as in the authors' code",
        letter="decision",
        repaired=True,
    ),
    Case("kvzip_plus", lambda p, r, m: p.KVzipPress(r, kvzip_plus_normalization=True), scope="model", one_by_one=True),
    Case("kvgrad", lambda p, r, m: p.KVgradPress(r), scope="model", one_by_one=True),
    Case(
        "kvgrad, several chunks",
        lambda p, r, m: p.KVgradPress(r, chunk_size=48),
        models=TINY,
        scope="model",
        one_by_one=True,
    ),
    Case(
        "kvcompose",
        lambda p, r, m: p.KVComposePress(compression_ratio=r),
        one_by_one=True,
        why=FIRST_LAYER,
        letter="C",
        repaired=True,
    ),
    Case(
        "kvcompose, unstructured",
        lambda p, r, m: p.KVComposePress(compression_ratio=r, structured=False),
        one_by_one=True,
        why="the pairs of the second pass, the whole context again, stay in the cache and are attended to",
        letter="A",
        repaired=True,
    ),
    # -- others
    Case(
        "simlayerkv",
        lambda p, r, m: p.SimLayerKVPress(lazy_threshold=1 - r, n_recent=40),
        one_by_one=True,
        why="a lazy layer keeps n_recent - n_last recent tokens, and is judged by the n_recent before the last n_last",
        letter="K",
        repaired=True,
    ),
    Case(
        "think",
        lambda p, r, m: p.ThinKPress(r),
        why=PRUNED_WINDOW,
        letter="paper",
        repaired=True,
    ),
    Case(
        "finch",
        lambda p, r, m: p.FinchPress(r, window_size=16),
        rerotated=True,
        why=ONE_LESS,
        letter="K",
        repaired=True,
    ),
    Case(
        "finch, chunks",
        lambda p, r, m: p.FinchPress(r, chunk_length=32, window_size=4),
        rerotated=True,
        models=TINY,
        why="every chunk keeps its share of the budget, the question counted as a part of the last one; in coldpress "
        "chunks share what the question leaves; the weights as above",
        letter="decision",
        repaired=True,
    ),
    Case(
        "finch, in place",
        lambda p, r, m: p.FinchPress(r, normalize_scores=False, rerotate_keys=False, window_size=16),
        models=TINY,
    ),
    Case("merging_knorm", lambda p, r, m: p.MergingPress(p.KnormPress(r))),
    Case(
        "merging_snapkv, a part",
        lambda p, r, m: p.MergingPress(_snapkv(p, r), similarity_threshold=0.1, merge_fraction=0.6),
        models=TINY,
    ),
    Case("entropy_gated_chunkkv_knorm", lambda p, r, m: p.EntropyGatedChunkKVPress(p.KnormPress(r))),
    Case(
        "entropy_gated_chunkkv_snapkv",
        lambda p, r, m: p.EntropyGatedChunkKVPress(_snapkv(p, r, window=20)),
        why=MEDIANS,
        letter="decision",
        repaired=True,
    ),
    Case(
        "entropy_gated_chunkkv_knorm, two rows",
        lambda p, r, m: p.EntropyGatedChunkKVPress(p.KnormPress(r)),
        rows=2,
        why="the chunks of row 0 are kept in every row",
        letter="E",
        repaired=True,
        models=TINY,
    ),
    Case(
        "dms_knorm",
        lambda p, r, m: p.DMSPress(p.KnormPress(), threshold=-8 - 4 * r, sliding_window_size=20),
        models=TINY,
        one_by_one=True,
    ),
    # -- while decoding
    # KeyDiff: with Knorm a token's repetitions tie in the first layer, and what follows such a tie differs for good
    Case(
        "decoding_keydiff",
        lambda p, r, m: p.DecodingPress(p.KeyDiffPress(), compression_interval=8, target_size=100),
        ratios=(0.5,),
        decode=24,
    ),
    Case(
        "decoding_streaming_llm",
        lambda p, r, m: p.DecodingPress(p.StreamingLLMPress(), compression_interval=8, target_size=100),
        ratios=(0.5,),
        decode=24,
        why="pairs are gathered in the order of scores, so that later rounds take others for sinks and recent ones",
        letter="B4",
        repaired=True,
    ),
    Case(
        "decoding_ratio_keydiff",
        lambda p, r, m: p.CompressionRatioDecodingPress(
            p.KeyDiffPress(), compression_interval=8, target_compression_ratio=r
        ),
        decode=24,
    ),
    Case(
        "prefill_decoding_keydiff",
        lambda p, r, m: p.PrefillDecodingPress(
            p.SnapKVPress(r, window_size=16), p.DecodingPress(p.KeyDiffPress(), compression_interval=8, target_size=60)
        ),
        decode=24,
    ),
    Case(
        "cam_knorm",
        lambda p, r, m: p.CAMPress(p.KnormPress(), compression_interval=8, target_size=100),
        ratios=(0.5,),
        decode=24,
        why="kvpress evicts by the mean of the heads' scores, the same pairs in all of them; in coldpress each head "
        "evicts its own, as in the base press; draws as below",
        letter="decision",
    ),
    Case(
        "cam_streaming_llm",
        lambda p, r, m: p.CAMPress(p.StreamingLLMPress(), compression_interval=8, target_size=100),
        ratios=(0.5,),
        decode=24,
        why=DRAWS,
        letter="table",
    ),
    # -- with kvpress's own parameters
    *DEFAULTS,
]
