"""PressType: errors in the definition of a class of presses, in words that say what to write instead.

Python and dataclasses would say it too, but later, or of something else: a press written for kvpress would fail inside
the model with a missing argument, or have methods that are never called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, fields, is_dataclass
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

from coldpress.errors import FrozenPressError, PressError

__all__ = ["PressType", "as_given", "in_short", "not_called", "or_by_name"]

_F = TypeVar("_F", bound=Callable[..., Any])

_PAGE = "'A press of your own' in docs/from-kvpress.md shows how one written for kvpress is carried over."
_OF_A_VIEW = ("score", "compress")  # called with a LayerView
_NOT_CALLED = {  # what kvpress calls, and what coldpress calls in its place
    "forward_hook": "compress(self, view)",
    "post_init_from_model": "prepared(self, model, tokenizer=None)",
}


_RENAMED = {  # traits that presses of earlier versions of coldpress have
    "decodes": "can_rechoose",
    "heads_alone": "per_head_independent",
    "scores_alone": "pointwise",
    "goes_on": "evicts_while_decoding",
    "layers_differ": "per_layer",
    "leaves_keys": "changes",
}


def as_given(press: object) -> str:
    """What was given where a press is needed, for the end of a sentence."""
    if isinstance(press, type):
        return f"the class {press.__name__}; call it"
    if any(cls.__module__.partition(".")[0] == "kvpress" for cls in type(press).__mro__):
        return f"{press!r}, a press of kvpress; import {type(press).__name__} from coldpress, or carry it over"
    return repr(press)


def in_short(press: object) -> str:
    """The call that makes a press, without what has its default; of anything else its ``repr``."""
    if not is_dataclass(press) or isinstance(press, type):
        return repr(press)
    said = ((f, getattr(press, f.name)) for f in fields(press) if f.init and f.repr)
    given = ", ".join(f"{f.name}={in_short(value)}" for f, value in said if f.default is MISSING or value != f.default)
    return f"{type(press).__name__}({given})"


def not_called(press: str, name: str) -> str:
    """Why a press has no ``name``, where kvpress's have; an empty text for any other name."""
    if name not in _NOT_CALLED:
        return ""
    return f"{press}.{name} is kvpress's and nothing here calls it; in its place there is {_NOT_CALLED[name]}. {_PAGE}"


def or_by_name(function: _F) -> _F:
    """``function``, whose arguments before ``/`` are taken by name as well, where they are not given by place."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_ONLY]

    @wraps(function)
    def call(*args: Any, **others: Any) -> Any:
        for name in names[len(args) :]:
            if name not in others:
                break
            args = *args, others.pop(name)
        return function(*args, **others)

    return call  # type: ignore[return-value]


class PressType(type):
    """The type of all press classes: looks at each when it is defined.

    Raises:
        PressError: ``score`` or ``compress`` does not take a view; a method that only kvpress would call; a
            constructor of its own, which copies of a press at other ratios would not go through; or a dataclass that
            is not frozen.
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], is_root: bool = False) -> PressType:
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], is_root: bool = False) -> None:
        super().__init__(name, bases, namespace)
        if is_root or not any(isinstance(base, PressType) for base in bases):
            return  # those that coldpress itself begins with
        for method in _OF_A_VIEW:
            given = _other_arguments(getattr(cls, method, None))
            if given is not None:
                raise PressError(
                    f"{name}.{method} takes ({given}); here it takes (view), which has what a press looks at. {_PAGE}"
                )
        for own in namespace:
            if sentence := not_called(name, own):
                raise PressError(sentence)
            if own in _RENAMED:
                raise PressError(f"{name}.{own} is called {_RENAMED[own]} now, and nothing asks for the old name.")
        if "per_head_independent" not in namespace and not cls.__module__.startswith("coldpress."):
            super().__setattr__("per_head_independent", False)
        for base in cls.__mro__:
            for method, claims in vars(base).get("implied", {}).items():
                for trait, value in claims.items():
                    if cls._depth_of(method) < cls._depth_of(trait):  # the claim was made of an earlier method
                        super().__setattr__(trait, value)
        if "__call__" in namespace:
            raise PressError(
                f"{name}.__call__ would not be called where a cache or the pipeline has the press; what has to be "
                f"known of the model is asked in prepared(self, model, tokenizer=None). {_PAGE}"
            )
        is_made_again = "__dataclass_fields__" in namespace  # with slots=True, by what dataclass has made of it
        if "__init__" in namespace and hasattr(cls, "__dataclass_fields__") and not is_made_again:
            raise PressError(
                f"{name} has an __init__ of its own, which copies of a press at other ratios do not go through: make "
                f"its parameters fields under @dataclass(frozen=True), and check them in __post_init__. {_PAGE}"
            )

    def _depth_of(cls, name: str) -> int:
        """How far up the bases a name is defined."""
        return next(depth for depth, base in enumerate(cls.__mro__) if name in vars(base))

    def __setattr__(cls, name: str, value: Any) -> None:
        """Set an attribute of the class, as ``dataclass`` does: the moment to put its errors in our words."""
        if name == "__dataclass_params__" and not value.frozen:
            raise PressError(
                f"{cls.__name__}: a press does not change once it is made; write @dataclass(frozen=True). {_PAGE}"
            )
        super().__setattr__(name, _saying_what_to_do(value) if name == "__setattr__" else value)


def _other_arguments(method: object) -> str | None:
    """The arguments of a method that cannot be called with a view alone; None for one that can, or no method."""
    if not isinstance(method, FunctionType):
        return None
    signature = inspect.signature(method)
    try:
        signature.bind("self", "view")
    except TypeError:
        return ", ".join(list(signature.parameters)[1:])
    return None


def _saying_what_to_do(frozen: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    """The ``__setattr__`` that a frozen dataclass has, with an error that says how to get another press."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            frozen(self, name, value)
        except FrozenInstanceError:
            raise FrozenPressError(_instead(self, name, value)) from None

    return __setattr__


def _instead(press: Any, name: str, value: Any) -> str:
    cls = type(press).__name__
    if name in ("compression_ratio", "budget_tokens", "budget_bytes") and hasattr(press, "with_budget"):
        call = f"with_ratio({value!r})" if name == "compression_ratio" else f"with_budget({name}={value!r})"
        return f"{cls} does not change once it is made: write press = press.{call}."
    names = [f.name for f in fields(press) if f.init]
    if name in names:
        return f"{cls} does not change once it is made: write press = dataclasses.replace(press, {name}={value!r})."
    return f"{cls} has no parameter {name!r}, and does not change once it is made; it takes {', '.join(names)}."
