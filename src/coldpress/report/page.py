"""A report as files: an HTML page, which fetches nothing and escapes every text, and a summary in Markdown."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from coldpress.io.output import check_writable, write_file
from coldpress.records.results import Collection
from coldpress.records.wording import at_words, capital, clean, escape, fenced, listed, model_name, table_lines
from coldpress.report.apart import added
from coldpress.report.columns import Cell, Table, opening_table, tables
from coldpress.report.figures import VARIABLES, Drawing, require_matplotlib
from coldpress.report.glance import CHEAP, answer, beside, chosen, lead_of, rows
from coldpress.report.phrases import contexts, sentences, versions
from coldpress.report.plots import draw
from coldpress.report.sections import KINDS, Entry, Section, sections, text_name
from coldpress.report.terminal import describe

MOST_SKIPPED = 30  # files that are named; the rest are counted
METHOD = (
    "ΔNLL is the loss under a press minus the loss of the uncompressed cache on the same tokens, in nats a token; PPL "
    "is exp(loss), so that ΔNLL 0.01 is about +1 % of PPL.",
    "KL is the mean Kullback-Leibler divergence of the next-token distribution from the uncompressed model's, in "
    "nats; it sees changes that a perplexity averages away.",
    "Intervals, drawn as bars or in brackets, are 95 % confidence intervals of paired differences, the window (or "
    "text) as the unit of sampling, Student's t. One press is told from another only where the interval of their "
    "paired difference excludes 0. Intervals are of one comparison each: among many presses some are ahead by chance.",
    f"Cheap: the whole interval lies below +{CHEAP * 100:g} % of PPL. Speed is called a gain only where every round "
    "agrees.",
    "Intervals of scores stay in 0 to 1: Wilson's of a score, Newcombe's of a paired difference.",
    "no_press is measured beside every press, also where one press only was asked for: every number is compared with "
    "it.",
    "Numbers of different protocols, texts or models are in different sections and are not comparable; the opening "
    "shows other texts and tasks beside each other, each in a column of its own.",
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
    """Everything a report shows."""
    require_matplotlib()
    records = collection.records
    found = sections(records)
    of_headline = added(found, lambda section: (where(section), section.kind))
    of_title = added(found, _title)
    parts = [_part(section, i, of_title[id(section)], of_headline[id(section)]) for i, section in enumerate(found, 1)]
    lead = found.index(lead_of(found))
    opening = _opening(found[lead], parts[lead], found)
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


def _opening(section: Section, part: Part, all_sections: Sequence[Section]) -> Opening:
    found, others = rows(section), beside(section, all_sections)
    shown = chosen(found, others)
    table = opening_table(shown, others)
    notes = contexts(section)
    for about in dict.fromkeys(about for _, about in table.heads if about):
        notes.append(f"{listed([head for head, own in table.heads if own == about])}: {about}.")
    if len(shown) < len(found):
        which = "presses that tasks were given to, at one size" if len({row.size for row in shown}) == 2 else "best"
        notes.append(f"The {which}, {len(shown)} of {len(found)} rows; all are below.")
    notes += versions([section, *others])
    title = part.title if len(all_sections) > 1 else "In a minute"
    figure = next((f for f in part.figures if f.kind == "kl"), next(iter(part.figures), None))
    return Opening(title, tuple(sentences(answer(section))), table, " ".join(notes), figure)


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
        caption=" ".join([capital(caption) + ".", *versions([section])]),
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
    said += "".join(f"; {line}" for line in map(clean, collection.twice))
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


ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"


# The page


def page(report: Report) -> str:
    """The whole page."""
    light, dark = ({name: Markup(pair[i]) for name, pair in VARIABLES.items()} for i in (0, 1))
    return _template().render(report=report, light=light, dark=dark, style=_text("page.css"), script=_text("page.js"))


def _text(name: str) -> Markup:
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def _bar(cell: Cell) -> Markup:
    """An interval on its column's scale: a line with a dot, a thin line at 0, an arrow where it goes on."""
    if cell.bar is None:
        return Markup("")
    low, high, middle, zero = (3 + 94 * min(max(x, 0.0), 1.0) for x in cell.bar)
    ends = "".join(
        f'<path d="M{at} 3l{step} 3l{-step} 3z" fill="var(--ref)"/>'
        for at, step, is_off in ((3, -3, cell.bar[0] < 0), (97, 3, cell.bar[1] > 1))
        if is_off
    )
    dot = f'<circle cx="{middle:.1f}" cy="6" r="2.6" fill="var(--s0)"/>' if 0 <= cell.bar[2] <= 1 else ""
    return Markup(
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="M{zero:.1f} 0v12" stroke="var(--faint)"/>'
        f'<path d="M{low:.1f} 6H{high:.1f}" stroke="var(--ref)" stroke-width="1.5"/>{dot}{ends}</svg>'
    )


@functools.cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bar": _bar, "drawn": Markup}
    environment.filters["sort_key"] = lambda cell: "" if cell.value is None else repr(cell.value)  # as in the record
    return environment.from_string((ASSETS / "page.html").read_text(encoding="utf-8"))


# Markdown, and the files


def summary(report: Report) -> str:
    """The whole text."""
    lines = [f"# {escape(report.title)}", "", escape(report.counts), "", "## " + escape(report.opening.title), ""]
    lines += [escape(" ".join(report.opening.sentences)), "", *_table(report.opening.table), ""]
    lines += [escape(report.opening.notes), ""] if report.opening.notes else []
    lines += _figure(report.opening.figure) if report.opening.figure is not None else []
    lines += ["## Conclusions", "", *(f"* {escape(part.headline)}" for part in report.parts), ""]
    for part in report.parts:
        lines += _part_lines(part)
    lines += ["## How to read this", "", *(f"* {escape(sentence)}" for sentence in report.method), ""]
    if report.skipped:
        lines += ["## Files left out", "", *(f"* {escape(line)}" for line in report.skipped), ""]
    lines += ["## How it was made", ""]
    lines += [*fenced(report.commands), ""] if report.commands else []
    for environment in report.environments:
        lines += ["* " + "; ".join(f"{escape(name)} {escape(value)}" for name, value in environment)]
    return "\n".join(lines).rstrip() + "\n"


def _part_lines(part: Part) -> list[str]:
    lines = [f"## {escape(part.title)}", "", escape(part.caption), ""]
    lines += [f"* {escape(finding)}" for finding in part.findings]
    lines += [""] if part.findings else []
    for figure in part.figures:
        lines += _figure(figure)
    for table in part.tables:
        lines += [*_table(table), ""]
    return lines


def _figure(figure: Drawing) -> list[str]:
    return [f"![{escape(figure.kind)}]({figure.file})", "", escape(figure.caption), ""]


def _table(table: Table) -> list[str]:
    rows = [[f"{cell.text} {cell.said}".strip() for cell in row] for row in table.rows]
    return table_lines([[head for head, _ in table.heads], *rows])


def write_report(collection: Collection, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and the plots into ``folder``; each whole or as it was before."""
    check_writable(folder)
    report = make_report(collection)
    figures = [*(f for part in report.parts for f in part.figures), report.opening.figure]
    files = {f.file: f.png for f in figures if f is not None}
    files |= {"report.md": summary(report).encode(), "report.html": page(report).encode()}
    return [write_file(folder / name, content) for name, content in files.items()]


# A section in words: the minute's answer, and what is odd or failed; who is ahead of whom, the answer alone says


def where(section: Section) -> str:
    """``On WikiText-103 with pythia-70m``."""
    return f"On {clean(text_name(section.first))} with {model_name(section.first)}"


def headline(section: Section, apart: str = "") -> str:
    """What to quote from a section; ``apart`` tells it from another of the same text and model."""
    lead = where(section) + (f" ({apart})" if apart else "")
    if not section.entries:
        return f"{lead}, nothing was finished under {clean(section.first['protocol'])}."
    return f"{lead}: {' '.join(sentences(answer(section)))}"


def findings(section: Section) -> list[str]:
    """What a reader of the numbers must know: points that hide or are left out, and what went wrong."""
    said = _oddities(section) if section.kind == "quality" else []
    return said + [f"{clean(p.name)} {_error_words(p)}." for p in section.unfinished]


def _oddities(section: Section) -> list[str]:
    """Points that removed less than others, or are the same as the baseline or each other to the last digit."""
    said = []
    for entry in section.entries:
        if entry.equals_baseline and entry.removed:
            said.append(
                f"{clean(entry.name)} has the uncompressed model's loss in every window, though "
                f"{100 * entry.removed:.0f} % was removed: check that it was really applied."
            )
        elif entry.equals_baseline:
            said.append(f"{clean(entry.name)} removed nothing, and changed nothing.")
    for size in section.sizes:
        more = [f"{p.label} ({p.removed:.2f})" for p in section.at(size) if p.keeps_more and not p.equals_baseline]
        if more:
            said.append(
                f"{capital(at_words(size))}, less than that was removed by {listed(more)}; left out of the comparison."
            )
        alike: dict[str, list[Entry]] = {}
        for entry in section.at(size):
            if entry.per_window and not entry.equals_baseline:
                alike.setdefault(repr([w["nll"] for w in entry.per_window]), []).append(entry)
        for same in alike.values():
            if len(same) > 1:
                said.append(f"{listed([p.label for p in same])} have the same loss in every window {at_words(size)}.")
    return said


def _error_words(entry: Entry) -> str:
    """``failed: ValueError: ...`` or how far an interrupted run came."""
    if entry.record["status"] == "failed":
        said = clean(entry.record.get("error") or "no error is recorded")
        return f"failed: {said if len(said) <= 200 else said[:197] + '...'}"
    if entry.record["status"] == "interrupted":
        windows = entry.record.get("windows")
        return "was interrupted" + (f" after {windows:g} window{'' if windows == 1 else 's'}" if windows else "")
    return f"has the status {clean(entry.record['status'])[:40]}"
