"""Roles: which parts of a press have work to do at each call of a layer, looked up once for each press."""

from __future__ import annotations

from typing import NamedTuple

from coldpress.core.press import Press, parts
from coldpress.errors import PressError

__all__ = ["Roles"]


class Roles(NamedTuple):
    """The parts of a press that have work to do at each call of a layer."""

    press: Press | None
    observers: tuple[Press, ...] = ()
    readers: tuple[Press, ...] = ()  # at most one, which chooses what a decoding query reads

    @classmethod
    def of(cls, press: Press | None) -> Roles:
        """Raise :class:`PressError` if two parts choose what a query reads."""
        own = () if press is None else tuple(parts(press))
        readers = tuple(part for part in own if part.reads_part)
        if len(readers) > 1:
            names = " and ".join(type(part).__name__ for part in readers)
            raise PressError(f"{names} both choose which pairs a decoding query reads; use one of them.")
        return cls(press, tuple(part for part in own if part.observes and part.observes_later), readers)
