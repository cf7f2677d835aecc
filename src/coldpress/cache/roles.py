"""Roles: which parts of a press have work to do at each call of a layer, looked up once for each press."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coldpress.core.press import Press, parts

__all__ = ["Roles"]


class Roles(NamedTuple):
    """The parts of a press that have work to do at each call of a layer."""

    press: Press | None
    observers: Sequence[Press] = ()
    readers: Sequence[Press] = ()  # they choose what a decoding query reads

    @classmethod
    def of(cls, press: Press | None) -> Roles:
        own = [] if press is None else list(parts(press))
        return cls(press, [part for part in own if part.observes], [part for part in own if part.reads_part])
