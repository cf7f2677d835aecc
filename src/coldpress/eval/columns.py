"""The columns of a report's tables, for the page and for Markdown: what is shown, and what a column is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coldpress.eval.memory import format_bytes
from coldpress.eval.sections import Entry, Section
from coldpress.eval.task_words import task_name
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


def _plain(key: str, digits: int, factor: float = 1.0, unit: str = "") -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = entry.record.get(key)
        return EMPTY if value is None else Cell(f"{number(value * factor, digits)}{unit}", value)

    return cell


def _spread(key: str, digits: int, unit: str = "") -> Callable[[Entry], Cell]:
    """A number with the smallest and the largest of its rounds, where these are recorded."""

    def cell(entry: Entry) -> Cell:
        value, spread = entry.record.get(key), entry.record.get(f"{key}_spread")
        if value is None or spread is None or spread["min"] == spread["max"]:
            return _plain(key, digits, 1, unit)(entry)
        return Cell(
            f"{number(value, digits)}{unit} [{number(spread['min'], digits)}, {number(spread['max'], digits)}]", value
        )

    return cell


def _inside(key: str, inner: str, digits: int) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = (entry.record.get(key) or {}).get(inner)
        return EMPTY if value is None else Cell(number(value, digits), value)

    return cell


def _count(key: str) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = entry.record.get(key)
        return EMPTY if value is None else Cell(format_bytes(value), value)

    return cell


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
    ("bits/byte", "of the scored text", _plain("bits_per_byte", 4)),
    ("KLD", "mean Kullback-Leibler divergence from the uncompressed model, nats", _inside("kld", "mean", 4)),
    ("KLD p99", "its 99th percentile", _inside("kld", "p99", 3)),
    ("same top-1", "tokens whose likeliest continuation is the same", _plain("same_top1", 1, 100, " %")),
    ("greedy agreement", "mean of the greedy tokens before the first that differs", _agreement),
)  # fmt: skip
_SIZES: tuple[_Column, ...] = (
    ("achieved", "fraction that was really removed", _plain("effective_compression_ratio", 3)),
    ("read", "fraction of the stored pairs that a decoding query reads", _plain("read_ratio", 3)),
    ("KV before", "bytes of the uncompressed cache", _count("kv_bytes_baseline")),
    ("KV after", "bytes of the compressed cache", _count("kv_bytes")),
    ("KV most", "most bytes stored while reading", _count("kv_bytes_max")),
)
_SPEED: tuple[_Column, ...] = (
    ("decode tok/s", "tokens a second after the first", _plain("decode_tokens_per_s", 1)),
    (
        "speed-up [rounds]",
        "of decoding against the uncompressed cache in the same round",
        _spread("decode_speedup", 2, "×"),
    ),
    ("TPOT ms [rounds]", "time per output token after the first", _spread("tpot_ms", 2)),
    ("TPOT uncompressed", "that of the uncompressed cache in the same round, ms", _plain("tpot_ms_baseline", 2)),
    ("TTFT s", "time to the first token, compression included", _plain("ttft_s", 3)),
    ("prefill tok/s", "tokens of the context a second", _plain("prefill_tokens_per_s", 0)),
    ("peak", "peak memory", _count("peak_mem_bytes")),
    ("peak above start", "peak memory above what was held before", _count("peak_mem_delta_bytes")),
)
_STATUS: tuple[_Column, ...] = (("status", "empty where all went well", _status),)
_CONTEXT: tuple[_Column, ...] = (("context", "tokens of the timed context", _context),)
_STREAM: tuple[_Column, ...] = (
    ("positions", "where kept keys stand", lambda p: Cell(clean(p.position_mode or ""))),
    ("tokens", "scored", lambda p: EMPTY if p.scored_tokens is None else Cell(f"{p.scored_tokens:,}", p.scored_tokens)),
    ("loss", "nats a token", _plain("loss", 4)),
)


def tables(section: Section) -> list[Table]:
    """One or two tables: of a prefix or a stream with its speed, of timings by context, of tasks."""
    if section.kind == "tasks":
        return [_task_table(section), *_table("", [*_PRESS, *_STATUS, *_SIZES, *_SPEED], section.all)]
    if section.kind == "speed":
        return _table("Press × ratio × context", [*_PRESS, *_CONTEXT, *_STATUS, *_SPEED, *_SIZES], section.all)
    own = [*_STREAM, *_QUALITY] if section.kind == "stream" else [*_QUALITY]
    if section.kind == "plain":
        own = [("loss", "nats a token, of the uncompressed model", _plain("loss", 4)), *_QUALITY]
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
