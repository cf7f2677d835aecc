"""Speed and memory against the length of the context, the uncompressed cache beside the presses."""

from __future__ import annotations

from typing import Any

from coldpress.eval.figures import Drawing, Style, drawing
from coldpress.eval.plotting import REF, caption_tail, curve, panels, said_of_colours, shared_legend, title
from coldpress.eval.sections import Entry, Section
from coldpress.eval.wording import clean

__all__ = ["draw_speed"]

MIB = 1 / (1 << 20)


def _rate(entry: Entry) -> float | None:
    return entry.decode_tokens_per_s or entry.generation_tokens_per_s


def _peak(entry: Entry) -> float | None:
    """Above what the process held before, where that is known."""
    peak = entry.peak_mem_delta_bytes if entry.peak_mem_delta_bytes is not None else entry.peak_mem_bytes
    return None if peak is None else peak * MIB


def _rate_bars(entry: Entry) -> tuple[float, float] | None:
    """What the slowest and the fastest round's time per token come to."""
    spread = entry.tpot_ms_spread
    if spread is None or not entry.decode_tokens_per_s or min(spread["min"], spread["max"]) <= 0:
        return None
    return 1000 / spread["max"], 1000 / spread["min"]


def _ttft_bars(entry: Entry) -> tuple[float, float] | None:
    spread = entry.ttft_s_spread
    return None if spread is None else (spread["min"], spread["max"])


_PANELS: tuple[tuple[str, Any, Any], ...] = (
    ("decoding (tokens a second)", _rate, _rate_bars),
    ("time to the first token (s)", lambda p: p.ttft_s, _ttft_bars),
    ("peak memory above the start (MiB)", _peak, lambda p: None),
)


def draw_speed(section: Section, look: dict[str, Style], prefix: str) -> list[Drawing]:
    """One picture of three panels for each size, where a section has several contexts; else its table says it all."""
    timed = [p for p in section.entries if p.context and any(value(p) is not None for _, value, _ in _PANELS)]
    contexts = sorted({p.context for p in timed})
    if len(contexts) < 2:
        return []
    sizes = panels(section, lambda p: p in timed) or [""]
    base = sorted((p for p in timed if p.is_baseline), key=lambda p: p.context)
    used = [panel for panel in _PANELS if any(panel[1](p) is not None for p in timed)]
    kinds = {p.peak_mem_kind for p in timed if p.peak_mem_kind}
    measured = f" Peak memory is measured by {', '.join(map(clean, sorted(kinds)))}." if kinds else ""
    caption = (
        "Speed and memory against the length of the timed context, one row for each size; dashed: no_press. Bars span "
        f"the rounds, from the slowest to the fastest.{measured}{said_of_colours(section)} ({caption_tail(section)})"
    )
    with drawing("speed", caption, caption_tail(section), (9.2, 0.9 + 2.7 * len(sizes)), prefix) as (done, figure):
        axes = figure.subplots(len(sizes), len(used), sharex=True, sharey="col", squeeze=False)
        for axis, (name, _, _) in zip(axes[0], used, strict=True):
            axis.set_title(name)
        for row, size in zip(axes, sizes, strict=True):
            for axis, (_, value, spread) in zip(row, used, strict=True):
                _line(done, axis, Style(REF, "", "--", 1.3, 2), "no_press", base, value, spread)
                labels = sorted({p.label for p in section.at(size)}, key=lambda label: (look[label].rank, label))
                for label in labels:
                    own = sorted((p for p in timed if p.label == label and p.size == size), key=lambda p: p.context)
                    _line(done, axis, look[label], label, own, value, spread)
                if len(contexts) > 1 and contexts[-1] >= 4 * contexts[0]:
                    axis.set_xscale("log", base=2)
                    axis.minorticks_off()
                axis.set_xticks(contexts, [f"{c:,}" for c in contexts], rotation=30, fontsize=8)
            row[0].set_ylabel(title(size))
        for axis in axes.flat:  # once all rows are drawn: they share an axis, which stands still from then on
            axis.set_ylim(bottom=0)
        for axis in axes[-1]:
            axis.set_xlabel("tokens of context")
        shared_legend(figure, [axis for row in axes for axis in row])
    return [done]


def _line(done: Drawing, axis: Any, style: Style, label: str, entries: list[Entry], value: Any, spread: Any) -> None:
    entries = [p for p in entries if value(p) is not None]
    if not entries:
        return
    ys = [value(p) for p in entries]
    bars = None
    if any(spread(p) for p in entries):
        ends = [spread(p) or (y, y) for p, y in zip(entries, ys, strict=True)]
        low = [max(0.0, y - e[0]) for y, e in zip(ys, ends, strict=True)]
        bars = [low, [max(0.0, e[1] - y) for y, e in zip(ys, ends, strict=True)]]
    curve(done, axis, style, label, [p.context for p in entries], ys, bars)
