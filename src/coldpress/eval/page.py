"""The HTML page of a report: one file, nothing fetched from anywhere, every text escaped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from coldpress.eval.columns import Cell
from coldpress.eval.document import Report
from coldpress.eval.figures import css_colours

__all__ = ["page"]

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"


def page(report: Report) -> str:
    """The whole page."""
    light, dark = ({k: Markup(v) for k, v in colours.items()} for colours in css_colours())
    return _template().render(report=report, light=light, dark=dark, style=_text("page.css"), script=_text("page.js"))


def _text(name: str) -> Markup:
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def _sort_key(cell: Cell) -> str:
    """The number that a column is sorted by, as it is in the record."""
    return "" if cell.value is None else repr(cell.value)


@functools.cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"sort_key": _sort_key, "drawn": Markup}
    return environment.from_string((ASSETS / "page.html").read_text(encoding="utf-8"))
