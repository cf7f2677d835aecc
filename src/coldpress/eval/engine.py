"""Where pieces of work are done: in this process, or by workers elsewhere (see ``cluster.py``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from transformers.modeling_utils import PreTrainedModel

from coldpress.errors import ClusterError, nearest
from coldpress.eval.cluster import RayEngine
from coldpress.eval.models import LoadedModel
from coldpress.eval.ray_connection import check_address, import_ray

__all__ = ["ENGINES", "Engine", "LocalEngine", "check_engine", "make_engine"]

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


ENGINES = ("local", "ray")


def check_engine(name: str, ray_address: str | None = None, workers: int | None = None) -> None:
    """Raise the InputError of :func:`make_engine` as far as it can be known, in some 10 s, before a model is loaded."""
    if name not in ENGINES:
        raise ClusterError(f"--engine {name!r}: allowed are {', '.join(ENGINES)}.{nearest(name, ENGINES)}")
    if name == "local":
        for option, value in (("--ray_address", ray_address), ("--workers", workers)):
            if value is not None:
                raise ClusterError(f"{option} is for --engine ray; add that, or leave {option} out.")
        return
    if workers is not None and workers < 1:
        raise ClusterError(f"--workers must be at least 1, got {workers}.")
    ray = import_ray()
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if address is not None and not ray.is_initialized():
        check_address(address)


@contextmanager
def make_engine(
    name: str,
    loaded: LoadedModel,
    *,
    ray_address: str | None = None,
    workers: int | None = None,
    **options: Any,
) -> Iterator[Engine]:
    """The engine called ``name`` for ``loaded``, closed at the end of the block; see :class:`RayEngine`."""
    check_engine(name, ray_address, workers)
    if name == "local":
        yield LocalEngine(loaded.model)
        return
    engine = RayEngine(loaded, address=ray_address, workers=workers, **options)
    try:
        yield engine
    finally:
        engine.close()
