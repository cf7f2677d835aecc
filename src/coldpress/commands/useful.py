"""What was given on the command line, as settings take it; an option that would do nothing is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.errors import InputError
from coldpress.eval.options import KINDS, SIZES, OfTiming, names_of
from coldpress.eval.settings import BenchmarkSettings, Settings, TaskSettings

__all__ = ["check_benchmark", "check_ppl", "check_sweep", "check_tasks", "given_to"]

Given = Mapping[str, Any]  # options by name; None: not given
_TIMED = ("context_limit", *names_of(OfTiming))


def given_to(settings: Any, given: Given) -> dict[str, Any]:
    """The options that were given, as a dataclass of settings takes them."""
    own = {f.name: given[f.name] for f in fields(settings) if given.get(f.name) is not None}
    own |= {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
    return own | ({"press_args": tuple(own["press_args"].items())} if "press_args" in own else {})


def check_ppl(given: Given, settings: Settings) -> None:
    """Raise :class:`InputError` for an option of speed or of presses, if nothing is timed or no press measured."""
    _check_sizes(given, settings.press)
    found = [name for name in _TIMED if given.get(name) is not None]
    if found and settings.ppl_only:
        raise InputError(f"--{found[0]} is for speed and memory, and neither is measured here; leave it out.")


def check_benchmark(given: Given, settings: BenchmarkSettings) -> None:
    """Raise :class:`InputError` for an option of presses, if none is measured."""
    _check_sizes(given, settings.press)


def check_tasks(given: Given, settings: TaskSettings) -> None:
    """Raise :class:`InputError` for an option of presses, if none is measured, or one that no task looks at."""
    from coldpress.eval.tasks import find_task

    _check_sizes(given, settings.press)
    tasks = [find_task(name) for name in settings.task]
    looks = {
        "depths": any(task.has_depth for task in tasks),
        "template": any(task.takes_template for task in tasks),
        "max_new_tokens": any(task.answer_tokens is not None for task in tasks),
    }
    for name, is_useful in looks.items():
        if given.get(name) is not None and not is_useful:
            raise InputError(f"--{name} means nothing to {' and '.join(settings.task)}; leave it out.")


def check_sweep(given: Given, kinds: Collection[str], presses: Collection[str]) -> None:
    """Raise :class:`InputError` for an option that none of these kinds of measurement and presses looks at."""
    _check_sizes(given, presses)
    for f in fields(Settings):
        useless = set(f.metadata["useless"])
        if f.name in _TIMED:
            useless |= set(KINDS) - ({"speed", "tasks"} if f.name == "max_new_tokens" else {"speed"})
        if given.get(f.name) is not None and useless.issuperset(kinds):
            raise InputError(f"--{f.name} means nothing to {' and '.join(sorted(kinds))}; leave it out.")


def _check_sizes(given: Given, presses: Collection[str]) -> None:
    asked = {size: given.get(size) or () for size in SIZES}
    asked["compression_ratio"] = [r for r in asked["compression_ratio"] if 0 < r < 1]  # others are refused elsewhere
    found = [size for size in SIZES if asked[size]]
    if found and set(presses) == {NO_PRESS}:
        raise InputError(
            f"--{found[0]} says how much a press keeps, and no_press keeps every pair; name a press with --press, or "
            f"leave --{found[0]} out."
        )
