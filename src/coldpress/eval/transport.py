"""What work on another machine returned or raised, in bytes; an exception keeps the traceback that it had there."""

from __future__ import annotations

import io
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

from coldpress.eval.checks import release

__all__ = ["answer", "opened"]


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
