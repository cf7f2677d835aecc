"""``coldpress benchmark``: one of the field's benchmarks under presses, one result record per press and size."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import NO_PRESS
from coldpress.bases.scorer import BUDGETS
from coldpress.errors import InputError, OutputError
from coldpress.eval.benchmarks import Benchmark, Row, find_benchmark
from coldpress.eval.benchmarks.contexts import AskedContext, make_contexts
from coldpress.eval.benchmarks.needle_in_haystack import hide
from coldpress.eval.benchmarks.rows import LIMIT, Rows, check_rows, choose, load_rows
from coldpress.eval.benchmarks.run import AnswerLedger, BenchmarkRun
from coldpress.eval.engine_by_name import check_engine, make_engine
from coldpress.eval.jobs import Job, make_jobs
from coldpress.eval.ledger import UNFINISHED, versions
from coldpress.eval.models import LoadedModel, load_model, pick_device
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.points import Point
from coldpress.eval.progress import note, progress
from coldpress.eval.results import SCHEMA_VERSION, check_writable, environment
from coldpress.eval.settings import Settings
from coldpress.eval.task_results import carry_out
from coldpress.stores.bits import KVBits

__all__ = ["BenchmarkSettings", "benchmark_protocol", "measure_benchmark"]

_ELSEWHERE = ("output_dir", "device_map", "engine", "ray_address", "workers")  # what changes no result
_OF_JOBS = ("press", "compression_ratio", *BUDGETS, "press_args", "kv_bits", "kv_group_size", "kv_residual_tokens")


@dataclass(frozen=True)
class BenchmarkSettings:
    """Everything a run over a benchmark was asked for; the command line's options have these names.

    Raises:
        InputError: options that can never work.
    """

    name: str
    data: str | None = None  # a folder; None for the hub
    data_dir: str | None = None
    fraction: float = 1.0
    limit: int | None = None
    max_context_length: int | None = None
    max_new_tokens: int | None = None  # what each row says
    query_aware: bool = False
    needle_depth: tuple[int, ...] = ()
    pin_system: str | None = None
    model: str = "EleutherAI/pythia-70m"
    revision: str | None = None
    press: tuple[str, ...] = (NO_PRESS,)
    compression_ratio: tuple[float, ...] = ()  # (0.5,) if no budget is given
    budget_tokens: tuple[int, ...] = ()
    budget_bytes: tuple[int, ...] = ()
    press_args: tuple[tuple[str, Any], ...] = ()
    chunk_tokens: int | None = None
    kv_bits: tuple[int, ...] = ()
    kv_group_size: int = KVBits.group_size
    kv_residual_tokens: int = KVBits.residual_tokens
    allow_extrapolation: bool = False
    attn_implementation: str = "sdpa"
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    seed: int = 42  # kvpress's, so that a fraction is the same one
    engine: str = "local"
    ray_address: str | None = None
    workers: int | None = None
    output_dir: str = "results/benchmarks"

    def __post_init__(self) -> None:
        benchmark = find_benchmark(self.name)
        if not 0 < self.fraction <= 1:
            raise InputError(f"--fraction must be more than 0 and at most 1, got {self.fraction:g}.")
        if self.pin_system is not None and not self.pin_system.strip():
            raise InputError("--pin_system is empty; give the system prompt, or leave it out.")
        if not benchmark.is_haystack:
            if self.needle_depth:
                raise InputError(f"--needle_depth belongs to needle_in_haystack; {self.name} hides nothing.")
            return
        if self.max_context_length is None or not self.needle_depth:
            raise InputError(f"{self.name} needs --max_context_length and --needle_depth, such as 4096 and 0 50 100.")
        if not all(0 <= depth <= 100 for depth in self.needle_depth):
            raise InputError(f"--needle_depth must be per cents from 0 to 100, got {list(self.needle_depth)}.")
        if self.fraction < 1:
            raise InputError(f"{self.name} has one text; leave --fraction out.")

    @property
    def benchmark(self) -> Benchmark:
        return find_benchmark(self.name)

    @property
    def loading(self) -> dict[str, Any]:
        """The options of load_model beside the name."""
        names = ("device", "dtype", "attn_implementation", "revision", "device_map")
        return {name: getattr(self, name) for name in names}

    @property
    def cluster(self) -> dict[str, Any]:
        """The options of the engine."""
        return {"ray_address": self.ray_address, "workers": self.workers}

    def jobs(self, longest_answer: int) -> list[Job]:
        """The presses to measure; see :func:`coldpress.eval.jobs.make_jobs`.

        Args:
            longest_answer: tokens; a press that goes to work while decoding must find something to do.
        """
        if "finch" in self.press and not self.query_aware:
            raise InputError("finch chooses by the question at the end of a text; add --query_aware, or leave it out.")
        chosen = {name: getattr(self, name) for name in (*_OF_JOBS, "chunk_tokens", "seed")}
        load_press_files(self.press, self.engine)
        return make_jobs(Settings(**chosen, speed_only=True, max_new_tokens=max(longest_answer, 2)))


def benchmark_protocol(settings: BenchmarkSettings, data_dir: str | None) -> str:
    """The name of the way a benchmark is measured; numbers of different names are not compared."""
    parts = ["benchmark-v1", settings.name, *([] if data_dir is None else [data_dir])]
    parts += ["query_aware"] if settings.query_aware else []
    parts += ["pinned"] if settings.pin_system is not None else []
    parts += [] if settings.max_context_length is None else [f"cut{settings.max_context_length}"]
    parts += [] if settings.chunk_tokens is None else [f"chunk{settings.chunk_tokens}"]
    return "-".join(parts)


def measure_benchmark(settings: BenchmarkSettings, command: str) -> tuple[list[dict[str, Any]], bool]:
    """Run a benchmark under presses, write the results, and print them.

    A run that was killed goes on where it was when it is started again with the same settings.

    Args:
        settings: what to measure.
        command: the command line, for the record.

    Returns:
        The records, in the order of the table, and whether the user interrupted the run.

    Raises:
        InputError: before any long work, when something that was asked for cannot work.
    """
    check_engine(settings.engine, **settings.cluster)
    pick_device(settings.device)
    if not settings.output_dir.strip():
        raise OutputError("--output_dir is empty; name a folder.")
    output_dir = Path(settings.output_dir)
    benchmark = settings.benchmark
    settings.jobs(2**31)  # presses that there are not, before anything is loaded
    loaded_rows = load_rows(benchmark, settings.data, settings.data_dir)
    check_rows(benchmark, loaded_rows, has_limit=settings.max_new_tokens is not None)
    jobs = settings.jobs(settings.max_new_tokens or max(row[LIMIT] for row in loaded_rows.rows))
    check_writable(output_dir)
    loaded = load_model(settings.model, **settings.loading)
    rows = loaded_rows.rows
    if benchmark.is_haystack:
        assert settings.max_context_length is not None
        rows = hide(rows, loaded.tokenizer, settings.max_context_length, settings.needle_depth)
    rows = choose(rows, settings.fraction, settings.limit, settings.seed)
    contexts = make_contexts(
        rows,
        loaded.tokenizer,
        max_positions=UNKNOWN_POSITIONS if settings.allow_extrapolation else loaded.max_positions or UNKNOWN_POSITIONS,
        max_context_length=settings.max_context_length,
        max_new_tokens=settings.max_new_tokens,
        is_query_aware=settings.query_aware,
        system=settings.pin_system,
    )
    loaded.check_ids([torch.tensor(context.context_ids) for context in contexts])
    n_cut = sum(context.length < context.n_whole for context in contexts)
    if n_cut:
        longest = max(context.n_whole for context in contexts)
        kept = max(context.length for context in contexts)
        note(f"{n_cut} of {len(contexts)} contexts are cut to {kept:,} tokens or less; the longest has {longest:,}")
    common = _common(settings, command, loaded, loaded_rows, rows, contexts)
    ledger = AnswerLedger(output_dir / UNFINISHED / _digest(common))
    jobs = [
        job if job.press is None else replace(job, press=job.press.prepared(loaded.model, loaded.tokenizer))
        for job in jobs
    ]
    run = BenchmarkRun(
        loaded.model,
        loaded.tokenizer,
        [Point(job.press, job.kv_bits) for job in jobs],
        benchmark,
        contexts,
        chunk_tokens=settings.chunk_tokens,
        seed=settings.seed,
        ledger=ledger,
    )
    with make_engine(settings.engine, loaded, **settings.cluster) as engine:
        return carry_out(run, jobs, common, output_dir, ledger, partial(progress, name=settings.name), engine)


def _digest(common: dict[str, Any]) -> str:
    """The same for runs whose contexts may be shared."""
    names = ("weights_fingerprint", "dtype", "device", "attn_implementation", "protocol", "tokens_sha256", "seed")
    parts = [common.get(name) for name in names], versions(common)
    return "benchmark-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def _common(
    settings: BenchmarkSettings,
    command: str,
    loaded: LoadedModel,
    data: Rows,
    rows: Sequence[Row],
    contexts: Sequence[AskedContext],
) -> dict[str, Any]:
    """What the records of one run have in common."""
    asked = {name: value for name, value in asdict(settings).items() if name not in (*_OF_JOBS, *_ELSEWHERE)}
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": secrets.token_hex(6),
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "protocol": benchmark_protocol(settings, data.data_dir),
        "settings": asked,
        "seed": settings.seed,
        **loaded.facts(),
        "dataset": settings.name,
        "dataset_source": data.source,
        "subset": data.data_dir,
        "split": "test",
        "text_sha256": hashlib.sha256(repr([sorted(row.items()) for row in rows]).encode()).hexdigest(),
        "tokens_sha256": hashlib.sha256("".join(each.fingerprint for each in contexts).encode()).hexdigest(),
        "total_tokens": sum(context.length for context in contexts),
        "n_contexts": len(contexts),
        "n_questions": len(rows),
        "n_contexts_cut": sum(context.length < context.n_whole for context in contexts),
        "batch_size": 1,
        "position_mode": "original",
        "env": environment(),
    }
