"""Values of options: what a text on the command line stands for, and why it stands for nothing."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

__all__ = ["Several", "auto_or_not", "bits", "integer", "json_object", "listed", "not_negative", "positive"]


class Several(argparse.Action):
    """An option that takes lists of values, and joins them: ``0.25,0.5 0.9`` is three."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


def auto_or_not(text: str) -> bool | None:
    """True for ``yes``, False for ``no``, None for ``auto``."""
    if text not in ("auto", "yes", "no"):
        raise argparse.ArgumentTypeError(f"must be auto, yes or no, got {text!r}")
    return None if text == "auto" else text == "yes"


def listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """What reads values of the type ``one`` with commas between them; what ends in a comma is as without it."""

    def read(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",")]
        values = []
        for part in [part for part in parts if part] or [text]:
            try:
                values.append(one(part))
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"invalid {one.__name__} value: {part!r}") from error
        return values

    return read


def bits(text: str) -> int | str:
    """In how few bits pairs are stored: 8, 4, 2, ``k8v4`` (keys in 8 bits, values in 4) and its like, or ``mixed``."""
    name = text.strip()
    if name in ("8", "4", "2"):
        return int(name)
    if re.fullmatch("k[842]v[842]|mixed", name):
        return name
    raise argparse.ArgumentTypeError(f"must be 8, 4, 2, keys and values apart as in k8v4, or mixed; got {text[:40]!r}")


def integer(text: str, minimum: int, maximum: int = 2**63 - 1) -> int:
    """An integer from ``minimum`` to ``maximum``."""
    digits = text.strip().removeprefix("+").replace("_", "")
    try:
        value = maximum + 1 if digits.isdecimal() and len(digits) > 1000 else int(text)  # int reads no more than 4300
    except ValueError:
        value = minimum - 1
    got = text if len(text) <= 40 else f"{text[:30]}... of {len(text)} characters"
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}, got {got!r}")
    if value > maximum:
        raise argparse.ArgumentTypeError(f"must be an integer of at most {maximum}, got {got!r}")
    return value


positive = partial(integer, minimum=1)
not_negative = partial(integer, minimum=0)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    wanted = 'must be a JSON object such as {"window_size": 32}'
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{wanted}, got {text[:80]!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
    return value
