"""What a command does with the streams and signals of its process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from coldpress.io.terminal import printable

__all__ = ["interrupted_at_once", "open_streams", "output_problem", "shortly"]


def open_streams() -> None:
    """Where standard output or error is closed, what is written goes nowhere, and into no file that is opened later."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 -- until the process ends


def output_problem() -> str | None:
    """Why standard output takes nothing any more, such as a full disk; from then on what is written goes nowhere."""
    try:
        sys.stdout.write("\n")  # what failed is not tried again by a flush alone
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


def shortly(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as one line, without the file and the line of code that it comes from."""
    return printable(f"warning: {' '.join(str(message).split())}") + "\n"


@contextlib.contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Ctrl-C ends the process: nothing has begun, and libraries swallow exceptions while they are imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is ignored, or somebody else's
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)
