"""The Markdown summary of a report: the same words, tables and plots, for a README or a pull request."""

from __future__ import annotations

import re

from coldpress.eval.columns import Table
from coldpress.eval.document import Part, Report

__all__ = ["escape", "summary"]


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a paragraph and in a table's cell."""
    text = re.sub(r"([\\`*\[\]<>|#~$&!])", r"\\\1", " ".join(text.split()))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is one
    text = re.sub(r"(?i)\b(https?|ftp|mailto)(?=:)|\bwww(?=\.)", lambda m: f"{m[0]}\u200b", text)
    return re.sub(r"^([-+=]|\d+[.)])(?=\s|$)", r"\\\1", text)


def summary(report: Report) -> str:
    """The whole text."""
    lines = [f"# {escape(report.title)}", "", escape(report.counts), "", "## Conclusions", ""]
    lines += [f"* {escape(part.headline)}" for part in report.parts] + [""]
    for part in report.parts:
        lines += _part(part)
    lines += ["## How to read this", "", *(f"* {escape(sentence)}" for sentence in report.method), ""]
    if report.skipped:
        lines += ["## Files left out", "", *(f"* {escape(line)}" for line in report.skipped), ""]
    lines += ["## How it was made", ""]
    if report.commands:
        longest = max(len(run) for run in re.findall("`*", "".join(report.commands)))
        fence = "`" * max(3, longest + 1)
        lines += [fence, *report.commands, fence, ""]
    for environment in report.environments:
        lines += ["* " + "; ".join(f"{escape(name)} {escape(value)}" for name, value in environment)]
    return "\n".join(lines).rstrip() + "\n"


def _part(part: Part) -> list[str]:
    lines = [f"## {escape(part.title)}", "", escape(part.caption), ""]
    lines += [f"* {escape(finding)}" for finding in part.findings]
    lines += [""] if part.findings else []
    for figure in part.figures:
        caption = escape(figure.drawing.caption)
        lines += [f"![{escape(figure.drawing.kind)}]({figure.file})", "", caption, ""]
    for table in part.tables:
        lines += [*_table(table), ""]
    return lines


def _table(table: Table) -> list[str]:
    heads = [escape(head) for head, _ in table.heads]
    rows = [[escape(cell.text) for cell in row] for row in table.rows]
    rule = ["---", *("---:" for _ in heads[1:])]
    return [f"| {' | '.join(row)} |" for row in [heads, rule, *rows]]
