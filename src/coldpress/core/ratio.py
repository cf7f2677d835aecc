"""What a compression ratio may be; without torch, so that a command can say it at once."""

from __future__ import annotations

from numbers import Real
from typing import Any

from coldpress.errors import PressError

__all__ = ["check_ratio"]


def check_ratio(ratio: object, name: str = "compression_ratio") -> None:
    """Raise :class:`PressError` unless ``ratio`` is a number in [0, 1)."""
    number: Any = ratio  # compared as it is: an int may be too large for a float
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 <= number < 1:
        raise PressError(f"{name} is the fraction of pairs to remove: a number in [0, 1), such as 0.5; got {ratio!r}.")
