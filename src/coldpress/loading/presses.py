"""A press as a command names it: its name, its size, and its parameters as JSON and ``model_args`` give them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from coldpress.bases.press import BasePress
from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import NO_PRESS, make_press, parameters_of, takes_ratio
from coldpress.bases.scorer import BUDGETS
from coldpress.core.definition import as_given
from coldpress.errors import PressError
from coldpress.presses.finch import FinchPress

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


def default_press(chunk_tokens: int | None) -> str:
    """The press where none is named: one that finds again what is asked later, or another where the text is read in
    pieces, as that one needs it whole."""
    return "snapkv" if chunk_tokens else "sampled_defensive"


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
    """Parameters come from JSON, where a text may stand in for a number; an integer is a float, too."""
    known = parameters_of(name)
    for parameter, value in parameters.items():
        if parameter not in known:  # make_press will say so
            continue
        field = known[parameter]
        told = getattr(field.type, "__name__", str(field.type))  # a class where a file's annotations are no texts
        of_default = _KINDS.get(type(field.default).__name__, (type(field.default),))
        kinds = [kind for part in told.split(" | ") for kind in _KINDS.get(part, ())] or of_default
        if type(value) not in kinds and (value != field.default or isinstance(value, bool)):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise PressError(f"{name}: {parameter} must be {allowed}, got {value!r}.")


def check_of_a_context(name: str, press: BasePress | None, sizes: Mapping[str, Any]) -> None:
    """Raise :class:`PressError` if a press would do nothing to a text that is compressed before any question is known.

    Args:
        name: of the press.
        press: it; None for ``no_press``.
        sizes: the ratio and the budgets that were asked for; None and 0 ask for nothing.
    """
    asked = [size for size, value in sizes.items() if value]
    if press is None and asked:
        raise PressError(f"{name} keeps every pair, and {asked[0]} asks for less; name a press, or leave that out.")
    if press is not None and not press.at_prefill:
        raise PressError(
            f"{name} goes on while decoding and compresses nothing of a text that is read; name a press that does."
        )
    if isinstance(press, FinchPress):
        raise PressError(
            f"{name} chooses by the question at the end of a text, and here the questions come later; name another "
            "press."
        )


def press_of(
    press: str | BasePress | None, ratio: float | None, budgets: dict[str, int | None], parameters: dict[str, Any]
) -> BasePress | None:
    """The press that is asked for, None for none; half of the pairs go where nothing says how much."""
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
    return make_press(press, ratio, **sizes, **own_parameters(press, parameters, 0))


def own_parameters(name: str, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """The parameters of a press: those that were given, and the seed where it draws numbers."""
    own = {"seed": seed, **given} if "seed" in parameters_of(name) else given
    check_types(name, own)
    return own
