"""A report from records: its parts, put together once, for the page and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from coldpress.eval.apart import added
from coldpress.eval.columns import Table, opening_table, tables
from coldpress.eval.conclusions import WITHIN, findings, headline, where
from coldpress.eval.figures import Drawing, require_matplotlib
from coldpress.eval.glance import answer, chosen, rows
from coldpress.eval.phrases import contexts, sentences
from coldpress.eval.plots import draw
from coldpress.eval.report import describe
from coldpress.eval.results import Collection
from coldpress.eval.sections import KINDS, Section, lead_of, sections
from coldpress.eval.wording import clean, listed

__all__ = ["Part", "Report", "make_report"]

MOST_SKIPPED = 30  # files that are named; the rest are counted
METHOD = (
    "ΔNLL is the loss under a press minus the loss of the uncompressed cache on the same tokens, in nats a token; PPL "
    "is exp(loss), so that ΔNLL 0.01 is about +1 % of PPL.",
    "KL is the mean Kullback-Leibler divergence of the next-token distribution from the uncompressed model's, in "
    "nats; it sees changes that a perplexity averages away.",
    "Intervals, drawn as bars or in brackets, are 95 % confidence intervals of paired differences, the window (or "
    "text) as the unit of sampling, Student's t. One press is called ahead of another only where the interval of their "
    "paired difference excludes 0. Intervals are of one comparison each: among many presses some are ahead by chance.",
    f"Cheap: the whole interval lies below {WITHIN}. Speed is called a gain only where every round agrees.",
    "Intervals of scores stay in 0 to 1: Wilson's of a score, Newcombe's of a paired difference.",
    "no_press is measured beside every press, also where one press only was asked for: every number is compared with "
    "it.",
    "Numbers of different protocols, texts or models are in different sections and are not comparable.",
)
METHOD_OF_BENCHMARKS = (
    "Scores of a benchmark are its own, in 0 to 1; their intervals are bootstrapped over contexts with all their "
    "questions."
)


@dataclass(frozen=True)
class Part:
    """A section, ready to be shown; plain texts, escaped by whoever shows them."""

    anchor: str
    title: str
    caption: str
    headline: str
    findings: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[Drawing, ...]


@dataclass(frozen=True)
class Opening:
    """What a reader has a minute for: of one section three sentences, a table and a plot."""

    title: str
    sentences: tuple[str, ...]
    table: Table
    notes: str
    figure: Drawing | None


@dataclass(frozen=True)
class Report:
    title: str
    counts: str
    opening: Opening
    parts: tuple[Part, ...]
    method: tuple[str, ...]
    commands: tuple[str, ...]
    environments: tuple[tuple[tuple[str, str], ...], ...]
    skipped: tuple[str, ...]


def make_report(collection: Collection) -> Report:
    """Everything a report shows.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    records = collection.records
    found = sections(records)
    of_headline = added(found, lambda section: (where(section), section.kind))
    of_title = added(found, _title)
    parts = [_part(section, i, of_title[id(section)], of_headline[id(section)]) for i, section in enumerate(found, 1)]
    lead = found.index(lead_of(found))
    opening = _opening(found[lead], parts[lead], len(found) > 1)
    if opening.figure is not None:
        rest = tuple(figure for figure in parts[lead].figures if figure is not opening.figure)
        parts[lead] = replace(parts[lead], figures=rest)
    names = list(dict.fromkeys(where(section).removeprefix("On ") for section in found))
    title = f"KV-cache compression: {names[0]}" if len(names) == 1 else "KV-cache compression report"
    has_benchmarks = any(str(record["protocol"]).startswith("benchmark") for record in records)
    return Report(
        title=title,
        counts=_counts(collection),
        opening=opening,
        parts=tuple(parts),
        method=(*METHOD, *([METHOD_OF_BENCHMARKS] if has_benchmarks else [])),
        commands=tuple(dict.fromkeys(clean(r["command"]) for r in records if r.get("command"))),
        environments=_environments(records),
        skipped=tuple(map(clean, collection.skipped[:MOST_SKIPPED])),
    )


def _opening(section: Section, part: Part, is_one_of_many: bool) -> Opening:
    found = rows(section)
    shown = chosen(found)
    notes = contexts(section)
    if len(shown) < len(found):
        notes.append(f"The best presses of each size, {len(shown)} of {len(found)} rows; all are below.")
    title = part.title if is_one_of_many else "In a minute"
    figure = next((f for f in part.figures if f.kind == "kl"), next(iter(part.figures), None))
    return Opening(title, tuple(sentences(answer(section))), opening_table(shown), " ".join(notes), figure)


def _title(section: Section) -> str:
    return f"{where(section).removeprefix('On ')}: {KINDS[section.kind]}, {clean(section.first['protocol'])}"


def _part(section: Section, number: int, of_title: str, of_headline: str) -> Part:
    first = next((p.record for p in section.entries), section.first)
    caption = clean(describe(first))
    if section.kind == "speed" and len(section.contexts) > 1:  # of which the first record knows its own
        said = f"timed with {listed([f'{n:,}' for n in section.contexts])} tokens of context"
        caption = re.sub(r"timed with [\d,]+ tokens of context", said, caption)
    if first.get("ppl_preset"):
        caption += f"; preset {clean(first['ppl_preset'])}"
    figures = draw(section, f"p{number}")
    for i, figure in enumerate(figures):
        same = sum(other.kind == figure.kind for other in figures[:i])
        figure.file = f"{number}-{figure.kind}{f'-{same + 1}' if same else ''}.png"
    return Part(
        anchor=f"part-{number}",
        title=_title(section) + (f", {of_title}" if of_title else ""),
        caption=caption[0].upper() + caption[1:] + ".",
        headline=headline(section, of_headline),
        findings=tuple(findings(section)),
        tables=tuple(tables(section)),
        figures=tuple(figures),
    )


def _counts(collection: Collection) -> str:
    """How much there was, and what did not come to an end."""
    records = collection.records
    counts = {status: sum(r["status"] == status for r in records) for status in ("failed", "interrupted")}
    said = f"{len(records)} record{'' if len(records) == 1 else 's'}"
    parts = [f"{n} {status}" for status, n in counts.items() if n]
    said += f", {', '.join(parts)}" if parts else ", none of them failed"
    n = len(collection.skipped)
    if n:
        files = "1 other file that is no record was" if n == 1 else f"{n} other files that are no records were"
        said += f"; {files} left out"
    return f"{said}."


def _environments(records: Sequence[dict[str, Any]]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Each different machine and its versions, once; how busy it was changes all the time and is left out."""
    found = (
        tuple(
            (clean(name), clean(", ".join(map(str, value)) if isinstance(value, list) else value))
            for name, value in record["env"].items()
            if value is not None and name != "loadavg"
        )
        for record in records
    )
    return tuple({frozenset(env): env for env in found}.values())
