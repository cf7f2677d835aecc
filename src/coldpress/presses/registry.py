"""Names of the presses: what the command line, the documentation and the contract tests list comes from here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from coldpress.errors import PressError, nearest
from coldpress.presses.base import BasePress

__all__ = ["NO_PRESS", "PressInfo", "catalogue", "make_press", "press_names", "register"]

NO_PRESS = "no_press"  # the uncompressed baseline: a name for the command line, no class

_P = TypeVar("_P", bound=type[BasePress])
_BY_NAME: dict[str, type[BasePress]] = {}


@dataclass(frozen=True)
class PressInfo:
    """One line of the catalogue, read off a press's class and docstring."""

    name: str
    class_name: str
    summary: str
    source: str
    needs: str
    parameters: str


def register(name: str) -> Callable[[_P], _P]:
    """Class decorator: make a press known under ``name``.

    Raises:
        PressError: the name is taken by another class.
    """

    def decorate(cls: _P) -> _P:
        taken = _BY_NAME.get(name)
        if name == NO_PRESS or (taken is not None and taken.__qualname__ != cls.__qualname__):
            raise PressError(f"The press name {name!r} is taken{f' by {taken.__name__}' if taken else ''}.")
        _BY_NAME[name] = cls
        return cls

    return decorate


def press_names() -> list[str]:
    """The registered names, sorted; ``no_press`` is not one of them."""
    return sorted(_BY_NAME)


def make_press(name: str, compression_ratio: float, /, **parameters: Any) -> BasePress | None:
    """The press called ``name``, or None for ``no_press``.

    Raises:
        PressError: unknown name (with the nearest ones), a ratio outside [0, 1), an unknown parameter.
    """
    if name == NO_PRESS:
        return None
    cls = _BY_NAME.get(name)
    if cls is None:
        known = [NO_PRESS, *press_names()]
        raise PressError(f"Unknown press {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    allowed = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for parameter in parameters:
        if parameter not in allowed:
            raise PressError(
                f"{cls.__name__} has no parameter {parameter!r}.{nearest(parameter, allowed)} "
                f"It takes: {', '.join(allowed)}."
            )
    return cls(compression_ratio=compression_ratio, **parameters)  # type: ignore[call-arg]


def catalogue() -> list[PressInfo]:
    """Every registered press, sorted by name."""
    return [_info(name, _BY_NAME[name]) for name in press_names()]


def _info(name: str, cls: type[BasePress]) -> PressInfo:
    doc = inspect.getdoc(cls) or ""

    def line(tag: str) -> str:
        found = re.search(rf"^{tag}: (.+?)(?=\n\n|\n[A-Z]\w+: |\Z)", doc, re.MULTILINE | re.DOTALL)
        return " ".join(found[1].split()) if found else ""

    own = [f for f in fields(cls) if f.name != "compression_ratio"]  # type: ignore[arg-type]
    parameters = ", ".join(f"{f.name}={f.default!r}" for f in own)
    return PressInfo(name, cls.__name__, doc.split("\n")[0], line("Source"), line("Needs"), parameters)
