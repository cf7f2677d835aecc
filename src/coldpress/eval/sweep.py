"""A sweep: presses x ratios x texts x models, that may be killed at any moment and goes on where it was.

One prefill of a window serves every press and ratio. What is finished is on disk: a result for each point, and until
the results of an evaluation are written, a ledger of its windows and timed rounds in ``OUTPUT_DIR/.unfinished``. A
point whose result is there is not measured again; one that failed is.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coldpress.errors import InputError
from coldpress.eval.cluster import make_engine
from coldpress.eval.evaluate import make_run
from coldpress.eval.ledger import Ledger
from coldpress.eval.point_run import Engine
from coldpress.eval.run import Run, carry_out, checked_folder
from coldpress.eval.settings import TaskSettings
from coldpress.eval.sweep_plan import Evaluation, SweepPlan
from coldpress.eval.task_run import make_questions
from coldpress.io.progress import WorkClock, note
from coldpress.io.terminal import printable
from coldpress.loading.datasets import Corpus, load_corpus
from coldpress.loading.models import LoadedModel, load_model
from coldpress.records.results import is_finished, result_path


@dataclass
class Outcome:
    """What became of a sweep."""

    n_measured: int = 0  # points that were measured now
    n_found: int = 0  # and those whose results were there already
    n_failed: int = 0  # of those measured now
    n_begun: int = 0  # points that were begun now and are not finished
    problems: list[str] = field(default_factory=list)  # what kept whole evaluations from being measured
    is_interrupted: bool = False  # whether the user stopped it
    n_told: int = 0  # of the problems, that the user has been told of


def sweep(plan: SweepPlan, command: str) -> Outcome:
    """Measure what is not measured yet, one evaluation after the other, and write the results.

    InputError before any work where a text or the folder cannot be used, and where nothing at all could be measured.
    """
    asked = [replace(evaluation.settings, output_dir=plan.output_dir) for evaluation in plan.evaluations]
    for settings in {(s.device, s.engine, *s.cluster.values()): s for s in asked}.values():
        output_dir = checked_folder(settings)
    read = functools.cache(load_corpus)  # each text once
    for evaluation in plan.evaluations:
        _corpus(evaluation, read)
    outcome, clock = Outcome(), WorkClock(len(plan.evaluations))
    for evaluations in _by_model(plan.evaluations):
        try:
            _sweep_model(evaluations, read, output_dir, command, outcome, clock)
        except InputError as error:
            outcome.problems.append(f"{evaluations[0].settings.model}: {error}")
        except KeyboardInterrupt:
            outcome.is_interrupted = True
        if outcome.is_interrupted:
            break
    is_nothing = not outcome.n_measured and not outcome.n_found and not outcome.is_interrupted
    if is_nothing and outcome.problems:
        raise InputError(f"Nothing could be measured. {' '.join(dict.fromkeys(outcome.problems))}")
    _tell_all(outcome)
    return outcome


def _sweep_model(
    evaluations: list[Evaluation],
    read: Callable[..., Corpus],
    output_dir: Path,
    command: str,
    outcome: Outcome,
    clock: WorkClock,
) -> None:
    s = evaluations[0].settings
    loaded = load_model(s.model, **s.loading)
    runs: list[tuple[Evaluation, Run]] = []
    done: list[Ledger] = []
    planned: set[Path] = set()  # a model, a text or a section that is given twice is measured once
    for evaluation in evaluations:
        try:
            run = _run(evaluation, _corpus(evaluation, read), loaded, output_dir, command)
        except InputError as error:
            outcome.problems.append(f"{evaluation.name}: {error}")
            clock.plan(id(evaluation), 0.0)
            continue
        paths = [result_path(output_dir, record) for record in run.finished_records()]
        new = {path: job for path, job in zip(paths, run.jobs, strict=True) if path not in planned}
        planned |= set(new)
        run.jobs = [job for path, job in new.items() if not is_finished(path)]
        outcome.n_found += len(new) - len(run.jobs)
        clock.plan(id(evaluation), run.work if run.jobs else 0.0)
        assert run.ledger is not None
        if not run.jobs:
            done.append(run.ledger)
            continue
        runs.append((evaluation, run))
        for line in run.notes:
            note(f"{evaluation.name}: {line}")
    going_on = {run.ledger.folder for _, run in runs if run.ledger is not None}
    for ledger in done:
        if ledger.folder not in going_on:
            ledger.discard()
    with contextlib.ExitStack() as stack:
        engine: Engine | None = None
        for evaluation, run in runs:
            s = evaluation.settings
            if evaluation.kind in ("perplexity", "tasks") and engine is None:  # one for all texts of the model
                engine = stack.enter_context(make_engine(s.engine, loaded, **s.cluster))
            if evaluation.kind == "speed":  # no workers beside what is timed
                stack.close()
                engine = None
            _measure(run, evaluation, output_dir, engine, outcome, clock)
            if outcome.is_interrupted:
                return


def _run(evaluation: Evaluation, corpus: Corpus | None, loaded: LoadedModel, folder: Path, command: str) -> Run:
    """One evaluation of which everything is decided."""
    settings, jobs = replace(evaluation.settings, output_dir=str(folder)), evaluation.jobs
    run: Run
    if isinstance(settings, TaskSettings):
        run = make_questions(settings, jobs, corpus, loaded, command)
    else:
        assert corpus is not None
        run = make_run(settings, jobs, corpus, loaded, command)
    run.keep_in(folder)
    return run


def _measure(
    run: Run, evaluation: Evaluation, folder: Path, engine: Engine | None, outcome: Outcome, clock: WorkClock
) -> None:
    """Measure one evaluation, from where an earlier run was."""
    _tell_all(outcome)
    print(f"## {printable(evaluation.name)}\n", flush=True)
    label = f"[{len(clock.works) - len(clock.open) + 1}/{clock.n_parts}] {evaluation.name}"
    run.show_progress = lambda items, name: clock.progress(items, label, id(evaluation))
    try:
        records, outcome.is_interrupted = carry_out(run, folder, engine)
    except KeyboardInterrupt:  # while its tables were printed: its results are written
        records, outcome.is_interrupted = run.records(), True
    outcome.n_begun += sum(record["status"] == "interrupted" for record in records)
    outcome.n_failed += sum(record["status"] == "failed" for record in records)
    outcome.n_measured += sum(record["status"] != "interrupted" for record in records)


def _tell_all(outcome: Outcome) -> None:
    """Say which problems there are that were not said; where nothing can be measured, the sweep's error says them."""
    for problem in outcome.problems[outcome.n_told :]:
        note(problem, kind="error")
    outcome.n_told = len(outcome.problems)


def _by_model(evaluations: tuple[Evaluation, ...]) -> Iterator[list[Evaluation]]:
    """The evaluations that share a loaded model, in the order of the plan."""
    found: dict[Any, list[Evaluation]] = {}
    for evaluation in evaluations:
        s = evaluation.settings
        key = (s.model, s.revision, s.device, s.dtype, s.attn_implementation, s.device_map)
        found.setdefault(key, []).append(evaluation)
    yield from found.values()


def _corpus(evaluation: Evaluation, read: Callable[..., Corpus]) -> Corpus | None:
    """The text of an evaluation; None for tasks in sentences of our own."""
    asked = evaluation.settings.reading
    return read(**asked) if asked else None


def summary(outcome: Outcome, output_dir: str) -> str:
    """The last line of a sweep."""
    parts = [f"{outcome.n_measured} point(s) measured"]
    if outcome.n_found:
        parts.append(f"{outcome.n_found} already there")
    if outcome.n_begun:
        parts.append(f"{outcome.n_begun} begun")
    if outcome.n_failed:
        parts.append(f"{outcome.n_failed} failed")
    if outcome.problems:
        parts.append(f"{len(outcome.problems)} part(s) could not be measured")
    sys.stdout.flush()
    return f"{', '.join(parts)}; results in {output_dir}/"
