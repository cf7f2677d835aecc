"""The minute's answer of a section: which press, how much memory, how much quality, how fast; numbers, not words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.records.metrics import wilson
from coldpress.records.reading import Task, few_questions
from coldpress.report.sections import KINDS, Entry, Section, paired

CHEAP = 0.01  # of perplexity
FEWEST_WINDOWS = 8  # with fewer, presses are not ranked
MOST_ROWS = 12  # beside no_press; of more, the best of each size


@dataclass(frozen=True)
class Row:
    """A line of the opening table; None where not measured. Bytes, nats a token, tokens a second."""

    press: str
    size: str
    asked: float | None = None  # the ratio, or the number of tokens or bytes, that the size says
    kv_bytes: int | None = None
    kl: float | None = None
    ppl: float | None = None
    change: float | None = None  # of perplexity, relative
    change_ci: tuple[float, float] | None = None
    score: float | None = None
    tokens_per_s: float | None = None
    ttft_s: float | None = None
    peak_bytes: int | None = None
    status: str = ""


@dataclass
class Answer:
    """What three sentences say of a section."""

    section: Section
    few: int | None = None  # windows, or questions, where they are too few to rank presses
    # the press that stays closest to the uncompressed model at the size most presses were measured at
    best: Entry | None = None
    # presses that are not told apart from it by the paired interval of their losses
    level: list[str] = field(default_factory=list)
    cheap: Entry | None = None  # the smallest cache whose whole interval stays within :data:`CHEAP`
    context: int | None = None  # tokens of the timed context
    fastest: Entry | None = None  # the largest speed-up that every round confirms
    n_rounds: int = 0  # the most rounds of a timing; 0 where none was timed
    uncompressed: float | None = None  # PPL of the uncompressed model where no press touches the loss that was measured
    smallest: Entry | None = None  # the smallest cache that was measured
    # how many scores stand how to the uncompressed cache's, by what :func:`standing` says; with too few questions
    # ``few`` is how many these are
    counts: dict[str, int] = field(default_factory=dict)


def lead_of(found: Sequence[Section]) -> Section:
    """The section that a report opens with: a compressed context if there is one, of the largest model.

    Of several the one with the most timings and points, and of equal ones that which was measured first.
    """
    order = [*KINDS]

    def rank(section: Section) -> tuple[Any, ...]:
        timed = sum(p.timed is not None or p.tpot_ms is not None for p in section.entries)
        most = -section.first["num_params"], -timed, -len(section.all)
        return not section.entries, order.index(section.kind), *most, section.first.get("timestamp") or ""

    return min(found, key=rank)


def beside(section: Section, found: Iterable[Section]) -> list[Section]:
    """What else was measured of its model: the same protocol on other texts, and tasks."""

    of_model = ("model", "num_params", "dtype", "device")

    def same(other: Section, names: Sequence[str]) -> bool:
        return all(other.first.get(name) == section.first.get(name) for name in names)

    others = [other for other in found if other is not section and other.entries and same(other, of_model)]
    return [s for s in others if s.kind == "tasks" or (s.kind == section.kind and same(s, ("protocol",)))]


def kl_of(entry: Entry) -> float | None:
    """Mean Kullback-Leibler divergence from the uncompressed model, nats a token."""
    value = (entry.record.get("kld") or {}).get("mean")
    return None if value is None else float(value)


def is_cheap(entry: Entry) -> bool:
    """Whether its whole interval stays within :data:`CHEAP`."""
    ci = entry.ppl_change_ci
    return ci is not None and ci[1] <= CHEAP


def quality_of(entries: Sequence[Entry]) -> tuple[str, dict[int, float]]:
    """``"KL"`` or ``"Δ loss"``, and the number of each entry by its ``id``; KL where all that are compared have it."""
    compared = [p for p in entries if p.delta_nll is not None and not p.is_baseline]
    divergences = {id(p): value for p in compared if (value := kl_of(p)) is not None}
    if len(divergences) == len(compared):
        return "KL", divergences
    return "Δ loss", {id(p): p.delta_nll for p in compared}


def n_windows(entries: Sequence[Entry]) -> int:
    """The most windows, or texts, that a loss was taken over."""
    return max((len(p.per_window or p.per_document or []) or int(p.windows or 0) for p in entries), default=0)


def rows(section: Section) -> list[Row]:
    """The uncompressed cache first, then size by size, the best press of each first."""
    pressed = [p for p in section.entries if not p.is_baseline]
    _, quality = quality_of(pressed)
    context = _context(section)
    is_plain = section.kind == "plain"

    def made(entry: Entry) -> Row:
        timed = _timed(entry, context)
        has_ci = n_windows([entry]) >= FEWEST_WINDOWS
        return Row(
            press=entry.label,
            size="" if entry.is_baseline else entry.size,
            asked=None if entry.is_baseline else entry.asked,
            kv_bytes=entry.kv_bytes_max or entry.kv_bytes or (timed.kv_bytes if timed else None),
            kl=None if entry.is_baseline else kl_of(entry),
            ppl=None if is_plain and not entry.is_baseline else entry.ppl,
            change=entry.ppl_change,
            change_ci=entry.ppl_change_ci if has_ci else None,
            score=_score(entry),
            tokens_per_s=None if timed is None else timed.decode_tokens_per_s or timed.generation_tokens_per_s,
            ttft_s=timed.ttft_s if timed is not None and section.kind == "speed" else None,
            peak_bytes=None if timed is None else timed.peak_mem_bytes,
            status="" if entry.is_ok else str(entry.record["status"]),
        )

    if section.kind == "speed":
        pressed = [p for p in pressed if p.context == context]
    order = {size: i for i, size in enumerate(section.sizes)}
    pressed.sort(key=lambda p: (order.get(p.size, 0), quality.get(id(p), math.inf), p.label))
    found = [made(p) for p in [*pressed, *(p for p in section.unfinished if not p.is_baseline)]]
    base = [p for p in section.entries if p.is_baseline and (section.kind != "speed" or p.context == context)]
    return [made(base[0]) if base else _uncompressed(section, pressed), *found]


def chosen(found: Sequence[Row], others: Iterable[Section] = ()) -> list[Row]:
    """All of a few rows; of many those at one size, if most of them are also in the tasks of ``others``.

    Else the best of each size, without the references.
    """
    base, rest = found[0], [row for row in found[1:] if not row.status]
    if len(found) - 1 <= MOST_ROWS:
        return list(found)
    tasked = {(p.label, p.size) for section in others if section.kind == "tasks" for p in section.entries}
    counts = Counter(row.size for row in rest if (row.press, row.size) in tasked)
    size, n = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if 2 * n > sum(row.size == size for row in rest):  # and not of a few presses only
        return [base, *[row for row in rest if row.size == size and (row.press, size) in tasked][:MOST_ROWS]]
    rest = [row for row in rest if row.press not in ("random", "streaming_llm")]
    sizes = dict.fromkeys(row.size for row in rest)
    each = max(1, MOST_ROWS // max(1, len(sizes)))
    return [base, *(row for size in sizes for row in [r for r in rest if r.size == size][:each])]


def _uncompressed(section: Section, pressed: Sequence[Entry]) -> Row:
    """The line of ``no_press``, from what the records of presses say of it."""
    record: dict[str, Any] = pressed[0].record if pressed else {}
    timed = next((t for p in pressed if (t := _timed(p, _context(section))) is not None), None)
    tpot = None if timed is None else timed.tpot_ms_baseline
    return Row(
        press=NO_PRESS,
        size="",
        kv_bytes=record.get("kv_bytes_baseline"),
        ppl=record.get("ppl") if section.kind == "plain" else record.get("baseline_ppl"),
        score=_score(pressed[0], "score_base") if pressed else None,
        tokens_per_s=1000 / tpot if tpot else None,
        peak_bytes=None if timed is None else timed.peak_mem_bytes_uncompressed,
    )


def _score(entry: Entry, name: str = "score") -> float | None:
    """The mean of its tasks' scores."""
    scores = [task[name] for task in entry.tasks or [] if task.get(name) is not None]
    return math.fsum(scores) / len(scores) if scores else None


def _context(section: Section) -> int | None:
    """The longest context that was timed, of this section's runs or of others of the same press."""
    known = [t.context for p in section.entries if (t := p.timed or p).tpot_ms is not None and t.context]
    return max(known, default=None)


def _timed(entry: Entry, context: int | None) -> Entry | None:
    timed = entry.timed or entry
    return timed if timed.tpot_ms is not None and timed.context == context else None


def answer(section: Section) -> Answer:
    """What can be said of a section in a minute."""
    found = Answer(section, context=_context(section))
    pressed = [p for p in section.entries if not p.is_baseline]
    sized = [p for p in pressed if p.kept_bytes is not None]
    found.smallest = min(sized, key=lambda p: (p.kept_bytes or 0, p.label), default=None)
    if section.kind == "quality":
        _rank(found, pressed)
    elif section.kind == "stream":
        _rank_stream(found, pressed)
    elif section.kind == "tasks":
        stood = [standing(task)[0] for p in pressed for task in p.tasks or []]
        found.few = min((n for p in pressed for task in p.tasks or [] if (n := few_questions(task))), default=None)
        found.counts = {kind: stood.count(kind) for kind in dict.fromkeys(stood)}
    elif section.kind == "plain":
        found.uncompressed = next((p.ppl for p in section.entries if p.ppl is not None), None)
    timed = [t for p in pressed if (t := _timed(p, found.context)) is not None and t.decode_speedup is not None]
    found.n_rounds = max((t.repetitions if isinstance(t.repetitions, int) else 1 for t in timed), default=0)
    sure = [p for p in timed if p.is_surely_faster]
    found.fastest = max(sure, key=lambda p: p.decode_speedup, default=None)
    return found


def value_of(task: Task) -> tuple[Any, Any, bool]:
    """What is shown of a task: its score, or nats more than uncompressed; the interval; and whether it is a score."""
    score, n = task.get("score"), task.get("n")
    if score is None:
        return *_cost_of(task), False
    return score, wilson(score, int(n)) if n and 0 <= score <= 1 else None, True


def _cost_of(task: Task) -> tuple[Any, Any]:
    """Nats a token of the answer more than uncompressed, and their interval."""
    more, loss, base = (task.get(name) for name in ("delta_answer_nll", "answer_nll", "answer_nll_base"))
    if more is None and loss is not None and base is not None:
        more = loss - base
    return more, task.get("delta_answer_nll_ci95")


def standing(task: Task) -> tuple[str, float | None]:
    """Whether an answer is ``worse``, ``same`` or ``better`` by its paired interval, ``unknown`` where it has none, or
    has ``few_questions``; and by how much.

    A large score is good, a small loss is: the second is a score's difference, or a loss's in nats a token.
    """
    score, base = task.get("score"), task.get("score_base")
    if score is None:
        sign, (difference, ci) = -1, _cost_of(task)
    else:
        sign, difference, ci = 1, None if base is None else score - base, task.get("delta_score_ci95")
    if few_questions(task) is not None:
        return "few_questions", difference
    if ci is None or difference is None:
        return "unknown", difference
    low, high = sorted((sign * ci[0], sign * ci[1]))
    return ("worse" if high < 0 else "better" if low > 0 else "same"), difference


def _rank(found: Answer, pressed: Sequence[Entry]) -> None:
    """The best of one size, what cannot be told from it, and the smallest cheap cache."""
    compared = [p for p in pressed if p.delta_nll is not None]
    if n_windows(compared) < FEWEST_WINDOWS:
        found.few = n_windows(compared) if compared else None
        return
    fair = [p for p in compared if not (p.is_reference or p.equals_baseline or p.keeps_more)]
    fair = fair or [p for p in compared if not p.equals_baseline]
    if not fair:
        return
    by_size: dict[str, list[Entry]] = {}
    for entry in fair:
        by_size.setdefault(entry.size, []).append(entry)

    def rank(own: list[Entry]) -> tuple[float, float]:
        return -len(own), abs((own[0].kept_bytes if own[0].kept_bytes is not None else 1) - 0.5)

    own = min(by_size.values(), key=rank)
    _, quality = quality_of(own)
    best = min(own, key=lambda p: (quality[id(p)], p.label))
    found.best = best
    for other in sorted(own, key=lambda p: (quality[id(p)], p.label)):
        difference = None if other is best else paired(other, best)
        if difference is not None and difference.ci95 is not None and difference.ci95[0] <= 0:
            found.level.append(other.label)
    small = [p for p in fair if is_cheap(p) and (p.kept_bytes or 1) < 0.95]
    found.cheap = min(small, key=lambda p: (round(p.kept_bytes or 1, 2), quality_of(small)[1][id(p)]), default=None)


def _rank_stream(found: Answer, pressed: Sequence[Entry]) -> None:
    """The lowest loss at the largest budget."""
    sizes = [size for size in found.section.sizes if any(p.loss is not None for p in found.section.at(size))]
    own = [p for p in pressed if sizes and p.size == sizes[-1] and p.loss is not None]
    if own:
        found.best = min(own, key=lambda p: (p.loss, p.label))
        if len(own) > 1 and n_windows(own) < 2:
            found.few = n_windows(own)
