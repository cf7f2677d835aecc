"""Benchmarks under compressed contexts: each context is compressed once, and each of its questions answered from that.

The loop, its ledger and its checks are those of tasks; what is new is an example with several questions, of which only
the answers are of interest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.press_files import load_press_files
from coldpress.cache.pressed import PressedCache
from coldpress.eval.benchmarks import Row, find_benchmark
from coldpress.eval.benchmarks.benchmark import Benchmark, Scores, Share
from coldpress.eval.benchmarks.others import hide
from coldpress.eval.benchmarks.rows import LIMIT, AskedContext, Rows, check_rows, choose, load_rows, make_contexts
from coldpress.eval.jobs import BASELINE, Point, make_jobs
from coldpress.eval.ledger import Answers, Ledger
from coldpress.eval.losses import finite, forward, token_losses
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.point_run import PointRun, check_baseline, sizes_of
from coldpress.eval.run import DECODE_COST, ExampleRun, carry_out, checked_folder, prepared
from coldpress.eval.settings import BenchmarkSettings
from coldpress.eval.task_run import ExampleWork, by_depth, ends_of, greedy_tokens, row_of
from coldpress.io.progress import note
from coldpress.loading.models import load_model
from coldpress.loading.tokens import note_unreadable
from coldpress.models.block import prefilling
from coldpress.records.metrics import bootstrap


def mean(shares: Sequence[Share]) -> float | None:
    """What was reached out of all; None where nothing could be."""
    total = math.fsum(share.of for share in shares)
    return math.fsum(share.reached for share in shares) / total if total else None


def bootstrap_interval(
    own: Sequence[Share], base: Sequence[Share], contexts: Sequence[int], **options: int
) -> tuple[float, float] | None:
    """95 % interval of the difference of two means, from contexts that are drawn anew, with all their questions.

    Questions about one context share a compressed cache, so they are not independent; contexts are.

    Args:
        own, base: shares of each question, under a press and uncompressed.
        contexts: which one each question is about.
        options: of :func:`coldpress.records.metrics.bootstrap`.
    """
    sums = {context: numpy.zeros(4) for context in contexts}
    for mine, other, context in zip(own, base, contexts, strict=True):
        sums[context] += [*mine, *other]
    columns = list(zip(*sums.values(), strict=True))
    return bootstrap(
        columns, lambda reached, of, reached_base, of_base: reached / of - reached_base / of_base, **options
    )


def mcnemar(own: Sequence[Share], base: Sequence[Share]) -> tuple[int, int, float] | None:
    """Questions that a press gets right and the uncompressed cache wrong, the other way round, and the exact p.

    The two-sided p of McNemar's test: how likely so uneven a split of the changed ones is if both sides are equally so.
    None where an answer can be right in part.
    """
    if any(share.of != 1 or share.reached not in (0, 1) for share in (*own, *base)):
        return None
    gained = sum(mine.reached > other.reached for mine, other in zip(own, base, strict=True))
    lost = sum(mine.reached < other.reached for mine, other in zip(own, base, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return gained, lost, min(1.0, 2 * tail / 2**changed)


SHOWN = 200  # characters of a question that a record holds


class ContextWork(ExampleWork):
    """Answers the questions about one context: work for an engine."""

    def _check(self, model: PreTrainedModel, example: AskedContext, base: Answers) -> None:
        """Raise SelfCheckError if the uncompressed cache's losses are not those of a direct forward pass."""
        answer = base.answers[0]
        tokens = row_of(model, example.context_ids, example.questions[0].ids, answer)
        cache, n = PressedCache(), example.length
        forward(model, tokens[:, :n], cache, keep=1)
        losses = token_losses(forward(model, tokens[:, n:-1], cache, keep=len(answer)), tokens[:, -len(answer) :])
        check_baseline(model, tokens, finite(losses.cpu()))

    def _ask(
        self, model: PreTrainedModel, cache: PressedCache, example: AskedContext, with_hash: bool = False
    ) -> Answers:
        """What ``cache``, right after its prefill, answers; each question on a branch of its own."""
        goes_on = cache.press is not None and cache.press.evicts_while_decoding
        sizes = {"seen_tokens": cache.seen_tokens, **sizes_of(cache, with_hash)}
        answers: list[list[int]] = []
        for question in example.questions:
            branch = cache.fork()
            block: AbstractContextManager[Any] = prefilling(model, branch) if goes_on else nullcontext()
            with block:
                logits = forward(model, row_of(model, question.ids), branch, keep=1)
                answers.append(greedy_tokens(model, branch, logits, question.limit, self.ends))
            if goes_on and len(answers) == 1:
                sizes = {"seen_tokens": branch.seen_tokens, **sizes_of(branch, with_hash)}
        return Answers(answers=answers, **sizes)


class BenchmarkRun(PointRun[Answers]):
    """Answer the questions of a benchmark, context by context; :meth:`results` can be asked for at any time.

    ``contexts`` are those of :func:`make_contexts`; for the rest see :class:`PointRun` and :class:`ExampleWork`.
    """

    kind = Answers

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        points: Sequence[Point],
        benchmark: Benchmark,
        contexts: Sequence[AskedContext],
        ledger: Ledger | None = None,
        **options: Any,
    ):
        self.tokenizer, self.benchmark = tokenizer, benchmark
        self.work = ContextWork(ends_of(model, tokenizer), **options)
        super().__init__(model, points, contexts, ledger)

    def _fingerprint(self, index: int) -> str:
        parts = self.given[index].fingerprint, self.work.chunk_tokens, self.work.seed
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _result(self, point: Point) -> dict[str, Any]:
        """The part of a result record that is about the benchmark, over the contexts measured so far."""
        measured = self.measured(point)
        _, first, first_base = measured[0]
        grown = [base.kv_bytes / base.seen_tokens * own.seen_tokens for _, own, base in measured]
        rows = [row for each in measured for row in self._rows(*each)]
        return {
            "tasks": self._groups(rows, point == BASELINE),
            "per_example": [{name: value for name, value in row.items() if name[0] != "_"} for row in rows],
            **first.facts(first_base, first.seen_tokens),
            "kv_bytes": round(sum(own.kv_bytes for _, own, _ in measured) / len(measured)),
            "kv_bytes_baseline": round(sum(grown) / len(measured)),
            "effective_compression_ratio": sum(own.achieved_ratio for _, own, _ in measured) / len(measured),
        }

    def _rows(self, index: int, own: Answers, base: Answers) -> list[dict[str, Any]]:
        """What a record says of each question about a context, and what it is summed up from."""
        context, found = self.given[index], []
        for question, ids, other_ids in zip(context.questions, own.answers, base.answers, strict=True):
            answer, other = self._text(ids), self._text(other_ids)
            scores = self.benchmark.score(answer, question.row), self.benchmark.score(other, question.row)
            depth, first = question.row.get("needle_depth"), next(iter(scores[0]), None)
            found.append(
                {
                    "_scores": scores,
                    "_groups": self.benchmark.groups(question.row),
                    "task": self.benchmark.groups(question.row)[0],
                    "context": index,
                    "length": context.length,
                    "depth": None if depth is None else depth / 100,
                    "question": question.row["question"].strip()[:SHOWN],
                    "answer": answer,
                    "is_same_answer": ids == other_ids,
                    "score": None if first is None else mean([scores[0][first]]),
                    "score_base": None if first is None else mean([scores[1][first]]),
                }
            )
        return found

    def _text(self, answer: list[int]) -> str:
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _groups(self, rows: list[dict[str, Any]], is_baseline: bool) -> list[dict[str, Any]]:
        """What a record says of each group and measure."""
        lengths: dict[str, list[int]] = {}
        for context in self.given:  # of all, so that runs which were interrupted compare
            for question in context.questions:
                for name in self.benchmark.groups(question.row):
                    lengths.setdefault(name, []).append(context.length)
        found = []
        for name, all_lengths in lengths.items():
            own = [row for row in rows if name in row["_groups"]]
            if not own:
                continue
            measures = list(dict.fromkeys(measure for row in own for measure in row["_scores"][0]))
            main = measures[0] if measures else None
            found.append(
                {
                    "task": name if len(measures) < 2 else f"{name} {main}",
                    "length": round(sum(all_lengths) / len(all_lengths)),
                    "n": len(own),
                    "n_contexts": len({row["context"] for row in own}),
                    "same_answers": sum(row["is_same_answer"] for row in own) / len(own),
                    **_compared(own, main, is_baseline),
                    "by_depth": by_depth(own, partial(_means, main)),
                    "measures": [{"measure": each} | _compared(own, each, is_baseline) for each in measures],
                    "answer_nll": None,
                    "answer_nll_base": None,
                }
            )
        return found


def _compared(rows: list[dict[str, Any]], measure: str | None, is_baseline: bool = True) -> dict[str, Any]:
    """One measure over questions, beside that of the uncompressed cache."""
    names = ("score", "score_base", "delta_score_ci95", "gained", "lost", "mcnemar_p")
    found: dict[str, Any] = dict.fromkeys(names)
    if measure is None:
        return found
    pairs: list[tuple[Scores, Scores]] = [row["_scores"] for row in rows]
    own, base = [each[measure] for each, _ in pairs], [each[measure] for _, each in pairs]
    found |= {"score": mean(own), "score_base": mean(base)}
    if not is_baseline:
        found["delta_score_ci95"] = bootstrap_interval(own, base, [row["context"] for row in rows])
        found["gained"], found["lost"], found["mcnemar_p"] = mcnemar(own, base) or (None, None, None)
    return found


def _means(measure: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {name: value for name, value in _compared(rows, measure).items() if name in ("score", "score_base")}
    return {"n": len(rows), **scores, "answer_nll": None, "answer_nll_base": None}


# ``coldpress benchmark``: one result record per press and size


def benchmark_protocol(settings: BenchmarkSettings, data_dir: str | None) -> str:
    """The name of the way a benchmark is measured; numbers of different names are not compared."""
    cut = "" if settings.max_context_length is None else f"cut{settings.max_context_length}"
    aware = "query_aware" if settings.query_aware else ""
    return settings.protocol("benchmark-v1", settings.name, data_dir or "", aware, after=cut)


def measure_benchmark(settings: BenchmarkSettings, command: str) -> tuple[list[dict[str, Any]], bool]:
    """Run a benchmark under presses as :func:`coldpress.eval.task_run.measure_tasks` runs tasks."""
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
        max_positions=None if settings.allow_extrapolation else loaded.max_positions or UNKNOWN_POSITIONS,
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
    run = BenchmarkCommand(settings, prepared(jobs, loaded), loaded, command, contexts, data, rows)
    run.keep_in(folder)
    return carry_out(run, folder)


@dataclass
class BenchmarkCommand(ExampleRun):
    """A run over a benchmark of which everything is decided."""

    data: Rows
    rows: Sequence[Row]

    def point_run(self, **given: Any) -> BenchmarkRun:
        return BenchmarkRun(**given, benchmark=find_benchmark(self.settings.name), contexts=self.examples)

    @property
    def asked(self) -> float:
        return DECODE_COST * sum(question.limit for context in self.examples for question in context.questions)

    def facts(self) -> dict[str, Any]:
        contexts, data = self.examples, self.data
        return {
            "protocol": benchmark_protocol(self.settings, data.data_dir),
            "dataset": self.settings.name,
            "dataset_source": data.source,
            "subset": data.data_dir,
            "split": "test",
            "text_sha256": hashlib.sha256(repr([sorted(row.items()) for row in self.rows]).encode()).hexdigest(),
            **super().facts(),
            "n_contexts": len(contexts),
            "n_questions": len(self.rows),
            "n_contexts_cut": sum(context.length < context.n_whole for context in contexts),
        }
