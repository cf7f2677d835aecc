"""Losses by place: against the distance from the compressed context, and against the position in a stream."""

from __future__ import annotations

from typing import Any

from coldpress.eval.figures import Drawing, Style, drawing
from coldpress.eval.plotting import REF, caption_tail, curve, panels, said_of_colours, scale, shared_legend, title
from coldpress.eval.sections import Entry, Section

__all__ = ["draw_distance", "draw_positions"]


def draw_distance(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    base = (section.baseline.nll_by_distance if section.baseline else None) or {}

    def values(entry: Entry) -> dict[str, tuple[float, list[float] | None]]:
        given = entry.delta_by_distance
        if given:
            return {k: (v["delta"], v["ci95"]) for k, v in given.items()}
        own = entry.nll_by_distance or {}
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


def draw_positions(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    def values(entry: Entry) -> dict[str, tuple[float, list[float] | None]]:
        return {k: (v, None) for k, v in (entry.nll_by_position or {}).items() if v is not None}

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
    buckets = list(dict.fromkeys(k for p in [*section.entries] if p.size in sizes for k in values(p)))
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
            entries = sorted(section.at(size), key=lambda p: (look[p.label].rank, p.label))
            for n, entry in enumerate(entries):
                own = values(entry)
                at = [i for i, b in enumerate(buckets) if b in own]
                ys = [own[buckets[i]][0] for i in at]
                everything += ys
                cis = [own[buckets[i]][1] for i in at]
                bars = None
                if any(cis):
                    low = [max(0.0, y - c[0]) if c else 0.0 for y, c in zip(ys, cis, strict=True)]
                    high = [max(0.0, c[1] - y) if c else 0.0 for y, c in zip(ys, cis, strict=True)]
                    bars = [low, high]
                step = (n - len(entries) / 2) * 0.03 if bars and look[entry.label].is_coloured else 0
                if at:
                    curve(done, axis, look[entry.label], entry.label, [i + step for i in at], ys, bars)
            axis.set_xticks(range(len(buckets)), buckets, rotation=30 if len(buckets) > 5 else 0, fontsize=8)
            axis.set_xlim(-0.3, len(buckets) - 0.7)
        for axis in flat[len(sizes) :]:
            axis.set_visible(False)
        note = scale(flat[0], everything) if kind == "distance" else ""
        if note and min(everything) >= 0:
            flat[0].set_ylim(bottom=-min(v for v in everything if v) / 2)
        for row in axes:
            row[0].set_ylabel(f"{what} (nats a token)")
        for axis in flat[max(0, len(sizes) - columns) : len(sizes)]:
            axis.set_xlabel(across)
        shared_legend(figure, flat[: len(sizes)])
        done.caption = f"{caption}{note} ({caption_tail(section)})"
    return done


def _first_number(bucket: str) -> tuple[int, str]:
    digits = bucket.partition("-")[0]
    return (int(digits) if digits.isdecimal() else 0), bucket
