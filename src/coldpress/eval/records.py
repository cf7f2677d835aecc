"""From measurements to result records: one for each press and its size, with all that is needed to repeat it."""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict
from typing import Any

from coldpress.eval.jobs import Job
from coldpress.eval.points import config_of
from coldpress.eval.results import SCHEMA_VERSION, environment
from coldpress.eval.run import Run

__all__ = ["METRICS", "blank_record", "finished_records", "make_records"]

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


def make_records(run: Run) -> list[dict[str, Any]]:
    """One record per press and size, a ratio or a budget; of an interrupted run, those that have something in them.

    ``status`` is ``ok`` when everything that was asked for is there, ``failed`` when the press or the run failed,
    ``interrupted`` otherwise. The metrics of a record that failed are null; what was measured until then is in
    ``before_failure``, under the same names.
    """
    common, scored = _common(run), run.scored
    is_by_press = run.prefix is not None or run.stream is not None
    records = []
    for job in run.jobs:
        parts = list(scored.get((id(job.press), job.kv_bits), ()))
        parts += [] if is_by_press or run.plain is None else [run.plain]
        parts += _speed(run, job)
        error = run.error or next((part for part in parts if isinstance(part, Exception)), None)
        if not parts and error is None:
            continue
        record = blank_record(common, job)
        record["status"] = "failed" if error is not None else "ok" if _is_complete(run, job) else "interrupted"
        measured: dict[str, Any] = {}
        for part in parts:
            measured |= part if isinstance(part, dict) else {}
        if error is None:
            record |= measured
        else:
            record |= {"before_failure": measured} if measured else {}
            record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            record["traceback"] = "".join(traceback.format_exception(error))
        records.append(record)
    return records


def finished_records(run: Run) -> list[dict[str, Any]]:
    """For each job of a run, in order, what its record will look like if it succeeds, with nothing measured."""
    common = _common(run)
    records = [blank_record(common, job) for job in run.jobs]
    for record, job in zip(records, run.jobs, strict=True):
        if run.settings.ppl_mode == "streaming" and job.press is None:  # nothing is evicted, so no gaps are closed
            record["position_mode"] = "original"
    return records


def blank_record(common: dict[str, Any], job: Job) -> dict[str, Any]:
    """A record that says what was asked for, and nothing that was measured."""
    return {
        **dict.fromkeys(METRICS),
        **common,
        "press": job.name,
        "press_config": config_of(job.press),
        "compression_ratio": job.ratio,
        "budget_tokens": job.budget_tokens,
        "budget_bytes": job.budget_bytes,
        "kv_bits": None if job.kv_bits is None else job.kv_bits.bits,
        "kv_bits_config": None if job.kv_bits is None else asdict(job.kv_bits),
        "status": "ok",
        "error": None,
    }


def _is_complete(run: Run, job: Job) -> bool:
    """Whether everything that was asked for this press has been measured."""
    plan = run.plan
    is_scored = run.plain is not None or plan.protocol.startswith("speed")
    if run.stream is not None:
        is_scored = run.stream.is_complete
    if plan.windows is not None:
        is_scored = run.prefix is not None and run.prefix.is_complete
    is_timed = plan.context_ids is None
    if run.speed is not None and not run.has_failed(job):
        point = run.speed.point(job.press, job.kv_bits)
        is_timed = len(point.samples) == run.settings.repetitions and point.memory is not None
    return is_scored and is_timed


def _speed(run: Run, job: Job) -> list[dict[str, Any] | Exception]:
    """The speed part of a record, if any of it was timed, and what went wrong."""
    if run.speed is None or run.has_failed(job):
        return []
    point = run.speed.point(job.press, job.kv_bits)
    parts: list[dict[str, Any] | Exception] = [] if point.error is None else [point.error]
    if not point.samples:
        return parts
    part = run.speed.result(point)
    if run.prefix is not None:
        part = {f"speed_{key}" if key in SIZES else key: value for key, value in part.items()}
    return [part, *parts]


def _common(run: Run) -> dict[str, Any]:
    """What the records of one run have in common."""
    s, corpus, plan = run.settings, run.corpus, run.plan
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.run_id,
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": run.command,
        "protocol": plan.protocol,
        "ppl_mode": s.ppl_mode,
        "ppl_preset": s.ppl_preset,
        "settings": s.recorded(),
        "seed": s.seed,
        **run.loaded.facts(),
        "dataset": s.text_file or s.dataset,
        "dataset_source": corpus.source,
        "subset": corpus.subset,
        "split": corpus.split,
        "sample_idx": s.sample_idx,
        "doc_ids": plan.doc_ids,
        "join": corpus.join,
        "add_bos": plan.add_bos,
        "text_sha256": corpus.text_sha256,
        "text_bytes": corpus.text_bytes,
        "tokens_sha256": plan.tokens_sha256,
        "total_tokens": plan.total_tokens,
        "batch_size": s.batch_size,
        "position_mode": "original",
        "engine": {"name": s.engine, **run.engine},
        "seconds": run.seconds,
        "env": environment(),
    }
    if plan.context_ids is not None:
        record["context_tokens"] = plan.context_ids.shape[1]
    if plan.windows is not None:
        sizes = plan.windows[0]
        record |= {"context_tokens": sizes.context, "target_tokens": sizes.target, "stride": sizes.stride}
    elif plan.max_length is not None:
        record |= {"max_length": plan.max_length, "stride": plan.stride}
    elif s.ppl_mode == "streaming":
        record |= {"chunk_size": s.stream_chunk, "stream_limit": plan.stream_limit, "position_mode": s.positions}
    return record
