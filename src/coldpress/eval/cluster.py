"""Work on many machines: an engine whose workers are Ray actors, here or on a cluster.

Each worker loads the model once and measures whatever it is handed; items go out one by one, two to a worker. What a
lost worker had in hand is done again by another. Times and memory are never measured by workers.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
import pickle
import platform
import re
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers.modeling_utils import PreTrainedModel

import coldpress
from coldpress.errors import (
    ClusterError,
    ColdpressError,
    LostWorkersError,
    MissingDependencyError,
    UnreachableError,
    nearest,
)
from coldpress.eval.checks import release
from coldpress.eval.engine import Engine, LocalEngine
from coldpress.eval.models import LoadedModel, load_model
from coldpress.eval.progress import note
from coldpress.io.files import path_of
from coldpress.io.network import one_line

__all__ = ["ENGINES", "RayEngine", "check_engine", "make_engine"]

ENGINES = ("local", "ray")
LOOPBACK = "127.0.0.1"  # what a cluster that is started here listens on
IN_HAND = 2  # items a worker has at most: one that it does, and one so that it need not wait
PROBE_S = 10.0  # for a cluster to answer
PATIENCE_S = 180.0  # for a cluster to find room for a worker, and to start it on a busy machine
MOST_TRIES = 3  # of an item whose workers die
MOST_RESTARTS = 3  # beside one for each worker

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def check_engine(name: str, ray_address: str | None = None, workers: int | None = None) -> None:
    """Raise what :func:`make_engine` would, as far as it can be known before a model is loaded.

    Raises:
        ClusterError: no such engine, or an option that it does not have.
        MissingDependencyError: Ray is not installed.
        UnreachableError: no cluster answers at the address, within some 10 s.
    """
    if name not in ENGINES:
        raise ClusterError(f"--engine {name!r}: allowed are {', '.join(ENGINES)}.{nearest(name, ENGINES)}")
    if name == "local":
        for option, value in (("--ray_address", ray_address), ("--workers", workers)):
            if value is not None:
                raise ClusterError(f"{option} is for --engine ray; add that, or leave {option} out.")
        return
    if workers is not None and workers < 1:
        raise ClusterError(f"--workers must be at least 1, got {workers}.")
    ray = _ray()
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if address is not None and not ray.is_initialized():
        _check_address(address)


@contextmanager
def make_engine(
    name: str,
    loaded: LoadedModel,
    *,
    ray_address: str | None = None,
    workers: int | None = None,
    **options: Any,
) -> Iterator[Engine]:
    """The engine called ``name`` for ``loaded``, closed at the end of the block.

    Args:
        name: ``local`` or ``ray``.
        loaded: the model; workers load the same one.
        ray_address, workers, options: see :class:`RayEngine`.

    Raises:
        ClusterError, MissingDependencyError, UnreachableError: see :func:`check_engine` and :class:`RayEngine`.
    """
    check_engine(name, ray_address, workers)
    if name == "local":
        yield LocalEngine(loaded.model)
        return
    engine = RayEngine(loaded, address=ray_address, workers=workers, **options)
    try:
        yield engine
    finally:
        engine.close()


class RayEngine:
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
        self.ray = _ray()
        self.patience_s = patience_s
        self.spec = _Spec.of(loaded)
        is_cuda = self.spec.device == "cuda"
        self.gpus = (1.0 if is_cuda else 0.0) if gpus is None else gpus
        address = address or os.environ.get("RAY_ADDRESS")
        is_local = address is None and not self.ray.is_initialized()
        if is_local:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = workers or (torch.cuda.device_count() if is_cuda else 2)
            threads = threads or max(1, cores // workers)
        self.threads = threads or 1
        self._is_ours = self._connect(address, None if workers is None else workers * self.threads)
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

    def _connect(self, address: str | None, cores: int | None) -> bool:
        """Connect to the cluster, or start one; whether it is one of ours."""
        if self.ray.is_initialized():
            return False
        if address is not None:
            _check_address(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            options |= {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": LOOPBACK}
        try:
            with _on_loopback() if address is None else nullcontext():
                self.ray.init(address=address or "local", **options)
        except (Exception, SystemExit) as error:  # it ends the process where a connection breaks
            where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
            raise UnreachableError(
                f"{where} could not be {'reached' if address else 'started'} ({type(error).__name__}: "
                f"{one_line(error)}); leave --ray_address out to run on this machine alone."
            ) from error
        if address is None and self.ray.util.get_node_ip_address() != LOOPBACK:
            self.ray.shutdown()
            raise ClusterError(
                f"Ray {self.ray.__version__} does not keep the cluster that it starts on {LOOPBACK}; install a version "
                'that is tested, pip install "coldpress[ray]", or start a cluster yourself and give --ray_address.'
            )
        return True

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
        actor = self.ray.remote(_Worker).options(num_cpus=self.threads, num_gpus=self.gpus, max_restarts=0).remote()
        return _Hand(actor, actor.begin.remote(self.threads), time.monotonic() + self.patience_s)

    def _dismiss(self, hand: _Hand) -> None:
        try:
            self.ray.kill(hand.actor)
        except Exception:  # the connection is gone, and the workers with it
            return

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

        Raises:
            ClusterError: it runs other code, or has other weights.
            RayError: it is lost, or does not start.
        """
        if not self.ray.wait([hand.greeting], timeout=0)[0]:
            return
        if not hand.has_begun:
            hand.about = self.ray.get(hand.greeting)
            self.spec.check_code(hand.about)
            hand.has_begun = True
            hand.greeting = hand.actor.load.remote(self.spec)
            return
        fingerprint = _opened(self.ray.get(hand.greeting))
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
        """See :meth:`coldpress.eval.engine.Engine.map`.

        Raises:
            LostWorkersError: no worker is left, or one item has ended several of them.
            Exception: whatever ``work`` raises.
        """
        source = iter(items)
        again: deque[_Task] = deque()  # of workers that were lost
        for hand in self._crew:
            hand.tasks.clear()  # of a loop that was left
        while True:
            for in_hand, hand in itertools.product(range(IN_HAND), self._crew):  # one for each before a second one
                if hand.is_ready and len(hand.tasks) <= in_hand:
                    task = again.popleft() if again else _next(source, work)
                    if task is None:
                        break
                    hand.tasks.append(task)
                    task.answer = hand.actor.do.remote(task.packed)
            answers = [hand.tasks[0].answer for hand in self._crew if hand.tasks]
            if not answers and not again:
                return
            starting = [hand.greeting for hand in self._crew if not hand.is_ready]
            self.ray.wait(answers + starting, timeout=5.0)
            for hand in list(self._crew):
                try:
                    if not hand.is_ready:
                        self._welcome(hand)
                    elif hand.tasks and self.ray.wait([hand.tasks[0].answer], timeout=0)[0]:
                        answer = self.ray.get(hand.tasks[0].answer)
                        task = hand.tasks.popleft()
                        yield task.item, _opened(answer)
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

    def _lose(self, hand: _Hand, error: Exception) -> Iterable[_Task]:
        """A worker is gone: what it had in hand, to be done again. Another one is asked for."""
        tasks = list(hand.tasks)
        self._crew.remove(hand)
        self._dismiss(hand)
        if tasks:
            tasks[0].tries += 1  # the others had not been begun
            if tasks[0].tries >= MOST_TRIES:
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
        return tasks

    def _check_crew(self, why: str) -> None:
        if not self._crew:
            raise LostWorkersError(f"No worker is left: {why}. What was finished is kept.")


@dataclass(eq=False)
class _Task:
    """An item on its way."""

    item: Any
    packed: bytes  # work and item
    tries: int = 0  # that a worker did not survive
    answer: Any = None


def _next(source: Iterator[Any], work: Callable[..., Any]) -> _Task | None:
    """The next item, packed; None if there is none."""
    from ray import cloudpickle

    for item in source:
        return _Task(item, cloudpickle.dumps((work, item)))
    return None


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it."""

    actor: Any
    greeting: Any  # what is awaited of it while it starts
    deadline: float  # for the cluster to find room for it
    has_begun: bool = False
    is_ready: bool = False  # has loaded the right model
    about: dict[str, Any] = field(default_factory=dict)
    tasks: deque[_Task] = field(default_factory=deque)  # in the order in which it does them

    @property
    def host(self) -> str:
        return str(self.about.get("host", ""))


@dataclass(frozen=True)
class _Spec:
    """What a worker loads, and what it has to be like."""

    name: str
    device: str
    dtype: str
    attn_implementation: str
    revision: str | None
    fingerprint: str
    about: dict[str, Any]  # of the driver

    @classmethod
    def of(cls, loaded: LoadedModel) -> _Spec:
        if len(getattr(loaded.model, "hf_device_map", None) or ()) > 1 or getattr(loaded.model, "_tp_size", None):
            raise ClusterError("--engine ray gives every worker a whole model; leave --device_map and --tp_plan out.")
        path = path_of(loaded.name)
        is_here = loaded.name == "demo" or path.exists()
        return cls(
            name=str(path.resolve()) if is_here and loaded.name != "demo" else loaded.name,
            device=loaded.device.type,  # which of them, the cluster says
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            attn_implementation=loaded.attn_implementation,
            revision=None if is_here else loaded.revision,
            fingerprint=loaded.weights_fingerprint,
            about=_about(),
        )

    def check_code(self, about: dict[str, Any]) -> None:
        """Raise :class:`ClusterError` if a worker runs another coldpress."""
        if about["code"] != self.about["code"]:
            own, its = self.about["coldpress"], about["coldpress"]
            versions = f"{its} there, {own} here" if own != its else f"both say {own}, and their files differ"
            raise ClusterError(f"{about['host']} has another coldpress ({versions}); install the same one there.")

    def differences(self, about: dict[str, Any]) -> Iterator[str]:
        """What may make a worker's last digits differ from this process's."""
        for name in ("torch", "transformers", "python"):
            if about[name] != self.about[name]:
                yield f"{about['host']} has {name} {about[name]}, and here it is {self.about[name]}; losses may differ."
        if about["threads"] != self.about["threads"] and self.device == "cpu":
            yield (
                f"workers run {about['threads']} thread(s) and this process {self.about['threads']}: sums are added in "
                "another order, and losses agree with a local run's to rounding, not bit for bit."
            )


# -- on the worker --------------------------------------------------------------------------------------------------


class _Worker:
    """The actor: loads a model once, and does one piece of work after the other."""

    def begin(self, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        return _about()

    def load(self, spec: _Spec) -> bytes:
        def work() -> str:
            loaded = load_model(
                spec.name,
                device=spec.device,
                dtype=spec.dtype,
                attn_implementation=spec.attn_implementation,
                revision=spec.revision,
            )
            self.model = loaded.model
            return loaded.weights_fingerprint

        return _answer(work)

    def do(self, packed: bytes) -> bytes:
        def work() -> Any:
            function, item = pickle.loads(packed)
            return function(self.model, item)

        return _answer(work)


def _about() -> dict[str, Any]:
    """What can make the results of two processes differ."""
    root = Path(coldpress.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "coldpress": coldpress.__version__,
        "code": digest.hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def _answer(work: Callable[[], Any]) -> bytes:
    """What ``work()`` returns, or the exception that it raises, in bytes that can be read elsewhere."""
    try:
        answer = (True, work())
    except Exception as error:
        answer = (False, release(error))
    try:
        return _packed(answer)
    except Exception as error:  # a result that is not for sending
        return _packed((False, error))


def _opened(packed: bytes) -> Any:
    is_result, value = pickle.loads(packed)
    if not is_result:
        raise value
    return value


# -- exceptions that travel -----------------------------------------------------------------------------------------


class _Elsewhere(Exception):
    """The traceback of an exception on the machine where it was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _packed(value: Any) -> bytes:
    """``value`` pickled, whatever exceptions are in it."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Exceptions keep their traceback, as text; of those that cannot be pickled, name and text are kept."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, BaseException):
            return NotImplemented
        text = "".join(traceback.format_exception(type(value), value, value.__traceback__))
        try:
            pickled = pickle.dumps(value)
            pickle.loads(pickled)  # many can be written and not be read
        except Exception:
            pickled = None
        return _raised_elsewhere, (pickled, type(value).__name__, str(value), f"on {socket.gethostname()}:\n{text}")


def _raised_elsewhere(pickled: bytes | None, name: str, message: str, text: str) -> BaseException:
    """The exception again, with the traceback that it had there as its cause."""
    error: BaseException
    try:
        error = type(name, (Exception,), {})(message) if pickled is None else pickle.loads(pickled)
    except Exception:  # its class is not here
        error = type(name, (Exception,), {})(message)
    error.__cause__ = _Elsewhere(text)
    return error


# -- Ray ------------------------------------------------------------------------------------------------------------


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            '--engine ray needs Ray (Python 3.10 to 3.13): pip install "coldpress[ray]".'
        ) from error
    return ray


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster that is started in the block listens on the loopback interface alone.

    Ray takes an address of this machine that others can reach in the place of 127.0.0.1, unless it is told that a
    cluster has one machine only, as it is by default on Windows and macOS.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_address(address: str) -> None:
    """Raise unless a Ray cluster answers at ``address``.

    Asked from outside, because Ray's own client tries for more than a minute, and then ends the process it is in.
    """
    help_ = "leave --ray_address out to run on this machine alone."
    if address == "local":
        raise ClusterError("--ray_address local: leave it out to start a cluster on this machine.")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ClusterError(f"--ray_address {address!r} is not an address; give host:port, ray://host:port or auto.")
        started = time.monotonic()
        problem = _knock(host.strip("[]"), int(port))
        if problem is not None:
            raise UnreachableError(f"no Ray cluster can be reached at {address} ({problem}); {help_}")
        if address.startswith("ray://"):
            return
        left = max(3.0, PROBE_S - (time.monotonic() - started))
    else:
        left = PROBE_S
    problem = _ask(address, left)
    if problem is not None:
        where = "on this machine" if address == "auto" else f"at {address}"
        raise UnreachableError(f"no Ray cluster can be reached {where} ({problem}); {help_}")


def _ask(address: str, seconds: float) -> str | None:
    """Why the cluster at ``address`` does not say that it is well, or None."""
    where = [] if address == "auto" else ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *where]
    try:
        asked = subprocess.run(command, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    if b"Unauthenticated" in asked.stderr:
        if address == "auto" and "RAY_AUTH_MODE" not in os.environ:
            return None  # Ray takes the token of this machine by itself then
        return "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token"
    return None if asked.returncode == 0 else "nobody there says that it is a Ray cluster and well"


def _knock(host: str, port: int) -> str | None:
    """Why nobody answers at a port; None if somebody does."""
    from coldpress.io.network import within

    def ask() -> None:
        socket.create_connection((host, port), timeout=PROBE_S / 2).close()

    return within(PROBE_S / 2 + 1, ask)[0]


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
