"""ComposedPress: one press after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor

from coldpress.bases.scorer import ScorerPress
from coldpress.core.choice import best, checked, pack, protect
from coldpress.core.kept import Place
from coldpress.core.ratio import check_ratio
from coldpress.core.requirements import SCORER, require
from coldpress.core.view import LayerView
from coldpress.errors import PressError

_C = TypeVar("_C", bound="ComposedPress")


@dataclass(frozen=True)
class ComposedPress(ScorerPress):
    """Keep what is left after each of several presses has removed its share of what the one before left.

    Every press scores the whole text, so that a position, a sink or a window means the same to all of them; those that
    were removed before cannot come back. What any of them protects, none of them removes.

    Source: kvpress's ComposedPress, https://github.com/NVIDIA/kvpress; no paper. Differs from kvpress: later presses
    score the whole text instead of what is left of it.

    Needs: what the presses need. Cost: the sum of theirs.

    Args:
        presses: at least one scorer, each with its ratio. ``compression_ratio`` is 1 - product of (1 - ratio).
    """

    can_rechoose = False
    per_layer = False

    compression_ratio: float = field(init=False, repr=False, compare=False)
    budget_tokens: int | None = field(init=False, repr=False, compare=False, default=None)
    budget_bytes: int | None = field(init=False, repr=False, compare=False, default=None)
    presses: Sequence[ScorerPress]

    def __post_init__(self) -> None:
        presses = tuple(self.presses) if isinstance(self.presses, Sequence) else ()
        if not presses:
            raise PressError(f"ComposedPress takes a list of at least one press, got {self.presses!r}.")
        for press in presses:
            require(self, press, *SCORER)
        object.__setattr__(self, "presses", presses)
        kept = math.prod(1 - Fraction(repr(float(press.compression_ratio))) for press in presses)
        object.__setattr__(self, "compression_ratio", float(1 - kept))

    def with_budget(self: _C, **budget: Any) -> _C:
        """The same presses, each with the share of the work that it has now, at another ratio together."""
        if set(budget) != {"compression_ratio"}:
            raise PressError(
                "ComposedPress has the ratios of its presses, and no budget in tokens or bytes of its own."
            )
        compression_ratio = budget["compression_ratio"]
        check_ratio(compression_ratio)
        kept = [math.log1p(-press.compression_ratio) for press in self.presses]
        shares = [part / sum(kept) if sum(kept) else 1 / len(kept) for part in kept]
        ratios = [round(1 - (1 - compression_ratio) ** share, 12) for share in shares]
        return replace(self, presses=[p.with_ratio(r) for p, r in zip(self.presses, ratios, strict=True)])

    def score(self, view: LayerView) -> Tensor:
        raise PressError("ComposedPress has no scores of its own, only those of its presses.")

    def keep_of(self, n_tokens: int, place: Place) -> int:
        return self._counts(n_tokens, place)[-1]

    def protected(self, view: LayerView) -> tuple[int, int]:
        both = [press.protected(view) for press in self.presses]
        return max(n_sink for n_sink, _ in both), max(n_window for _, n_window in both)

    def reserved(self, view: LayerView, n_keep: int) -> Tensor | None:
        found = [own for press in self.presses if (own := press.reserved(view, n_keep)) is not None]
        return torch.stack(torch.broadcast_tensors(*found)).any(0) if found else None

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        left = torch.ones(view.keys.shape[:3], dtype=torch.bool, device=view.keys.device)
        for press, count in zip(self.presses, self._counts(view.n_tokens, view.place), strict=True):
            scores = protect(checked(press.scores(view)).masked_fill(~left, -torch.inf), must)
            left = best(scores, count)
        return pack(left)

    def _counts(self, n_tokens: int, place: Place) -> list[int]:
        """How many are left after each press."""
        counts = []
        for press in self.presses:
            n_tokens = press.keep_of(n_tokens, place)
            counts.append(n_tokens)
        return counts
