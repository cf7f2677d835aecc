"""Taken: the parts of a file of a saved cache, checked one by one; what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST", "Malformed", "Parts", "Taken", "is_int", "need"]

MOST = 2**40  # of a number of tokens: no text is longer, and sums of such numbers are exact

Parts = dict[str, Tensor]


class Malformed(ValueError):
    """A part of a file that no saved cache has."""


def need(is_met: bool, what: str) -> None:
    if not is_met:
        raise Malformed(what)


def is_int(value: Any, least: int = 0, most: int = MOST) -> bool:
    return type(value) is int and least <= value <= most


class Taken:
    """The tensors of one layer, taken one by one; what is left over at the end is too much."""

    def __init__(self, parts: Parts):
        self.left = dict(parts)

    def take(self, name: str, dtype: torch.dtype | None, *shape: int | None, finite: bool = True) -> Tensor:
        """One tensor of this dtype and shape; None for a size that is free."""
        part = self.left.pop(name, None)
        need(part is not None, f"{name}, which is not there")
        assert part is not None
        need(dtype is None or part.dtype == dtype, f"{name}, of {part.dtype}")
        fits = part.dim() == len(shape) and all(b in (None, a) for a, b in zip(part.shape, shape, strict=True))
        need(fits, f"{name}, of shape {tuple(part.shape)}")
        if finite and part.is_floating_point():
            need(bool(part.isfinite().all()), f"{name}, with numbers that are not finite")
        return part

    def maybe(self, name: str, *how: Any, **options: Any) -> Tensor | None:
        return self.take(name, *how, **options) if name in self.left else None
