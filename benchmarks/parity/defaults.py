"""Every press once more, with kvpress's own parameters, on texts long enough for them.

Only what a press cannot be made without is given: the ratio, the press inside a wrapper, files. Decoding goes on until
the schedule's own interval and target are reached.
"""

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
from benchmarks.parity.case import Case, Maker
from benchmarks.parity.models import LONG, LONGEST
from benchmarks.parity.reasons import (
    DRAWS,
    FIRST_LAYER,
    IN_ORDER_OF_SCORES,
    MEDIANS,
    OF_ALL_HEADS,
    OF_THE_LAST_CHUNK,
    PADDING,
    PRUNED_WINDOW,
    SAFEGUARD,
    SEED,
    SINKS,
    SKETCH,
    SUMS,
    WHOLE_CHUNKS,
    WHOLE_PAIRS,
    Z_SCORES,
)

_FROM_TARGET = 1040  # tokens after 1,536 until a cache of 2,048 has been passed by an interval of 512
_FROM_INTERVAL = 520


def _case(name: str, make: Maker, **more: Any) -> Case:
    given = {"ratios": (0.5,), "models": LONG, "is_default": True, "repaired": "why" in more} | more
    return Case(f"{name}, defaults", make, **given)


DEFAULTS = [
    # -- scorers
    _case("random", lambda p, r, m: p.RandomPress(r, seed=3), why=SEED, letter="K"),
    _case("knorm", lambda p, r, m: p.KnormPress(r)),
    _case("keydiff", lambda p, r, m: p.KeyDiffPress(r)),
    _case("streaming_llm", lambda p, r, m: p.StreamingLLMPress(r)),
    _case("snapkv", lambda p, r, m: p.SnapKVPress(r)),
    _case("pyramidkv", lambda p, r, m: p.PyramidKVPress(r), one_by_one=True, why=WHOLE_PAIRS, letter="decision"),
    _case("tova", lambda p, r, m: p.TOVAPress(r)),
    _case("observed_attention", lambda p, r, m: p.ObservedAttentionPress(r), kvpress_attention="eager"),
    _case("expected_attention", lambda p, r, m: p.ExpectedAttentionPress(r), why=SINKS, letter="paper"),
    _case("cap", lambda p, r, m: p.CapPress(r)),
    _case("lagkv", lambda p, r, m: p.LagKVPress(r)),
    _case("cur", lambda p, r, m: p.CURPress(r), why=SUMS, letter="K"),
    _case("non_causal_attention", lambda p, r, m: p.NonCausalAttnPress(r), why=PADDING, letter="K"),
    _case("leverage", lambda p, r, m: p.LeverageScorePress(r), why=SKETCH, letter="K"),
    _case("compactor", lambda p, r, m: p.CompactorPress(r), why=Z_SCORES, letter="K"),
    # -- wrappers
    _case("adakv_snapkv", lambda p, r, m: p.AdaKVPress(p.SnapKVPress(r)), scope="layer", one_by_one=True),
    _case("critical_snapkv", lambda p, r, m: p.CriticalKVPress(p.SnapKVPress(r))),
    _case(
        "critical_adakv_snapkv",
        lambda p, r, m: p.CriticalAdaKVPress(p.SnapKVPress(r)),
        scope="layer",
        one_by_one=True,
        why=SAFEGUARD,
        letter="paper",
    ),
    _case("chunk_knorm", lambda p, r, m: p.ChunkPress(p.KnormPress(r))),
    Case(
        "chunk_knorm, chunk_length=256",
        lambda p, r, m: p.ChunkPress(p.KnormPress(r), chunk_length=256),
        models=LONG,
        is_default=True,
    ),
    _case("chunk_snapkv", lambda p, r, m: p.ChunkPress(p.SnapKVPress(r)), why=OF_THE_LAST_CHUNK, letter="K"),
    _case(
        "chunkkv_knorm",
        lambda p, r, m: p.ChunkKVPress(p.KnormPress(r)),
        one_by_one=True,
        why=WHOLE_CHUNKS,
        letter="decision",
    ),
    _case(
        "chunkkv_snapkv",
        lambda p, r, m: p.ChunkKVPress(p.SnapKVPress(r)),
        one_by_one=True,
        why=WHOLE_CHUNKS,
        letter="decision",
    ),
    _case("block_keydiff", lambda p, r, m: p.BlockPress(p.KeyDiffPress(r))),
    _case("rerotated_streaming_llm", lambda p, r, m: p.KeyRerotationPress(p.StreamingLLMPress(r)), rerotated=True),
    _case(
        "per_layer_knorm",
        lambda p, r, m: p.PerLayerCompressionPress(p.KnormPress(), [0.25, 0.5, 0.75] * 10),
        one_by_one=True,
    ),
    _case(
        "composed, keydiff and snapkv",
        lambda p, r, m: p.ComposedPress([p.KeyDiffPress(r / 2), p.SnapKVPress(r / 2)]),
        why=IN_ORDER_OF_SCORES,
        letter="B4",
    ),
    # -- presses that were calibrated or trained, with random files
    _case("qfilter", lambda p, r, m: p.QFilterPress(r, filters=query_filters(m))),
    _case(
        "expected_attention_stats",
        lambda p, r, m: p.ExpectedAttentionStatsPress(r, stats_folder=query_statistics(m)),
        why=SINKS,
        letter="paper",
    ),
    _case("kvzap", lambda p, r, m: p.KVzapPress(r, weights=predictors(m, "mlp"))),
    _case(
        "dms_kvzap",
        lambda p, r, m: p.DMSPress(p.KVzapPress(weights=predictors(m, "mlp")), threshold=r - 1),
        one_by_one=True,
    ),
    _case(
        "fastkvzip",
        lambda p, r, m: p.FastKVzipPress(r, weights=gates(m)),
        scope="model",
        one_by_one=True,
        why=OF_ALL_HEADS,
        letter="decision",
    ),
    _case(
        "lukv",
        lambda p, r, m: p.LUKVPress(compression_ratio=r, curves=budget_curves(m, 1 / 256)),
        models=LONGEST,
        one_by_one=True,
        why=SINKS,
        letter="paper",
    ),
    _case("duo_attention", lambda p, r, m: p.DuoAttentionPress(r, pattern=head_pattern(m, 128, 256)), one_by_one=True),
    # -- presses that run the model again
    _case(
        "kvzip", lambda p, r, m: p.KVzipPress(r), scope="model", one_by_one=True, why=OF_ALL_HEADS, letter="decision"
    ),
    _case(
        "kvgrad", lambda p, r, m: p.KVgradPress(r), scope="model", one_by_one=True, why=OF_ALL_HEADS, letter="decision"
    ),
    _case(
        "kvcompose",
        lambda p, r, m: p.KVComposePress(compression_ratio=r),
        one_by_one=True,
        why=f"{FIRST_LAYER}; and the number of pairs as above",
        letter="C",
    ),
    # -- others
    _case("simlayerkv", lambda p, r, m: p.SimLayerKVPress(), one_by_one=True),
    _case("think", lambda p, r, m: p.ThinKPress(r), why=PRUNED_WINDOW, letter="paper"),
    _case("finch", lambda p, r, m: p.FinchPress(r, window_size=16), rerotated=True),
    _case("merging_knorm", lambda p, r, m: p.MergingPress(p.KnormPress(r))),
    _case("merging_snapkv", lambda p, r, m: p.MergingPress(p.SnapKVPress(r))),
    _case(
        "entropy_gated_chunkkv_snapkv",
        lambda p, r, m: p.EntropyGatedChunkKVPress(p.SnapKVPress(r)),
        why=MEDIANS,
        letter="decision",
    ),
    _case("entropy_gated_chunkkv_knorm", lambda p, r, m: p.EntropyGatedChunkKVPress(p.KnormPress(r))),
    # -- while decoding
    _case("decoding_keydiff", lambda p, r, m: p.DecodingPress(p.KeyDiffPress()), models=LONGEST, decode=_FROM_TARGET),
    _case(
        "decoding_ratio_keydiff",
        lambda p, r, m: p.CompressionRatioDecodingPress(p.KeyDiffPress()),
        decode=_FROM_INTERVAL,
    ),
    _case(
        "prefill_decoding_keydiff",
        lambda p, r, m: p.PrefillDecodingPress(p.SnapKVPress(0.25), p.DecodingPress(p.KeyDiffPress())),
        models=LONGEST,
        decode=_FROM_TARGET,
    ),
    _case(
        "cam_streaming_llm",
        lambda p, r, m: p.CAMPress(p.StreamingLLMPress()),
        models=LONGEST,
        decode=_FROM_TARGET,
        why=DRAWS,
        letter="table",
        repaired=False,
    ),
]
