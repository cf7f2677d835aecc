"""A report as files: an HTML page, which fetches nothing and escapes every text, and a summary in Markdown."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from coldpress.errors import OutputError
from coldpress.eval.columns import Cell, Table
from coldpress.eval.document import Part, Report, make_report
from coldpress.eval.figures import VARIABLES, Drawing
from coldpress.eval.results import Collection, check_writable
from coldpress.io.files import replace_file

__all__ = ["escape", "fenced", "page", "summary", "table_lines", "write_file", "write_report"]

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"


def page(report: Report) -> str:
    """The whole page."""
    light, dark = ({name: Markup(pair[i]) for name, pair in VARIABLES.items()} for i in (0, 1))
    return _template().render(report=report, light=light, dark=dark, style=_text("page.css"), script=_text("page.js"))


def _text(name: str) -> Markup:
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def _sort_key(cell: Cell) -> str:
    """The number that a column is sorted by, as it is in the record."""
    return "" if cell.value is None else repr(cell.value)


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
    environment.filters |= {"bar": _bar, "sort_key": _sort_key, "drawn": Markup}
    return environment.from_string((ASSETS / "page.html").read_text(encoding="utf-8"))


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a paragraph and in a table's cell."""
    text = re.sub(r"([\\`*\[\]<>|#~$&!])", r"\\\1", " ".join(text.split()))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is one
    text = re.sub(r"(?i)\b(https?|ftp|mailto)(?=:)|\bwww(?=\.)", lambda m: f"{m[0]}\u200b", text)
    return re.sub(r"^([-+=]|\d+[.)])(?=\s|$)", r"\\\1", text)


def summary(report: Report) -> str:
    """The whole text."""
    lines = [f"# {escape(report.title)}", "", escape(report.counts), "", "## " + escape(report.opening.title), ""]
    lines += [escape(" ".join(report.opening.sentences)), "", *_table(report.opening.table), ""]
    lines += [escape(report.opening.notes), ""] if report.opening.notes else []
    lines += _figure(report.opening.figure) if report.opening.figure is not None else []
    lines += ["## Conclusions", "", *(f"* {escape(part.headline)}" for part in report.parts), ""]
    for part in report.parts:
        lines += _part(part)
    lines += ["## How to read this", "", *(f"* {escape(sentence)}" for sentence in report.method), ""]
    if report.skipped:
        lines += ["## Files left out", "", *(f"* {escape(line)}" for line in report.skipped), ""]
    lines += ["## How it was made", ""]
    lines += [*fenced(report.commands), ""] if report.commands else []
    for environment in report.environments:
        lines += ["* " + "; ".join(f"{escape(name)} {escape(value)}" for name, value in environment)]
    return "\n".join(lines).rstrip() + "\n"


def _part(part: Part) -> list[str]:
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


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, of which the first row is the head and the first column a text."""
    rule = ["---", *("---:" for _ in rows[0][1:])]
    head, *body = [[escape(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *body]]


def fenced(lines: Sequence[str]) -> list[str]:
    """Code in Markdown, whatever backticks are in it."""
    fence = "`" * max(3, 1 + max(len(run) for run in re.findall("`*", "".join(lines))))
    return [fence, *lines, fence]


def write_report(collection: Collection, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and the plots into ``folder``; each whole or as it was before.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the folder cannot be written to.
    """
    check_writable(folder)
    report = make_report(collection)
    figures = [*(f for part in report.parts for f in part.figures), report.opening.figure]
    files = {f.file: f.png for f in figures if f is not None}
    files |= {"report.md": summary(report).encode(), "report.html": page(report).encode()}
    return [write_file(folder / name, content) for name, content in files.items()]


def write_file(path: Path, content: bytes) -> Path:
    """Write a file whole, or leave it as it was; raises OutputError where it cannot be."""
    try:
        replace_file(path, lambda part: part.write_bytes(content))
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r} ({error.strerror}): choose another --output") from error
    return path
