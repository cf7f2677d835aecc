"""What a case of the comparison is: one press, made in both libraries by the same words.

A case without a reason has to agree. A case with one has to differ somewhere, or the reason is out of date; if the
faulty expression of kvpress can be repaired in a few lines (``repaired.py``), results have to agree once it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from benchmarks.parity.models import SHORT
from transformers import PreTrainedModel

RATIOS = (0.25, 0.5, 0.75)
Maker = Callable[["Library", float, PreTrainedModel], Any]


class Library:
    """The classes of a library, or of the first of several modules that has them."""

    def __init__(self, *modules: ModuleType):
        self._modules = modules

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"{self._modules[-1].__name__} has no {name}")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: how the table calls it.
        make: the press, from a library, a ratio and a model.
        why: what makes the results differ: a fault of kvpress, or a statement of the paper that coldpress follows.
        letter: of that fault in the project's list; ``paper`` for a statement of the paper, ``decision`` for one of
            coldpress.
        repaired: ``repaired.py`` has what takes the difference away.
        ratios: what ``make`` is called with.
        models: those that it is run on.
        rows: 1 or 2 texts in a batch.
        chat: the tokenizer has a chat template, and the text begins with what that puts there.
        decode: tokens that are decoded under the press before anything is compared.
        scope: which pairs compete with each other, where ties are looked for: those of a head, of a layer or of the
            model.
        one_by_one: score one token at a time: kvpress cannot mask several when layers differ in length (fault C).
        rerotated: kvpress counts positions from the compressed length on.
        kvpress_attention: the implementation that kvpress needs.
        breaks: models on which kvpress raises an error, and the letter and description of that fault.
        is_default: the press has kvpress's own parameters; such cases have tables of their own.
        not_compared: why the case cannot be run at all.
    """

    name: str
    make: Maker
    why: str = ""
    letter: str = ""
    repaired: bool = False
    ratios: tuple[float, ...] = RATIOS
    models: tuple[str, ...] = SHORT
    rows: int = 1
    chat: bool = False
    decode: int = 0
    scope: str = "head"
    one_by_one: bool = False
    rerotated: bool = False
    kvpress_attention: str = "sdpa"
    breaks: tuple[str, ...] = ()
    breaks_why: str = ""
    is_default: bool = False
    not_compared: str = ""

    def runs_on(self, model: str) -> bool:
        return not self.not_compared and model in self.models
