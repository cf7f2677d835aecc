"""What a client is told of an error: not more than it may know of this machine."""

from __future__ import annotations

import re
from pathlib import Path

from coldpress.errors import InputError, RequestError
from coldpress.io.artefacts import artefacts_folder

__all__ = ["refusal"]

_PART = r"/[^\s'\",;:()/]*[^\s'\",;:()/.]"  # of a path


def refusal(error: Exception) -> RequestError | None:
    """What a client is told of an error; None for one that is the server's own fault."""
    if isinstance(error, RequestError):
        return error
    return RequestError(_without_paths(str(error))) if isinstance(error, InputError) else None


def _without_paths(message: str) -> str:
    """A message that was written for whoever runs the server, without where things lie here."""
    own = {str(folder).rstrip("/") for folder in (artefacts_folder(), Path.home(), Path.cwd())} - {"", "."}
    known = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))  # they may have blanks
    message = re.sub(r"(?<=['\"])~?/[^'\"]+(?=['\"])", "[path]", message)
    return re.sub(rf"(?:{known})(?:{_PART})*|(?<![\w:/.])~?(?:{_PART}){{2,}}", "[path]", message)
