"""``coldpress ppl``: load once, measure the perplexity and the speed of every press on the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from coldpress.bases.registry import NO_PRESS, takes_ratio
from coldpress.eval.datasets import Corpus, load_corpus
from coldpress.eval.jobs import BASELINE, Job, left_out_of_batches, make_jobs
from coldpress.eval.ledger import versions
from coldpress.eval.models import LoadedModel, load_model
from coldpress.eval.perplexity import plain_perplexity
from coldpress.eval.plan import Plan, make_plan
from coldpress.eval.point_run import Engine, PointRun
from coldpress.eval.prefix import PrefixRun
from coldpress.eval.progress import note
from coldpress.eval.run import DECODE_COST, Part, Run, carry_out, checked_folder, prepared
from coldpress.eval.schema import IDENTIFYING, OF_A_POINT, SIZES
from coldpress.eval.settings import Settings
from coldpress.eval.speed import SpeedPoint, SpeedRun
from coldpress.eval.stream import StreamRun
from coldpress.eval.windows import laid_out


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
    _said: dict[str, list[Part]] | None = field(default=None, init=False)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.plan.notes

    @property
    def digest(self) -> str:
        """The same for points whose windows and timed rounds are the same."""
        return digest_of(self.finished_records()[0])

    @property
    def work(self) -> float:
        plan, s, n_points = self.plan, self.settings, 1 + len(self.jobs)
        if plan.windows is not None:
            first = plan.windows[0]
            n_windows = sum(len(p.starts) for p in plan.windows)
            n_prefills = 1 if s.chunk_tokens is None else n_points
            per_point = first.target + DECODE_COST * s.greedy_tokens
            return self.n_parameters * n_windows * (first.context * n_prefills + per_point * n_points)
        if plan.context_ids is not None:
            tokens = plan.context_ids.shape[1] + DECODE_COST * s.max_new_tokens
            return self.n_parameters * n_points * tokens * (s.repetitions + 1.3)
        return self.n_parameters * plan.total_tokens * (len(self.jobs) if s.ppl_mode == "streaming" else 4)

    def measure(self, engine: Engine | None, save: Callable[..., None]) -> None:
        self._measure_perplexity(engine)
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
