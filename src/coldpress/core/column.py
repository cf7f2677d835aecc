"""Column: what each stored pair carries beside its key and value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
