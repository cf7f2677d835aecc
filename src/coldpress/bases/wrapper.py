"""WrapperPress: a press that changes one of the choices of the press inside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from coldpress.bases.scorer import ScorerPress
from coldpress.core.kept import Place
from coldpress.core.press import Press, parts
from coldpress.core.requirements import SCORER, refusal, require
from coldpress.core.view import LayerView
from coldpress.errors import PressError

__all__ = ["WrapperPress", "require_forced"]

_W = TypeVar("_W", bound="WrapperPress")


@dataclass(frozen=True)
class WrapperPress(ScorerPress):
    """A press around another one, which answers every question that the wrapper does not answer itself.

    The ratio or budget, the scores and the protected tokens are those of the press inside; ``with_budget`` changes it
    there.

    Args:
        press: the press inside.

    Attributes:
        needs_inside: what the press inside has to have, as :mod:`coldpress.core.requirements` calls it.
    """

    per_layer = False
    needs_inside: ClassVar[tuple[str, ...]] = SCORER

    # the inner press's
    compression_ratio: float = field(init=False, repr=False, compare=False)
    budget_tokens: int | None = field(init=False, repr=False, compare=False)
    budget_bytes: int | None = field(init=False, repr=False, compare=False)
    press: ScorerPress

    def __post_init__(self) -> None:
        require(self, self.press, *self.needs_inside)
        for name in ("compression_ratio", "budget_tokens", "budget_bytes"):
            object.__setattr__(self, name, getattr(self.press, name))

    def with_budget(self: _W, **budget: Any) -> _W:
        return replace(self, press=self.press.with_budget(**budget))

    def score(self, view: LayerView) -> Tensor:
        return self.press.score(view)

    def scores(self, view: LayerView) -> Tensor:
        return self.press.scores(view)

    def keep_of(self, n_tokens: int, place: Place) -> int:
        return self.press.keep_of(n_tokens, place)

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.press.protected(view)

    def reserved(self, view: LayerView, n_keep: int) -> Tensor | None:
        return self.press.reserved(view, n_keep)

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor | None:
        return self.press.choose(view)


def require_forced(outer: Press, press: Press, instead: str) -> None:
    """Raise :class:`PressError` unless ``press``, and every press inside it, can be told what must stay (``chosen``).

    Args:
        instead: what to do, as :func:`coldpress.core.requirements.refusal` takes it.
    """
    for part in parts(press):
        if isinstance(part, ScorerPress) and (
            type(part).choose is not ScorerPress.choose or type(part).chosen is WrapperPress.chosen
        ):
            raise PressError(refusal(outer, part, "scores", instead))
