"""One evaluation: load once, measure every press on the same tokens, write one result per press."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from coldpress.bases.registry import NO_PRESS, takes_ratio
from coldpress.errors import InputError, OutputError, SelfCheckError
from coldpress.eval.datasets import load_corpus
from coldpress.eval.engine import Engine
from coldpress.eval.engine_by_name import check_engine
from coldpress.eval.jobs import left_out_of_batches, make_jobs
from coldpress.eval.ledger import Ledger
from coldpress.eval.models import load_model, pick_device
from coldpress.eval.presets import laid_out
from coldpress.eval.progress import note
from coldpress.eval.records import make_records
from coldpress.eval.report import show, size_of
from coldpress.eval.results import check_writable, result_path, uninterrupted, write_result, write_results
from coldpress.eval.round_log import RoundLog
from coldpress.eval.run import Run, make_run
from coldpress.eval.settings import Settings
from coldpress.eval.speed_points import SpeedPoint

__all__ = ["carry_out", "evaluate"]


def evaluate(settings: Settings, command: str) -> tuple[list[dict[str, Any]], bool]:
    """Run an evaluation, write its results, and print them.

    Args:
        settings: what to measure.
        command: the command line, for the record.

    Returns:
        The records, in the order of the table, and whether the user interrupted the run. Of an interrupted run, what
        was finished has status ``ok`` and what was begun ``interrupted``; a press that failed has ``failed``.

    Raises:
        InputError: before any long work, when something that was asked for cannot work.
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
    pick_device(settings.device)
    check_engine(settings.engine, settings.ray_address, settings.workers)
    if not settings.output_dir.strip():
        raise OutputError("--output_dir is empty; name a folder.")
    output_dir = Path(settings.output_dir)
    check_writable(output_dir)
    corpus = load_corpus(
        settings.dataset,
        subset=settings.subset,
        split=settings.split,
        sample_idx=settings.sample_idx,
        text_file=settings.text_file,
    )
    run = make_run(
        settings, jobs, laid_out(corpus, settings.ppl_preset), load_model(settings.model, **settings.loading), command
    )
    for line in run.plan.notes:
        note(line)
    return carry_out(run, output_dir)


def carry_out(
    run: Run,
    output_dir: Path,
    *,
    engine: Engine | None = None,
    ledger: Ledger | None = None,
    log: RoundLog | None = None,
) -> tuple[list[dict[str, Any]], bool]:
    """Measure all of a run, write its results, and print them.

    Args:
        run: see :func:`coldpress.eval.run.make_run`.
        output_dir: where the results belong.
        engine: where windows under presses are measured; None: here.
        ledger, log: what an earlier run of the same has finished of its windows and of its timed rounds.

    Returns:
        As :func:`evaluate`.
    """
    is_interrupted, stopped = False, None
    early = _Early(run, output_dir)
    try:
        run.measure_perplexity(engine, ledger)
        if run.seconds and run.plan.context_ids is not None:  # who kills the rest shall not lose this
            early.save_perplexity()
        run.measure_speed(early.save_speed, log)
    except Exception as error:  # the model itself fails, without a press: so does everything that is compared with it
        run.error = error
        stopped = error if isinstance(error, InputError) else None
    except KeyboardInterrupt:
        is_interrupted = True
    with uninterrupted():  # a second Ctrl-C shall not cost the results
        records = make_records(run)
        if stopped is not None:  # what was asked for cannot be done: no result but of what was measured before
            records = [record for record in records if record.get("before_failure")]
        try:
            early.replace(records)
        finally:
            if stopped is not None:
                raise stopped
    for record in records:
        if record["status"] == "failed":
            size = size_of(record)
            note(f"{record['press']}{f' at {size}' if size else ''} failed: {record['error']}", kind="error")
    if records:
        print(f"\n{show(records)}\n")
        print(f"{len(records)} result(s) in {output_dir}/", flush=True)
    return records, is_interrupted


class _Early:
    """Writes what is finished while the run goes on; at its end the run has one file for each setting all the same."""

    def __init__(self, run: Run, output_dir: Path):
        self.run, self.output_dir = run, output_dir
        self.written: set[Path] = set()

    def save_perplexity(self) -> None:
        """Write the records of all presses, ``interrupted`` until they are timed, and print their table."""
        records = make_records(self.run)
        self._save(records)
        measured = [record if record["status"] == "failed" else {**record, "status": "ok"} for record in records]
        with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
            print(f"\n{show(measured)}\n", flush=True)

    def save_speed(self, point: SpeedPoint) -> None:
        """Write the record of a press of which everything is measured now, or that has failed."""
        jobs = [job for job in self.run.jobs if job.press is point.press and job.kv_bits == point.kv_bits]
        self._save(make_records(replace(self.run, jobs=jobs)))

    def _save(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.written.add(result_path(self.output_dir, record))
            with contextlib.suppress(SelfCheckError):  # the last word says what is wrong with it
                write_result(self.output_dir, record)

    def replace(self, records: list[dict[str, Any]]) -> None:
        """Write the run's last word, and take back what it had said under other names."""
        last = write_results(self.output_dir, records)
        for path in self.written - last:
            path.unlink(missing_ok=True)
