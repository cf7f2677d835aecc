"""What an evaluation works on and what it has measured so far; its parts are measured here, one after the other."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from coldpress.bases.press import BasePress
from coldpress.eval.datasets import Corpus
from coldpress.eval.engine import Engine
from coldpress.eval.engine_by_name import make_engine
from coldpress.eval.jobs import Job
from coldpress.eval.ledger import Ledger
from coldpress.eval.models import LoadedModel
from coldpress.eval.perplexity import plain_perplexity
from coldpress.eval.plan import Plan, make_plan
from coldpress.eval.prefix import PrefixRun
from coldpress.eval.progress import note, progress
from coldpress.eval.round_log import RoundLog
from coldpress.eval.settings import Settings
from coldpress.eval.speed import SpeedRun
from coldpress.eval.speed_points import SpeedPoint
from coldpress.eval.stream import StreamRun
from coldpress.stores.codec import Codec

__all__ = ["Run", "make_run"]


def make_run(settings: Settings, jobs: list[Job], corpus: Corpus, loaded: LoadedModel, command: str) -> Run:
    """A run of which everything is decided and nothing measured.

    Raises:
        InputError: the text or the sizes do not fit the model, or a press lacks what it needs of it.
    """
    jobs = [
        job if job.press is None else replace(job, press=job.press.prepared(loaded.model, loaded.tokenizer))
        for job in jobs
    ]
    plan = make_plan(settings, corpus, loaded.tokenizer, loaded.max_positions)
    firsts = [window.bos for window in plan.windows or () if window.bos is not None]
    loaded.check_ids([*plan.documents, *(torch.tensor([bos]) for bos in firsts)])
    return Run(settings, jobs, corpus, loaded, plan, command)


@dataclass
class Run:
    """What was asked for, what it works on, and what has been measured so far."""

    settings: Settings
    jobs: list[Job]
    corpus: Corpus
    loaded: LoadedModel
    plan: Plan
    command: str
    plain: dict[str, Any] | None = None
    prefix: PrefixRun | None = None
    stream: StreamRun | None = None
    speed: SpeedRun | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each part
    error: Exception | None = None  # what ended the run
    engine: dict[str, Any] = field(default_factory=dict)  # where windows under presses were measured; empty: here
    show_progress: Callable[..., Any] = progress
    run_id: str = field(default_factory=lambda: secrets.token_hex(6))
    _scored: dict[Any, list[Any]] | None = None

    @property
    def scored(self) -> dict[Any, list[Any]]:
        """Parts of the record of each press and its bits: its perplexity under the press, and what failed of it.

        Taken once when all is measured.
        """
        by_press: Any = self.prefix or self.stream
        if by_press is None or self._scored is not None:
            return self._scored or {}
        found: dict[Any, list[Any]] = {}
        for point, result in by_press.results():
            measured = by_press.before_failure(point) if isinstance(result, Exception) else None
            parts = [part for part in (measured, result) if part is not None]
            found[id(point.press), getattr(point, "kv_bits", None)] = parts
        if by_press.is_complete:
            self._scored = found
        return found

    def has_failed(self, job: Job) -> bool:
        """Whether its perplexity could not be measured; then it is not timed."""
        return any(isinstance(part, Exception) for part in self.scored.get((id(job.press), job.kv_bits), ()))

    @property
    def compressed(self) -> tuple[list[BasePress | None], list[Codec | None]]:
        """The presses, and the bits that what they keep is stored in, without the uncompressed baseline."""
        pairs = [(job.press, job.kv_bits) for job in self.jobs if job.press is not None or job.kv_bits is not None]
        return [press for press, _ in pairs], [bits for _, bits in pairs]

    def measure_perplexity(self, engine: Engine | None = None, ledger: Ledger | None = None) -> None:
        """If it was asked for.

        Args:
            engine: where windows under presses are measured; None: here.
            ledger: what an earlier run has finished of them; None: nothing.
        """
        s, plan, model = self.settings, self.plan, self.loaded.model
        torch.manual_seed(s.seed)
        pressed, kv_bits = self.compressed
        if s.ppl_mode == "streaming":
            assert s.stream_chunk is not None
            positions: Any = s.positions
            self.stream = StreamRun(
                model,
                [job.press for job in self.jobs],
                plan.documents,
                chunk=s.stream_chunk,
                positions=positions,
                limit=plan.stream_limit,
            )
            self._timed("perplexity", self.stream.run)
        elif plan.windows is not None:
            documents = list(zip(plan.documents, plan.windows, strict=True))
            self.prefix = PrefixRun(
                model,
                pressed,
                documents,
                s.batch_size,
                s.chunk_tokens,
                kv_bits,
                token_bytes=plan.token_bytes,
                greedy_tokens=s.greedy_tokens,
                ledger=ledger,
                seed=s.seed,
            )
            given = (
                contextlib.nullcontext(engine)
                if engine is not None
                else make_engine(s.engine, self.loaded, **s.cluster)
            )
            with given as where:
                self._timed("perplexity", partial(self.prefix.run, engine=where))
                self.engine = getattr(where, "facts", dict)()
        elif plan.max_length is not None and plan.stride is not None:
            if pressed:
                note("this perplexity is the uncompressed model's; --ppl_apply_press measures it under the press.")
            sizes: dict[str, Any] = {"max_length": plan.max_length, "stride": plan.stride, "batch_size": s.batch_size}
            sizes |= {"preset": plan.preset, "token_bytes": plan.token_bytes, "units": plan.units}
            self.plain = self._timed("perplexity", partial(plain_perplexity, model, plan.documents, **sizes))

    def measure_speed(self, on_done: Callable[[SpeedPoint], None], log: RoundLog | None = None) -> None:
        """And memory, if they were asked for; ``on_done`` is told of each press of which all is measured."""
        s, plan, model = self.settings, self.plan, self.loaded.model
        jobs = [job for job in self.jobs if not self.has_failed(job)]
        points = [(job.press, job.kv_bits) for job in jobs if job.press is not None or job.kv_bits is not None]
        if plan.context_ids is not None and jobs:
            eos = getattr(model.generation_config, "eos_token_id", None)
            self.speed = SpeedRun(
                model,
                plan.context_ids.to(self.loaded.device),
                [None, *(press for press, _ in points)],  # the baseline is always timed beside the presses
                kv_bits=[None, *(bits for _, bits in points)],
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
            self._timed("speed", partial(self.speed.run, on_done=on_done, log=log))

    def _timed(self, name: str, work: Callable[..., Any]) -> Any:
        start = time.perf_counter()
        try:
            return work(progress=partial(self.show_progress, name=name))
        finally:
            self.seconds[name] = time.perf_counter() - start
