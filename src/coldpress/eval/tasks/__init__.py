"""Tasks that are generated offline: needles, tracking and counting scored by string match, and two kinds of probes.

An example is a context of exactly so many tokens, which is compressed without a look at the question; the question,
which is fed afterwards; and the answer. It depends on the seed, the task, its length, its depth and its number alone.
"""

from __future__ import annotations

from coldpress.eval.tasks.kinds import Example, Task, find_task, make_examples, task_names
from coldpress.eval.tasks.material import Material

__all__ = ["Example", "Material", "Task", "find_task", "make_examples", "task_names"]
