"""WrapperPress: a press that changes one of the choices of the press inside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from coldpress.bases.checks import no_scorer, require_one_layer
from coldpress.bases.press import BasePress
from coldpress.bases.scorer import ScorerPress
from coldpress.core.kept import Place
from coldpress.core.view import LayerView
from coldpress.errors import PressError

__all__ = ["WrapperPress", "require_choice", "require_press", "require_scorer"]

_W = TypeVar("_W", bound="WrapperPress")


@dataclass(frozen=True)
class WrapperPress(ScorerPress):
    """A press around another one, which answers every question that the wrapper does not answer itself.

    The ratio or budget, the scores and the protected tokens are those of the press inside; ``with_budget`` changes it
    there.

    Args:
        press: the press inside.
    """

    # the inner press's
    compression_ratio: float = field(init=False, repr=False, compare=False)
    budget_tokens: int | None = field(init=False, repr=False, compare=False)
    budget_bytes: int | None = field(init=False, repr=False, compare=False)
    press: ScorerPress

    def __post_init__(self) -> None:
        self._check_press()
        for name in ("compression_ratio", "budget_tokens", "budget_bytes"):
            object.__setattr__(self, name, getattr(self.press, name))

    def _check_press(self) -> None:
        """Raise :class:`PressError` if ``press`` cannot be wrapped; wrappers that choose by scores need a scorer."""
        require_scorer(self, self.press)

    def with_budget(self: _W, **budget: Any) -> _W:
        return replace(self, press=self.press.with_budget(**budget))

    @property
    def chooses_again(self) -> bool:
        return self.can_rechoose and self.press.chooses_again

    def score(self, view: LayerView) -> Tensor:
        return self.press.score(view)

    def scores(self, view: LayerView) -> Tensor:
        return self.press.scores(view)

    def keep_of(self, n_tokens: int, place: Place) -> int:
        return self.press.keep_of(n_tokens, place)

    def layers_differ(self) -> bool:
        return self.press.layers_differ()

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.press.protected(view)

    def choose(self, view: LayerView) -> Tensor | None:
        return self.press.choose(view)


def require_scorer(wrapper: BasePress, press: object) -> None:
    """Raise :class:`PressError` unless ``press`` is a scorer: scores and a budget, and nothing around them."""
    require_choice(wrapper, press)
    if isinstance(press, WrapperPress) or type(press).choose is not ScorerPress.choose:  # type: ignore[attr-defined]
        raise PressError(
            f"{type(wrapper).__name__} chooses by scores, and {type(press).__name__} makes that choice in its own way; "
            "give it a scorer such as SnapKVPress(0.5)."
        )


def require_choice(wrapper: BasePress, press: object) -> None:
    """Raise :class:`PressError` unless ``press`` chooses among pairs and leaves them as they are."""
    require_press(wrapper, press)
    if type(press).compress is not ScorerPress.compress:  # type: ignore[attr-defined]
        raise PressError(
            f"{type(press).__name__} changes the pairs it keeps, so nothing else can be done after it; put it outside: "
            f"{type(press).__name__}(press={type(wrapper).__name__}(...))."
        )


def require_press(wrapper: BasePress, press: object) -> None:
    """Raise :class:`PressError` unless ``press`` is one with scores and a budget."""
    require_one_layer(wrapper, press)
    if not isinstance(press, ScorerPress):
        raise PressError(f"{type(wrapper).__name__} wraps a press such as SnapKVPress(0.5), got {no_scorer(press)}.")
