"""What tables show of tasks and benchmarks: a column for each task and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from coldpress.bases.registry import NO_PRESS

__all__ = ["Column", "task_columns"]

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], str | None]]  # its head, and what stands in a record's line
Kind = tuple[str, int]  # the name of a task, and its length in tokens


def task_columns(records: Sequence[Record]) -> list[list[Column]]:
    """The columns of three tables: scores, nats a token of the answers, answers against the uncompressed cache's."""
    found = (entry for r in records for entry in r.get("tasks") or ())
    kinds = list(dict.fromkeys((entry["task"], entry["length"]) for entry in found))
    return [
        [(f"{task} {length:,}", partial(_number, (task, length), "score", "{:.1%}")) for task, length in kinds],
        [
            (f"{task} {length:,} nats", partial(_number, (task, length), "answer_nll", "{:.3f}"))
            for task, length in kinds
        ],
        [(f"{task} {length:,} against uncompressed", partial(_change, (task, length))) for task, length in kinds],
    ]


def _entry(kind: Kind, record: Record) -> Record:
    """What a record says of a task; empty where it says nothing."""
    return next((e for e in record.get("tasks") or () if (e["task"], e["length"]) == kind), {})


def _number(kind: Kind, key: str, form: str, record: Record) -> str | None:
    value = _entry(kind, record).get(key)
    return None if value is None else form.format(value)


def _change(kind: Kind, record: Record) -> str | None:
    """How a benchmark's answers differ: scores with their interval, McNemar's counts and p, how many are the same."""
    entry = _entry(kind, record)
    is_baseline = record["press"] == NO_PRESS and record.get("kv_bits") is None
    if entry.get("same_answers") is None or is_baseline:
        return None
    ci, said = entry.get("delta_score_ci95"), [f"{entry['same_answers']:.0%} same answers"]
    if entry.get("gained") is not None:
        said.insert(0, f"+{entry['gained']} -{entry['lost']} p {entry['mcnemar_p']:.2g}")
    if entry.get("score") is not None and entry.get("score_base") is not None:
        interval = "" if ci is None else f" [{ci[0]:+.1%}, {ci[1]:+.1%}]"
        said.insert(0, f"{entry['score'] - entry['score_base']:+.1%}{interval}")
    return "; ".join(said)
