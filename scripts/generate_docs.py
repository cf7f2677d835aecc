#!/usr/bin/env python3
"""Write the generated parts of the documents: the list of presses and the tables of committed results.

    python scripts/generate_docs.py            write them
    python scripts/generate_docs.py --check    exit with 1 if a document is not what it would write

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. NAME is ``presses``, or
``results FOLDER`` for the table of the JSON files in benchmarks/FOLDER.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from coldpress.errors import ColdpressError
from coldpress.eval.report import describe, table
from coldpress.eval.results import read_results
from coldpress.presses.registry import catalogue

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/presses.md")
PART = re.compile(r"(<!-- generated: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def presses() -> str:
    """The catalogue as a Markdown table."""
    lines = ["| name | class | keeps | source | needs |", "|---|---|---|---|---|"]
    for info in catalogue():
        what = info.summary.removeprefix("Keep ").rstrip(".")
        source = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", info.source)
        source = source.split(" Differs from")[0].rstrip(".")
        lines.append(
            f"| `{info.name}` | `{info.call}` | {what} | {source} | {info.needs.split(' Cost:')[0].rstrip('.')} |"
        )
    return "\n".join(lines)


def results(folder: str) -> str:
    """The table of the results in benchmarks/``folder``, sorted by ratio and loss, with what they were measured on."""
    records = read_results(ROOT / "benchmarks" / folder)
    if not records:
        raise ColdpressError(f"benchmarks/{folder} holds no results")
    records.sort(key=lambda r: (r["compression_ratio"] or 0.0, r["loss"] if r["loss"] is not None else 0.0))
    return f"{table(records)}\n\n{describe(records[0])}."


def generated(name: str) -> str:
    kind, _, argument = name.partition(" ")
    makers = {"presses": lambda: presses(), "results": lambda: results(argument)}
    if kind not in makers:
        raise ColdpressError(f"nothing called {name!r} is generated; there are {', '.join(makers)}")
    return makers[kind]()


def render(text: str) -> str:
    """``text`` with its generated parts made anew."""
    return PART.sub(lambda m: f"{m[1]}{generated(m['name'])}\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
