"""Names of the presses: what the command line, the documentation and the contract tests list comes from here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from coldpress.budget import check_ratio
from coldpress.errors import PressError, nearest
from coldpress.presses.base import BUDGETS, BasePress, ScorerPress

__all__ = ["NO_PRESS", "PressInfo", "catalogue", "make_press", "parameters_of", "press_names", "register"]

NO_PRESS = "no_press"  # the uncompressed baseline: a name for the command line, no class

_P = TypeVar("_P", bound=type[BasePress])


@dataclass(frozen=True)
class _Entry:
    """What a name stands for: a press, or a wrapper around a press, with some parameters that are not the defaults."""

    cls: type[BasePress]
    inner: type[ScorerPress] | None = None
    changed: dict[str, Any] = field(default_factory=dict)  # of the press inside, or of the press

    @property
    def classes(self) -> list[type[BasePress]]:
        """The press and the one inside it."""
        return [cls for cls in (self.cls, self.inner) if cls]

    @property
    def has_ratio(self) -> bool:
        """Whether the press, or the one inside it, is made with a ratio."""
        own = any(f.name == "compression_ratio" and f.init for f in fields(self.cls))  # type: ignore[arg-type]
        return self.cls.has_ratio and (own or self.inner is not None)

    @property
    def schedule_ratio(self) -> str | None:
        """The parameter that the ratio is, of a schedule around a press that has none of its own."""
        return None if self.cls.at_prefill else "target_compression_ratio"

    def split(self, parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """``parameters`` as those of the press and those of the press inside; what both have is the wrapper's."""
        own = {f.name for f in _parameters(self.cls)}
        inside = {f.name for f in _parameters(self.inner)} if self.inner else set()
        outside = {k: v for k, v in self.changed.items() if k not in inside}
        outside |= {k: v for k, v in parameters.items() if k in own}
        rest = {k: v for k, v in self.changed.items() if k in inside}
        return outside, rest | {k: v for k, v in parameters.items() if k not in own}

    @property
    def kind(self) -> str:
        """``trained`` or ``calibrated`` where the press or the one inside it is."""
        kinds = {cls.kind for cls in self.classes}
        return next((kind for kind in ("trained", "calibrated") if kind in kinds), "training-free")


_BY_NAME: dict[str, _Entry] = {}


@dataclass(frozen=True)
class PressInfo:
    """One line of the catalogue, read off a press's class and docstring.

    ``call`` is how the press is made, with its defaults: ``SnapKVPress(compression_ratio, window_size=64, ...)``. The
    last six are those of :class:`BasePress`, of the press and the one inside it together.
    """

    name: str
    class_name: str
    summary: str
    source: str
    needs: str
    parameters: str
    call: str
    kind: str
    at_prefill: bool
    decodes: bool
    per_head: bool
    per_layer: bool
    has_ratio: bool


def register(name: str, inner: type[ScorerPress] | None = None, **parameters: Any) -> Callable[[_P], _P]:
    """Class decorator: make a press known under ``name``.

    Args:
        name: how the command line and :func:`make_press` call it.
        inner: for a wrapper, the class of the press inside it.
        parameters: those of ``inner``, or of the class where it has no such parameter, that differ from the defaults.

    Raises:
        PressError: the name is taken by another class.
    """

    def decorate(cls: _P) -> _P:
        taken = _BY_NAME.get(name)
        if name == NO_PRESS or (taken is not None and taken.cls.__qualname__ != cls.__qualname__):
            raise PressError(f"The press name {name!r} is taken{f' by {taken.cls.__name__}' if taken else ''}.")
        _BY_NAME[name] = _Entry(cls, inner, parameters)
        return cls

    return decorate


def press_names(*, kind: str | None = None, has_ratio: bool | None = None, at_prefill: bool | None = None) -> list[str]:
    """The registered names, sorted: all, or those for which the arguments hold; ``no_press`` is none of them.

    Args:
        kind, has_ratio, at_prefill: as in :class:`PressInfo`; None for any.
    """
    return [
        name
        for name, entry in sorted(_BY_NAME.items())
        if kind in (None, entry.kind)
        and has_ratio in (None, entry.has_ratio)
        and at_prefill in (None, entry.cls.at_prefill)
    ]


def make_press(name: str, compression_ratio: float, /, **parameters: Any) -> BasePress | None:
    """The press called ``name``, or None for ``no_press``.

    Parameters of a name that stands for a wrapper are the wrapper's own or those of the press inside it; a parameter
    that both have is the wrapper's. Every press that has a ratio takes ``budget_tokens`` or ``budget_bytes`` too, with
    a ratio of 0; a decoding schedule does not, and its ratio is that of the text so far. A press without a ratio, whose
    own parameters say how much is kept, is made with a ratio of 0.

    Raises:
        PressError: unknown name (with the nearest ones), a ratio outside [0, 1), an unknown parameter, a ratio for a
            press that has none.
    """
    if name == NO_PRESS:
        return None
    entry = _BY_NAME.get(name)
    if entry is None:
        known = [NO_PRESS, *press_names()]
        raise PressError(f"Unknown press {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    allowed = sorted(parameters_of(name))
    budget = {k: v for k, v in parameters.items() if k in BUDGETS and v is not None}
    if budget and not entry.has_ratio:
        raise PressError(f"{name} has no budget in tokens or bytes: its own parameters say how much is kept.")
    if budget and entry.schedule_ratio:
        raise PressError(
            f"{name} keeps a share of the text so far; for a fixed number of tokens make "
            f"DecodingPress({_named(entry.inner)}(), target_size=...) in Python."
        )
    parameters = {k: v for k, v in parameters.items() if k not in BUDGETS}
    for parameter in parameters:
        if parameter not in allowed:
            raise PressError(
                f"{name} has no parameter {parameter!r}.{nearest(parameter, allowed)} "
                f"It takes: {', '.join(allowed) or 'none beside the ratio'}."
            )
    if not entry.has_ratio:
        check_ratio(compression_ratio)
        if compression_ratio:
            raise PressError(
                f"{name} has no compression ratio: its own parameters say how much is kept ({', '.join(allowed)}). "
                f"Give it the ratio 0, got {compression_ratio}."
            )
    own_ratio: dict[str, Any] = {"compression_ratio": compression_ratio} if entry.has_ratio else {}
    own, inside = entry.split(parameters)
    if entry.inner is None:
        return entry.cls(**own_ratio, **budget, **own)
    if entry.schedule_ratio:
        check_ratio(compression_ratio)
        own[entry.schedule_ratio] = compression_ratio
        return entry.cls(base_press=entry.inner(**inside), **own)  # type: ignore[call-arg]
    press = entry.inner(compression_ratio=compression_ratio, **budget, **inside)
    return entry.cls(press=press, **own)  # type: ignore[call-arg]


def parameters_of(name: str) -> dict[str, Field[Any]]:
    """What :func:`make_press` takes for ``name`` beside the ratio: a wrapper's own parameters and those inside it.

    A parameter that both have is the wrapper's. Empty for a name that is not registered.
    """
    entry = _BY_NAME.get(name)
    classes = entry.classes[::-1] if entry else []
    return {f.name: f for cls in classes for f in _parameters(cls)}


def catalogue() -> list[PressInfo]:
    """Every registered press, sorted by name."""
    return [_info(name, _BY_NAME[name]) for name in press_names()]


def _parameters(cls: type[BasePress]) -> list[Field[Any]]:
    """What a press takes beside the ratio and the press inside it."""
    budget = ("compression_ratio", "target_compression_ratio", *BUDGETS, "press", "base_press")
    return [f for f in fields(cls) if f.init and f.repr and f.name not in budget]  # type: ignore[arg-type]


def _named(cls: type[BasePress] | None) -> str:
    return "" if cls is None else cls.__name__


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _info(name: str, entry: _Entry) -> PressInfo:
    doc = inspect.getdoc(entry.cls) or ""

    def line(tag: str) -> str:
        found = re.search(rf"^{tag}: (.+?)(?=\n\n|\n[A-Z]\w+: |\Z)", doc, re.MULTILINE | re.DOTALL)
        return " ".join(found[1].split()) if found else ""

    def call(cls: type[BasePress], first: list[str], changed: dict[str, Any]) -> str:
        return f"{cls.__name__}({', '.join([*first, *_described(cls, changed)])})"

    of_own, of_inner = entry.split({})
    own = ", ".join(_described(entry.cls, of_own))
    ratio = ["compression_ratio"] if entry.has_ratio else []
    if entry.inner is None:
        text = call(entry.cls, ratio, of_own)
    elif entry.schedule_ratio:
        inner = call(entry.inner, [], of_inner)
        shown = [*_described(entry.cls, of_own), f"{entry.schedule_ratio}=compression_ratio"]
        text, own = (f"{entry.cls.__name__}({', '.join([inner, *shown])})", ", ".join([f"base_press={inner}", *shown]))
    else:
        inner = call(entry.inner, ratio, of_inner)
        text = call(entry.cls, [inner], of_own)
        own = ", ".join([f"press={inner}", *_described(entry.cls, of_own)])
    return PressInfo(
        name=name,
        class_name=entry.cls.__name__,
        summary=doc.split("\n")[0],
        source=line("Source"),
        needs=line("Needs"),
        parameters=own,
        call=text,
        kind=entry.kind,
        at_prefill=entry.cls.at_prefill,
        decodes=all(cls.decodes for cls in entry.classes),
        per_head=any(cls.per_head for cls in entry.classes),
        per_layer=any(cls.per_layer for cls in entry.classes),
        has_ratio=entry.has_ratio,
    )


def _described(cls: type[BasePress], changed: dict[str, Any]) -> list[str]:
    return [f"{f.name}={changed.get(f.name, _default(f))!r}" for f in _parameters(cls)]
