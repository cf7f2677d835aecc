"""A press and its parameters as JSON and the ``model_args`` of lm-evaluation-harness give them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from coldpress.bases.press import BasePress
from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import NO_PRESS, make_press, parameters_of, takes_ratio
from coldpress.bases.scorer import BUDGETS
from coldpress.core.definition import as_given
from coldpress.errors import InputError, PressError

__all__ = ["check_no_size", "check_one_press", "check_types", "integer", "is_whole", "press_of", "read_press_args"]

_KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


def read_press_args(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dictionary, or the JSON of one; None is an empty one. Raises :class:`PressError` for anything else."""
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PressError(f'press_args must be a dictionary or JSON such as {{"window_size": 32}}, got {given!r}.')
    return found


def check_one_press(names: Iterable[str], parameters: Mapping[str, Any]) -> None:
    """Raise :class:`PressError` where parameters are given, and there are several presses or none to take them."""
    if parameters and len([name for name in names if name != NO_PRESS]) != 1:
        raise PressError("--press_args belongs to one press; name a single one with --press.")


def check_no_size(parameters: Mapping[str, Any], message: str = "--press_args cannot hold {0}; use --{0}.") -> None:
    """Raise :class:`PressError` where a ratio or a budget is among the parameters."""
    for size in ("compression_ratio", *BUDGETS):
        if size in parameters:
            raise PressError(message.format(size))


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


def press_of(
    press: str | BasePress | None, ratio: float | None, budgets: dict[str, int | None], parameters: dict[str, Any]
) -> BasePress | None:
    """The press that is asked for, None for none; half of the pairs go where nothing says how much.

    Raises:
        PressError: an unknown press or parameter, or sizes and parameters that do not belong together.
    """
    sizes = {name: value for name, value in budgets.items() if value is not None}
    given = [*([] if ratio is None else ["compression_ratio"]), *sizes, *(["press_args"] if parameters else [])]
    if isinstance(press, BasePress) or press in (None, NO_PRESS):
        if given and not (press in (None, NO_PRESS) and given == ["compression_ratio"] and not ratio):
            raise PressError(
                f"{' and '.join(given)} belong to a press that is named; give press=NAME, or leave them out."
            )
        return press if isinstance(press, BasePress) else None
    if not isinstance(press, str):
        raise PressError(
            f"press must be the name of a press or a press such as SnapKVPress(0.5), got {as_given(press)}."
        )
    check_no_size(parameters, "press_args cannot hold {0}; give {0}= beside press=.")
    load_press_files([press])
    if ratio is None:
        ratio = 0.5 if takes_ratio(press) and not sizes else 0.0
    if "seed" in parameters_of(press):
        parameters = {"seed": 0, **parameters}
    check_types(press, parameters)
    return make_press(press, ratio, **sizes, **parameters)


def integer(name: str, value: Any, minimum: int) -> int:
    """``value`` as the integer that it stands for; :class:`InputError` if it is none, or less than ``minimum``."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = minimum - 1
    if number < minimum or number != float(value):
        raise InputError(f"{name} must be an integer >= {minimum}, got {value!r}.")
    return number


def is_whole(press: BasePress | None) -> bool:
    """Whether ``press`` is asked to keep everything: its ratio is 0 and it has no budget."""
    if press is None:
        return True
    own = getattr(press, "compression_ratio", None)
    sizes = [own, *(getattr(press, name, None) for name in BUDGETS)]
    return own is not None and not any(sizes) and not getattr(press, "key_channel_compression_ratio", 0)
