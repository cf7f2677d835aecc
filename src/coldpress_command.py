"""The command ``coldpress``. A module of its own, because Ctrl-C may come while the package imports torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """As :func:`coldpress.cli.main`; 130 when interrupted, be it before anything has begun."""
    try:
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:  # not where Ctrl-C is ignored
            signal.signal(signal.SIGINT, _leave)
        try:
            from coldpress.cli import main as run
        finally:
            signal.signal(signal.SIGINT, before)
        return run(argv, prog)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """At once: there is nothing to clean up, and libraries swallow exceptions while they are imported."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
