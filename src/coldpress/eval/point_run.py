"""What runs over windows and over examples have in common: points, items, what is finished of them, and what failed."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from transformers.modeling_utils import PreTrainedModel

from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import BASELINE, Point
from coldpress.eval.ledger import Ledger
from coldpress.eval.progress import Sized

__all__ = ["Engine", "Item", "PointRun"]

_Item = TypeVar("_Item")
_Measured = TypeVar("_Measured")
_Result = TypeVar("_Result")


class Engine:
    """Does the same work on many items: here one after the other, in this process.

    Work is a function of a model and an item that keeps nothing: any worker can do any item, in any order, and again
    if it was lost. Items are asked for one by one, as they are needed, so that what has turned out not to be worth
    doing is not handed out.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def map(
        self, work: Callable[[PreTrainedModel, _Item], _Result], items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result]]:
        """Each item with what came of it, in the order in which they are finished."""
        for item in items:
            yield item, work(self.model, item)


@dataclass(frozen=True, eq=False)
class Item:
    """What work is done on."""

    index: int  # of it in the run
    given: Any  # a batch of windows, an example, a context with questions, or a chunk of a document
    points: tuple[Point, ...]  # to measure on it beside the baseline
    is_checked: bool  # whether the checks are made that need forward passes of their own


class PointRun(ABC, Generic[_Measured]):
    """Measure points, and the uncompressed baseline beside them, item by item, on any engine.

    :meth:`results` can be asked for at any time. A point that fails on an item is not measured on the next ones.

    Args:
        model: a causal language model on coldpress's backend.
        points: to measure; the baseline always is.
        given: what they are measured on, one item for each.
        ledger: what was finished by an earlier run, and where this one notes what it has finished; None: nowhere.
    """

    kind: ClassVar[type[Any]]  # what a ledger notes of each point
    work: Any  # of an engine: gives for an item what each point made of it, by its key, or what went wrong

    def __init__(
        self, model: PreTrainedModel, points: Sequence[Point], given: Sequence[Any], ledger: Ledger | None = None
    ):
        self.model, self.given, self.ledger = model, given, ledger
        self.points = [point for point in points if point != BASELINE]
        self.done: list[dict[str, _Measured]] = [{} for _ in given]  # by the key of the point
        self.errors: dict[str, Exception] = {}

    @abstractmethod
    def _result(self, point: Point) -> dict[str, Any]:
        """The part of a result record, over the items measured so far; SelfCheckError if it contradicts itself."""

    def _fingerprint(self, index: int) -> str:
        """The same for items that are the same, and measured alike, where the ledger's name does not tell that."""
        return ""

    def measured(self, point: Point) -> list[tuple[int, _Measured, _Measured]]:
        """The items that a point was measured on: index, what the point made of it, and what the baseline did."""
        return [(i, done[point.key], done[BASELINE.key]) for i, done in enumerate(self.done) if point.key in done]

    @property
    def is_complete(self) -> bool:
        return not any(self._missing(index) for index in range(len(self.done)))

    def run(self, progress: Callable[[Any], Any] = iter, engine: Engine | None = None) -> None:
        """Measure everything that is not finished. Of an interrupted run, the items that were finished stay.

        Args:
            progress: wraps the finished items, for a progress bar.
            engine: where the work is done; None: here.
        """
        if self.ledger is not None:
            for index, done in enumerate(self.done):
                done |= self.ledger.load(self.kind, index, self._fingerprint(index))
        n_open = sum(bool(self._missing(index)) for index in range(len(self.done)))
        engine = Engine(self.model) if engine is None else engine
        for item, found in progress(Sized(engine.map(self.work, self._open()), n_open)):
            self._keep(item.index, found)

    def results(self) -> Iterator[tuple[Point, dict[str, Any] | Exception]]:
        """Each point of which there is something to say, the baseline first, with its record or what went wrong."""
        for point in (BASELINE, *self.points):
            if point.key in self.errors:
                yield point, self.errors[point.key]
            elif self._is_measured(point):
                try:
                    yield point, self._result(point)
                except SelfCheckError as error:
                    yield point, error

    def parts(self) -> dict[str, list[dict[str, Any] | Exception]]:
        """By the key of each point of which there is something to say: what was measured, then what went wrong."""
        found: dict[str, list[dict[str, Any] | Exception]] = {}
        for point, result in self.results():
            found[point.key] = [result]
            if point.key in self.errors and self._is_measured(point):
                with contextlib.suppress(SelfCheckError):
                    found[point.key].insert(0, self._result(point))
        return found

    def _is_measured(self, point: Point) -> bool:
        return any(point.key in done for done in self.done)

    def _missing(self, index: int) -> list[Point]:
        """The points that have not been measured on an item, and have not failed."""
        done = self.done[index]
        return [p for p in (BASELINE, *self.points) if p.key not in done and p.key not in self.errors]

    def _open(self) -> Iterator[Item]:
        """The items on which something is left to measure; of what has failed meanwhile nothing is."""
        for index in range(len(self.done)):
            missing = self._missing(index)
            if missing:
                points = tuple(point for point in missing if point != BASELINE)
                yield Item(index, self.given[index], points, is_checked=index == 0)

    def _keep(self, index: int, found: dict[str, _Measured | Exception]) -> None:
        done = self.done[index]
        for key, value in found.items():
            if isinstance(value, Exception):
                self.errors.setdefault(key, value)
            elif key not in done:  # the baseline is measured along with what comes later
                done[key] = value
        if self.ledger is not None:
            self.ledger.save(index, done, self._fingerprint(index))
