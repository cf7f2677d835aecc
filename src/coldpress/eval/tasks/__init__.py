"""Tasks that are generated offline: needles, tracking and counting scored by string match, and two kinds of probes.

An example is a context of exactly so many tokens, which is compressed without a look at the question; the question,
which is fed afterwards; and the answer. It depends on the seed, the task, its length, its depth and its number alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from coldpress.errors import InputError
from coldpress.eval.tasks import kinds as kinds
from coldpress.eval.tasks.example import Example, Task, find_task, make_example, task_names
from coldpress.eval.tasks.material import Material

__all__ = ["Example", "Material", "Task", "find_task", "make_examples", "task_names"]


def make_examples(
    material: Material,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    n_examples: int,
    seed: int = 0,
) -> list[Example]:
    """``n_examples`` of each task at each length; those of a task with a depth take the depths in turn.

    ``lengths`` of contexts are in tokens, ``depths`` in [0, 1]. InputError where there is no such task, where numbers
    are out of range, or a length is too short for a task.
    """
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"--depths must be numbers from 0 (beginning) to 1 (end), got {list(depths)}.")
    if n_examples < 1 or not tasks or not lengths:
        raise InputError("Tasks need at least one name, one length and one example.")
    found = [find_task(name) for name in dict.fromkeys(tasks)]
    return [
        make_example(task, material, length, depths[index % len(depths)], seed, index)
        for task in found
        for length in dict.fromkeys(lengths)
        for index in range(n_examples)
    ]
