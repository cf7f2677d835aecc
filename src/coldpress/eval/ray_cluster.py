"""A Ray cluster to work on: one that answers at an address, or one that is started here and ends with the engine.

Its workers load what the driver says. What they return or raise travels in bytes; an exception keeps its traceback.
"""

from __future__ import annotations

import io
import os
import pickle
import platform
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from coldpress.errors import ClusterError
from coldpress.eval.point_run import release
from coldpress.io.files import path_of
from coldpress.loading.models import BY_NAME, LoadedModel, load_model
from coldpress.version import VERSION, source_digest


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
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "coldpress": VERSION,
        "code": source_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
