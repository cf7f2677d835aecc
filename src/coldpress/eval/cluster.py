"""Work on many machines: an engine whose workers are Ray actors, here or on a cluster.

Each worker loads the model once and measures whatever it is handed; items go out one by one, two to a worker. What a
lost worker had in hand is done again by another. Times and memory are never measured by workers.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers.modeling_utils import PreTrainedModel

from coldpress.errors import ClusterError, ColdpressError, LostWorkersError, nearest
from coldpress.eval.point_run import Engine
from coldpress.eval.ray_cluster import Spec, Worker, opened
from coldpress.io.network import one_line
from coldpress.io.progress import note
from coldpress.io.ray import check_address, connect, import_ray
from coldpress.loading.models import LoadedModel

IN_HAND = 2  # items a worker has at most: one that it does, and one so that it need not wait
PATIENCE_S = 180.0  # for a cluster to find room for a worker, and to start it on a busy machine
MOST_TRIES = 3  # of an item whose workers die
MOST_RESTARTS = 3  # beside one for each worker

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RayEngine(Engine):
    """Workers on a Ray cluster, each with a model of its own.

    Args:
        loaded: the model here; that of the workers must have the same weights.
        address: of a cluster: ``host:port``, ``auto`` for the one on this machine, or ``ray://host:port``. None takes
            the environment's ``RAY_ADDRESS``, or what this process is connected to, or else starts a cluster on this
            machine that ends with the engine and listens on 127.0.0.1 alone.
        workers: how many. None: on a cluster as many as it has room for; on this machine one for each CUDA device, or
            two.
        threads: of each worker, and the cores it asks the cluster for. None: those of this machine shared out, on a
            cluster one.
        gpus: CUDA devices of each worker; None: one where the model is on CUDA.
        max_restarts: workers that may be started in the place of lost ones.
        patience_s: how long the cluster may take to find room for a worker.

    Raises:
        UnreachableError: no cluster answers at ``address``.
        ClusterError: it cannot run these workers, or they have other weights or another version of coldpress.
        MissingDependencyError: Ray is not installed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        address: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
        gpus: float | None = None,
        max_restarts: int | None = None,
        patience_s: float = PATIENCE_S,
    ):
        super().__init__(loaded.model)
        self.ray = import_ray()
        self.patience_s = patience_s
        self.spec = Spec.of(loaded)
        is_cuda = self.spec.device == "cuda"
        self.gpus = (1.0 if is_cuda else 0.0) if gpus is None else gpus
        address = address or os.environ.get("RAY_ADDRESS")
        is_local = address is None and not self.ray.is_initialized()
        if is_local:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = workers or (torch.cuda.device_count() if is_cuda else 2)
            threads = threads or max(1, cores // workers)
        self.threads = threads or 1
        self._is_ours = connect(self.ray, address, None if workers is None else workers * self.threads)
        self.wanted = workers or 0
        self._restarts = 0
        self._crew: list[_Hand] = []
        try:
            self.wanted = workers or self._room()
            self.max_restarts = self.wanted + MOST_RESTARTS if max_restarts is None else max_restarts
            self._crew = self._first_crew()
        except BaseException:
            self.close()
            raise

    # -- the cluster ------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """How many workers the cluster has room for."""
        has = self.ray.cluster_resources()
        room = int(has.get("CPU", 0) // self.threads)
        if self.gpus:
            room = min(room, int(has.get("GPU", 0) // self.gpus))
        if room < 1:
            raise ClusterError(f"The Ray cluster has no room for a worker of {self._needs()}: it has {_shown(has)}.")
        return room

    def _needs(self) -> str:
        return f"{self.threads} core(s)" + (f" and {self.gpus:g} GPU(s)" if self.gpus else "")

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for hand in self._crew:
            self._dismiss(hand)
        self._crew = []
        if self._is_ours and self.ray.is_initialized():
            self.ray.shutdown()  # of a cluster that was there before, it only takes leave
        self._is_ours = False

    def facts(self) -> dict[str, Any]:
        """What a record says of the engine."""
        return {
            "engine": "ray",
            "workers": self.wanted,
            "threads_per_worker": self.threads,
            "gpus_per_worker": self.gpus,
            "hosts": sorted({hand.host for hand in self._crew if hand.is_ready}),
            "lost_workers": self._restarts,
        }

    # -- workers ----------------------------------------------------------------------------------------------------

    def _hire(self) -> _Hand:
        """Ask the cluster for a worker; it answers when there is one."""
        actor = self.ray.remote(Worker).options(num_cpus=self.threads, num_gpus=self.gpus, max_restarts=0).remote()
        return _Hand(actor, actor.begin.remote(self.threads), time.monotonic() + self.patience_s)

    def _dismiss(self, hand: _Hand) -> None:
        with suppress(Exception):  # the connection is gone, and the workers with it
            self.ray.kill(hand.actor)

    def _first_crew(self) -> list[_Hand]:
        """Workers that have loaded the model, at least one; those that the cluster has no room for are sent away."""
        self._crew = crew = [self._hire() for _ in range(self.wanted)]
        late = []
        while waiting := [hand for hand in crew if not hand.is_ready and hand not in late]:
            self.ray.wait([hand.greeting for hand in waiting], timeout=1.0)
            for hand in waiting:
                try:
                    self._greet(hand)
                except self.ray.exceptions.RayError as error:
                    raise ClusterError(f"A worker did not start ({_gist(error)}).") from error
                if not hand.has_begun and time.monotonic() > hand.deadline:
                    self._dismiss(hand)
                    late.append(hand)
        ready = [hand for hand in crew if hand.is_ready]
        if not ready:
            raise ClusterError(
                f"The Ray cluster found no room for a worker of {self._needs()} within {self.patience_s:.0f} s: it has "
                f"{_shown(self.ray.cluster_resources())}, of which {_shown(self.ray.available_resources())} is free."
            )
        if late:
            note(f"the Ray cluster has room for {len(ready)} of {self.wanted} workers; these do all the work.")
        for line in sorted({line for hand in ready for line in self.spec.differences(hand.about)}):
            note(line)
        return ready

    def _greet(self, hand: _Hand) -> None:
        """Take the next step with a worker that starts: it has begun, then it has loaded the model.

        ClusterError where it runs other code or has other weights, RayError where it is lost or does not start.
        """
        if not self.ray.wait([hand.greeting], timeout=0)[0]:
            return
        if not hand.has_begun:
            hand.about = self.ray.get(hand.greeting)
            self.spec.check_code(hand.about)
            hand.has_begun = True
            hand.greeting = hand.actor.load.remote(self.spec)
            return
        fingerprint = opened(self.ray.get(hand.greeting))
        if fingerprint != self.spec.fingerprint:
            raise ClusterError(
                f"{self.spec.name} has other weights on {hand.host} than here (fingerprints {fingerprint} and "
                f"{self.spec.fingerprint}); put the same files in its place, or give a hub id with --revision."
            )
        hand.is_ready = True

    # -- work -------------------------------------------------------------------------------------------------------

    def map(
        self, work: Callable[[PreTrainedModel, _Item], _Result], items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result]]:
        """Raises what ``work`` does, and LostWorkersError if no worker is left, or one item has ended several."""
        packed = (_WorkItem(item, self.ray.cloudpickle.dumps((work, item))) for item in items)
        again: deque[_WorkItem] = deque()  # of workers that were lost
        for hand in self._crew:
            hand.work_items.clear()  # of a loop that was left
        while True:
            for in_hand, hand in itertools.product(range(IN_HAND), self._crew):  # one for each before a second one
                if hand.is_ready and len(hand.work_items) <= in_hand:
                    work_item = again.popleft() if again else next(packed, None)
                    if work_item is None:
                        break
                    hand.work_items.append(work_item)
                    work_item.answer = hand.actor.do.remote(work_item.packed)
            answers = [hand.work_items[0].answer for hand in self._crew if hand.work_items]
            if not answers and not again:
                return
            starting = [hand.greeting for hand in self._crew if not hand.is_ready]
            self.ray.wait(answers + starting, timeout=5.0)
            for hand in list(self._crew):
                try:
                    if not hand.is_ready:
                        self._welcome(hand)
                    elif hand.work_items and self.ray.wait([hand.work_items[0].answer], timeout=0)[0]:
                        answer = self.ray.get(hand.work_items[0].answer)
                        work_item = hand.work_items.popleft()
                        yield work_item.item, opened(answer)
                except self.ray.exceptions.RayError as error:
                    again.extend(self._lose(hand, error))

    def _welcome(self, hand: _Hand) -> None:
        """As :meth:`_greet`, for one who takes the place of another: those who cannot work are sent away."""
        try:
            self._greet(hand)
        except ColdpressError as error:
            note(f"a new worker cannot be used: {one_line(error)}")
            self._crew.remove(hand)
            self._dismiss(hand)
        if not hand.has_begun and time.monotonic() > hand.deadline:
            self._crew.remove(hand)
            self._dismiss(hand)
        self._check_crew("the cluster found no room for a new one")

    def _lose(self, hand: _Hand, error: Exception) -> Iterable[_WorkItem]:
        """A worker is gone: what it had in hand, to be done again. Another one is asked for."""
        work_items = list(hand.work_items)
        self._crew.remove(hand)
        self._dismiss(hand)
        if work_items:
            work_items[0].tries += 1  # the others had not been begun
            if work_items[0].tries >= MOST_TRIES:
                raise LostWorkersError(
                    f"{MOST_TRIES} workers were lost one after the other at the same piece of work, the last one on "
                    f"{hand.host} ({_gist(error)}); if memory ran out, give a smaller --batch_size. What was "
                    "finished is kept."
                ) from error
        if self._restarts < self.max_restarts:
            self._restarts += 1
            self._crew.append(self._hire())
        note(f"a worker on {hand.host or 'the cluster'} was lost ({_gist(error)}); its work is done again.")
        self._check_crew(f"{self._restarts} were started in the place of others")
        return work_items

    def _check_crew(self, why: str) -> None:
        if not self._crew:
            raise LostWorkersError(f"No worker is left: {why}. What was finished is kept.")


@dataclass(eq=False)
class _WorkItem:
    """An item on its way."""

    item: Any
    packed: bytes  # work and item
    tries: int = 0  # that a worker did not survive
    answer: Any = None


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it."""

    actor: Any
    greeting: Any  # what is awaited of it while it starts
    deadline: float  # for the cluster to find room for it
    has_begun: bool = False
    is_ready: bool = False  # has loaded the right model
    about: dict[str, Any] = field(default_factory=dict)
    work_items: deque[_WorkItem] = field(default_factory=deque)  # in the order in which it does them

    @property
    def host(self) -> str:
        return str(self.about.get("host", ""))


def _gist(error: BaseException) -> str:
    """What Ray's many lines on a lost worker come to."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    missing = re.search(r"No module named '([^']+)'", text)
    if missing is not None:
        return f"it has no Python package {missing[1]}; install coldpress[ray] on every machine of the cluster"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:160].rstrip(".:") if lines else type(error).__name__


def _shown(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


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
    name: str, loaded: LoadedModel, *, ray_address: str | None = None, workers: int | None = None, **options: Any
) -> Iterator[Engine]:
    """The engine called ``name`` for ``loaded``, closed at the end of the block; see :class:`RayEngine`."""
    check_engine(name, ray_address, workers)
    if name == "local":
        yield Engine(loaded.model)
        return
    with closing(RayEngine(loaded, address=ray_address, workers=workers, **options)) as engine:
        yield engine
