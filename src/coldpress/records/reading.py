"""What a record says of its press, its size and its tasks, and which records may share a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coldpress.backends import BUDGETS, NO_PRESS
from coldpress.records.metrics import FEWEST_QUESTIONS
from coldpress.records.schema import BYTES, ENVIRONMENT, FIELDS, SPEED_SETTINGS
from coldpress.records.wording import clean, format_bytes, number

Record = dict[str, Any]
Task = dict[str, Any]  # of a record: what was measured of a task
NOISY = 1.5  # times as long as another may a round of the uncompressed cache take on a quiet machine


def measured(record: Record, name: str) -> tuple[Any, tuple[Any, Any] | None]:
    """The number of a registered field, and the smallest and the largest of its rounds where they are recorded."""
    field, value = FIELDS[name], record.get(name)
    value = (value or {}).get(field.inner) if field.inner else value
    spread = record.get(f"{name}_spread") if field.has_spread else None
    return value, None if spread is None or spread["min"] == spread["max"] else (spread["min"], spread["max"])


def written(name: str, value: Any) -> str:
    """A number of a registered field, without its unit."""
    field = FIELDS[name]
    return format_bytes(value) if field.kind is BYTES else number(value * field.factor, field.digits)


def is_plain(record: Record) -> bool:
    """Whether the perplexity beside a press is the uncompressed model's own."""
    return (record["press"] != NO_PRESS or bits_of(record) != "") and str(record.get("protocol", "")).startswith(
        "strided"
    )


def size_of(record: Record) -> str:
    """How much a press was asked to keep: its ratio or budget; an empty text for a press that has neither."""
    if record.get("budget_tokens") is not None:
        return f"{record['budget_tokens']:,} tokens"
    if record.get("budget_bytes") is not None:
        return format_bytes(record["budget_bytes"])
    ratio = record.get("compression_ratio")
    return "" if ratio is None else f"{ratio:.15g}"


def bits_of(record: Record) -> str:
    """In how many bits what was kept is stored; an empty text where it is as it was."""
    return "" if record.get("kv_bits") is None else f"{record['kv_bits']}"


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """The records that may share a table: those of which :func:`describe` says the same; each group sorted.

    A press that failed has measured nothing, and stands with those that were asked for the same.
    """
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Record]]] = {}
    for record in records:
        outcome: tuple[Any, ...] = (record.get("windows"), record.get("scored_tokens"))
        if record["status"] == "failed":
            outcome = ()
        elif record.get("ppl_mode") == "streaming":  # how far each press reads stands in its row
            outcome = ("stream",)
        found.setdefault(asked(record), {}).setdefault(outcome, []).append(record)
    grouped = []
    for outcomes in found.values():
        failed = outcomes.pop((), [])
        first, *rest = list(outcomes.values()) or [[]]
        grouped += [sorted(group, key=_order) for group in ([*first, *failed], *rest)]
    return grouped


def asked(record: Record) -> tuple[Any, ...]:
    """What a caption says that is known before anything is measured."""
    settings, env = record.get("settings") or {}, record["env"]
    return (
        *(record.get(k) for k in ("protocol", "model", "num_params", "dtype", "device", "attn_implementation")),
        *(record.get(k) for k in ("ppl_mode", "dataset", "subset", "text_sha256", "total_tokens")),
        *(settings.get(k) for k in (() if settings.get("ppl_only") else SPEED_SETTINGS)),
        *(env[k] for k in ENVIRONMENT),
    )


def size_order(record: Record) -> tuple[Any, ...]:
    """Sizes as numbers, ratios before budgets."""
    sizes = [record.get(name) for name in ("compression_ratio", *BUDGETS)]
    return tuple((size is None, size or 0) for size in sizes)


def _order(record: Record) -> tuple[Any, ...]:
    """No press before the presses, these by name and size."""
    return record["press"] != NO_PRESS, record["press"], size_order(record)


def noise_of(records: Iterable[Record]) -> tuple[float, float] | None:
    """The least and the most TPOT of the uncompressed cache in one run, ms, where they are too far apart to say much.

    Of several runs those that are furthest apart.
    """
    found = []
    for record in records:
        is_base = record["press"] == NO_PRESS and not bits_of(record)
        spread = record.get("tpot_ms_spread" if is_base else "tpot_ms_baseline_spread")
        if spread is not None and spread["max"] > NOISY * spread["min"] > 0:
            found.append((spread["min"], spread["max"]))
    return max(found, key=lambda ends: ends[1] / ends[0], default=None)


def task_name(task: Task) -> str:
    """``needle at 4,096 tokens``."""
    length = task.get("length")
    return clean(task["task"]) + (f" at {length:,.0f} tokens" if length is not None else "")


def names_of_tasks(records: Iterable[Record]) -> list[str]:
    """The tasks that were measured of any."""
    return list(dict.fromkeys(task_name(task) for record in records for task in record.get("tasks") or ()))


def task_of(record: Record, name: str) -> Task:
    """What was measured of the task of this name; empty where nothing was."""
    return next((task for task in record.get("tasks") or () if task_name(task) == name), {})


def unanswered(records: Iterable[Record]) -> list[str]:
    """The tasks that the uncompressed model itself cannot do, of which no press can lose anything."""
    tasks = [task for record in records for task in record.get("tasks") or ()]
    return list(dict.fromkeys(task_name(task) for task in tasks if task.get("score_base") == 0))


def few_questions(entry: Record) -> int | None:
    """How many questions a task has, where they are too few for a verdict; those about one context count once."""
    n = entry.get("n_contexts") or entry.get("n")
    return n if n is not None and n < FEWEST_QUESTIONS else None


def interval_of_score(entry: Record) -> list[float] | None:
    """The paired interval of a task's score, where there are questions enough for one."""
    return None if few_questions(entry) is not None else entry.get("delta_score_ci95")
