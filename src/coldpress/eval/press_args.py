"""The parameters of a press as JSON gives them: ``--press_args`` and lm_eval's ``press_args=``."""

from __future__ import annotations

import json
from typing import Any

from coldpress.bases.registry import parameters_of
from coldpress.errors import PressError

__all__ = ["check_types", "read_press_args"]


def read_press_args(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dictionary, or the JSON of one; None is an empty one. Raises :class:`PressError` for anything else."""
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PressError(f'press_args must be a dictionary or JSON such as {{"window_size": 32}}, got {given!r}.')
    return found


def check_types(name: str, parameters: dict[str, Any]) -> None:
    """Parameters come from JSON, where a text may stand in for a number."""
    known = parameters_of(name)
    for parameter, value in parameters.items():
        if parameter not in known:  # make_press will say so
            continue
        field = known[parameter]
        kinds = [kind for part in str(field.type).split(" | ") for kind in _KINDS.get(part, ())] or [
            type(field.default)
        ]
        if value != field.default and type(value) not in kinds:
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise PressError(f"{name}: {parameter} must be {allowed}, got {value!r}.")


_KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
