"""What task and probe records say, in words: each press against the uncompressed cache, never against another."""

from __future__ import annotations

from typing import Any

from coldpress.eval.sections import Entry, Section
from coldpress.eval.wording import clean, listed

__all__ = ["task_findings", "task_name"]

Task = dict[str, Any]


def task_name(task: Task) -> str:
    """``needle at 4,096 tokens``."""
    length = task.get("length")
    return clean(task["task"]) + (f" at {length:,.0f} tokens" if length is not None else "")


def task_findings(section: Section) -> list[str]:
    """First a headline without its beginning, then a sentence for each task and size."""
    verdicts: dict[tuple[str, str], dict[str, list[str]]] = {}
    for entry in section.entries:
        for task in [] if entry.is_baseline else entry.tasks or []:
            kind, words = _verdict(entry, task)
            verdicts.setdefault((entry.size, task_name(task)), {}).setdefault(kind, []).append(words)
    if not verdicts:
        return ["no press was scored on a task."]
    counted = [kind for kinds in verdicts.values() for kind, names in kinds.items() for _ in names]
    n = len(counted)
    parts = [
        f"{counted.count(kind)} {words}"
        for kind, words in (
            ("worse", "are below the uncompressed cache"),
            ("level", "are within the error bars of it"),
            ("better", "are above it"),
            ("unknown", "have no error bars"),
        )
        if kind in counted
    ]
    said = [f"of {n} scores (a press, a size and a task each), {', '.join(parts)}."]
    for (size, task), kinds in verdicts.items():
        parts = [
            f"{words}: {listed(kinds[kind])}"
            for kind, words in (
                ("worse", "below the uncompressed cache"),
                ("level", "within the error bars of it"),
                ("better", "above it"),
                ("unknown", "without error bars"),
            )
            if kind in kinds
        ]
        said.append(f"{task}{f', presses at {size}' if size else ''}: {'; '.join(parts)}.")
    return said


def _verdict(entry: Entry, task: Task) -> tuple[str, str]:
    """Whether it is worse than the baseline, and by how much; a larger score is good, a smaller loss is."""
    score, base, ci = task.get("score"), task.get("score_base"), task.get("delta_score_ci95")
    if score is not None:
        difference = None if base is None else score - base
        words = f"{entry.label} {score:.2f}" + ("" if base is None else f" against {base:.2f}")
        sign = 1
    else:
        answer, before = task.get("answer_nll"), task.get("answer_nll_base")
        difference, ci = task.get("delta_answer_nll"), task.get("delta_answer_nll_ci95")
        if difference is None and answer is not None and before is not None:
            difference = answer - before
        words = f"{entry.label} {difference:+.3f} nats" if difference is not None else entry.label
        sign = -1
    if ci is None or difference is None:
        return "unknown", words
    words += f" [{ci[0]:+.2f}, {ci[1]:+.2f}]"
    low, high = sorted((sign * ci[0], sign * ci[1]))
    return ("worse" if high < 0 else "better" if low > 0 else "level"), words
