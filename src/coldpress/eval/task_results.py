"""From a run over examples to its result records: written, and printed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coldpress.errors import InputError
from coldpress.eval.engine import Engine
from coldpress.eval.jobs import Job
from coldpress.eval.ledger import LedgerFolder
from coldpress.eval.point_run import PointRun
from coldpress.eval.points import BASELINE, Point
from coldpress.eval.progress import note
from coldpress.eval.records import blank_record
from coldpress.eval.report import show, size_of
from coldpress.eval.results import uninterrupted, write_results

__all__ = ["carry_out"]


def carry_out(
    run: PointRun[Any],
    jobs: Sequence[Job],
    common: dict[str, Any],
    output_dir: Path,
    ledger: LedgerFolder,
    progress: Callable[[Any], Any],
    engine: Engine | None = None,
) -> tuple[list[dict[str, Any]], bool]:
    """Measure everything, write the results, and print them.

    Args:
        run: over the examples.
        jobs: the presses, one record each.
        common: what the records have in common.
        output_dir: of the results.
        ledger: of the run; it is removed when everything is measured.
        progress: wraps the finished items.
        engine: where the work is done; None: here.

    Returns:
        The records, in the order of the table, and whether the user interrupted the run.

    Raises:
        InputError: what was asked for turns out not to work.
    """
    is_interrupted, failure, stopped, start = False, None, None, time.perf_counter()
    try:
        run.run(progress, engine)
    except Exception as error:  # the model itself fails: so does everything that is compared with it
        failure = error
        stopped = error if isinstance(error, InputError) else None
    except KeyboardInterrupt:
        is_interrupted = True
    with uninterrupted():  # a second Ctrl-C shall not cost the results
        common["seconds"] = {"tasks": time.perf_counter() - start}
        records = _records(run, jobs, common, failure)
        if stopped is not None:  # what was asked for cannot be done: no result but of what was measured before
            records = [record for record in records if record.get("before_failure")]
        try:
            write_results(output_dir, records)
        finally:
            if stopped is not None:
                raise stopped
    for record in records:
        if record["status"] == "failed":
            size = size_of(record)
            note(f"{record['press']}{f' at {size}' if size else ''} failed: {record['error']}", kind="error")
    if run.is_complete:
        ledger.clear()
    if records:
        print(f"\n{show(records)}\n")
        print(f"{len(records)} result(s) in {output_dir}/", flush=True)
    return records, is_interrupted


def _records(
    run: PointRun[Any], jobs: Sequence[Job], common: dict[str, Any], failure: Exception | None
) -> list[dict[str, Any]]:
    """One record per job of which there is something to say."""
    results = {point.key: (point, result) for point, result in run.results()}
    records = []
    for job in jobs:
        own = Point(job.press, job.kv_bits)
        point, result = results.get(BASELINE.key if own == BASELINE else own.key, (own, None))
        error = failure or (result if isinstance(result, Exception) else None)
        if result is None and error is None:
            continue
        record = blank_record(common, job)
        record["status"] = "failed" if error is not None else "ok" if run.is_complete else "interrupted"
        if error is None:
            record |= result  # type: ignore[arg-type]
        else:
            measured = result if isinstance(result, dict) else run.before_failure(point)
            record |= {"before_failure": measured} if measured else {}
            record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            record["traceback"] = "".join(traceback.format_exception(error))
        records.append(record)
    return records
