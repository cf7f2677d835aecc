"""What the ``model_args`` of lm-evaluation-harness ask for: a press of a size, and whole numbers."""

from __future__ import annotations

from typing import Any

from coldpress.bases.press import BasePress
from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import NO_PRESS, make_press, parameters_of, takes_ratio
from coldpress.bases.scorer import BUDGETS
from coldpress.core.definition import as_given
from coldpress.errors import InputError, PressError
from coldpress.eval.press_args import check_types

__all__ = ["integer", "is_whole", "press_of"]


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
    for size in ("compression_ratio", *BUDGETS):
        if size in parameters:
            raise PressError(f"press_args cannot hold {size}; give {size}= beside press=.")
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
