"""Checks of a press's parameters, with sentences that say what to write instead."""

from __future__ import annotations

from typing import Any

import torch

from coldpress.core.press import Press
from coldpress.errors import PressError

__all__ = ["check_at_least", "check_between", "check_share", "numbers_of"]


def check_at_least(press: Press, minimum: int, *names: str) -> None:
    """Raise :class:`PressError` unless the named fields are integers of at least ``minimum``, and below 2**62."""
    for name in names:
        value = getattr(press, name)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**62:
            below = "" if isinstance(value, float) or not isinstance(value, int) or value < minimum else " and < 2**62"
            raise PressError(f"{type(press).__name__}: {name} must be an integer >= {minimum}{below}, got {value!r}.")


def check_between(press: Press, low: float, high: float, *names: str) -> None:
    """Raise :class:`PressError` unless the named fields are numbers from ``low`` to ``high``, both included."""
    for name in names:
        value = getattr(press, name)
        fits = isinstance(value, float) or (type(value) is int and abs(value) < 2**62)  # torch has no longer ones
        if not fits or not low <= value <= high:
            allowed = f">= {low}" if high == float("inf") else f"in [{low}, {high}]"
            raise PressError(f"{type(press).__name__}: {name} must be a number {allowed}, got {value!r}.")


def check_share(press: Press, *names: str) -> None:
    """Raise :class:`PressError` unless the named fields are numbers above 0, and at most 1."""
    for name in names:
        value = getattr(press, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
            raise PressError(f"{type(press).__name__}: {name} must be a number above 0 and at most 1, got {value!r}.")


def numbers_of(press: Press, name: str, values: Any, n_dims: int) -> tuple[Any, ...]:
    """A table of numbers as tuples in tuples, ``n_dims`` deep, so that presses can be compared and hashed.

    Raises:
        PressError: ``values`` is not a tensor, array or list of so many dimensions, is empty, or is not finite.
    """
    try:
        table = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        table = torch.empty(0)
    if table.dim() != n_dims or not table.numel() or not table.isfinite().all():
        raise PressError(
            f"{type(press).__name__}: {name} must be a tensor or lists of finite numbers with {n_dims} dimensions."
        )

    def tuples(part: Any) -> Any:
        return tuple(map(tuples, part)) if isinstance(part, list) else part

    found: tuple[Any, ...] = tuples(table.tolist())
    return found
