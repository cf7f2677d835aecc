"""A press as plain data: its class's name and its parameters, in the types of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from coldpress.core.press import Press
from coldpress.errors import PressError

__all__ = ["as_data", "from_data"]


def as_data(press: Press) -> dict[str, Any]:
    """The class and the parameters of ``press``, and of those inside it.

    What a press has found out by itself, and leaves out of comparisons, is not among them.

    Raises:
        PressError: a parameter is something else than None, a number, a text, a press, or a list of these.
    """
    if not is_dataclass(press):
        raise PressError(f"{type(press).__name__} is no dataclass, so its parameters are not known.")
    given = {f.name: getattr(press, f.name) for f in fields(press) if f.init and f.compare}
    try:
        return {"class": _name(type(press)), "parameters": {name: _value(value) for name, value in given.items()}}
    except TypeError as error:
        raise PressError(f"{type(press).__name__} has a parameter that a file cannot hold: {error}.") from error


def from_data(data: dict[str, Any]) -> Press:
    """The press that ``data`` describes. Looks among the classes that exist; nothing is imported.

    Raises:
        PressError: there is no such class, or it does not take these parameters.
    """
    name, parameters = data.get("class"), data.get("parameters")
    if not isinstance(name, str) or not isinstance(parameters, dict):
        raise PressError("A press is described by its class and its parameters, and one of them is missing.")
    cls = next((cls for cls in _subclasses(Press) if _name(cls) == name), None)
    if cls is None:
        raise PressError(f"There is no press {name} here; import the module {name.partition(':')[0]} first.")
    try:
        return cls(**{key: _back(value) for key, value in parameters.items()})
    except PressError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # of a type that it does not expect
        raise PressError(f"{name} does not take the parameters that are given: {error}.") from error


def _name(cls: type[Press]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _value(value: Any) -> Any:
    if isinstance(value, Press):
        return as_data(value)
    if isinstance(value, (list, tuple)):
        return [_value(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _back(value: Any) -> Any:
    """The value of a parameter; lists come back as tuples, which presses have for them."""
    if isinstance(value, dict):
        return from_data(value)
    return tuple(_back(part) for part in value) if isinstance(value, list) else value


def _subclasses(cls: type[Press]) -> Iterator[type[Press]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
