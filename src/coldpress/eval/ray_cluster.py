"""A Ray cluster to work on: one that answers at an address, or one that is started here and ends with the engine.

Its workers load what the driver says. What they return or raise travels in bytes; an exception keeps its traceback.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from coldpress.errors import ClusterError, MissingDependencyError, UnreachableError
from coldpress.eval.models import BY_NAME, LoadedModel, load_model
from coldpress.eval.point_run import release
from coldpress.io.files import path_of
from coldpress.io.network import one_line, within
from coldpress.version import VERSION

LOOPBACK = "127.0.0.1"  # what a cluster that is started here listens on
PROBE_S = 10.0  # for a cluster to answer


def import_ray() -> Any:
    """The module; :class:`MissingDependencyError` says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            '--engine ray needs Ray (Python 3.10 to 3.13): pip install "coldpress[ray]".'
        ) from error
    return ray


def connect(ray: Any, address: str | None, cores: int | None) -> bool:
    """Connect to the cluster at ``address``, or start one that listens on 127.0.0.1 alone.

    Args:
        address: None starts a cluster on this machine, unless this process is connected to one.
        cores: of a cluster that is started here; None: all.

    Returns:
        Whether there was no connection before, so that it is the caller's to end.
    """
    if ray.is_initialized():
        return False
    if address is not None:
        check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": LOOPBACK}
    try:
        with _on_loopback() if address is None else nullcontext():
            ray.init(address=address or "local", **options)
    except (Exception, SystemExit) as error:  # it ends the process where a connection breaks
        where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
        raise UnreachableError(
            f"{where} could not be {'reached' if address else 'started'} ({type(error).__name__}: "
            f"{one_line(error)}); leave --ray_address out to run on this machine alone."
        ) from error
    if address is None and ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise ClusterError(
            f"Ray {ray.__version__} does not keep the cluster that it starts on {LOOPBACK}; install a version "
            'that is tested, pip install "coldpress[ray]", or start a cluster yourself and give --ray_address.'
        )
    return True


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


def check_address(address: str) -> None:
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
    """Why there is no answer at a port; None if there is one."""

    def ask() -> None:
        socket.create_connection((host, port), timeout=PROBE_S / 2).close()

    return within(PROBE_S / 2 + 1, ask)[0]


# The workers


def answer(work: Callable[[], Any]) -> bytes:
    """What ``work()`` returns, or the exception that it raises, in bytes that can be read elsewhere."""
    try:
        found = (True, work())
    except Exception as error:
        found = (False, release(error))
    try:
        return _packed(found)
    except Exception as error:  # a result that is not for sending
        return _packed((False, error))


def opened(packed: bytes) -> Any:
    """What :func:`answer` was given: the result, or its exception is raised."""
    is_result, value = pickle.loads(packed)
    if not is_result:
        raise value
    return value


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


@dataclass(frozen=True)
class Spec:
    """What a worker loads, and what it has to be like."""

    name: str
    device: str
    loading: dict[str, Any]  # the options of load_model beside these
    fingerprint: str
    about: dict[str, Any]  # of the driver

    @classmethod
    def of(cls, loaded: LoadedModel) -> Spec:
        if len(getattr(loaded.model, "hf_device_map", None) or ()) > 1 or getattr(loaded.model, "_tp_size", None):
            raise ClusterError("--engine ray gives every worker a whole model; leave --device_map and --tp_plan out.")
        path = path_of(loaded.name)
        is_here = loaded.name in BY_NAME or path.exists()
        return cls(
            name=str(path.resolve()) if is_here and loaded.name not in BY_NAME else loaded.name,
            device=loaded.device.type,  # which of them, the cluster says
            loading={
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "attn_implementation": loaded.attn_implementation,
                "revision": None if is_here else loaded.revision,
            },
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


class Worker:
    """The actor: loads a model once, and does one piece of work after the other."""

    def begin(self, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        return _about()

    def load(self, spec: Spec) -> bytes:
        def work() -> str:
            loaded = load_model(spec.name, device=spec.device, **spec.loading)
            self.model = loaded.model
            return loaded.weights_fingerprint

        return answer(work)

    def do(self, packed: bytes) -> bytes:
        def work() -> Any:
            function, item = pickle.loads(packed)
            return function(self.model, item)

        return answer(work)


def _about() -> dict[str, Any]:
    """What can make the results of two processes differ."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "coldpress": VERSION,
        "code": digest.hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
