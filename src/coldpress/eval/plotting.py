"""What the plots of a report share: captions, styles, axes, legends, and a series with its error bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from coldpress.eval.figures import INK, MARKERS, Drawing, Style, styles
from coldpress.eval.report import short
from coldpress.eval.sections import Section
from coldpress.eval.wording import clean

__all__ = [
    "REF",
    "caption_tail",
    "curve",
    "legend",
    "panels",
    "plain_numbers",
    "said_of_colours",
    "scale",
    "section_styles",
    "shared_legend",
    "title",
]

MOST_PANELS = 4
REF = INK["ref"][0]


def caption_tail(section: Section) -> str:
    """Protocol, text and model: what every number of a section depends on."""
    first = section.first
    subset = f"/{first['subset']}" if first.get("subset") else ""
    return (
        f"protocol {clean(first['protocol'])}; text {clean(short(first['dataset']) + subset)}, sha256 "
        f"{clean(first['text_sha256'][:12])}; model {clean(short(first['model']))}"
    )


def section_styles(section: Section) -> dict[str, Style]:
    references = [p.label for p in section.all if p.is_reference]
    return styles([p.label for p in section.all if not p.is_baseline], section.best(), references)


def said_of_colours(section: Section) -> str:
    rest = len(section.labels) - len(section.best())
    faint = f" The {len(section.best())} presses of the best mean rank are in colour, the {rest} others thin grey."
    return faint if rest else ""


def scale(axis: Any, values: Sequence[float]) -> str:
    """A symmetric logarithmic axis where one press would flatten the rest; what to say of it in a caption."""
    sizes = [abs(v) for v in values if v]
    if len(sizes) < 4 or max(sizes) < 15 * statistics.median(sizes):
        return ""
    limit = float(f"{statistics.median(sizes):.0e}")
    axis.set_yscale("symlog", linthresh=limit)
    plain_numbers(axis.yaxis)
    return f" The vertical axis is linear up to {limit:g} and logarithmic above."


def plain_numbers(axis: Any) -> None:
    """``0.01`` beside a logarithmic axis; the formulas that matplotlib writes there are not drawn."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def curve(done: Drawing, axis: Any, style: Style, label: str, xs: list[Any], ys: list[float], bars: Any) -> Any:
    """A series with its error bars; those in grey have none, and say their name when pointed at."""
    options = {"color": style.color, "marker": style.marker, "linestyle": style.line, "linewidth": style.width}
    if not style.is_coloured:
        (line,) = axis.plot(xs, ys, zorder=style.rank, markersize=3, **options)
        done.name(line, label)
        return line
    options |= {"markeredgecolor": INK["paper"][0]} if style.marker in MARKERS else {}
    drawn = axis.errorbar(xs, ys, yerr=bars, zorder=style.rank, elinewidth=1.0, label=clean(label), **options)
    done.name(drawn.lines[0], label)
    return drawn


def legend(figure: Any, axis: Any, order: Any) -> None:
    """To the right of a plot, in the order in which the lines end there."""
    handles, names = axis.get_legend_handles_labels()
    pairs = sorted(zip(handles, names, strict=True), key=lambda pair: (order(pair[1]), pair[1]))
    figure.legend([h for h, _ in pairs], [n for _, n in pairs], loc="outside right upper", handlelength=2.6)


def shared_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for several panels, above them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend([*found.values()], [*found], loc="outside upper left", ncols=5, handlelength=2.4)


def panels(section: Section, has: Any) -> list[str]:
    """At most four sizes that have something to draw, the smallest and the largest among them."""
    sizes = [size for size in section.sizes if any(has(p) for p in section.at(size))]
    if len(sizes) <= MOST_PANELS:
        return sizes
    step = (len(sizes) - 1) / (MOST_PANELS - 1)
    return [sizes[round(i * step)] for i in range(MOST_PANELS)]


def title(size: str) -> str:
    return f"ratio {size}" if size.replace(".", "", 1).isdigit() else size
