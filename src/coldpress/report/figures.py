"""Drawing surface of the plots: one look for PNG and page, colours that a page can change, the same bytes each time.

Every colour is drawn as that of a light page; in the SVG of a page each becomes a CSS variable, so that the dark mode
has its own. Texts from records are drawn as they are, never as formulas.
"""

from __future__ import annotations

import io
import itertools
import re
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from coldpress.errors import MissingDependencyError
from coldpress.records.wording import clean, short
from coldpress.report.sections import Section

# Series colours that stay apart for colour-blind readers, each with a marker of its own.
COLOURS = ("#0072b2", "#c84e00", "#00805c", "#a83f86", "#94690a", "#2b8fd0", "#5f4bb6", "#5c6b00")
DARK = ("#56b4f0", "#ff8c42", "#2fd1a0", "#f090c8", "#f0c050", "#9fd6ff", "#b3a5ff", "#cfd94a")
MARKERS = ("o", "s", "^", "D", "v", ">", "<", "p")
INK = {  # light, dark; where it is used
    "ink": ("#1b1f24", "#e6e8ea"),  # texts
    "axis": ("#6a737e", "#8b949e"),
    "grid": ("#dfe3e8", "#30363d"),
    "faint": ("#b6bdc5", "#4d555e"),  # series that are not in colour
    "ref": ("#57606b", "#a8b0b9"),  # reference lines
    "paper": ("#fefefe", "#15191e"),
    "bad": ("#b3261e", "#ff8a80"),
}
# What a page calls each colour: its light and its dark shade.
VARIABLES = {
    **{f"--{name}": pair for name, pair in INK.items()},
    **{f"--s{i}": pair for i, pair in enumerate(zip(COLOURS, DARK, strict=True))},
}
_RC = {
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.0, "text.parse_math": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "coldpress", "path.simplify": False, "axes.unicode_minus": True},
    **{"axes.edgecolor": INK["axis"][0], "axes.labelcolor": INK["ink"][0], "text.color": INK["ink"][0]},
    **{"xtick.color": INK["axis"][0], "ytick.color": INK["axis"][0], "grid.color": INK["grid"][0]},
    **{"xtick.labelcolor": INK["ink"][0], "ytick.labelcolor": INK["ink"][0], "axes.facecolor": "none"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **{"legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6, "lines.markersize": 5.5},
    **{"errorbar.capsize": 2.5, "figure.facecolor": "none", "axes.titlesize": 9.5, "axes.titlelocation": "left"},
}
DPI = 144
MIB = 1 / (1 << 20)


@dataclass(frozen=True)
class Style:
    """How a series is drawn; ``rank`` orders what lies above what."""

    color: str
    marker: str
    line: str = "-"
    width: float = 1.6
    rank: int = 3
    is_coloured: bool = True


REF = INK["ref"][0]
FAINT = Style(INK["faint"][0], ".", "-", 0.8, 1, False)


def styles(section: Section) -> dict[str, Style]:
    """The style of each series of a section: the same in all its plots."""
    found = {p.label: FAINT for p in section.all if not p.is_baseline}
    for i, label in enumerate(section.best()):
        found[label] = Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
    lines = (("random", ":", "x"), ("streaming_llm", "-.", "+"))
    for label in [p.label for p in section.all if p.is_reference]:
        line, marker = next(((line, marker) for name, line, marker in lines if label.startswith(name)), ("--", "1"))
        found[label] = Style(REF, marker, line, 1.3, 2)
    return found


@dataclass
class Drawing:
    """A finished picture."""

    kind: str  # what it shows, a word for its file name
    caption: str  # what it shows in words, with protocol and text; not escaped
    svg: str = ""  # for a page, colours as CSS variables, ids begun with ``prefix`` when asked for
    png: bytes = b""  # its bytes on a light ground
    file: str = ""  # the name of the PNG beside a report
    titles: dict[str, str] = field(default_factory=dict)

    def name(self, artist: Any, title: str) -> None:
        """Say what an artist is, for those who point at it on a page."""
        key = f"t{len(self.titles)}"
        artist.set_gid(key)
        self.titles[key] = clean(title)


def require_matplotlib() -> None:
    """Raises MissingDependencyError without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'The report draws with matplotlib, which is not installed: pip install "coldpress[report]", or use --table '
            "for the tables alone."
        ) from error


@contextmanager
def drawing(
    kind: str, caption: str, section: Section, size: tuple[float, float], prefix: str
) -> Iterator[tuple[Drawing, Any]]:
    """A figure of ``size`` inches to draw on, which the :class:`Drawing` holds in the end.

    ``caption`` may be added to until then; protocol, text and model follow it.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done, footer = Drawing(kind, caption), _footer(section)
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font does not have, axes without any value
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        below = figure.supxlabel(clean(footer), fontsize=7, color=INK["axis"][0], x=0.01, ha="left")
        yield done, figure
        done.caption += f" ({footer})"
        below.set_visible(False)  # a page has its caption beside the plot, a lone PNG has this line
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        done.svg = _inline(buffer.getvalue().decode("utf-8"), prefix, done.titles, f"{kind}: {done.caption}")
        below.set_visible(True)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=INK["paper"][0], metadata={"Software": None})
        done.png = _few_colours(buffer.getvalue())


def _few_colours(png: bytes) -> bytes:
    """The same picture in a palette: a plot has few colours, and its file is a third as large."""
    from PIL import Image  # comes with matplotlib

    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(small, format="PNG", optimize=True)
    return small.getvalue()


def _inline(svg: str, prefix: str, titles: dict[str, str], label: str) -> str:
    """matplotlib's file as an element of a page: no prolog, no metadata, ids that no other picture has."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=").replace('<style type="text/css">', "<style>")
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)  # of all elements of the page
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', "".join(re.findall("<[^>]*>", svg))))

    def element(match: re.Match[str]) -> str:
        """One tag; what stands between tags, numbers of the axes for instance, is left alone."""
        tag = match[0]
        key = re.search(r'\sid="([^"]+)"', tag)
        title = ""
        if key is not None:
            tag = tag.replace(key[0], f' id="{prefix}-{key[1]}"' if key[1] in used else "")
            title = f"<title>{escape(titles[key[1]])}</title>" if key[1] in titles and not tag.endswith("/>") else ""
        tag = re.sub(r'(href="#|url\(#)([^")]+)', rf"\g<1>{prefix}-\g<2>", tag)
        for variable, (light, _) in VARIABLES.items():
            colour = "currentColor" if variable == "--ink" else f"var({variable})"
            tag = re.sub(re.escape(light), colour, tag, flags=re.IGNORECASE)
        tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", tag)
        return re.sub(r"(\d+\.\d{2})\d+", r"\1", tag) + title  # a hundredth of a point is enough

    svg = re.sub("<[^>]*>", element, svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    wide = f"--wide: {float(width) / 72 * 6.6:.1f}rem"  # texts are as large in a narrow plot as in a wide one
    head = f'<svg viewBox="0 0 {width} {height}" style="{wide}" role="img" aria-label="{escape(clean(label))}">'
    return head + svg[svg.index(">") + 1 :].strip()


MOST_PANELS = 4


def _footer(section: Section) -> str:
    """Protocol, text and model: what every number of a section depends on."""
    first = section.first
    subset = f"/{first['subset']}" if first.get("subset") else ""
    return (
        f"protocol {clean(first['protocol'])}; text {clean(short(first['dataset']) + subset)}, sha256 "
        f"{clean(first['text_sha256'][:12])}; model {clean(short(first['model']))}"
    )


def said_of_colours(section: Section) -> str:
    rest = len(section.labels) - len(section.best())
    faint = f" The {len(section.best())} presses of the best mean rank are in colour, the {rest} others thin grey."
    return faint if rest else ""


def scale(axis: Any, values: Sequence[float], which: str = "y") -> str:
    """A symmetric logarithmic axis where one press would flatten the rest; what to say of it in a caption."""
    sizes = [abs(v) for v in values if v]
    if len(sizes) < 4 or max(sizes) < 15 * statistics.median(sizes):
        return ""
    limit = float(f"{statistics.median(sizes):.0e}")
    if which == "x":
        axis.set_xscale("symlog", linthresh=limit)
    else:
        axis.set_yscale("symlog", linthresh=limit)
    plain_numbers(axis.xaxis if which == "x" else axis.yaxis)
    return f" The axis of losses is linear up to {limit:g} and logarithmic above."


def plain_numbers(axis: Any) -> None:
    """``0.01`` beside a logarithmic axis; the formulas that matplotlib writes there are not drawn."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def bars(values: Sequence[float], spans: Sequence[Sequence[float] | None]) -> list[list[float]] | None:
    """Error bars as matplotlib wants them, from the ends of intervals; None where no value has one."""
    if not any(spans):
        return None
    ends = [span or (value, value) for value, span in zip(values, spans, strict=True)]
    low = [max(0.0, value - end[0]) for value, end in zip(values, ends, strict=True)]
    return [low, [max(0.0, end[1] - value) for value, end in zip(values, ends, strict=True)]]


def curve(done: Drawing, axis: Any, style: Style, label: str, xs: list[Any], ys: list[float], bars: Any = None) -> Any:
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


def shared_legend(figure: Any, axes: Sequence[Any], columns: int = 5) -> None:
    """One legend for several panels, above them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)

    def width(columns: int) -> float:  # in inches, nearly
        rows, longer = divmod(len(found), columns)
        ends = [i * rows + min(i, longer) for i in range(columns + 1)]
        return sum(0.078 * max(map(len, [*found][a:b]), default=0) + 0.6 for a, b in itertools.pairwise(ends))

    columns = next((n for n in range(columns, 1, -1) if width(n) <= figure.get_figwidth()), 1)
    figure.legend([*found.values()], [*found], loc="outside upper left", ncols=columns, handlelength=2.4)


def grid(figure: Any, n: int, columns: int, across: str, **options: Any) -> list[Any]:
    """The axes of ``n`` panels, row by row, the lowest of each column with ``across`` below it."""
    rows = -(-n // columns)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes[n:]:
        axis.set_visible(False)
    for axis in axes[max(0, n - columns) : n]:
        axis.set_xlabel(across)
    return axes[:n]


def panels(section: Section, has: Any) -> list[str]:
    """At most four sizes that have something to draw, the smallest and the largest among them."""
    sizes = [size for size in section.sizes if any(has(p) for p in section.at(size))]
    if len(sizes) <= MOST_PANELS:
        return sizes
    step = (len(sizes) - 1) / (MOST_PANELS - 1)
    return [sizes[round(i * step)] for i in range(MOST_PANELS)]


def title(size: str) -> str:
    return f"ratio {size}" if size.replace(".", "", 1).isdigit() else size
