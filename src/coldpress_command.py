"""The command ``coldpress``. A module of its own, because Ctrl-C may come while the package is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """As :func:`coldpress.cli`; 130 when interrupted, be it before anything has begun."""
    try:
        from coldpress.commands.streams import interrupted_at_once

        with interrupted_at_once():  # an import may turn a KeyboardInterrupt into another error
            from coldpress.cli import main as run
        return run(argv, prog)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
