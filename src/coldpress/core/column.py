"""Column: what each stored pair carries beside its key and value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PINNED", "Column"]

PINNED = "pinned"  # bool, filled by the cache: tokens that nothing may evict


@dataclass(frozen=True)
class Column:
    """A number, or a row of numbers, that each pair carries through all operations on it.

    Attributes:
        name: how ``view.columns`` and ``Kept.columns`` call it.
        fill: the value of a new token.
        dtype: of the column.
        width: numbers of each pair, ``[B, Hkv, T, width]``; None for a single one, ``[B, Hkv, T]``.
    """

    name: str
    fill: float | bool = 0.0
    dtype: torch.dtype = torch.float32
    width: int | None = None

    def new(self, keys: Tensor) -> Tensor:
        """Of pairs that nothing was said of, those of ``keys [B, Hkv, T, D]``."""
        return torch.full(self.shape(*keys.shape[:3]), self.fill, dtype=self.dtype, device=keys.device)

    def shape(self, *slots: int) -> tuple[int, ...]:
        """Of a column of ``slots``: batch, heads, tokens."""
        return slots if self.width is None else (*slots, self.width)
