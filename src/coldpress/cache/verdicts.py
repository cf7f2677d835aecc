"""Verdicts: what a press has said of the newest tokens, until they are no longer among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Verdicts"]


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Which of some consecutive tokens of a layer stay when their turn comes. Immutable, so that forks may share it.

    Attributes:
        stays: bool ``[B, Hkv, n]``, of the tokens at ``end - n .. end - 1`` of the input.
        end: where they end.
    """

    stays: Tensor
    end: int

    def of(self, start: int, stop: int) -> Tensor:
        """bool ``[B, Hkv, stop - start]`` for the tokens at ``start .. stop - 1``; those never judged stay."""
        first = self.end - self.stays.shape[2]
        begin, end = (min(max(at, first), self.end) - first for at in (start, stop))
        never = max(0, min(stop, first) - start), max(0, stop - max(start, self.end))
        return pad(self.stays[..., begin:end], never, value=True)

    def and_then(self, stays: Tensor, end: int) -> Verdicts:
        """With those of newer tokens, up to ``end``."""
        first, begin = self.end - self.stays.shape[2], end - stays.shape[2]
        return (
            Verdicts(torch.cat([self.of(first, begin), stays], dim=-1), end) if begin > first else Verdicts(stays, end)
        )

    def since(self, start: int) -> Verdicts:
        """Without those of tokens before ``start``."""
        return Verdicts(self.of(min(start, self.end), self.end), self.end)

    def until(self, end: int) -> Verdicts:
        """Without those of tokens from ``end`` on."""
        first = self.end - self.stays.shape[2]
        return self if end >= self.end else Verdicts(self.of(min(first, end), end), end)

    def index_rows(self, rows: Tensor) -> Verdicts:
        """Of these rows."""
        return Verdicts(self.stays.index_select(0, rows), self.end)
