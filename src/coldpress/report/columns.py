"""The columns of a report's tables, for the page and for Markdown: what is shown, and what a column is sorted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.records.reading import measured, names_of_tasks, task_name, task_of, written
from coldpress.records.schema import FIELDS
from coldpress.records.wording import clean, number, percent
from coldpress.report.glance import FEWEST_WINDOWS, Row, n_windows, value_of
from coldpress.report.phrases import filled
from coldpress.report.sections import Entry, Section, text_name


@dataclass(frozen=True)
class Cell:
    """What is shown, the number behind it, if there is one, and its interval.

    ``bar`` is what a page draws of the interval: its ends, its middle and 0, as fractions of the column's scale; a
    fraction outside of 0 to 1 is off the scale.
    """

    text: str
    value: float | None = None
    is_bad: bool = False
    span: tuple[float, float] | None = None
    said: str = ""  # the interval in words
    bar: tuple[float, float, float, float] | None = None


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

    def cell(entry: Entry) -> Cell:
        value, spread = measured(entry.record, name)
        if value is None:
            return EMPTY
        said = "" if spread is None else f"[{', '.join(written(name, end) for end in spread)}]"
        return Cell(f"{written(name, value)}{field.unit[1]}", value, span=spread, said=said)

    return field.page or field.head, field.about, cell


def _plain(value: Any, form: str) -> Cell:
    return EMPTY if value is None else Cell(format(value, form), value)


def _with_ci(value: float | None, ci: Sequence[float] | None, digits: int, sign: str = "+") -> Cell:
    if value is None:
        return EMPTY
    text = f"{value:{sign}.{digits}f}"
    if ci is None:
        return Cell(text, value)
    return Cell(text, value, span=(ci[0], ci[1]), said=f"[{number(ci[0], digits)}, {number(ci[1], digits)}]")


def _size(entry: Entry) -> Cell:
    return Cell(entry.size, entry.asked)


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


_PRESS: tuple[_Column, ...] = (
    ("press", "the method", lambda p: Cell(clean(p.label))),
    ("ratio or budget", "what was asked for: the fraction to remove, or what may be kept", _size),
)
_QUALITY: tuple[_Column, ...] = (
    _of("kld"),
    (
        "ΔNLL",
        "loss minus the uncompressed cache's, nats a token, paired, with its 95 % interval",
        lambda p: _with_ci(p.delta_nll, p.delta_nll_ci95, 4),
    ),
    ("PPL", "perplexity", lambda p: _plain(p.ppl, ".3f")),
    _of("same_top1"),
    ("KLD p99", "99th percentile of the divergence", lambda p: _plain((p.kld or {}).get("p99"), ".3f")),
    ("greedy agreement", "mean of the greedy tokens before the first that differs", _agreement),
    _of("bits_per_byte"),
)
_KEPT = (_of("kv_bytes"), _of("effective_compression_ratio"))
_SIZES = tuple(map(_of, ("kv_bytes_baseline", "read_ratio", "kv_bytes_max")))
_SPEED = tuple(
    map(
        _of,
        (
            *("decode_tokens_per_s", "decode_speedup", "peak_mem_bytes", "ttft_s", "tpot_ms"),
            *("tpot_ms_baseline", "prefill_tokens_per_s", "peak_mem_delta_bytes"),
        ),
    )
)
_STATUS: tuple[_Column, ...] = (("status", "empty where all went well", _status),)
_CONTEXT: tuple[_Column, ...] = (("context", "tokens of the timed context", lambda p: _plain(p.context, ",")),)
_UNPRESSED: _Column = ("press", "no press touches this loss", lambda p: Cell(NO_PRESS))
_NO_SIZE: _Column = ("ratio or budget", "none", lambda p: EMPTY)
_STREAM: tuple[_Column, ...] = (
    ("positions", "where kept keys stand", lambda p: Cell(clean(p.position_mode or ""))),
    ("tokens", "scored", lambda p: _plain(p.scored_tokens, ",")),
    _of("loss"),
)


def tables(section: Section) -> list[Table]:
    """Quality, the most wanted columns first, then memory and speed; of tasks a column for each."""
    entries, has_base = section.all, section.baseline is not None
    told = ("KV before", "TPOT uncompressed") if has_base else ()  # by the line of no_press
    costs = [column for column in (*_SPEED, *_SIZES) if column[0] not in told]
    if section.kind == "tasks":
        return [task_table(section), *_table("Memory and speed", [*_PRESS, *_KEPT, *costs], entries)]
    if section.kind == "speed":
        return _table("Press × ratio × context", [*_PRESS, *_CONTEXT, *_STATUS, *_KEPT, *costs], entries)
    own: tuple[_Column, ...] = (*_STREAM, *_QUALITY) if section.kind == "stream" else _QUALITY
    if section.kind == "plain":
        entries = [p for p in entries if p.is_baseline] or entries[:1]
        plain = _table("The uncompressed model", [_UNPRESSED, _NO_SIZE, _of("loss"), *own], entries)
        return [*plain, *_table("Memory and speed", [*_PRESS, *_STATUS, *_KEPT, *costs], section.all)]
    quality = _table("Quality", [*_PRESS, *_STATUS, _KEPT[0], *own, _KEPT[1]], entries)
    return [*quality, *_table("Memory and speed", [*_PRESS, *costs], entries)]


def opening_table(found: Sequence[Row], others: Iterable[Section] = ()) -> Table:
    """The table that a page opens with; the change of PPL with its interval drawn, here and on ``others``."""
    names, lines = filled(found, spells=False)
    heads = [(name, "") for name in names]
    at = names.index("change of PPL") if "change of PPL" in names else len(names)
    more = [column for section in others for column in _beside(found, section)]
    heads[at + 1 : at + 1] = [(head, about) for head, about, _ in more]
    rows = []
    for i, (row, line) in enumerate(zip(found, lines, strict=True)):
        cells = [Cell(text, value if text else None) for text, value in line]
        if row.change_ci is not None and at < len(cells) and cells[at].text:
            cells[at] = _of_change(cells[at], row.change_ci)
        cells[at + 1 : at + 1] = [column[i] for _, _, column in more]
        rows.append(tuple(cells))
    return Table("", tuple(heads), _drawn(rows))


def _of_change(cell: Cell, ci: tuple[float, float]) -> Cell:
    return replace(cell, span=ci, said=f"[{percent(ci[0])}, {percent(ci[1])}]")


def _beside(found: Sequence[Row], section: Section) -> list[tuple[str, str, list[Cell]]]:
    """What a section says of the rows of another: heads, explanations and cells. Only what each press has."""
    own = {(p.label, p.size): p for p in section.entries if not p.is_baseline}
    entries = [own.get((row.press, row.size)) for row in found if row.size]
    points = [p for p in entries if p is not None]
    if not points or len(points) < len(found) - 1:
        return []
    if section.kind == "quality":
        few, cells = n_windows(points) < FEWEST_WINDOWS, []
        for p in points:
            if p.ppl_change is None:
                return []
            cell = Cell(percent(p.ppl_change), p.ppl_change)
            cells.append(cell if few or p.ppl_change_ci is None else _of_change(cell, p.ppl_change_ci))
        about = "that of the uncompressed cache, and how much it changes"
        return [(f"PPL, {clean(text_name(section.first))}", about, [_plain(points[0].baseline_ppl, ".2f"), *cells])]
    columns = []
    for name in names_of_tasks(p.record for p in points):
        tasks = [task_of(p.record, name) for p in points]
        if all(task.get("score") is not None for task in tasks):
            scores = [tasks[0].get("score_base"), *(task["score"] for task in tasks)]
            cells = [EMPTY if score is None else Cell(f"{score:.0%}".replace("%", " %"), score) for score in scores]
            columns.append((name, f"answers that are right, of {tasks[0].get('n') or 0:,} questions", cells))
    return columns


def _table(title: str, columns: Sequence[_Column], entries: Sequence[Entry]) -> list[Table]:
    """The columns that the entries fill; none if that is only the press."""
    cells = [[cell(entry) for _, _, cell in columns] for entry in entries]
    used = [i for i in range(len(columns)) if i < 2 or any(row[i].text for row in cells)]
    filled = [row for row in cells if any(row[i].text for i in used[2:])]
    if len(used) < 3:
        return []
    heads = tuple(columns[i][:2] for i in used)
    return [Table(title, heads, _drawn([tuple(row[i] for i in used) for row in filled]))]


def _drawn(rows: Sequence[tuple[Cell, ...]]) -> tuple[tuple[Cell, ...], ...]:
    """The rows with their intervals on a scale of their column, which random does not stretch."""
    scales: dict[int, tuple[float, float]] = {}
    for i in range(len(rows[0]) if rows else 0):
        spans = [row[i].span for row in rows if row[0].text != "random"] or [row[i].span for row in rows]
        ends = [end for span in spans if span is not None for end in span if math.isfinite(end)]
        if ends and max(*ends, 0.0) > min(*ends, 0.0):
            scales[i] = min(*ends, 0.0), max(*ends, 0.0)

    def bar(cell: Cell, i: int) -> Cell:
        if cell.span is None or cell.value is None or i not in scales:
            return cell
        low, high = scales[i]
        a, b, middle, zero = ((x - low) / (high - low) for x in (*cell.span, cell.value, 0.0))
        return replace(cell, bar=(a, b, middle, zero))

    return tuple(tuple(bar(cell, i) for i, cell in enumerate(row)) for row in rows)


def task_table(section: Section) -> Table:
    """Task by press: a line for each entry, and for the uncompressed cache, a column for each task."""
    names = names_of_tasks(p.record for p in section.entries)

    def cell(entry: Entry, name: str) -> Cell:
        task = task_of(entry.record, name)
        value, span, is_score = value_of(task)
        if is_score:
            return _with_ci(value, span, 2, "")
        if value is not None and not entry.is_baseline:
            shown = _with_ci(value, span, 3)
            return replace(shown, text=f"{shown.text} nats")
        if task.get("same_answers") is not None:
            return Cell(f"{task['same_answers']:.0%} same answers", task["same_answers"])
        loss = task.get("answer_nll")
        return EMPTY if loss is None else Cell(f"{loss:.3f} nats", loss)

    heads = (("press", "the method"), ("ratio or budget", "what was asked for"))
    shown = [p for p in section.all if p.tasks]
    rows = [(Cell(clean(p.label)), _size(p), *(cell(p, name) for name in names)) for p in shown]
    base = {task_name(task): task.get("score_base") for p in shown for task in p.tasks}
    if section.baseline is None and any(value is not None for value in base.values()):
        rows.insert(0, (Cell(NO_PRESS), EMPTY, *(_plain(base.get(name), ".2f") for name in names)))
    explained = "string match in 0 to 1 with Wilson's interval, or nats a token of the answer more than uncompressed"
    return Table("Task × press", (*heads, *((name, explained) for name in names)), _drawn(rows))
