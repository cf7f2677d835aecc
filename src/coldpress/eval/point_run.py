"""What runs over windows and over examples have in common: points, items, what is finished of them, and what failed."""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.press import BasePress
from coldpress.bases.scorer import BudgetPress
from coldpress.cache.pins import Spans
from coldpress.cache.place import place_of_layer
from coldpress.cache.pressed import PressedCache
from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import BASELINE, Point
from coldpress.eval.ledger import Ledger
from coldpress.eval.losses import forward, loss_error, token_losses
from coldpress.io.progress import Sized
from coldpress.models.block import prefilling
from coldpress.models.prompts import prefill
from coldpress.stores.bits import bits_name

# One prefill for many presses, what is noted of the caches, and what is done about a press that goes wrong

_E = TypeVar("_E", bound=BaseException | None)


def check_stored_pairs(
    press: BasePress | None, cache: PressedCache, n_tokens: int, source: PressedCache | None = None
) -> None:
    """As many pairs are stored as the ratio asks for, or SelfCheckError; layers and heads may share them out.

    After a prefill in pieces no more than that: where a budget grows faster than the text does (a layer of PyramidKV, a
    head of AdaKV), what it could store now is gone. Not checked where layers with a sliding window choose among the
    pairs in its reach.

    Args:
        cache: right after the prefill of ``n_tokens``.
        source: the cache whose prefill it was; None if its own.
    """
    windows = [layer.window for layer in (source or cache).pressed_layers()]
    if not isinstance(press, BudgetPress) or any(window is not None for window in windows):
        return
    layers = [layer for layer in cache.pressed_layers() if layer.is_initialized]
    positions = [layer.positions() for layer in layers]  # [B, Hkv, T]
    stored = sum(int((p >= 0).sum()) for p in positions)
    wanted = 0
    for i, layer in enumerate(layers):
        place = place_of_layer(layer, i, len(layers))
        wanted += press.keep_of(n_tokens, place) * positions[i].shape[:2].numel()
    if stored > wanted or (stored < wanted and cache.chunk_tokens is None):
        raise SelfCheckError(f"{press}: {wanted} pairs should have been stored, {stored} were.")


def check_baseline(model: PreTrainedModel, ids: Tensor, losses: Tensor) -> None:
    """The uncompressed cache gives the losses of one forward pass without a cache, to 0.001 nats, in 16 bits 0.25.

    Attention over stored keys is another order of the same arithmetic, so bits differ, in 16 bits by some steps of a
    logit. What this finds is larger: a token that is fed twice, a position or a mask that is off.

    Args:
        ids: all tokens, int64 ``[B, N]``.
        losses: of the last of them, as the cache made them: float32 ``[B, n]`` on the CPU.
    """
    n = losses.shape[1]
    direct = token_losses(forward(model, ids[:, :-1], None, keep=n), ids[:, -n:]).cpu()
    worst = float((losses - direct).abs().max())
    if not worst <= (1e-3 if model.dtype == torch.float32 else 0.25):
        raise SelfCheckError(
            f"The uncompressed cache and a forward pass without a cache differ by {worst:.2g} nats on one token."
        )


def check_unchanged(press: BasePress, losses: Tensor, base: Tensor) -> None:
    """A press that removes nothing changes no loss ``[B, n]``, or SelfCheckError.

    Its logits are the baseline's bit for bit, made by the same operations from the same numbers. So what is allowed is
    the error of two losses (:func:`coldpress.eval.losses.loss_error`).
    """
    change = (losses - base).abs()
    if not (change <= 2 * loss_error(base)).all():
        raise SelfCheckError(f"{press} removes nothing and yet changes a loss by {float(change.max()):.2g} nats.")


def check_removed(point: Point, own: Any, base: Any, what: str) -> None:
    """Where ``what`` is bit for bit the uncompressed cache's, nothing was to be removed, or SelfCheckError.

    ``own`` and ``base`` are what is noted of the point's first cache, and of the uncompressed one.
    """
    is_smaller = point.kv_bits is not None and own.kv_bytes < base.kv_bytes
    if getattr(point.press, "compression_ratio", 0.0) > 0 or own.achieved_ratio > 0 or is_smaller:
        bits = "" if point.kv_bits is None else f" in {bits_name(point.kv_bits)} bits"
        raise SelfCheckError(
            f"{point.press}{bits}: {what} are bit for bit those of the uncompressed cache: nothing was compressed."
        )


def release(error: _E) -> _E:
    """The same error, without the memory that the variables of its frames hold: the next press may need it."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    return error


def prefilled(
    model: PreTrainedModel, context: Tensor, points: Sequence[Point], chunk_tokens: int | None = None, n_pinned: int = 0
) -> tuple[PressedCache, Iterator[PressedCache]]:
    """The uncompressed cache of ``context [B, C]``, whose first ``n_pinned`` nothing may evict, and that of each point.

    A press that fails leaves a cache that raises the error when it is used. The caches are handed out one by one, so
    that the memory of one is free before the next one grows.
    """
    pin = [(0, n_pinned)] if n_pinned else None
    full = PressedCache(chunk_tokens=chunk_tokens, pin=pin)
    if chunk_tokens is not None:  # what is computed of the second piece depends on what was kept of the first
        prefill(model, context, full)
        return full, (_alone(model, context, point, chunk_tokens, pin) for point in points)
    branches = full.branches([point.press for point in points], [point.kv_bits for point in points])
    with prefilling(model, full, *branches):
        forward(model, context, full, keep=1)
    branches.reverse()
    return full, (branches.pop() for _ in points)


def each_measured(
    points: Sequence[Point],
    branches: Iterator[PressedCache],
    full: PressedCache,
    n_tokens: int,
    measure: Callable[[PressedCache], Any],
) -> dict[str, Any]:
    """What each point made of one item, by its key, or what went wrong with it.

    Args:
        branches: caches of the points, as :func:`prefilled` hands them out beside ``full``.
        n_tokens: of the context in them.
        measure: what a point's cache makes of the item.
    """
    found: dict[str, Any] = {}
    for point in points:
        branch = next(branches)  # its memory is free again before the next one grows
        try:
            branch.get_seq_length()  # raises what the press raised
            check_stored_pairs(point.press, branch, n_tokens, full)
            found[point.key] = measure(branch)
        except Exception as error:
            found[point.key] = release(error)
    return found


def _alone(model: PreTrainedModel, context: Tensor, point: Point, chunk_tokens: int, pin: Spans | None) -> PressedCache:
    cache = PressedCache(point.press, chunk_tokens=chunk_tokens, kv_bits=point.kv_bits, pin=pin)
    try:
        with prefilling(model, cache):
            prefill(model, context, cache)
    except Exception as error:
        cache.session.error = release(error)
    return cache


def sizes_of(cache: PressedCache, with_hash: bool = False) -> dict[str, Any]:
    """Sizes of the first row's cache, and a fingerprint of which pairs it keeps."""
    positions = [layer.positions() for layer in cache.pressed_layers() if layer.is_initialized]
    digest = hashlib.sha256(b"".join(p[0].cpu().numpy().tobytes() for p in positions)) if with_hash else None
    return {
        "kv_bytes": cache.kv_bytes() // positions[0].shape[0],
        "kv_lengths": cache.stored_lengths(),
        "achieved_ratio": cache.achieved_ratio(),
        "kept_hash": None if digest is None else digest.hexdigest()[:16],
    }


# The loop, and who goes through it

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
            self._restore(self.ledger)
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
            self._save(self.ledger, index)

    def _restore(self, ledger: Ledger) -> None:
        for index, done in enumerate(self.done):
            done |= ledger.load(self.kind, index, self._fingerprint(index))

    def _save(self, ledger: Ledger, index: int) -> None:
        ledger.save(index, self.done[index], self._fingerprint(index))
