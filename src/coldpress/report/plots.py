"""The plots of losses against ratio and bytes, with the references and with what failed; and which plots there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coldpress.records.wording import at_words, clean, listed
from coldpress.report import figures as fig
from coldpress.report.drawings import draw_distance, draw_positions, draw_speed, draw_tasks
from coldpress.report.figures import Drawing, Style
from coldpress.report.glance import quality_of
from coldpress.report.sections import Entry, Section

BAD = fig.INK["bad"][0]
_ABOUT = {"KL": "KL divergence from the uncompressed model", "Δ loss": "Loss more than uncompressed"}


def draw(section: Section, prefix: str) -> list[Drawing]:
    """All plots that the records of a section allow."""
    look = fig.styles(section)
    if section.kind == "tasks":
        return draw_tasks(section, look, prefix)
    found: list[Drawing | None] = []
    if section.kind == "quality":
        found = [_kl(section, look, f"{prefix}k"), _quality(section, look, f"{prefix}q")]
        found.append(draw_distance(section, look, f"{prefix}d"))
    elif section.kind == "stream":
        found = [draw_positions(section, look, f"{prefix}n")]
    found += draw_speed(section, look, f"{prefix}s")
    return [one for one in found if one is not None]


def _quality(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    compared = [p for p in section.entries if p.delta_nll is not None and p.at is not None and not p.is_baseline]
    strip = [p for p in section.unfinished if not p.is_baseline] + [p for p in compared if p.equals_baseline]
    if not compared and not strip:
        return None
    if len({p.size for p in section.all if not p.is_baseline}) <= 1:
        return _forest(section, look, compared, strip, prefix)
    caption = (
        "Loss against the fraction removed: the difference to the uncompressed cache (no_press, dashed at 0) in nats a "
        "token, with paired 95 % intervals; lower is better. Small sideways steps only keep bars apart."
        f"{fig.said_of_colours(section)}"
    )
    with fig.drawing("quality", caption, section, (8.4, 4.6 + 0.3 * bool(strip)), prefix) as (done, figure):
        rows = figure.add_gridspec(2, 1, height_ratios=[1, 0.18]) if strip else figure.add_gridspec(1, 1)
        axis = figure.add_subplot(rows[0])
        axis.axhline(0, color=fig.REF, linestyle="--", linewidth=1.2, label="no_press (uncompressed)", zorder=2)
        labels = sorted({p.label for p in compared}, key=lambda name: (look[name].rank, name))
        coloured = [name for name in labels if look[name].is_coloured]
        last = {}
        for name in labels:
            own = sorted((p for p in compared if p.label == name), key=lambda p: p.at or 0)
            step = 0.0 if name not in coloured else (coloured.index(name) - (len(coloured) - 1) / 2) * 0.0035
            losses = [p.delta_nll for p in own]
            spans = fig.bars(losses, [p.delta_nll_ci95 for p in own])
            fig.curve(done, axis, look[name], name, [p.at + step for p in own], losses, spans)
            last[name] = losses[-1]
        note = fig.scale(axis, [p.delta_nll for p in compared])
        axis.set_ylabel("Δ loss (nats a token)")
        if not note and compared:
            note += _without_random(axis, compared)
            _percent_axis(axis)
        fig.legend(figure, axis, lambda name: -last.get(name, 0.0))
        if strip:
            note += _strip(figure.add_subplot(rows[1], sharex=axis), strip)
            axis.tick_params(labelbottom=False)
        figure.axes[-1 if strip else 0].set_xlabel("fraction of the cache removed")
        done.caption += note
    return done


def _without_random(axis: Any, compared: Sequence[Entry]) -> str:
    """End the axis above the other presses where random is far above them; what to say of it in a caption."""
    ends = [end for p in compared if p.record["press"] != "random" for end in p.delta_nll_ci95 or (p.delta_nll,)]
    top = 1.15 * max(ends, default=math.inf)
    above = [f"{p.name} ({p.delta_nll:.2g})" for p in compared if p.delta_nll > top > 0]
    if above:
        axis.set_ylim(min(0, *ends) - 0.06 * top, top)
    return f" Off the top: {listed(above)}." if above else ""


def _percent_axis(axis: Any) -> None:
    """The same in per cent of perplexity, on the right."""
    import numpy as np

    right = axis.secondary_yaxis(
        "right",
        functions=(lambda d: 100 * np.expm1(np.minimum(d, 50)), lambda p: np.log1p(np.maximum(p, -99.99) / 100)),
    )
    right.set_ylabel("change of PPL (%)")
    right.spines["right"].set_visible(False)


def _strip(axis: Any, entries: Sequence[Entry]) -> str:
    """Under a plot: what failed, was interrupted, or is the baseline to the last digit, at the ratio asked for."""
    rows = {"failed": "x", "interrupted": "o", "= baseline": "D"}
    axis.set_ylim(-0.6, 2.6)
    axis.set_yticks(range(3), [*rows])
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)
    places: dict[tuple[int, float], list[str]] = {}
    for entry in entries:
        row = 2 if entry.is_ok else int(entry.record["status"] != "failed")
        at = entry.record.get("compression_ratio")
        places.setdefault((row, at if at is not None else entry.at or 0.0), []).append(entry.label)
    for (row, at), names in places.items():
        face = "none" if row else BAD
        axis.scatter([at], [row], marker=[*rows.values()][row], s=34, facecolors=face, edgecolors=BAD, linewidths=1.4)
        text = clean(names[0])[:24] if len(names) == 1 else f"{len(names)} presses"
        side = -1 if at > 0.6 else 1
        axis.annotate(
            text, (at, row), xytext=(6 * side, 0), textcoords="offset points", va="center", fontsize=7.5,
            ha="right" if side < 0 else "left",
        )  # fmt: skip
    return " Below: what failed, was interrupted, or equals the uncompressed cache in every window."


def _forest(
    section: Section, look: dict[str, Style], compared: list[Entry], strip: list[Entry], prefix: str
) -> Drawing:
    """One size only: each press a line, the best on top."""
    rows = sorted(compared, key=lambda p: -p.delta_nll)
    undone = [p for p in strip if not p.is_ok]
    caption = (
        f"Loss {at_words((compared or undone)[0].size)}: the difference to the uncompressed cache (no_press, dashed at "
        "0) in nats a token, with paired 95 % intervals; further left is better. random and streaming_llm are "
        "references, in grey."
    )
    with fig.drawing("quality", caption, section, (8.4, 1.5 + 0.27 * len(rows + undone)), prefix) as (done, figure):
        axis = figure.add_subplot()
        axis.axvline(0, color=fig.REF, linestyle="--", linewidth=1.2, zorder=2)
        done.caption += fig.scale(axis, [p.delta_nll for p in rows], "x")
        for y, entry in enumerate(rows):
            spans = fig.bars([entry.delta_nll], [entry.delta_nll_ci95])
            _dot(done, axis, look[entry.label], entry, entry.delta_nll, y, spans)
        for y, entry in enumerate(undone):
            axis.text(
                0.01, -1 - y, f"× {clean(entry.record['status'])}", color=BAD, fontsize=8.5, va="center",
                transform=axis.get_yaxis_transform(),
            )  # fmt: skip
        names = [f"{p.label}{' = baseline' if p.equals_baseline else ''}" for p in rows]
        axis.set_yticks(
            [*range(len(rows)), *(-1 - y for y in range(len(undone)))], [*names, *(p.label for p in undone)]
        )
        axis.set_ylim(-0.7 - len(undone), len(rows) - 0.3)
        axis.set_xlabel("Δ loss (nats a token)")
    return done


def _dot(done: Drawing, axis: Any, style: Style, entry: Entry, value: float, y: int, spans: Any = None) -> None:
    """A press on its line; hollow where it is the baseline."""
    color = style.color if style.is_coloured else fig.INK["axis"][0]
    marker = "D" if entry.equals_baseline else style.marker if style.is_coloured else "o"
    face = "none" if entry.equals_baseline else color
    drawn = axis.errorbar([value], [y], xerr=spans, color=color, marker=marker, markerfacecolor=face)
    done.name(drawn.lines[0], f"{entry.label} {value:.4f}")


def _kl(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    """The plot that a report opens with: quality against the bytes of the cache, a line for each press."""
    entries = [p for p in section.entries if p.delta_nll is not None and p.kv_bytes and not p.is_baseline]
    entries = [p for p in entries if not p.equals_baseline]
    measure, values = quality_of(entries)
    entries = [p for p in entries if measure != "KL" or values[id(p)] > 0]
    ranked = [values[id(p)] for p in entries if p.record["press"] != "random"]
    if not ranked:
        return None
    if len({p.size for p in entries}) < 2:
        return _kl_dots(section, look, prefix, entries)
    whole = max((b for p in section.entries if (b := p.kv_bytes_baseline)), default=None)
    caption = f"{_ABOUT[measure]} against the memory of the KV cache: down and left is better."
    caption += fig.said_of_colours(section)
    with fig.drawing("kl", caption, section, (7.6, 5.0), prefix) as (done, figure):
        axis = figure.add_subplot()
        for label in sorted({p.label for p in entries}, key=lambda label: (look[label].rank, label)):
            own = sorted((p for p in entries if p.label == label), key=lambda p: p.kv_bytes)
            fig.curve(done, axis, look[label], label, [p.kv_bytes * fig.MIB for p in own], [values[id(p)] for p in own])
        low, high = min(ranked), max(ranked)
        if measure == "KL":
            axis.set_yscale("log")
            axis.set_ylim(low / 1.5, high * 1.6)
            fig.plain_numbers(axis.yaxis)
        else:
            axis.axhline(0, color=fig.REF, linestyle="--", linewidth=1.2, zorder=2)
            axis.set_ylim(min(low, 0) - 0.06 * (high - low), max(high, 0) + 0.1 * (high - low))
        above = [p for p in entries if values[id(p)] > axis.get_ylim()[1]]
        if above:
            done.caption += f" Off the top: {listed([f'{p.name} ({values[id(p)]:.2g})' for p in above])}."
        axis.set_xlim(left=0)
        axis.set_xlabel(f"KV cache (MiB{f', {whole * fig.MIB:.3g} uncompressed' if whole else ''})")
        axis.set_ylabel(f"{measure} (nats a token)")
        fig.shared_legend(figure, [axis], 3)
    return done


def _kl_dots(section: Section, look: dict[str, Style], prefix: str, entries: list[Entry]) -> Drawing:
    """Of one size: each press a line, the best on top; the axis is that of the others where random is far off."""
    measure, values = quality_of(entries)
    rows = sorted(entries, key=lambda p: -values[id(p)])
    caption = f"{_ABOUT[measure]}, {at_words(rows[0].size)}: left is better."
    with fig.drawing("kl", caption, section, (7.6, 1.3 + 0.3 * len(rows)), prefix) as (done, figure):
        axis = figure.add_subplot()
        for y, entry in enumerate(rows):
            _dot(done, axis, look[entry.label], entry, values[id(entry)], y)
        axis.set_yticks(range(len(rows)), [clean(p.label) for p in rows])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        others = [values[id(p)] for p in rows if p.record["press"] != "random"]
        low, high = min(0.0, *others), max(0.0, *others)
        axis.set_xlim(low * 1.15, high * 1.15)
        off = [p for p in rows if values[id(p)] > axis.get_xlim()[1]]
        done.caption += "".join(f" Off the right edge: {clean(p.label)} ({values[id(p)]:.2g})." for p in off)
        axis.set_xlabel(f"{measure} (nats a token)")
    return done
