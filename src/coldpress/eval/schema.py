"""The fields of a result record."""

from __future__ import annotations

from coldpress.backends import BUDGETS

__all__ = ["IDENTIFYING", "METRICS", "OF_A_POINT", "SIZES"]

OF_A_POINT = ("press", "press_config", "compression_ratio", *BUDGETS, "kv_bits_config")
# What was asked for and what it was asked of: a run that fails has the same name as one that finishes. Measured values
# (loss, achieved ratio, ...) are in the record, not in its name.
IDENTIFYING = (
    *("protocol", "mode", "ppl_mode", "speed_only", "settings"),
    *("model", "model_revision", "weights_fingerprint", "dtype", "device", "attn_implementation", "quantization"),
    *("dataset", "dataset_revision", "subset", "split", "sample_idx", "text_file", "text_sha256", "add_bos"),
    *(
        "max_tokens",
        "max_windows",
        "max_documents",
        "context_tokens",
        "target_tokens",
        "stride",
        "chunk_size",
    ),
    *("batch_size", "position_mode", *OF_A_POINT),
    *("max_new_tokens", "warmup", "repetitions", "threads", "seed"),
)
# Null in a record until measured, and in that of a press that failed.
METRICS = (
    *("scored_tokens", "windows", "loss", "ppl", "baseline_loss", "baseline_ppl", "delta_nll", "delta_nll_se"),
    *("delta_nll_ci95", "ppl_ratio_ci95", "top1_acc", "same_top1", "kld", "delta_p", "nll_by_distance", "per_window"),
    *("nll_by_position", "per_document", "kv_bytes_max"),
    *("ppl_ci95", "bits_per_byte", "scored_bytes", "delta_by_distance", "greedy_agreement"),
    *("context_tokens", "target_tokens", "kv_bytes", "kv_bytes_baseline", "kv_len_before", "kv_len_after", "kept_hash"),
    *("effective_compression_ratio", "generated_tokens", "repetitions", "generation_tokens_per_s"),
    *("speed_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "tpot_ms", "decode_speedup"),
    *("timed_round", "total_s", "tpot_ms_baseline"),
    *("peak_mem_bytes", "peak_mem_kind", "peak_mem_baseline_bytes", "peak_mem_delta_bytes", "peak_reserved_bytes"),
)
# Sizes of the cache: when perplexity has its own context, those of the timed one are named speed_...
SIZES = (
    *("context_tokens", "kv_bytes", "kv_bytes_baseline", "kv_len_before", "kv_len_after"),
    "effective_compression_ratio",
)
