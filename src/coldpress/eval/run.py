"""From what is asked for to result records: one way for windows, streams, timed rounds, tasks and benchmarks.

A :class:`Run` has decided everything and measures point by point; :func:`carry_out` has it measure, writes what is
finished while it goes on, and prints the tables. The metrics of a record that failed are null; what was measured until
then is in ``before_failure``, under the same names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import secrets
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from coldpress.bases.registry import find_press, press_names
from coldpress.errors import InputError, OutputError, SelfCheckError
from coldpress.eval.cluster import check_engine, make_engine
from coldpress.eval.jobs import Job, config_of
from coldpress.eval.ledger import UNFINISHED, Ledger, versions
from coldpress.eval.point_run import Engine, PointRun
from coldpress.io.output import check_writable
from coldpress.io.progress import WorkClock, note
from coldpress.loading.models import LoadedModel, pick_device
from coldpress.records.reading import size_of
from coldpress.records.results import (
    SCHEMA_VERSION,
    environment,
    is_finished,
    result_path,
    uninterrupted,
    write_result,
    write_results,
)
from coldpress.records.schema import METRICS
from coldpress.report.terminal import show
from coldpress.stores.bits import bits_name

Part = dict[str, Any] | Exception  # of a record: what was measured, or what went wrong
DECODE_COST = 30  # of a token that is fed alone, in tokens of a prefill; for the time that is left


def checked_folder(settings: Any) -> Path:
    """The folder of the results, where it, the device and the engine can be used; :class:`InputError` elsewhere."""
    pick_device(settings.device)
    check_engine(settings.engine, **settings.cluster)
    if not settings.output_dir.strip():
        raise OutputError("--output_dir is empty; name a folder.")
    folder = Path(settings.output_dir)
    check_writable(folder)
    return folder


def prepared(jobs: Sequence[Job], loaded: LoadedModel) -> list[Job]:
    """The jobs with presses that have what they need of the model; raises InputError where one cannot."""
    given = loaded.model, loaded.tokenizer
    return [job if job.press is None else replace(job, press=job.press.prepared(*given)) for job in jobs]


def reads_again(job: Job) -> int:
    """What a press takes beside the prefill, in prefills, about: those inside a block run the model once more."""
    if job.press is None or job.name not in press_names():
        return 0
    return 4 * job.name.startswith("attention_matching") + 2 * find_press(job.name).in_block


@dataclass
class Run(ABC):
    """What was asked for, what it works on, and what has been measured so far."""

    settings: Any
    jobs: list[Job]
    loaded: LoadedModel
    command: str
    ledger: Ledger | None = field(default=None, init=False)  # what an earlier run of the same has finished
    seconds: dict[str, float] = field(default_factory=dict, init=False)  # wall time of each part
    error: Exception | None = field(default=None, init=False)  # what ended the run
    show_progress: Callable[..., Any] | None = field(default=None, init=False)  # None: with the time that is left
    is_cut: bool = field(default=False, init=False)  # its time was up before all was measured
    told: set[str] = field(default_factory=set, init=False)  # of presses that failed, when it is carried out in parts
    run_id: str = field(default_factory=lambda: secrets.token_hex(6), init=False)

    @abstractmethod
    def measure(self, engine: Engine | None, save: Callable[..., None]) -> None:
        """Measure all, on an engine or here; ``save`` writes the records of some jobs, or of all, meanwhile."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the records have in common beside what those of every run have."""

    @abstractmethod
    def parts(self, job: Job) -> list[Part]:
        """What has been measured of a job, and what went wrong with it."""

    @abstractmethod
    def is_complete(self, job: Job) -> bool:
        """Whether everything that was asked for it has been measured."""

    @property
    @abstractmethod
    def works(self) -> dict[str, float]:
        """Tokens that the model will read in each part, as many as matter, times its size."""

    @property
    def work(self) -> float:
        """That of all parts."""
        return sum(self.works.values())

    @functools.cached_property
    def _clock(self) -> WorkClock:
        clock = WorkClock(len(self.works))
        for part, work in self.works.items():
            clock.plan(part, work)
        return clock

    @property
    def digest(self) -> str:
        """The name of the ledger: the same for runs whose examples may be shared."""
        names = ("weights_fingerprint", "dtype", "device", "attn_implementation", "protocol", "tokens_sha256", "seed")
        common = self.common()
        parts = [common.get(name) for name in names], versions(common)
        kind = str(common["protocol"]).partition("-")[0]
        return f"{kind}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:10]}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the meaning of the numbers."""
        return ()

    @property
    def n_parameters(self) -> float:
        return float(sum(p.numel() for p in self.loaded.model.parameters()))

    def keep_in(self, folder: Path) -> None:
        """Note what is finished in a ledger beside the results, and go on from what is there."""
        self.ledger = Ledger(folder / UNFINISHED / self.digest)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left for another try, if nobody interrupted it."""
        return not self.is_cut and self.error is None

    def where(self, engine: Engine | None) -> AbstractContextManager[Engine]:
        """``engine`` or, where there is none yet, the one that was asked for, until the block ends."""
        s = self.settings
        return make_engine(s.engine, self.loaded, **s.cluster) if engine is None else contextlib.nullcontext(engine)

    def timed(self, part: str, work: Callable[..., Any], label: str = "") -> Any:
        """What a part of the work gives; its wall time is noted, and its progress shown under the label."""
        start, show = time.perf_counter(), self.show_progress
        if show is None:
            show = partial(self._clock.progress, part=part)
        try:
            return work(progress=partial(show, name=label or part))
        finally:
            self.seconds[part] = time.perf_counter() - start

    def common(self) -> dict[str, Any]:
        """What the records have in common."""
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": self.command,
            "settings": self.settings.recorded(),
            "seed": self.settings.seed,
            **self.loaded.facts(),
            "batch_size": 1,
            "position_mode": "original",
            "seconds": self.seconds,
            "env": environment(),
            **self.facts(),
        }

    def records(self, jobs: Sequence[Job] | None = None) -> list[dict[str, Any]]:
        """One record for each of ``jobs``, or of all, of which there is something to say.

        ``status`` is ``ok`` when everything that was asked for is there, ``failed`` when the press or the run failed,
        ``interrupted`` otherwise.
        """
        common, records = self.common(), []
        for job in self.jobs if jobs is None else jobs:
            parts = self.parts(job)
            error = self.error or next((part for part in parts if isinstance(part, Exception)), None)
            if not parts and error is None:
                continue
            record = _blank(common, job)
            measured = {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}
            if error is None:
                record |= measured | {"status": "ok" if self.is_complete(job) else "interrupted"}
            else:
                record |= {"before_failure": measured} if measured else {}
                record["status"] = "failed"
                record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                record["traceback"] = "".join(traceback.format_exception(error))
            records.append(record)
        return records

    def finished_records(self) -> list[dict[str, Any]]:
        """For each job, in order, what its record will look like if it succeeds, with nothing measured."""
        common = self.common()
        return [_blank(common, job) for job in self.jobs]


@dataclass
class ExampleRun(Run):
    """A run over tasks or benchmarks: points, and contexts with what is asked about them."""

    examples: list[Any]
    points: PointRun[Any] | None = field(default=None, init=False)

    @abstractmethod
    def point_run(self, **given: Any) -> PointRun[Any]:
        """What measures it, of what all such runs are given."""

    @property
    @abstractmethod
    def asked(self) -> float:
        """What each point reads after the contexts, in tokens of a prefill."""

    @property
    def works(self) -> dict[str, float]:
        n_read = (1 + sum(map(reads_again, self.jobs))) * sum(example.length for example in self.examples)
        return {"tasks": self.n_parameters * (n_read + self.asked * (1 + len(self.jobs)))}

    def facts(self) -> dict[str, Any]:
        tokens = "".join(example.fingerprint for example in self.examples)
        return {
            "tokens_sha256": hashlib.sha256(tokens.encode()).hexdigest(),
            "total_tokens": sum(example.length for example in self.examples),
        }

    def measure(self, engine: Engine | None, save: Callable[..., None]) -> None:
        s = self.settings
        given = {"model": self.loaded.model, "tokenizer": self.loaded.tokenizer, "ledger": self.ledger}
        points = [job.point for job in self.jobs]
        self.points = self.point_run(**given, points=points, chunk_tokens=s.chunk_tokens, seed=s.seed)
        with self.where(engine) as where:
            self.timed("tasks", partial(self.points.run, engine=where), getattr(s, "name", "tasks"))

    def parts(self, job: Job) -> list[Part]:
        return [] if self.points is None else self.points.parts().get(job.point.key, [])

    def is_complete(self, job: Job) -> bool:
        return self.points is not None and self.points.is_complete


def _blank(common: dict[str, Any], job: Job) -> dict[str, Any]:
    """A record that says what was asked for, and nothing that was measured."""
    return {
        **dict.fromkeys(METRICS),
        **common,
        "press": job.name,
        "press_config": config_of(job.press),
        "compression_ratio": job.ratio,
        "budget_tokens": job.budget_tokens,
        "budget_bytes": job.budget_bytes,
        "kv_bits": bits_name(job.kv_bits),
        "kv_bits_config": None if job.kv_bits is None else dict(vars(job.kv_bits)),
        "status": "ok",
        "error": None,
    }


def carry_out(
    run: Run, folder: Path, engine: Engine | None = None, is_quiet: bool = False, keeps_ledger: bool = False
) -> tuple[list[dict[str, Any]], bool]:
    """Measure all of a run, write its results, and print them.

    Args:
        run: of which everything is decided and nothing measured.
        folder: where the results belong.
        engine: where windows and examples are measured; None: here.
        is_quiet: print no tables.
        keeps_ledger: leave it there when all is measured: the run is a part of something that may be interrupted yet.

    Returns:
        The records, in the order of the table, and whether the user interrupted the run. Of an interrupted run, what
        was finished has status ``ok`` and what was begun ``interrupted``; a press that failed has ``failed``.

    Raises:
        InputError: what was asked for turns out not to work.
        OutputError: results cannot be written; what was measured is printed before.
    """
    is_interrupted, stopped = False, None
    early = _Early(run, folder, is_quiet)
    if not is_quiet:
        _note_replaced(run, folder)
    with contextlib.nullcontext() if run.ledger is None else run.ledger.held():
        if run.ledger is not None and run.ledger.is_of_other_code:
            note(
                f"a part of this was measured by other files of coldpress, and is taken over; remove "
                f"{run.ledger.folder} to measure all of it anew."
            )
        try:
            run.measure(engine, early.save)
        except Exception as error:  # the model itself fails, without a press: so does all that is compared with it
            run.error = error
            stopped = error if isinstance(error, InputError) else None
        except KeyboardInterrupt:
            is_interrupted = True
        with uninterrupted():  # a second Ctrl-C shall not cost the results
            records = run.records()
            if stopped is not None:  # what was asked for cannot be done: no result but of what was measured before
                records = [record for record in records if record.get("before_failure")]
            problem: Exception | None = stopped
            try:
                early.replace(records)
            except (OutputError, SelfCheckError) as error:
                problem = stopped or error
        if isinstance(problem, OutputError):  # no room on the disk: what was measured shall not be lost with it
            early.tell(records if stopped is None else [_as_measured(record) for record in records])
        if problem is not None:
            raise problem
        if run.ledger is not None and not is_interrupted and not keeps_ledger and run.is_over:
            run.ledger.clear()  # if the model or its workers failed, what was finished is left for another try
    for record in records:
        if record["status"] == "failed":
            size = size_of(record)
            said = f"{record['press']}{f' at {size}' if size else ''} failed: {record['error']}"
            if said not in run.told:
                note(said, kind="error")
                run.told.add(said)
    if records and not is_quiet:
        early.tell(records)
        print(f"{len(records)} result(s) in {folder}/{_unfinished(records)}", flush=True)
    return records, is_interrupted


def _note_replaced(run: Run, folder: Path) -> None:
    """Say that there are results of the same, which are measured again."""
    n = sum(is_finished(result_path(folder, record)) for record in run.finished_records())
    if n and (run.ledger is None or not run.ledger.folder.exists()):  # else it goes on from what was interrupted
        said = "1 result is" if n == 1 else f"{n} results are"
        note(f"{said} in {folder}/ already, measured anew and replaced; coldpress sweep leaves finished ones.")


def _as_measured(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a run that was stopped, as if nothing had stopped it."""
    return record | record.get("before_failure", {}) | {"status": "ok", "error": None}


def _unfinished(records: Sequence[dict[str, Any]]) -> str:
    n = sum(record["status"] == "interrupted" for record in records)
    return f", {n} of them unfinished" if n else ""


@dataclass
class _Early:
    """Writes what is finished while the run goes on; at its end the run has one file for each setting all the same."""

    run: Run
    folder: Path
    is_quiet: bool
    written: set[Path] = field(default_factory=set)
    said: set[str] = field(default_factory=set)  # captions and tables that need not be printed again

    def save(self, jobs: Sequence[Job] | None = None) -> None:
        """Write the records of some jobs, or of all, which are ``interrupted`` until all of them is measured.

        Of all, print their table.
        """
        records = self.run.records(jobs)
        for record in records:
            self.written.add(result_path(self.folder, record))
            with contextlib.suppress(SelfCheckError):  # the last word says what is wrong with it
                write_result(self.folder, record)
        if jobs is None and not self.is_quiet:
            measured = [record if record["status"] == "failed" else {**record, "status": "ok"} for record in records]
            with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
                text = show(measured)
                print(f"\n{text}\n", flush=True)
                self.said |= set(text.split("\n\n"))

    def tell(self, records: list[dict[str, Any]]) -> None:
        """Print the tables of the records, but for what was printed before."""
        if not records:
            return
        said = [text for text in show(records).split("\n\n") if text not in self.said]
        print("\n" + "\n\n".join(said) + "\n", flush=True)

    def replace(self, records: list[dict[str, Any]]) -> None:
        """Write the run's last word, and take back what it had said under other names."""
        last = write_results(self.folder, records)
        for path in self.written - last:
            path.unlink(missing_ok=True)
