"""Where pieces of work are done: in this process, or by workers elsewhere (see ``cluster.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from transformers.modeling_utils import PreTrainedModel

__all__ = ["Engine", "LocalEngine"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Engine(Protocol):
    """Does the same work on many items.

    Work is a function of a model and an item that keeps nothing: any worker can do any item, in any order, and again
    if it was lost. Items are asked for one by one, as they are needed, so that what has turned out not to be worth
    doing is not handed out.
    """

    def map(
        self, work: Callable[[PreTrainedModel, _Item], _Result], items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result]]:
        """Each item with what came of it, in the order in which they are finished."""
        ...


class LocalEngine:
    """One item after the other, in this process."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def map(
        self, work: Callable[[PreTrainedModel, _Item], _Result], items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result]]:
        for item in items:
            yield item, work(self.model, item)
