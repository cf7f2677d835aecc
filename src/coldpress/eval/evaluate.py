"""``coldpress ppl``: load once, measure the perplexity and the speed of every press on the same tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.registry import NO_PRESS, takes_ratio
from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import BASELINE, Job, left_out_of_batches, make_jobs
from coldpress.eval.ledger import UNREADABLE, Ledger, versions
from coldpress.eval.losses import forward, token_losses
from coldpress.eval.plan import Plan, make_plan
from coldpress.eval.point_run import Engine, PointRun
from coldpress.eval.prefix import PrefixRun
from coldpress.eval.run import DECODE_COST, Part, Run, carry_out, checked_folder, prepared, reads_again
from coldpress.eval.settings import Settings
from coldpress.eval.speed import SpeedPoint, SpeedRun
from coldpress.eval.stream import StreamRun
from coldpress.eval.windows import PRESETS, STRIDED, Window, laid_out
from coldpress.io.progress import note
from coldpress.loading.datasets import Corpus, load_corpus
from coldpress.loading.models import LoadedModel, input_device, load_model
from coldpress.models.compilable import check_model
from coldpress.records.metrics import (
    FEW_WINDOWS,
    bits_per_byte,
    bootstrap_difference,
    iid_se,
    paired_difference,
    perplexity,
)
from coldpress.records.schema import IDENTIFYING, OF_A_POINT, SIZES


def evaluate(settings: Settings, command: str) -> tuple[list[dict[str, Any]], bool]:
    """Run an evaluation, write its results, and print them; see :func:`coldpress.eval.run.carry_out`.

    :class:`InputError`, before any long work, where something that was asked for cannot work.
    """
    jobs = make_jobs(settings)
    for job in jobs:
        if job.name in settings.press and job.name != NO_PRESS and not takes_ratio(job.name):
            note(f"{job.name} has no compression ratio: it is measured once, as its own parameters say.")
    alone = list(dict.fromkeys(left_out_of_batches(settings)))
    if alone:
        note(
            f"all leaves out what takes one text at a time, not --batch_size {settings.batch_size}: {', '.join(alone)}."
        )
    folder = checked_folder(settings)
    corpus = load_corpus(**settings.reading)
    run = make_run(settings, jobs, corpus, load_model(settings.model, **settings.loading), command)
    for line in run.notes:
        note(line)
    if settings.tp_plan is None:  # else each process would go on from what it alone has kept
        run.keep_in(folder)
    return carry_out(run, folder)


def make_run(settings: Settings, jobs: Sequence[Job], corpus: Corpus, loaded: LoadedModel, command: str) -> PressRun:
    """A run of which everything is decided and nothing measured; InputError where text, sizes or a press do not fit."""
    if settings.compile:
        check_model(loaded.model)
    corpus = laid_out(corpus, settings.ppl_preset)
    plan = make_plan(settings, corpus, loaded.tokenizer, loaded.max_positions)
    firsts = [window.bos for window in plan.windows or () if window.bos is not None]
    loaded.check_ids([*plan.documents, *(torch.tensor([bos]) for bos in firsts)])
    return PressRun(settings, prepared(jobs, loaded), loaded, command, corpus, plan)


@dataclass
class PressRun(Run):
    """Perplexity of windows, of streams or of the uncompressed model, then speed and memory, as far as asked for."""

    corpus: Corpus
    plan: Plan
    plain: dict[str, Any] | None = field(default=None, init=False)
    scored: PointRun[Any] | None = field(default=None, init=False)  # windows or streams, point by point
    speed: SpeedRun | None = field(default=None, init=False)
    engine: dict[str, Any] = field(default_factory=dict, init=False)  # where windows were measured; empty: here
    # whether what is timed waits until the run is carried out once more
    is_timed_later: bool = field(default=False, init=False)
    _said: dict[str, list[Part]] | None = field(default=None, init=False)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.plan.notes

    @property
    def digest(self) -> str:
        """The same for points whose windows and timed rounds are the same."""
        return digest_of(self.finished_records()[0])

    @property
    def works(self) -> dict[str, float]:
        plan, s, n, found = self.plan, self.settings, 1 + len(self.jobs), {}
        again = sum(map(reads_again, self.jobs))
        if plan.windows is not None:
            first = plan.windows[0]
            per_window = first.context * (again + (1 if s.chunk_tokens is None else n))
            per_window += (first.target + DECODE_COST * s.greedy_tokens) * n
            found["perplexity"] = per_window * sum(len(p.starts) for p in plan.windows)
        elif s.ppl_mode == "streaming" or plan.max_length is not None:
            found["perplexity"] = plan.total_tokens * (len(self.jobs) if s.ppl_mode == "streaming" else 4)
        if plan.context_ids is not None:
            read = plan.context_ids.shape[1] * (n + again) + DECODE_COST * s.max_new_tokens * n
            found["speed"] = read * (s.repetitions + 1.3)
        return {part: self.n_parameters * tokens for part, tokens in found.items()}

    def measure(self, engine: Engine | None, save: Callable[..., None]) -> None:
        if self.scored is None and self.plain is None:
            self._measure_perplexity(engine)
        if self.is_timed_later:
            self.is_timed_later = False
            return
        if self.seconds and self.plan.context_ids is not None:  # who kills the rest shall not lose this
            save()
        self._measure_speed(save)

    def _measure_perplexity(self, engine: Engine | None) -> None:
        s, plan, model = self.settings, self.plan, self.loaded.model
        points = [job.point for job in self.jobs]
        torch.manual_seed(s.seed)
        if s.ppl_mode == "streaming":
            assert s.stream_chunk is not None
            how: dict[str, Any] = {"positions": s.positions, "limit": plan.stream_limit, "ledger": self.ledger}
            self.scored = StreamRun(model, points, plan.documents, chunk=s.stream_chunk, **how)
            self.timed("perplexity", self.scored.run)
        elif plan.windows is not None:
            self.scored = PrefixRun(
                model,
                points,
                list(zip(plan.documents, plan.windows, strict=True)),
                s.batch_size,
                s.chunk_tokens,
                token_bytes=plan.token_bytes,
                greedy_tokens=s.greedy_tokens,
                ledger=self.ledger,
                seed=s.seed,
            )
            with self.where(engine) as where:
                self.timed("perplexity", partial(self.scored.run, engine=where))
                self.engine = getattr(where, "facts", dict)()
        elif plan.max_length is not None and plan.stride is not None:
            if any(point != BASELINE for point in points):
                note("this perplexity is the uncompressed model's; --ppl_apply_press measures it under the press.")
            sizes: dict[str, Any] = {"max_length": plan.max_length, "stride": plan.stride, "batch_size": s.batch_size}
            sizes |= {
                "preset": plan.preset,
                "token_bytes": plan.token_bytes,
                "units": plan.units,
                "ledger": self.ledger,
            }
            self.plain = self.timed("perplexity", partial(plain_perplexity, model, plan.documents, **sizes))

    def _measure_speed(self, save: Callable[..., None]) -> None:
        """And memory; each press is saved when all of it is measured."""
        s, plan, model = self.settings, self.plan, self.loaded.model
        jobs = [job for job in self.jobs if not self._has_failed(job)]
        if plan.context_ids is None or not jobs:
            return
        eos = getattr(model.generation_config, "eos_token_id", None)
        self.speed = SpeedRun(
            model,
            plan.context_ids.to(self.loaded.device),
            [BASELINE, *(job.point for job in jobs if job.point != BASELINE)],  # it is always timed beside the others
            max_new_tokens=s.max_new_tokens,
            min_new_tokens=s.min_new_tokens,
            eos_ids=[] if eos is None else eos if isinstance(eos, list) else [eos],
            decode_only=s.speed_decode_only,
            repetitions=s.repetitions,
            warmup=s.warmup,
            seed=s.seed,
            chunk_tokens=s.chunk_tokens,
            compile=s.compile,
        )

        def on_done(point: SpeedPoint) -> None:
            save([job for job in self.jobs if job.point.key == point.key])

        self.timed("speed", partial(self.speed.run, on_done=on_done, ledger=self.ledger))

    def parts(self, job: Job) -> list[Part]:
        scored = list(self._of_perplexity(job))
        if self.speed is None or self._has_failed(job):
            return scored
        point = self.speed.point(job.press, job.kv_bits)
        if point.samples:
            timed = self.speed.result(point)
            if isinstance(self.scored, PrefixRun):  # it has a context of its own, and sizes of that
                timed = {f"speed_{key}" if key in SIZES else key: value for key, value in timed.items()}
            scored.append(timed)
        return scored if point.error is None else [*scored, point.error]

    def _of_perplexity(self, job: Job) -> list[Part]:
        """Its perplexity under the press, and what failed of it; taken once when all is measured."""
        if self.scored is None:
            return [] if self.plain is None else [self.plain]
        said = self._said or self.scored.parts()
        self._said = said if self.scored.is_complete else None
        return said.get(job.point.key, [])

    def _has_failed(self, job: Job) -> bool:
        """Whether its perplexity could not be measured; then it is not timed."""
        return any(isinstance(part, Exception) for part in self._of_perplexity(job))

    def is_complete(self, job: Job) -> bool:
        plan = self.plan
        is_scored = self.plain is not None or plan.protocol.startswith("speed")
        if plan.windows is not None or self.scored is not None:
            is_scored = self.scored is not None and self.scored.is_complete
        is_timed = plan.context_ids is None
        if self.speed is not None and not self._has_failed(job):
            point = self.speed.point(job.press, job.kv_bits)
            is_timed = len(point.samples) == self.settings.repetitions and point.memory is not None
        return is_scored and is_timed

    def finished_records(self) -> list[dict[str, Any]]:
        records = super().finished_records()
        for record, job in zip(records, self.jobs, strict=True):
            if self.settings.ppl_mode == "streaming" and job.press is None:  # nothing is evicted: no gaps are closed
                record["position_mode"] = "original"
        return records

    def facts(self) -> dict[str, Any]:
        s, corpus, plan = self.settings, self.corpus, self.plan
        record: dict[str, Any] = {
            "protocol": plan.protocol,
            "ppl_mode": s.ppl_mode,
            "ppl_preset": s.ppl_preset,
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
            "engine": {"name": s.engine, **self.engine},
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


def digest_of(record: dict[str, Any]) -> str:
    """The same for records of points whose windows and timed rounds are the same."""
    asked = {name: record.get(name) for name in IDENTIFYING if name not in OF_A_POINT}
    asked |= {"tokens": record["tokens_sha256"], "versions": versions(record)}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]


# The uncompressed model: a strided sliding window, or a preset. Under a press, see ``prefix.py``

_Job = tuple[int, Window]  # number of a document, and one of its windows
_FILE = "plain-{:06d}.json"  # of a ledger


@torch.inference_mode()
def plain_perplexity(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    max_length: int,
    stride: int,
    preset: str | None = None,
    token_bytes: Sequence[Tensor | None] = (),
    units: Sequence[tuple[int, int]] | None = None,
    batch_size: int = 1,
    progress: Callable[[Any], Any] = iter,
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """Perplexity of the uncompressed model: with a strided sliding window, or as a preset cuts the documents.

    Args:
        documents: token ids, int64 ``[N]`` each; windows never cross from one to the next.
        max_length, stride: see :func:`coldpress.eval.windows.plan_strided`.
        preset: one of :data:`coldpress.eval.windows.PRESETS`; None for a strided window, where every token but the
            first is scored once.
        token_bytes: what each token of each document stands for, int64 ``[N]``, for bits per byte; None or nothing
            where that is unknown.
        units: words and bytes of each document, by which lm-eval divides.
        batch_size: windows that are run together; those of another length than their neighbours run alone.
        ledger: of batches that an earlier run of the same has finished, and of those that this one has.

    Returns:
        ``scored_tokens``, ``windows``, ``loss`` (nats a token), ``ppl``, ``nll`` (the sum), ``ppl_ci95`` (clustered by
        window, by document for lm-eval; None with one), ``ppl_se`` (as llama.cpp prints it, for independent tokens),
        ``scored_bytes`` and ``bits_per_byte`` (None where unknown). With few windows also
        ``ppl_bootstrap_ci95``; with ``units`` also ``scored_words``, ``word_perplexity`` and ``byte_perplexity``.

    Raises:
        SelfCheckError: a loss is not finite, or the number of scored tokens is not what the formula says.
    """
    device = input_device(model)
    how = STRIDED if preset is None else PRESETS[preset]
    jobs = [(i, window) for i, ids in enumerate(documents) for window in how.windows(len(ids), max_length, stride)]
    rows: list[Tensor] = []  # losses of each window, in the order of the jobs
    for number, batch in enumerate(progress(list(_batches(jobs, batch_size)))):
        n = batch[0][1].n_scored
        losses = None if ledger is None else _kept(ledger, number, (len(batch), n))
        if losses is None:
            ids = torch.stack([documents[i][window.begin : window.end] for i, window in batch]).to(device)
            losses = token_losses(forward(model, ids[:, :-1], None, keep=n), ids[:, -n:]).cpu()
            if ledger is not None and losses.isfinite().all():
                ledger.write(_FILE.format(number), "losses", losses.tolist(), number)
        rows += losses
    scored = sum(len(row) for row in rows)
    expected = sum(how.scored(len(ids), max_length, stride) for ids in documents)
    if scored != expected:
        raise SelfCheckError(f"{scored} tokens were scored, the windows' formula says {expected}.")
    sums = [float(row.double().sum()) for row in rows]
    total = math.fsum(sums)
    if not math.isfinite(total):
        raise SelfCheckError(f"The loss is {total}: the model's logits are not finite in {model.dtype}.")
    loss = total / scored
    result: dict[str, Any] = {"scored_tokens": scored, "windows": len(jobs), "nll": total, "loss": loss}
    result["ppl"] = perplexity(loss)
    result |= _error_bars(jobs, rows, sums, by_document=units is not None)
    n_bytes = _scored_bytes(jobs, token_bytes)
    if units is not None:
        n_words, n_bytes = (sum(column) for column in zip(*units, strict=True))
        result |= {"scored_words": n_words, "word_perplexity": perplexity(total / n_words)}
        result["byte_perplexity"] = perplexity(total / n_bytes)
    return result | {"scored_bytes": n_bytes, "bits_per_byte": bits_per_byte(total, n_bytes or 0)}


def _kept(ledger: Ledger, number: int, shape: tuple[int, int]) -> Tensor | None:
    """The losses of a batch of windows, ``[windows, scored]``; None where they are not there, or damaged."""
    try:
        losses = torch.tensor(ledger.read(_FILE.format(number), "losses", number), dtype=torch.float32)
    except UNREADABLE:
        return None
    return losses if losses.shape == shape else None


def _error_bars(
    jobs: Sequence[_Job], rows: Sequence[Tensor], sums: Sequence[float], by_document: bool
) -> dict[str, Any]:
    """Intervals of perplexity: clustered by window or document, and as if tokens were independent."""
    clusters: dict[Any, list[int]] = {}
    for number, (document, window) in enumerate(jobs):
        clusters.setdefault(document if by_document else (document, window.begin), []).append(number)
    counts = [sum(len(rows[i]) for i in members) for members in clusters.values()]
    nll = [math.fsum(sums[i] for i in members) for members in clusters.values()]
    mean, _, ci = paired_difference(counts, nll)
    se = iid_se(torch.cat(list(rows)))
    found: dict[str, Any] = {
        "ppl_ci95": None if ci is None else [perplexity(ci[0]), perplexity(ci[1])],
        "ppl_se": None if se is None else se * perplexity(mean),
    }
    drawn = bootstrap_difference(counts, nll) if len(counts) < FEW_WINDOWS else None
    if drawn is not None:
        found["ppl_bootstrap_ci95"] = [perplexity(drawn[0]), perplexity(drawn[1])]
    return found


def _scored_bytes(jobs: Sequence[_Job], token_bytes: Sequence[Tensor | None]) -> int | None:
    """Bytes that the scored tokens stand for; None where a document's are unknown."""
    total = 0
    for document, window in jobs:
        n_bytes = token_bytes[document] if token_bytes else None
        if n_bytes is None:
            return None
        total += int(n_bytes[window.first_scored : window.end].sum())
    return total


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    """Runs of windows of one shape, at most ``size`` of them."""
    for _, run in itertools.groupby(jobs, key=lambda job: (job[1].end - job[1].begin, job[1].n_scored)):
        alike = list(run)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
