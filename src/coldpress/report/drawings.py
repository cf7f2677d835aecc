"""Drawings of a section: where losses come from, speed, and tasks."""

from __future__ import annotations

from typing import Any

from coldpress.records.reading import task_name, task_of
from coldpress.records.wording import clean, memory_words
from coldpress.report import figures as fig
from coldpress.report.figures import Drawing, Style
from coldpress.report.glance import value_of
from coldpress.report.sections import Entry, Section


def draw_distance(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    base = (section.baseline.nll_by_distance if section.baseline else None) or {}

    def values(entry: Entry) -> dict[str, tuple[float, list[float] | None]]:
        given = entry.delta_by_distance
        if given:
            return {k: (v["delta"], v["ci95"]) for k, v in given.items()}
        own = entry.nll_by_distance or {}
        return {k: (v - base[k], None) for k, v in own.items() if v is not None and base.get(k) is not None}

    caption = (
        "Loss against the distance from the compressed context: the difference to the uncompressed cache (dashed at 0) "
        "for the tokens at these places after it, in nats a token; bars are 95 % intervals where they are recorded."
    )
    return _small(section, look, prefix, "distance", values, {}, caption)


def draw_positions(section: Section, look: dict[str, Style], prefix: str) -> Drawing | None:
    def values(entry: Entry) -> dict[str, tuple[float, list[float] | None]]:
        return {k: (v, None) for k, v in (entry.nll_by_position or {}).items() if v is not None}

    base = values(section.baseline) if section.baseline else {}
    caption = "Loss of a stream against the position in the text, nats a token; dashed: no_press, as far as it reads."
    return _small(section, look, prefix, "positions", values, base, caption)


_AXES = {  # what is along them and up
    "distance": ("tokens after the context", "Δ loss (nats a token)"),
    "positions": ("position in the text", "loss (nats a token)"),
}


def _small(
    section: Section, look: dict[str, Style], prefix: str, kind: str, values: Any, base: dict[str, Any], caption: str
) -> Drawing | None:
    """A panel for each size, on one vertical axis."""
    sizes = fig.panels(section, values)
    if not sizes:
        return None
    along, up = _AXES[kind]
    buckets = list(dict.fromkeys(k for p in section.entries if p.size in sizes for k in values(p)))
    buckets = sorted(dict.fromkeys([*buckets, *base]), key=_first_number)
    columns = 3 if len(sizes) == 3 and len(buckets) < 6 else min(2, len(sizes))
    size_in = (8.4, 1.1 + 2.6 * -(-len(sizes) // columns))
    with fig.drawing(kind, caption + fig.said_of_colours(section), section, size_in, prefix) as (done, figure):
        axes = fig.grid(figure, len(sizes), columns, along, sharey=True)
        everything = []
        for axis, size in zip(axes, sizes, strict=True):
            axis.set_title(fig.title(size))
            if base:
                known = [i for i, b in enumerate(buckets) if b in base]
                axis.plot(known, [base[buckets[i]][0] for i in known], "--", color=fig.REF, label="no_press")
            elif kind == "distance":
                axis.axhline(0, color=fig.REF, linestyle="--", linewidth=1.2, label="no_press (uncompressed)")
            entries = sorted(section.at(size), key=lambda p: (look[p.label].rank, p.label))
            for n, entry in enumerate(entries):
                own = values(entry)
                at = [i for i, b in enumerate(buckets) if b in own]
                ys = [own[buckets[i]][0] for i in at]
                everything += ys
                spans = fig.bars(ys, [own[buckets[i]][1] for i in at])
                step = (n - len(entries) / 2) * 0.03 if spans and look[entry.label].is_coloured else 0
                if at:
                    fig.curve(done, axis, look[entry.label], entry.label, [i + step for i in at], ys, spans)
            axis.set_xticks(range(len(buckets)), buckets, rotation=30 if len(buckets) > 5 else 0, fontsize=8)
            axis.set_xlim(-0.3, len(buckets) - 0.7)
        note = fig.scale(axes[0], everything) if kind == "distance" else ""
        if note and min(everything) >= 0:
            axes[0].set_ylim(bottom=-min(v for v in everything if v) / 2)
        for axis in axes[::columns]:
            axis.set_ylabel(up)
        fig.shared_legend(figure, axes)
        done.caption += note
    return done


def _first_number(bucket: str) -> tuple[int, str]:
    digits = bucket.partition("-")[0]
    return (int(digits) if digits.isdecimal() else 0), bucket


def _peak(entry: Entry) -> float | None:
    """Above what the process held before, where that is known."""
    peak = entry.peak_mem_delta_bytes if entry.peak_mem_delta_bytes is not None else entry.peak_mem_bytes
    return None if peak is None else peak * fig.MIB


def _rate_bars(entry: Entry) -> tuple[float, float] | None:
    """What the slowest and the fastest round's time per token come to."""
    spread = entry.tpot_ms_spread
    if spread is None or not entry.decode_tokens_per_s or min(spread["min"], spread["max"]) <= 0:
        return None
    return 1000 / spread["max"], 1000 / spread["min"]


_PANELS: tuple[tuple[str, Any, Any], ...] = (
    ("decoding (tokens a second)", lambda p: p.decode_tokens_per_s or p.generation_tokens_per_s, _rate_bars),
    ("time to the first token (s)", lambda p: p.ttft_s, lambda p: (s := p.ttft_s_spread) and (s["min"], s["max"])),
    ("peak memory above the start (MiB)", _peak, lambda p: None),
)


def draw_speed(section: Section, look: dict[str, Style], prefix: str) -> list[Drawing]:
    """One picture of three panels for each size, where a section has several contexts; else its table says it all."""
    timed = [p for p in section.entries if p.context and any(value(p) is not None for _, value, _ in _PANELS)]
    contexts = sorted({p.context for p in timed})
    if len(contexts) < 2:
        return []
    sizes = fig.panels(section, lambda p: p in timed) or [""]
    base = sorted((p for p in timed if p.is_baseline), key=lambda p: p.context)
    used = [panel for panel in _PANELS if any(panel[1](p) is not None for p in timed)]
    kinds = {p.peak_mem_kind for p in timed if p.peak_mem_kind}
    measured = f" Peak memory is {', '.join(memory_words(clean(kind)) for kind in sorted(kinds))}." if kinds else ""
    caption = (
        "Speed and memory against the length of the timed context, one row for each size; dashed: no_press. Bars span "
        f"the rounds, from the slowest to the fastest.{measured}{fig.said_of_colours(section)}"
    )
    with fig.drawing("speed", caption, section, (9.2, 0.9 + 2.7 * len(sizes)), prefix) as (done, figure):
        axes = figure.subplots(len(sizes), len(used), sharex=True, sharey="col", squeeze=False)
        for axis, (name, _, _) in zip(axes[0], used, strict=True):
            axis.set_title(name)
        for row, size in zip(axes, sizes, strict=True):
            for axis, (_, value, spread) in zip(row, used, strict=True):
                _line(done, axis, Style(fig.REF, "", "--", 1.3, 2), "no_press", base, value, spread)
                labels = sorted({p.label for p in section.at(size)}, key=lambda label: (look[label].rank, label))
                for label in labels:
                    own = sorted((p for p in timed if p.label == label and p.size == size), key=lambda p: p.context)
                    _line(done, axis, look[label], label, own, value, spread)
                if len(contexts) > 1 and contexts[-1] >= 4 * contexts[0]:
                    axis.set_xscale("log", base=2)
                    axis.minorticks_off()
                axis.set_xticks(contexts, [f"{c:,}" for c in contexts], rotation=30, fontsize=8)
            row[0].set_ylabel(fig.title(size))
        for axis in axes.flat:  # once all rows are drawn: they share an axis, which stands still from then on
            axis.set_ylim(bottom=0)
        for axis in axes[-1]:
            axis.set_xlabel("tokens of context")
        fig.shared_legend(figure, [axis for row in axes for axis in row])
    return [done]


def _line(done: Drawing, axis: Any, style: Style, label: str, entries: list[Entry], value: Any, spread: Any) -> None:
    entries = [p for p in entries if value(p) is not None]
    if not entries:
        return
    ys = [value(p) for p in entries]
    fig.curve(done, axis, style, label, [p.context for p in entries], ys, fig.bars(ys, [spread(p) for p in entries]))


MOST_TASKS = 12
MOST_MAPS = 6  # tasks with a map of their own
MOST_COLUMNS = 5


def draw_tasks(section: Section, look: dict[str, Style], prefix: str) -> list[Drawing]:
    tasks: dict[str, dict[str, Any]] = {}
    for entry in section.entries:
        for task in entry.tasks or []:
            tasks.setdefault(task_name(task), task)
    found = [_scores(section, look, [*tasks], f"{prefix}k")] if tasks else []
    names = list(dict.fromkeys(task["task"] for task in tasks.values() if task.get("by_depth")))
    for i, name in enumerate(names[:MOST_MAPS]):
        drawn = _map(section, look, name, f"{prefix}m{i}-")
        found += [drawn] if drawn is not None else []
    return found


def _scores(section: Section, look: dict[str, Style], names: list[str], prefix: str) -> Drawing:
    left_out = f" {len(names) - MOST_TASKS} further tasks are in the table." if len(names) > MOST_TASKS else ""
    names = names[:MOST_TASKS]
    columns = min(2, len(names))
    caption = (
        "Scores against the fraction removed, with their 95 % intervals (Wilson); dashed: the uncompressed cache "
        "(no_press). String matches lie between 0 and 1, more is better; where a task has none, nats a token "
        "of the answer more than without a press, less is better."
        f"{fig.said_of_colours(section)}{left_out}"
    )
    size = (8.4, 0.9 + 2.5 * -(-len(names) // columns))
    with fig.drawing("tasks", caption, section, size, prefix) as (done, figure):
        axes = fig.grid(figure, len(names), columns, "fraction of the cache removed")
        for axis, name in zip(axes, names, strict=True):
            axis.set_title(clean(name))
            pressed = [
                p for p in section.entries if not p.is_baseline and value_of(task_of(p.record, name))[0] is not None
            ]
            for label in sorted({p.label for p in pressed}, key=lambda label: (look[label].rank, label)):
                own = sorted((p for p in pressed if p.label == label), key=lambda p: p.at or 0)
                ys, spans, _ = zip(*(value_of(task_of(p.record, name)) for p in own), strict=True)
                fig.curve(done, axis, look[label], label, [p.at or 0 for p in own], [*ys], fig.bars(ys, spans))
            tasks = [task_of(p.record, name) for p in pressed]
            is_score = any(task.get("score") is not None for task in tasks)
            bases = [task["score_base"] for task in tasks if task.get("score_base") is not None]
            level = next(iter(bases), None) if is_score else 0.0
            if level is not None:
                axis.axhline(level, color=fig.REF, linestyle="--", linewidth=1.2, label="no_press (uncompressed)")
            axis.set_ylabel("score" if is_score else "Δ nats a token")
            if is_score:
                axis.set_ylim(-0.04, 1.04)
        fig.shared_legend(figure, axes)
    return done


def _map(section: Section, look: dict[str, Style], name: str, prefix: str) -> Drawing | None:
    """Depth by length, a small map for each press and size; all on one scale of colours."""

    def cells(entry: Entry) -> dict[tuple[float, float], float]:
        found = {}
        for task in entry.tasks or []:
            if task["task"] == name:
                for cell in task.get("by_depth") or []:
                    if cell.get("answer_nll") is not None and cell.get("answer_nll_base") is not None:
                        key = cell["depth"], task.get("length") or 0
                        found[key] = cell["answer_nll"] - cell["answer_nll_base"]
        return found

    sizes = fig.panels(section, cells)
    chosen = [label for label, style in look.items() if style.is_coloured and any(
        cells(p) for p in section.entries if p.label == label
    )]  # fmt: skip
    chosen = sorted(set(chosen), key=lambda label: (look[label].color == fig.REF, label))
    left_out = f" Not shown: {len(chosen) - MOST_COLUMNS} presses." if len(chosen) > MOST_COLUMNS else ""
    references = [label for label in chosen if look[label].color == fig.REF]
    chosen = [*[c for c in chosen if c not in references][: MOST_COLUMNS - len(references)], *references][:MOST_COLUMNS]
    values = {(p.label, p.size): cells(p) for p in section.entries if p.label in chosen and p.size in sizes}
    everything = [v for own in values.values() for v in own.values()]
    if not everything:
        return None
    depths = sorted({depth for own in values.values() for depth, _ in own})
    lengths = sorted({length for own in values.values() for _, length in own})
    caption = (
        f"{clean(name)}: what compression costs the answer, by where it stands in the text (depth, 0 is the beginning) "
        "and by the length of the text, in nats a token more than the uncompressed cache; yellow is no cost."
        f"{left_out}"
    )
    height = 1.4 + len(sizes) * (1.0 + 0.2 * len(depths))
    with fig.drawing("depth", caption, section, (1.6 + 1.75 * len(chosen), height), prefix) as (done, figure):
        axes = figure.subplots(len(sizes), len(chosen), sharex=True, sharey=True, squeeze=False)
        top = max(max(everything), 1e-9)
        mesh = None
        for axis, label in zip(axes[0], chosen, strict=True):
            axis.set_title(clean(label)[:26], fontsize=8.5)
        for row, size in zip(axes, sizes, strict=True):
            for axis, label in zip(row, chosen, strict=True):
                own = values.get((label, size), {})
                grid = [[own.get((depth, length), float("nan")) for length in lengths] for depth in depths]
                mesh = axis.pcolormesh(
                    grid, cmap="viridis_r", vmin=min(0.0, min(everything)), vmax=top, edgecolors="face", linewidth=0.4
                )
                axis.set_ylim(len(depths), 0)  # the beginning of the text on top
                axis.grid(False)
                axis.set_xticks([i + 0.5 for i in range(len(lengths))], [f"{n:,.0f}" for n in lengths], rotation=45)
                axis.set_yticks([i + 0.5 for i in range(len(depths))], [f"{d:g}" for d in depths])
                axis.tick_params(labelsize=7.5)
            row[0].set_ylabel(f"{fig.title(size)}\ndepth")
        for axis in axes[-1]:
            axis.set_xlabel("tokens", fontsize=8)
        bar = figure.colorbar(mesh, ax=axes, shrink=0.8, pad=0.01)
        bar.set_label("Δ nats a token of the answer", color=fig.INK["ink"][0])
        bar.solids.set_rasterized(False)  # a page takes no images
        bar.solids.set_edgecolor("face")
    return done
