"""Outlines: what a press works out of the first pairs of a layer once, and not again at each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

__all__ = ["Outlines"]


class Outlines:
    """Numbers of the first slots of a layer, which hold as long as pairs are only appended.

    Whoever moves, changes or frees pairs calls :meth:`forget` or :meth:`crop`. Tensors are never written to, so forks
    share them. They are not saved with a cache: they are worked out again.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[int, Tensor]] = {}  # by name: of how many slots, and the numbers

    def of_first(self, name: Hashable, n: int, compute: Callable[[int, int], Tensor]) -> Tensor:
        """The numbers of slots ``0 .. n - 1``: those that are known, and what ``compute`` says of the slots after them.

        Args:
            name: of the numbers, with all that they depend on beside the pairs.
            n: how many slots. A caller that adds many at a time has them joined, which copies, seldom.
            compute: of slots ``start .. stop - 1``, ``[B, Hkv, m, ...]``, m any number of entries that make those of
                more slots when they are joined.
        """
        n_known, numbers = self._known.get(name, (0, None))
        if numbers is None or n_known > n or (numbers.is_inference() and not torch.is_inference_mode_enabled()):
            n_known, numbers = 0, None
        if numbers is None or n_known < n:
            with torch.no_grad():
                more = compute(n_known, n)
                numbers = more if numbers is None else torch.cat([numbers, more], dim=2)
            self._known[name] = n, numbers
        return numbers

    def crop(self, n: int) -> None:
        """Forget the numbers of more than the first ``n`` slots."""
        self._known = {name: own for name, own in self._known.items() if own[0] <= n}

    def forget(self) -> None:
        """Forget all: the pairs are others, or in other slots."""
        self._known = {}

    def shared(self) -> Outlines:
        """Outlines of the same slots that go their own way."""
        other = Outlines()
        other._known = dict(self._known)
        return other

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that take memory."""
        return tuple(numbers for _, numbers in self._known.values())
