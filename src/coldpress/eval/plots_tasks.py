"""Scores of tasks and probes against the ratio, and how well answers are remembered by depth and length."""

from __future__ import annotations

from typing import Any

from coldpress.eval.figures import INK, Drawing, Style, drawing
from coldpress.eval.plotting import REF, caption_tail, curve, panels, said_of_colours, shared_legend, title
from coldpress.eval.sections import Entry, Section
from coldpress.eval.task_words import task_name
from coldpress.eval.wording import clean

__all__ = ["draw_tasks"]

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


def _value(task: dict[str, Any]) -> tuple[Any, Any, bool]:
    """What is drawn of a task: its score, or nats more than the baseline; its interval; whether it is a score."""
    score, base, ci = task.get("score"), task.get("score_base"), task.get("delta_score_ci95")
    if score is not None:
        return score, None if ci is None or base is None else (base + ci[0], base + ci[1]), True
    more, ci = task.get("delta_answer_nll"), task.get("delta_answer_nll_ci95")
    if more is None and task.get("answer_nll") is not None and task.get("answer_nll_base") is not None:
        more = task["answer_nll"] - task["answer_nll_base"]
    return more, None if ci is None else (ci[0], ci[1]), False


def _task(entry: Entry, name: str) -> dict[str, Any] | None:
    return next((task for task in entry.tasks or [] if task_name(task) == name), None)


def _scores(section: Section, look: dict[str, Style], names: list[str], prefix: str) -> Drawing:
    left_out = f" {len(names) - MOST_TASKS} further tasks are in the table." if len(names) > MOST_TASKS else ""
    names = names[:MOST_TASKS]
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    caption = (
        "Scores against the fraction removed, with 95 % intervals of the difference to the uncompressed cache "
        "(no_press, dashed). String matches lie between 0 and 1, more is better; where a task has none, nats a token "
        "of the answer more than without a press, less is better."
        f"{said_of_colours(section)}{left_out} ({caption_tail(section)})"
    )
    with drawing("tasks", caption, caption_tail(section), (8.4, 0.9 + 2.5 * rows), prefix) as (done, figure):
        axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
        for axis, name in zip(axes, names, strict=False):
            axis.set_title(clean(name))
            is_score = False
            pressed = [p for p in section.entries if not p.is_baseline]
            labels = sorted({p.label for p in pressed}, key=lambda label: (look[label].rank, label))
            bases = []
            for label in labels:
                own = [(p, task) for p in pressed if p.label == label and (task := _task(p, name)) is not None]
                own = sorted((pair for pair in own if _value(pair[1])[0] is not None), key=lambda pair: pair[0].at or 0)
                values = [_value(task) for _, task in own]
                if not own:
                    continue
                is_score = values[0][2]
                bases += [task["score_base"] for _, task in own if task.get("score_base") is not None]
                low = [max(0.0, v - ci[0]) if ci else 0.0 for v, ci, _ in values]
                high = [max(0.0, ci[1] - v) if ci else 0.0 for v, ci, _ in values]
                curve(
                    done, axis, look[label], label, [p.at or 0 for p, _ in own], [v for v, _, _ in values], [low, high]
                )
            level = (bases[0] if bases else None) if is_score else 0.0
            if level is not None:
                axis.axhline(level, color=REF, linestyle="--", linewidth=1.2, label="no_press (uncompressed)")
            axis.set_ylabel("score" if is_score else "Δ nats a token")
            if is_score:
                axis.set_ylim(-0.04, 1.04)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(names) - columns) : len(names)]:
            axis.set_xlabel("fraction of the cache removed")
        shared_legend(figure, axes[: len(names)])
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

    sizes = panels(section, cells)
    chosen = [label for label, style in look.items() if style.is_coloured and any(
        cells(p) for p in section.entries if p.label == label
    )]  # fmt: skip
    chosen = sorted(set(chosen), key=lambda label: (look[label].color == REF, label))
    left_out = f" Not shown: {len(chosen) - MOST_COLUMNS} presses." if len(chosen) > MOST_COLUMNS else ""
    references = [label for label in chosen if look[label].color == REF]
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
        f"{left_out} ({caption_tail(section)})"
    )
    height = 1.4 + len(sizes) * (1.0 + 0.2 * len(depths))
    with drawing("depth", caption, caption_tail(section), (1.6 + 1.75 * len(chosen), height), prefix) as (done, figure):
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
            row[0].set_ylabel(f"{title(size)}\ndepth")
        for axis in axes[-1]:
            axis.set_xlabel("tokens", fontsize=8)
        bar = figure.colorbar(mesh, ax=axes, shrink=0.8, pad=0.01)
        bar.set_label("Δ nats a token of the answer", color=INK["ink"][0])
        bar.solids.set_rasterized(False)  # a page takes no images
        bar.solids.set_edgecolor("face")
    return done
