"""The versions of transformers that coldpress is tested with, and the warning of a newer one."""

from __future__ import annotations

import functools
import re
import warnings

from coldpress.errors import UntestedVersionWarning

__all__ = ["TESTED", "check_versions", "untested"]

TESTED = (
    "4.56",
    "5.2",
    "5.23",
    "5.24",
)  # the oldest that is supported to the newest; `make test-old` runs all but that


@functools.cache
def check_versions() -> None:
    """Warn, once in a process, of a transformers newer than the newest that is tested."""
    import transformers

    said = untested(transformers.__version__)
    if said is not None:
        warnings.warn(said, UntestedVersionWarning, stacklevel=3)


def untested(version: str) -> str | None:
    """A sentence about a ``version`` of transformers newer than the newest of :data:`TESTED`; None for all others.

    Patches of a tested version count as tested.
    """
    newest = TESTED[-1]
    major, minor = _parts(newest)
    if _parts(version) <= (major, minor):
        return None
    return (
        f"transformers {version} is newer than {newest}, the newest that this coldpress is tested with: look for a "
        f"newer coldpress, or pip install 'transformers<{major}.{minor + 1}'."
    )


def _parts(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
