"""Where results go: proved to be writable before any work is done, and written whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from coldpress.errors import OutputError
from coldpress.io.files import path_of, replace_file

LONGEST_NAME = 230  # of a result's file: a path that is too long for it is said before anything is measured


def check_writable(output_dir: Path) -> None:
    """Prove that results can be written to `output_dir`, and leave nothing behind; call it before any long work.

    Raises OutputError when the path is a file, lies below a file, or may not be written.
    """
    folder = Path(output_dir)
    missing = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    probe = folder / f".{secrets.token_hex(8)}.tmp".ljust(LONGEST_NAME, "_")
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch(exist_ok=False)
        finally:
            with contextlib.suppress(OSError, ValueError):
                probe.unlink(missing_ok=True)
                for parent in missing:
                    parent.rmdir()
    except FileExistsError as error:
        raise OutputError(f"output folder {str(output_dir)!r} is a file: give a folder") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL, or that is no text
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot write into folder {str(output_dir)[:200]!r} ({why}): give one you may write to"
        ) from error


def check_output(output: str, example: str) -> Path:
    """Prove that one file can be written, as :func:`check_writable` does; the path, of which ``~`` is the home.

    Raises OutputError when it names no file, such as a folder or a device, or cannot be written; ``example`` is one.
    """
    path = path_of(output)
    try:
        state = path.stat() if output.strip() else None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL, or that is no text
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"--output {output[:80]!r} is no name of a file ({why}); give one such as {example}."
        ) from error
    else:
        if state is None or not stat.S_ISREG(state.st_mode):
            raise OutputError(f"--output {output!r} is no name of a file; give one such as {example}.")
    check_writable(path.parent)
    return path


def write_file(path: Path, content: bytes) -> Path:
    """Write a file whole, or leave it as it was; raises OutputError where it cannot be."""
    try:
        replace_file(path, lambda part: part.write_bytes(content))
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r} ({error.strerror}): choose another --output") from error
    return path
