"""BudgetPress and ScorerPress: how many pairs are kept, and which by their scores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from coldpress.backends import BUDGETS
from coldpress.bases.checks import check_at_least
from coldpress.bases.press import BasePress
from coldpress.core.choice import select
from coldpress.core.counts import keep_count
from coldpress.core.forced import forced
from coldpress.core.kept import Kept, Place
from coldpress.core.press import parts
from coldpress.core.ratio import check_ratio
from coldpress.core.view import LayerView
from coldpress.errors import PressError

__all__ = ["BUDGETS", "BudgetPress", "ScorerPress", "check_budget"]


_S = TypeVar("_S", bound="BudgetPress")


@dataclass(frozen=True)
class BudgetPress(BasePress):
    """A press that is told how many pairs to keep; :class:`ScorerPress` for those that score one layer at a time.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        budget_tokens: pairs that a head keeps at most, on average over heads and layers; instead of a ratio.
        budget_bytes: bytes that the kept pairs of one row take at most, in all compressed layers together, as the
            cache stores them, few bits and biases included; instead of a ratio. Where heads differ and bits are few,
            those of each head that wait to be encoded (:class:`~coldpress.Codec`) can take some more.
    """

    has_ratio = True
    per_layer = False
    implied: ClassVar[Mapping[str, Mapping[str, Any]]] = {"keep_of": {"per_layer": True}}

    exact_at_0: ClassVar[bool] = True  # at ratio 0 the cache is the uncompressed one

    compression_ratio: float = 0.0
    budget_tokens: int | None = field(default=None, kw_only=True)
    budget_bytes: int | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = BudgetPress.__repr__  # type: ignore[method-assign]  # dataclass would make one of its own

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if f.repr and (f.name not in BUDGETS or getattr(self, f.name) is not None)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        check_ratio(self.compression_ratio)
        check_budget(self)

    def keep_of(self, n_tokens: int, place: Place) -> int:
        """How many of ``n_tokens`` pairs a head of the layer at ``place`` keeps: the mean if its heads differ."""
        return self.mean_keep(n_tokens, place)

    def mean_keep(self, n_tokens: int, place: Place) -> int:
        """How many of ``n_tokens`` pairs a head keeps, mean over heads and layers: the budget as its user gave it.

        Raises:
            PressError: ``budget_bytes`` is less than one token takes.
        """
        if self.budget_tokens is not None:
            return min(n_tokens, self.budget_tokens)
        if self.budget_bytes is not None:
            n_keep = place.n_within(self.budget_bytes, n_tokens)
            if not n_keep:
                one = place.token_bytes if place.stored_bytes is None else place.stored_bytes(1)
                raise PressError(
                    f"budget_bytes={self.budget_bytes} is less than the {place.n_layers * one} bytes of one token in "
                    f"{place.n_layers} layers."
                )
            return n_keep
        return keep_count(n_tokens, self.compression_ratio)

    def keep(self, view: LayerView) -> int:
        """How many pairs a head of this layer keeps, 1 <= n <= T: the mean if its heads differ."""
        if view.n_counted is not None:  # in a prefill in pieces
            return min(view.n_tokens, self.keep_of(view.n_counted, view.place))
        if view.positions is None:
            return self.keep_of(view.n_tokens, view.place)
        return min(view.n_tokens, self.keep_of(view.end, view.place))  # while decoding: of the text so far

    def with_ratio(self: _S, compression_ratio: float) -> _S:
        """The same press at another ratio, which takes the place of any budget."""
        return self.with_budget(compression_ratio=compression_ratio)

    def with_budget(self: _S, **budget: Any) -> _S:
        """The same press with ``compression_ratio``, ``budget_tokens`` or ``budget_bytes`` instead of what it had."""
        nothing: dict[str, Any] = {"compression_ratio": 0.0, "budget_tokens": None, "budget_bytes": None}
        return replace(self, **(nothing | budget))


@dataclass(frozen=True)
class ScorerPress(BudgetPress):
    """Keep the pairs with the largest scores; subclasses define :meth:`score`.

    Four questions, each with a method of its own, so that wrappers can change one and leave the others alone: which
    pairs matter (:meth:`scores`), how many are kept (:meth:`keep_of`) and which in any case (:meth:`protected`), which
    ones these are (:meth:`chosen`). Only a press that stores something else than the chosen pairs overrides
    :meth:`compress`.

    Args:
        compression_ratio, budget_tokens, budget_bytes: as in :class:`BudgetPress`.
    """

    can_rechoose = True
    per_head_independent = True
    offers_choice = True
    offers_scores = True
    implied: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "score": {"pointwise": False, "estimates_attention": False},
        "choose": {"offers_scores": False},
        "chosen": {"offers_scores": False},
        "compress": {"changes": frozenset({"keys", "values"})},
    }

    @property
    def changes(self) -> frozenset[str]:
        return frozenset()

    @property
    def chooses_again(self) -> bool:
        return all(part.can_rechoose for part in parts(self))

    def score(self, view: LayerView) -> Tensor:
        """Scores ``[B, Hkv, T]`` in float32; larger = keep. Must not depend on ``compression_ratio``."""
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def protected(self, view: LayerView) -> tuple[int, int]:
        """How many of the first and of the last tokens of the text are kept whatever their score."""
        return 0, 0

    def reserved(self, view: LayerView, n_keep: int) -> Tensor | None:
        """Other tokens that stay when a head keeps ``n_keep``: bool ``[B or 1, Hkv or 1, T]``, fewer than that."""
        return None

    def scores(self, view: LayerView) -> Tensor:
        """The scores that :meth:`choose` compares: :meth:`score`, computed once per view for all ratios."""
        score = self._checked_score if view.counts is None else self._by_head
        return view.once(self.with_ratio(0.0), lambda: score(view))

    def _checked_score(self, view: LayerView) -> Tensor:
        name, shape = f"{type(self).__name__}.score", view.keys.shape[:3]
        try:
            scores = self.score(view)
        except SystemExit as error:  # of a user's file: what is measured beside it goes on
            raise PressError(f"{name} ends the process (SystemExit: {error}).") from error
        if not isinstance(scores, Tensor) or scores.shape != shape or not scores.is_floating_point():
            got = type(scores).__name__
            if isinstance(scores, Tensor):
                got = f"{list(scores.shape)}{'' if scores.is_floating_point() else f' of {scores.dtype}'}"
            raise PressError(
                f"{name} returned {got}, and has to return a number for each KV head and token: {list(shape)}, "
                "floating-point."
            )
        return scores

    def _by_head(self, view: LayerView) -> Tensor:
        """Scores of a view whose heads store different numbers of pairs; minus infinity in empty slots."""
        scores = torch.full(view.keys.shape[:3], -torch.inf, device=view.keys.device)
        for row, head in itertools.product(*(range(n) for n in scores.shape[:2])):
            own = self._checked_score(view.of_head(row, head))[0, 0]
            scores[row, head, : len(own)] = own
        return scores

    def forced(self, view: LayerView, n_keep: int) -> Tensor:
        """Which tokens of ``view`` must be kept when a head keeps ``n_keep``: protected, reserved and pinned ones.

        Returns:
            bool ``[B or 1, Hkv or 1, T]``; see :func:`coldpress.core.forced.forced`.
        """
        return forced(view, self.protected(view), n_keep, reserved=self.reserved(view, n_keep))

    def choose(self, view: LayerView) -> Tensor | None:
        """Positions in ``view`` of the pairs that are kept.

        Returns:
            int64 ``[B, Hkv, n]``, ascending; -1 in the last places of a head that keeps fewer than the longest. None
            keeps everything.
        """
        n_keep = self.keep(view)
        if n_keep >= view.n_tokens:
            return None
        found = self.chosen(view, n_keep, self.forced(view, n_keep))
        return None if found is None else view.held(found)

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor | None:
        """:meth:`choose` where pairs are evicted: the best ``n_keep`` of each head, those in ``must`` among them.

        Args:
            n_keep: fewer than the view has; the mean over the heads, if they may differ.
            must: what :meth:`forced` gives; no head has more than ``n_keep`` of it.
        """
        return select(view.guard(self.scores(view), must), n_keep)

    def compress(self, view: LayerView) -> Kept | None:
        positions = self.choose(view)
        return None if positions is None else view.take(positions)


def check_budget(press: BudgetPress) -> None:
    """Raise :class:`PressError` unless at most one of ratio, tokens and bytes says how much is kept."""
    check_at_least(press, 1, *(name for name in BUDGETS if getattr(press, name) is not None))
    given = [name for name in ("compression_ratio", *BUDGETS) if getattr(press, name)]
    if len(given) > 1:
        raise PressError(f"{type(press).__name__}: {' and '.join(given)} both say how much is kept; give one of them.")
