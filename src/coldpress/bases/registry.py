"""Registry of the presses: the command line, the documentation and the contract tests list them from here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

from coldpress.backends import NO_PRESS
from coldpress.bases.docstring import parse
from coldpress.bases.press import BasePress
from coldpress.bases.scorer import BUDGETS, BudgetPress
from coldpress.core.definition import or_by_name
from coldpress.core.ratio import check_ratio
from coldpress.errors import PressError, nearest

__all__ = [
    "NO_PRESS",
    "Parameter",
    "PressInfo",
    "catalogue",
    "file_parameters",
    "find_press",
    "make_press",
    "parameters_of",
    "press_classes",
    "press_names",
    "register",
    "register_file_press",
    "registered_only",
    "takes_ratio",
]


_P = TypeVar("_P", bound=type[BasePress])


@dataclass(frozen=True)
class _Entry:
    """The press of a name: a press, or wrappers around a press, with some parameters that are not the defaults."""

    cls: type[BasePress]
    inner: tuple[type[BudgetPress], ...] = ()  # from the outside to the inside
    changed: dict[str, Any] = field(default_factory=dict)  # the press's own, or those of a press inside it

    @property
    def classes(self) -> tuple[type[BasePress], ...]:
        """The press and those inside it."""
        return self.cls, *self.inner

    @property
    def has_ratio(self) -> bool:
        """Whether the press, or the one inside it, is made with a ratio."""
        own = any(f.name == "compression_ratio" and f.init for f in fields(self.cls))  # type: ignore[arg-type]
        return self.cls.has_ratio and (own or bool(self.inner))

    @property
    def schedule_ratio(self) -> str | None:
        """The parameter that the ratio is, of a schedule around a press that has none of its own."""
        return "target_compression_ratio" if self.inner and not self.cls.at_prefill else None

    @property
    def kind(self) -> str:
        """``trained`` or ``calibrated`` where the press or the one inside it is."""
        kinds = {cls.kind for cls in self.classes}
        return next((kind for kind in ("trained", "calibrated") if kind in kinds), "training-free")

    def split(self, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """The parameters of each of ``classes``; one that several have is the outermost's."""
        found, left = [], dict(parameters)
        for cls in self.classes[:-1]:
            own = {f.name for f in _parameters(cls)}
            found.append({name: left.pop(name) for name in parameters if name in own and name in left})
        return [*found, left]


_BY_NAME: dict[str, _Entry] = {}
_OF_FILES: dict[str, _Entry] = {}  # by the name of the file; no part of the catalogue


class Parameter(NamedTuple):
    """A parameter of a press: its name, its default as it is written in Python, and what the docstring says of it.

    ``default`` is an empty text for one that has to be given.
    """

    name: str
    default: str
    text: str


@dataclass(frozen=True)
class PressInfo:
    """An entry of the catalogue, read off a press's class and docstring.

    Attributes:
        name: the registered one; an empty text for a class, which may have several names, or none.
        title: the class, and for a wrapper with a name the one inside: ``AdaKVPress(SnapKVPress)``.
        summary, details, source, differs, needs, cost: as in
            :class:`coldpress.bases.docstring.Docstring`.
        link: the address of the paper, or of the code where there is none; may be empty.
        call: how the press is made, with its defaults: ``SnapKVPress(compression_ratio, window_size=64, ...)``.
        parameters: what the call takes; of a named wrapper, those of the press inside it too.
        kind, at_prefill, can_rechoose, per_head, per_layer: as in :class:`BasePress`, of the press and the one inside
            it together.
        has_ratio: takes a ratio, and budgets.
        in_block: runs only inside ``with press(model):``, as the commands and the pipeline do.
    """

    name: str
    class_name: str
    title: str
    summary: str
    details: tuple[str, ...]
    source: str
    link: str
    differs: tuple[str, ...]
    needs: str
    cost: str
    call: str
    parameters: tuple[Parameter, ...]
    kind: str
    at_prefill: bool
    can_rechoose: bool
    per_head: bool
    per_layer: bool
    has_ratio: bool
    in_block: bool


def register(name: str, *inner: type[BudgetPress], **parameters: Any) -> Callable[[_P], _P]:
    """Class decorator: register a press under ``name``.

    Args:
        name: how the command line and :func:`make_press` call it.
        inner: for a wrapper, the classes of the presses inside it, the innermost one last.
        parameters: the class's own that differ from its defaults, and those of ``inner``.

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


@contextlib.contextmanager
def registered_only() -> Iterator[None]:
    """What is registered inside is no longer known after it."""
    before = dict(_BY_NAME)
    try:
        yield
    finally:
        _BY_NAME.clear()
        _BY_NAME.update(before)


def register_file_press(name: str, cls: type[BasePress]) -> None:
    """Make a press of a file known to :func:`make_press` by the file's name; see :mod:`coldpress.bases.press_files`.

    Raises:
        PressError: a class that cannot be made from a ratio and its own parameters.
    """
    if not is_dataclass(cls) or any(f.name in ("press", "base_press") for f in fields(cls)):
        raise PressError(
            f"--press {name}: {cls.__name__} is made around another press; give a class that is made from a ratio and "
            "parameters of its own."
        )
    _OF_FILES[name] = _Entry(cls)


def takes_ratio(name: str) -> bool:
    """Whether a press is made with a ratio; False for a name that is not known."""
    entry = _entry(name)
    return entry is not None and entry.has_ratio


def _entry(name: str) -> _Entry | None:
    return _BY_NAME.get(name) or _OF_FILES.get(name)


def press_names(*, kind: str | None = None, has_ratio: bool | None = None, at_prefill: bool | None = None) -> list[str]:
    """The registered names, sorted: all, or those that match the arguments; ``no_press`` is none of them.

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


@or_by_name
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
    entry = _entry(name)
    if entry is None:
        known = [NO_PRESS, *press_names()]
        meant = _of_class(name) or nearest(name, known)
        raise PressError(f"Unknown press {name!r}.{meant} 'coldpress presses' lists the names.")
    allowed = sorted(parameters_of(name))
    budget = {k: v for k, v in parameters.items() if k in BUDGETS and v is not None}
    if budget and not entry.has_ratio:
        raise PressError(f"{name} has no budget in tokens or bytes: its own parameters say how much is kept.")
    if budget and entry.schedule_ratio:
        raise PressError(
            f"{name} keeps a share of the text so far; for a fixed number of tokens make "
            f"DecodingPress({entry.classes[-1].__name__}(), target_size=...) in Python."
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
    *outside, inside = entry.split(entry.changed | parameters)
    if entry.schedule_ratio:
        check_ratio(compression_ratio)
        outside[0][entry.schedule_ratio] = compression_ratio
    else:
        inside |= own_ratio | budget
    press = entry.classes[-1](**inside)
    for cls, own in zip(entry.classes[-2::-1], reversed(outside), strict=True):
        press = cls(**{"press" if cls.at_prefill else "base_press": press}, **own)
    return press


def _of_class(name: str) -> str:
    """Advice where ``name`` is that of a class, with or without its ending; else an empty text."""
    wanted = name.lower().removesuffix("press")
    classes = {entry.cls.__name__ for entry in _BY_NAME.values()} | {info.class_name for info in press_classes()}
    cls = next((cls for cls in sorted(classes) if cls.lower().removesuffix("press") == wanted), None)
    if cls is None:
        return ""
    names = [repr(own) for own, entry in sorted(_BY_NAME.items()) if entry.cls.__name__ == cls]
    return f" {cls} is called {' or '.join(names)} here." if names else f" {cls} has no name and is made in Python."


def parameters_of(name: str) -> dict[str, Field[Any]]:
    """Parameters of :func:`make_press` for ``name`` beside the ratio: a wrapper's own parameters and those inside it.

    A parameter that both have is the wrapper's. Empty for a name that is not registered.
    """
    entry = _entry(name)
    classes = entry.classes[::-1] if entry else []
    return {f.name: f for cls in classes for f in _parameters(cls)}


def file_parameters(name: str) -> set[str]:
    """Parameters of a registered name that say where files of a calibrated or trained press are."""
    return {getattr(cls, "parameter", "weights") for cls in _BY_NAME[name].classes if cls.kind != "training-free"}


def catalogue() -> list[PressInfo]:
    """Every registered press, sorted by name."""
    return [_info(name, _BY_NAME[name]) for name in press_names()]


def press_classes() -> list[PressInfo]:
    """Every press's class once, whether it has names or is made in Python only, sorted by the class's name."""
    classes = {cls for cls in _subclasses(BasePress) if cls.__module__.startswith("coldpress.")}
    known = [cls for cls in classes if parse(cls).source]  # what has no source is there to be inherited from
    return [_info("", _Entry(cls)) for cls in sorted(known, key=lambda cls: cls.__name__)]


def find_press(name: str) -> PressInfo:
    """The entry of a registered name, of a class, or of a press in a file that was loaded by this name.

    Raises:
        PressError: there is none; says which names are near.
    """
    if name in _OF_FILES:
        return _info(name, _OF_FILES[name])
    known = {info.name or info.class_name: info for info in [*catalogue(), *press_classes()]}
    if name not in known:
        raise PressError(
            f"Unknown press {name!r}.{nearest(name, known)} 'coldpress presses' lists the names and classes."
        )
    return known[name]


def _subclasses(cls: type[BasePress]) -> Iterator[type[BasePress]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _parameters(cls: type[BasePress]) -> list[Field[Any]]:
    """Parameters of a press beside the ratio and the press inside it."""
    budget = ("compression_ratio", "target_compression_ratio", *BUDGETS, "press", "base_press")
    return [f for f in fields(cls) if f.init and f.repr and f.name not in budget]  # type: ignore[arg-type]


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _info(name: str, entry: _Entry) -> PressInfo:
    """The entry of a name; of the class alone for an empty one, with all that its constructor takes."""
    cls, doc = entry.cls, parse(entry.cls)
    ratio = ["compression_ratio"] if entry.has_ratio else []
    if not name:
        parameters = _constructor(cls)
        call = f"{cls.__name__}({', '.join(f'{p.name}={p.default}' if p.default else p.name for p in parameters)})"
    else:
        described = [_described(*part) for part in zip(entry.classes, entry.split(entry.changed), strict=True)]
        own = {p.name: p for part in reversed(described) for p in part}  # one that several have is the outermost's
        parameters = tuple(own[name] for name in dict.fromkeys(p.name for part in described for p in part))
        *outside, inside = [[f"{p.name}={p.default}" for p in part] for part in described]
        if entry.schedule_ratio:
            outside[0].append(f"{entry.schedule_ratio}=compression_ratio")
        else:
            inside[:0] = ratio
        call = f"{entry.classes[-1].__name__}({', '.join(inside)})"
        for part, written in zip(entry.classes[-2::-1], reversed(outside), strict=True):
            is_keyword = any(f.name == "press" and f.kw_only is True for f in fields(part))  # type: ignore[arg-type]
            call = f"{part.__name__}({', '.join([*written, f'press={call}'] if is_keyword else [call, *written])})"
    found = re.search(r"arXiv:(\d{4}\.\d{5})|(https://[^\s,;]+)", doc.source)
    return PressInfo(
        name=name,
        class_name=cls.__name__,
        title="(".join(part.__name__ for part in entry.classes) + ")" * len(entry.inner),
        summary=doc.summary,
        details=doc.details,
        source=doc.source,
        link="" if found is None else f"https://arxiv.org/abs/{found[1]}" if found[1] else found[2],
        differs=doc.differs,
        needs=doc.needs,
        cost=doc.cost,
        call=call,
        parameters=parameters,
        kind=entry.kind,
        at_prefill=entry.cls.at_prefill,
        can_rechoose=all(cls.can_rechoose for cls in entry.classes),
        per_head=any(cls.per_head for cls in entry.classes),
        per_layer=any(cls.per_layer for cls in entry.classes),
        has_ratio=entry.has_ratio if name else cls.has_ratio,
        in_block=any(
            getattr(cls, trait) is True  # not a property, which parameters decide
            for cls in entry.classes
            for trait in ("needs_hidden_states", "needs_model", "chooses_together")
        ),
    )


def _described(cls: type[BasePress], changed: dict[str, Any]) -> tuple[Parameter, ...]:
    """Parameters of a name beside the ratio."""
    said = parse(cls).arguments
    return tuple(
        Parameter(f.name, repr(changed.get(f.name, _default(f))), said.get(f.name, "")) for f in _parameters(cls)
    )


def _constructor(cls: type[BasePress]) -> tuple[Parameter, ...]:
    """Parameters of the constructor, but budgets, which every press with a ratio takes; keyword-only ones last."""
    said = parse(cls).arguments
    given = [f for f in fields(cls) if f.init and f.name not in BUDGETS]  # type: ignore[arg-type]
    given.sort(key=lambda f: f.kw_only is True)
    return tuple(
        Parameter(f.name, "" if (value := _default(f)) is MISSING else repr(value), said.get(f.name, "")) for f in given
    )
