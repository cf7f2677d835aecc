"""Every exception coldpress raises on purpose.

    ColdpressError
    ├── InputError                  what the user gave cannot work; commands exit with code 2
    │   ├── PressError              unknown press, impossible parameter        (also a ValueError)
    │   │   └── FrozenPressError    a press was to be changed                  (also a FrozenInstanceError)
    │   ├── ModelError              the model cannot run under coldpress       (also a ValueError)
    │   ├── CacheError              the cache cannot do what was asked         (also a ValueError)
    │   ├── DataError               no usable text: file, column, split, index (also a ValueError)
    │   ├── UnreachableError        the hub could not be reached               (also an OSError)
    │   ├── DeviceError             the device is not there                    (also a ValueError)
    │   ├── OutputError             the result cannot be written               (also an OSError)
    │   ├── ClusterError            an engine that cannot do this work         (also a ValueError)
    │   ├── RequestError            a request that the server refuses
    │   └── MissingDependencyError  an optional package is not installed       (also an ImportError)
    ├── LostWorkersError            a cluster has no worker left; commands exit with code 1
    └── SelfCheckError              a measurement contradicts itself; commands exit with code 1

    UntestedVersionWarning          a UserWarning: transformers is newer than what coldpress is tested with

Each message is one line: what was given, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import FrozenInstanceError

__all__ = [
    "CacheError",
    "ClusterError",
    "ColdpressError",
    "DataError",
    "DeviceError",
    "FrozenPressError",
    "InputError",
    "LostWorkersError",
    "MissingDependencyError",
    "ModelError",
    "OutputError",
    "PressError",
    "RequestError",
    "SelfCheckError",
    "UnreachableError",
    "UntestedVersionWarning",
    "nearest",
]


class ColdpressError(Exception):
    """Base of every exception that coldpress raises on purpose."""


class InputError(ColdpressError):
    """Something the user gave cannot work. Commands print the message and exit with code 2."""


class PressError(InputError, ValueError):
    """An unknown press, or a parameter outside what the press allows."""


class NoRoomError(PressError):
    """What must stay (pins, sinks, a window) is more than the budget keeps."""


class FrozenPressError(PressError, FrozenInstanceError):
    """A parameter of a press was assigned to; presses do not change, and the message says how to get another one."""


class ModelError(InputError, ValueError):
    """The model cannot run under coldpress, or runs another attention backend."""


class CacheError(InputError, ValueError):
    """The cache cannot do what was asked, for instance crop into what has been compressed."""


class DataError(InputError, ValueError):
    """No usable text: a missing file, column, subset or sample, or too few tokens."""


class UnreachableError(InputError, OSError):
    """A model or dataset is not here and the hub could not be reached."""


class DeviceError(InputError, ValueError):
    """The requested device does not exist on this machine."""


class OutputError(InputError, OSError):
    """A result cannot be written where it was asked for."""


class ClusterError(InputError, ValueError):
    """No such engine, or its workers cannot do this work: no room, other weights, another coldpress."""


class MissingDependencyError(InputError, ImportError):
    """An optional package is needed; the message says which, and how to install it."""


class RequestError(InputError):
    """A request that the server refuses, with what the answer in HTTP says beside the message.

    Args:
        message: one line.
        status: of HTTP.
        code: a word that programs look at, as OpenAI's API has them.
        param: the option that is at fault.
        retry_after_s: after which the same request may be answered; None where it never will be.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s


class LostWorkersError(ColdpressError):
    """The workers of a cluster are gone in the middle of a run; what they had finished is kept."""


class SelfCheckError(ColdpressError):
    """A measurement contradicts itself, so its numbers must not be used."""


class UntestedVersionWarning(UserWarning):
    """transformers is newer than the newest version that coldpress is tested with; said once in a process.

    ``warnings.filterwarnings("ignore", category=UntestedVersionWarning)`` silences it.
    """


def nearest(name: str, allowed: Iterable[str], least: float = 0.5) -> str:
    """Return ``" Did you mean 'x' or 'y'?"`` for the names closest to ``name``, or an empty string.

    One that ``name`` goes on from comes first, as ``--press`` for ``--press_name``.

    ``least``: how alike they must be, from 0 to 1; more where many names are allowed and a user may know none of them.
    """
    known = list(dict.fromkeys(allowed))
    close = [*(a for a in known if name.startswith(f"{a}_")), *difflib.get_close_matches(name, known, 3, least)]
    return f" Did you mean {' or '.join(repr(c) for c in list(dict.fromkeys(close))[:3])}?" if close else ""
