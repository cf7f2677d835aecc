"""``coldpress benchmark``: one of the field's benchmarks under presses, one result record per press and size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coldpress.bases.press_files import load_press_files
from coldpress.eval.benchmarks import Row, find_benchmark
from coldpress.eval.benchmarks.others import hide
from coldpress.eval.benchmarks.rows import LIMIT, AskedContext, Rows, check_rows, choose, load_rows, make_contexts
from coldpress.eval.benchmarks.run import BenchmarkRun
from coldpress.eval.jobs import make_jobs
from coldpress.eval.models import load_model
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.progress import note
from coldpress.eval.run import DECODE_COST, ExampleRun, carry_out, checked_folder, prepared
from coldpress.eval.settings import BenchmarkSettings
from coldpress.eval.tokens import note_unreadable

__all__ = ["benchmark_protocol", "measure_benchmark"]


def benchmark_protocol(settings: BenchmarkSettings, data_dir: str | None) -> str:
    """The name of the way a benchmark is measured; numbers of different names are not compared."""
    parts = ["benchmark-v1", settings.name, *([] if data_dir is None else [data_dir])]
    parts += ["query_aware"] if settings.query_aware else []
    parts += ["pinned"] if settings.pin_system is not None else []
    parts += [] if settings.max_context_length is None else [f"cut{settings.max_context_length}"]
    parts += [] if settings.chunk_tokens is None else [f"chunk{settings.chunk_tokens}"]
    return "-".join(parts)


def measure_benchmark(settings: BenchmarkSettings, command: str) -> tuple[list[dict[str, Any]], bool]:
    """Run a benchmark under presses as :func:`coldpress.eval.task_command.measure_tasks` runs tasks."""
    benchmark = find_benchmark(settings.name)
    load_press_files(settings.press, settings.engine)  # an evaluation of speed knows no engine
    make_jobs(settings.of_jobs(2**31))  # presses that there are not, before anything is loaded
    data = load_rows(benchmark, settings.data, settings.data_dir)
    check_rows(benchmark, data, has_limit=settings.max_new_tokens is not None)
    jobs = make_jobs(settings.of_jobs(settings.max_new_tokens or max(row[LIMIT] for row in data.rows)))
    folder = checked_folder(settings)
    loaded = load_model(settings.model, **settings.loading)
    rows = data.rows
    if benchmark.is_haystack and settings.max_context_length is not None:
        rows = hide(rows, loaded.tokenizer, settings.max_context_length, settings.needle_depth)
    rows = choose(rows, settings.fraction, settings.limit, settings.seed)
    note_unreadable(loaded.tokenizer, (row["context"] for row in rows), loaded.name)
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
    run = BenchmarkCommand(settings, prepared(jobs, loaded), loaded, command, data, rows, contexts)
    run.keep_in(folder)
    return carry_out(run, folder)


@dataclass
class BenchmarkCommand(ExampleRun):
    """A run over a benchmark of which everything is decided."""

    data: Rows
    rows: Sequence[Row]
    contexts: Sequence[AskedContext]

    @property
    def label(self) -> str:
        return str(self.settings.name)

    def point_run(self) -> BenchmarkRun:
        return BenchmarkRun(
            self.loaded.model,
            self.loaded.tokenizer,
            [job.point for job in self.jobs],
            find_benchmark(self.settings.name),
            self.contexts,
            chunk_tokens=self.settings.chunk_tokens,
            seed=self.settings.seed,
            ledger=self.ledger,
        )

    @property
    def work(self) -> float:
        new = DECODE_COST * sum(question.limit for context in self.contexts for question in context.questions)
        return self.n_parameters * (sum(context.length for context in self.contexts) + new * (1 + len(self.jobs)))

    def facts(self) -> dict[str, Any]:
        contexts, data = self.contexts, self.data
        return {
            "protocol": benchmark_protocol(self.settings, data.data_dir),
            "dataset": self.settings.name,
            "dataset_source": data.source,
            "subset": data.data_dir,
            "split": "test",
            "text_sha256": hashlib.sha256(repr([sorted(row.items()) for row in self.rows]).encode()).hexdigest(),
            "tokens_sha256": hashlib.sha256("".join(each.fingerprint for each in contexts).encode()).hexdigest(),
            "total_tokens": sum(context.length for context in contexts),
            "n_contexts": len(contexts),
            "n_questions": len(self.rows),
            "n_contexts_cut": sum(context.length < context.n_whole for context in contexts),
        }
