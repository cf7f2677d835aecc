"""The plots of losses: against ratio, bytes and distance, with the references and with what failed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from coldpress.eval.figures import INK, MARKERS, Drawing, Style, drawing, styles
from coldpress.eval.points import Point, Section
from coldpress.eval.report import short
from coldpress.eval.wording import clean

__all__ = ["caption_tail", "draw", "section_styles"]

MOST_PANELS = 4
REF, FADED, BAD = INK["ref"][0], INK["faint"][0], INK["bad"][0]


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


def draw(section: Section, prefix: str) -> list[Drawing]:
    """All plots that the records of a section allow."""
    from coldpress.eval.plots_speed import draw_speed
    from coldpress.eval.plots_tasks import draw_tasks

    look = section_styles(section)
    if section.kind == "tasks":
        return draw_tasks(section, look, prefix)
    found: list[Drawing | None] = []
    if section.kind == "quality":
        found = [_quality(section, look, f"{prefix}q"), _pareto(section, look, f"{prefix}p")]
        found.append(_distance(section, look, f"{prefix}d"))
    elif section.kind == "stream":
        found = [_positions(section, look, f"{prefix}n")]
    found += draw_speed(section, look, f"{prefix}s")
    return [one for one in found if one is not None]


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


def _bars(point: Point) -> list[list[float]] | None:
    ci = point.delta_nll_ci95
    if ci is None:
        return None
    return [[max(0.0, point.delta_nll - ci[0])], [max(0.0, ci[1] - point.delta_nll)]]


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


def _quality(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    compared = [p for p in section.points if p.delta_nll is not None and p.at is not None and not p.is_baseline]
    strip = [p for p in section.unfinished if not p.is_baseline] + [p for p in compared if p.equals_baseline]
    if not compared and not strip:
        return None
    if len({p.size for p in section.all if not p.is_baseline}) <= 1:
        return _forest(section, look, compared, strip, prefix)
    caption = (
        "Loss against the fraction removed: the difference to the uncompressed cache (no_press, dashed at 0) in nats a "
        "token, with paired 95 % intervals; lower is better. Small sideways steps only keep bars apart."
        f"{said_of_colours(section)}"
    )
    with drawing("quality", "", caption_tail(section), (8.4, 4.6 + 0.3 * bool(strip)), prefix) as (done, figure):
        grid = figure.add_gridspec(2 if strip else 1, 1, height_ratios=[1, 0.13 + 0.05 * bool(strip)][: 2 if strip else 1])
        axis = figure.add_subplot(grid[0])
        axis.axhline(0, color=REF, linestyle="--", linewidth=1.2, label="no_press (uncompressed)", zorder=2)
        labels = sorted({p.label for p in compared}, key=lambda name: (look[name].rank, name))
        coloured = [name for name in labels if look[name].is_coloured]
        for name in labels:
            own = sorted((p for p in compared if p.label == name), key=lambda p: p.at or 0)
            step = 0.0 if name not in coloured else (coloured.index(name) - (len(coloured) - 1) / 2) * 0.0035
            bars = [_bars(p) or [[0.0], [0.0]] for p in own]
            joined = [[b[0][0] for b in bars], [b[1][0] for b in bars]]
            curve(done, axis, look[name], name, [p.at + step for p in own], [p.delta_nll for p in own], joined)
        note = scale(axis, [p.delta_nll for p in compared])
        axis.set_ylabel("Δ loss (nats a token)")
        if not note and compared:
            _percent_axis(axis)
        last = {name: max((p for p in compared if p.label == name), key=lambda p: p.at or 0).delta_nll for name in labels}
        legend(figure, axis, lambda name: -last.get(name, 0.0))
        if strip:
            note += _strip(figure.add_subplot(grid[1], sharex=axis), strip)
            axis.tick_params(labelbottom=False)
        figure.axes[-1 if strip else 0].set_xlabel("fraction of the cache removed")
        done.caption = f"{caption}{note} ({caption_tail(section)})"
    return done


def _percent_axis(axis: Any) -> None:
    """The same in per cent of perplexity, on the right."""
    import numpy as np

    right = axis.secondary_yaxis(
        "right", functions=(lambda d: 100 * np.expm1(np.minimum(d, 50)), lambda p: np.log1p(np.maximum(p, -99.99) / 100))
    )
    right.set_ylabel("change of PPL (%)")
    right.spines["right"].set_visible(False)


def legend(figure: Any, axis: Any, order: Any) -> None:
    """To the right of a plot, in the order in which the lines end there."""
    handles, names = axis.get_legend_handles_labels()
    pairs = sorted(zip(handles, names, strict=True), key=lambda pair: (order(pair[1]), pair[1]))
    figure.legend([h for h, _ in pairs], [n for _, n in pairs], loc="outside right upper", handlelength=2.6)


def _strip(axis: Any, points: Sequence[Point]) -> str:
    """Under a plot: what failed, was interrupted, or is the baseline to the last digit, at the ratio asked for."""
    rows = {"failed": "x", "interrupted": "o", "= baseline": "D"}
    axis.set_ylim(-0.6, 2.6)
    axis.set_yticks(range(3), [*rows])
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)
    places: dict[tuple[int, float], list[str]] = {}
    for point in points:
        row = 2 if point.is_ok else int(point.record["status"] != "failed")
        at = point.record.get("compression_ratio")
        places.setdefault((row, at if at is not None else point.at or 0.0), []).append(point.label)
    for (row, at), names in places.items():
        face = "none" if row else BAD
        axis.scatter([at], [row], marker=[*rows.values()][row], s=34, facecolors=face, edgecolors=BAD, linewidths=1.4)
        text = clean(names[0])[:24] if len(names) == 1 else f"{len(names)} presses"
        axis.annotate(text, (at, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=7.5)
    return " Below: what failed, was interrupted, or equals the uncompressed cache in every window."


def _forest(
    section: Section, look: dict[str, Style], compared: list[Point], strip: list[Point], prefix: str
) -> Drawing:
    """One size only: each press a line, the best on top."""
    rows = sorted(compared, key=lambda p: -p.delta_nll)
    undone = [p for p in strip if not p.is_ok]
    size = (compared or undone)[0].size
    caption = (
        f"Loss {'at ratio ' if size.replace('.', '').isdigit() else 'with '}{size}: the difference to the uncompressed "
        "cache (no_press, dashed at 0) in nats a token, with paired 95 % intervals; further left is better. random and "
        "streaming_llm are references, in grey."
    )
    with drawing("quality", "", caption_tail(section), (8.4, 1.5 + 0.27 * len(rows + undone)), prefix) as (done, figure):
        axis = figure.add_subplot()
        axis.axvline(0, color=REF, linestyle="--", linewidth=1.2, zorder=2)
        note = ""
        sizes = [abs(p.delta_nll) for p in rows if p.delta_nll]
        if len(sizes) > 3 and max(sizes) > 15 * statistics.median(sizes):
            limit = float(f"{statistics.median(sizes):.0e}")
            axis.set_xscale("symlog", linthresh=limit)
            plain_numbers(axis.xaxis)
            note = f" The axis is linear up to {limit:g} and logarithmic beyond."
        for y, point in enumerate(rows):
            style = look[point.label]
            color = style.color if style.is_coloured else INK["axis"][0]
            marker = "D" if point.equals_baseline else style.marker if style.is_coloured else "o"
            face = {"markerfacecolor": "none"} if point.equals_baseline else {}
            drawn = axis.errorbar([point.delta_nll], [y], xerr=_bars(point), color=color, marker=marker, **face)
            done.name(drawn.lines[0], f"{point.label} {point.delta_nll:+.4f}")
        for y, point in enumerate(undone):
            axis.text(
                0.01, -1 - y, f"× {clean(point.record['status'])}", color=BAD, fontsize=8.5, va="center",
                transform=axis.get_yaxis_transform(),
            )  # fmt: skip
        names = [f"{p.label}{' = baseline' if p.equals_baseline else ''}" for p in rows]
        axis.set_yticks([*range(len(rows)), *(-1 - y for y in range(len(undone)))], [*names, *(p.label for p in undone)])
        axis.set_ylim(-0.7 - len(undone), len(rows) - 0.3)
        axis.set_xlabel("Δ loss (nats a token)")
        done.caption = f"{caption}{note} ({caption_tail(section)})"
    return done


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other matches in both bytes and loss, the smallest cache first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kv_bytes, p.delta_nll, p.label)):
        if not found or point.delta_nll < found[-1].delta_nll:
            found.append(point)
    return found


def _pareto(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    points = [p for p in section.points if p.delta_nll is not None and p.kv_bytes and not p.is_baseline]
    if len({p.kv_bytes for p in points}) < 2:
        return None
    best = front(points)
    caption = (
        "Loss against the bytes of the cache after compression. Coloured points, joined: no other press has both fewer "
        "bytes and less loss, by the measured means; with their 95 % intervals, which may overlap those of others. The "
        "rest is grey; × is random, + streaming_llm, the dashed line no_press."
    )
    mib = 1 / (1 << 20)
    with drawing("pareto", "", caption_tail(section), (8.4, 4.4), prefix) as (done, figure):
        axis = figure.add_subplot()
        axis.axhline(0, color=REF, linestyle="--", linewidth=1.2, zorder=2)
        whole = [b for p in section.points if (b := p.kv_bytes_baseline)]
        if whole:
            axis.plot([max(whole) * mib], [0], marker="o", color=REF, linestyle="none", zorder=4)
            axis.annotate(
                "no_press", (max(whole) * mib, 0), xytext=(-4, -12), textcoords="offset points", fontsize=8, ha="right"
            )
        for point in points:
            if point not in best:
                marker = look[point.label].marker if point.is_reference else "o"
                color = REF if point.is_reference else FADED
                (dot,) = axis.plot([point.kv_bytes * mib], [point.delta_nll], marker=marker, color=color, markersize=5)
                done.name(dot, f"{point.name}: {point.delta_nll:+.4f}")
        axis.plot(
            [p.kv_bytes * mib for p in best], [p.delta_nll for p in best], color=INK["axis"][0], linewidth=1, zorder=2
        )
        for point in best:
            style = look[point.label]
            color = style.color if style.is_coloured else INK["axis"][0]
            marker = style.marker if style.is_coloured else "o"
            drawn = axis.errorbar(
                [point.kv_bytes * mib], [point.delta_nll], yerr=_bars(point), color=color, marker=marker, markersize=7,
                zorder=5,
            )  # fmt: skip
            done.name(drawn.lines[0], f"{point.name}: {point.delta_nll:+.4f}")
            axis.annotate(
                clean(point.name), (point.kv_bytes * mib, point.delta_nll), xytext=(8, 5), textcoords="offset points",
                fontsize=8, zorder=6,
            )  # fmt: skip
        note = scale(axis, [p.delta_nll for p in points])
        sizes = [p.kv_bytes for p in points] + whole
        if max(sizes) > 8 * min(sizes):
            axis.set_xscale("log", base=2)
            plain_numbers(axis.xaxis)
        axis.margins(x=0.12)
        axis.set_xlabel("KV cache after compression (MiB)")
        axis.set_ylabel("Δ loss (nats a token)")
        done.caption = f"{caption}{note} ({caption_tail(section)})"
    return done


def panels(section: Section, has: Any) -> list[str]:
    """At most four sizes that have something to draw, the smallest and the largest among them."""
    sizes = [size for size in section.sizes if any(has(p) for p in section.at(size))]
    if len(sizes) <= MOST_PANELS:
        return sizes
    step = (len(sizes) - 1) / (MOST_PANELS - 1)
    return [sizes[round(i * step)] for i in range(MOST_PANELS)]


def title(size: str) -> str:
    return f"ratio {size}" if size.replace(".", "", 1).isdigit() else size


def _distance(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    base = (section.baseline.nll_by_distance if section.baseline else None) or {}

    def values(point: Point) -> dict[str, tuple[float, list[float] | None]]:
        given = point.delta_by_distance
        if given:
            return {k: (v["delta"], v["ci95"]) for k, v in given.items()}
        own = point.nll_by_distance or {}
        return {k: (v - base[k], None) for k, v in own.items() if v is not None and base.get(k) is not None}

    sizes = panels(section, values)
    if not sizes:
        return None
    caption = (
        "Loss against the distance from the compressed context: the difference to the uncompressed cache (dashed at 0) "
        "for the tokens at these places after it, in nats a token; bars are 95 % intervals where they are recorded."
        f"{said_of_colours(section)}"
    )
    return _small(section, look, sizes, values, {}, caption, ("distance", "tokens after the context", prefix), "Δ loss")


def _positions(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    def values(point: Point) -> dict[str, tuple[float, list[float] | None]]:
        return {k: (v, None) for k, v in (point.nll_by_position or {}).items() if v is not None}

    sizes = panels(section, values)
    if not sizes:
        return None
    base = values(section.baseline) if section.baseline else {}
    caption = (
        "Loss of a stream against the position in the text, in nats a token; dashed: no_press, as far as it reads."
        f"{said_of_colours(section)}"
    )
    return _small(section, look, sizes, values, base, caption, ("positions", "position in the text", prefix), "loss")


def _small(
    section: Section, look: dict[str, Style], sizes: list[str], values: Any, base: dict[str, Any], caption: str,
    names: tuple[str, str, str], what: str,
) -> Drawing:  # fmt: skip
    """A panel for each size, on one vertical axis."""
    kind, across, prefix = names
    buckets = list(dict.fromkeys(k for p in [*section.points] if p.size in sizes for k in values(p)))
    buckets = sorted(dict.fromkeys([*buckets, *base]), key=_first_number)
    columns = 3 if len(sizes) == 3 and len(buckets) < 6 else min(2, len(sizes))
    rows = -(-len(sizes) // columns)
    with drawing(kind, "", caption_tail(section), (8.4, 1.1 + 2.6 * rows), prefix) as (done, figure):
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
        flat = [axis for row in axes for axis in row]
        everything = []
        for axis, size in zip(flat, sizes, strict=False):
            axis.set_title(title(size))
            if base:
                known = [i for i, b in enumerate(buckets) if b in base]
                axis.plot(known, [base[buckets[i]][0] for i in known], "--", color=REF, label="no_press")
            elif kind == "distance":
                axis.axhline(0, color=REF, linestyle="--", linewidth=1.2, label="no_press (uncompressed)")
            points = sorted(section.at(size), key=lambda p: (look[p.label].rank, p.label))
            for n, point in enumerate(points):
                own = values(point)
                at = [i for i, b in enumerate(buckets) if b in own]
                ys = [own[buckets[i]][0] for i in at]
                everything += ys
                cis = [own[buckets[i]][1] for i in at]
                bars = None
                if any(cis):
                    low = [max(0.0, y - c[0]) if c else 0.0 for y, c in zip(ys, cis, strict=True)]
                    high = [max(0.0, c[1] - y) if c else 0.0 for y, c in zip(ys, cis, strict=True)]
                    bars = [low, high]
                step = (n - len(points) / 2) * 0.03 if bars and look[point.label].is_coloured else 0
                if at:
                    curve(done, axis, look[point.label], point.label, [i + step for i in at], ys, bars)
            axis.set_xticks(range(len(buckets)), buckets, rotation=30 if len(buckets) > 5 else 0, fontsize=8)
            axis.set_xlim(-0.3, len(buckets) - 0.7)
        for axis in flat[len(sizes) :]:
            axis.set_visible(False)
        note = scale(flat[0], everything) if kind == "distance" else ""
        for row in axes:
            row[0].set_ylabel(f"{what} (nats a token)")
        for axis in flat[max(0, len(sizes) - columns) : len(sizes)]:
            axis.set_xlabel(across)
        shared_legend(figure, flat[: len(sizes)])
        done.caption = f"{caption}{note} ({caption_tail(section)})"
    return done


def shared_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for several panels, above them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend([*found.values()], [*found], loc="outside upper left", ncols=5, handlelength=2.4)


def _first_number(bucket: str) -> tuple[int, str]:
    digits = bucket.partition("-")[0]
    return (int(digits) if digits.isdecimal() else 0), bucket


