"""The columns of a report's tables, for the page and for Markdown: what is shown, and what a column is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coldpress.eval.conclusions import task_name
from coldpress.eval.memory import format_bytes
from coldpress.eval.schema import BYTES, FIELDS
from coldpress.eval.sections import Entry, Section
from coldpress.eval.wording import clean, number

__all__ = ["Cell", "Table", "tables"]


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number behind it, if there is one."""

    text: str
    value: float | None = None
    is_bad: bool = False


@dataclass(frozen=True)
class Table:
    """``heads`` with a line of explanation each; the first two columns are texts, the rest numbers."""

    title: str
    heads: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


EMPTY = Cell("")
_Column = tuple[str, str, Callable[[Entry], Cell]]


def _of(name: str) -> _Column:
    """The column of a registered field, with the smallest and the largest of its rounds where these are recorded."""
    field = FIELDS[name]

    def form(value: Any) -> str:
        return format_bytes(value) if field.kind is BYTES else number(value * field.factor, field.digits)

    def cell(entry: Entry) -> Cell:
        value, spread = entry.record.get(name), entry.record.get(f"{name}_spread") if field.has_spread else None
        value = (value or {}).get(field.inner) if field.inner else value
        if value is None:
            return EMPTY
        text = f"{form(value)}{field.unit[1]}"
        if spread is not None and spread["min"] != spread["max"]:
            text += f" [{form(spread['min'])}, {form(spread['max'])}]"
        return Cell(text, value)

    return field.page or field.head, field.about, cell


def _p99(entry: Entry) -> Cell:
    value = (entry.record.get("kld") or {}).get("p99")
    return EMPTY if value is None else Cell(number(value, 3), value)


def _with_ci(value: float | None, ci: Sequence[float] | None, digits: int, sign: str = "+") -> Cell:
    if value is None:
        return EMPTY
    text = f"{value:{sign}.{digits}f}"
    return Cell(text if ci is None else f"{text} [{number(ci[0], digits)}, {number(ci[1], digits)}]", value)


def _ratio(entry: Entry) -> Cell:
    """PPL over the baseline's."""
    ci, change = entry.ppl_ratio_ci95, entry.ppl_change
    return EMPTY if change is None else _with_ci(1 + change, ci, 4, "")


def _size(entry: Entry) -> Cell:
    wanted = [entry.record.get(name) for name in ("compression_ratio", "budget_tokens", "budget_bytes")]
    return Cell(entry.size, next((float(x) for x in wanted if x is not None), None))


def _status(entry: Entry) -> Cell:
    if entry.is_ok:
        return Cell("same as baseline", is_bad=True) if entry.equals_baseline and entry.removed else EMPTY
    error = clean(entry.record.get("error") or "")
    return Cell(clean(entry.record["status"]) + (f": {error[:300]}" if error else ""), is_bad=True)


def _agreement(entry: Entry) -> Cell:
    agreement = entry.greedy_agreement
    if not agreement or agreement.get("mean") is None:
        return EMPTY
    of = "" if agreement.get("n_tokens") is None else f" of {agreement['n_tokens']:g}"
    return Cell(f"{number(agreement['mean'], 1)}{of}", agreement["mean"])


def _delta(entry: Entry) -> Cell:
    return _with_ci(entry.delta_nll, entry.delta_nll_ci95, 4)


def _context(entry: Entry) -> Cell:
    return EMPTY if entry.context is None else Cell(f"{entry.context:,}", entry.context)


def _plain_ppl(entry: Entry) -> Cell:
    return _with_ci(entry.ppl, entry.ppl_ci95, 3, "")


_PRESS: tuple[_Column, ...] = (
    ("press", "the method", lambda p: Cell(clean(p.label))),
    ("ratio or budget", "what was asked for: the fraction to remove, or what may be kept", _size),
)
_QUALITY: tuple[_Column, ...] = (
    ("ΔNLL [95 %]", "loss minus the uncompressed cache's, nats a token, paired", _delta),
    ("PPL", "perplexity, with its own interval where recorded", _plain_ppl),
    ("PPL ratio [95 %]", "perplexity over the uncompressed cache's, paired", _ratio),
    _of("bits_per_byte"),
    _of("kld"),
    ("KLD p99", "its 99th percentile", _p99),
    _of("same_top1"),
    ("greedy agreement", "mean of the greedy tokens before the first that differs", _agreement),
)  # fmt: skip
_SIZES = tuple(map(_of, ("effective_compression_ratio", "read_ratio", "kv_bytes_baseline", "kv_bytes", "kv_bytes_max")))
_SPEED = tuple(
    map(
        _of,
        (
            *("decode_tokens_per_s", "decode_speedup", "tpot_ms", "tpot_ms_baseline", "ttft_s"),
            *("prefill_tokens_per_s", "peak_mem_bytes", "peak_mem_delta_bytes"),
        ),
    )
)
_STATUS: tuple[_Column, ...] = (("status", "empty where all went well", _status),)
_CONTEXT: tuple[_Column, ...] = (("context", "tokens of the timed context", _context),)
_STREAM: tuple[_Column, ...] = (
    ("positions", "where kept keys stand", lambda p: Cell(clean(p.position_mode or ""))),
    ("tokens", "scored", lambda p: EMPTY if p.scored_tokens is None else Cell(f"{p.scored_tokens:,}", p.scored_tokens)),
    _of("loss"),
)


def tables(section: Section) -> list[Table]:
    """One or two tables: of a prefix or a stream with its speed, of timings by context, of tasks."""
    if section.kind == "tasks":
        return [_task_table(section), *_table("", [*_PRESS, *_STATUS, *_SIZES, *_SPEED], section.all)]
    if section.kind == "speed":
        return _table("Press × ratio × context", [*_PRESS, *_CONTEXT, *_STATUS, *_SPEED, *_SIZES], section.all)
    own = [*_STREAM, *_QUALITY] if section.kind == "stream" else [*_QUALITY]
    if section.kind == "plain":
        own = [_of("loss"), *_QUALITY]
    return _table(
        "Press × budget" if section.kind == "stream" else "Press × ratio",
        [*_PRESS, *_STATUS, *own, *_SIZES, *_SPEED],
        section.all,
    )


def _table(title: str, columns: Sequence[_Column], entries: Sequence[Entry]) -> list[Table]:
    """The columns that the entries fill; none if that is only the press."""
    cells = [[cell(entry) for _, _, cell in columns] for entry in entries]
    used = [i for i in range(len(columns)) if i < 2 or any(row[i].text for row in cells)]
    if len(used) < 3:
        return []
    rows = tuple(tuple(row[i] for i in used) for row in cells)
    return [Table(title, tuple(columns[i][:2] for i in used), rows)]


def _task_table(section: Section) -> Table:
    """Task by press: a line for each entry, a column for each task."""
    names = list(dict.fromkeys(task_name(task) for p in section.entries for task in p.tasks or []))

    def cell(entry: Entry, name: str) -> Cell:
        task: dict[str, Any] | None = next((t for t in entry.tasks or [] if task_name(t) == name), None)
        if task is None:
            return EMPTY
        if task.get("score") is None:
            more, ci = task.get("delta_answer_nll"), task.get("delta_answer_nll_ci95")
            if more is None and task.get("same_answers") is not None:
                return Cell(f"{task['same_answers']:.0%} same answers", task["same_answers"])
            if more is None:
                return (
                    EMPTY
                    if task.get("answer_nll") is None
                    else Cell(f"{task['answer_nll']:.3f} nats", task["answer_nll"])
                )
            shown = _with_ci(more, ci, 3)
            return Cell(f"{shown.text} nats", shown.value)
        ci, base = task.get("delta_score_ci95"), task.get("score_base")
        text = f"{task['score']:.3f}"
        if ci is not None and base is not None:
            text += f" (Δ {task['score'] - base:+.3f} [{number(ci[0], 3)}, {number(ci[1], 3)}])"
        return Cell(text, task["score"])

    heads = (("press", "the method"), ("ratio or budget", "what was asked for"))
    shown = [p for p in section.all if p.tasks]
    rows = tuple((Cell(clean(p.label)), _size(p), *(cell(p, name) for name in names)) for p in shown)
    explained = "string match in 0 to 1, or nats a token of the answer more than uncompressed; 95 % interval"
    return Table("Task × press", (*heads, *((name, explained) for name in names)), rows)
