"""Files that users give and files that we write: one reader with a limit, one writer that leaves whole files."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

__all__ = ["MAX_BYTES", "MAX_TEXT_BYTES", "forbidden", "is_utf8", "path_of", "read_bytes", "read_text", "replace_file"]

MAX_BYTES = 1 << 28  # of a file of settings, results or weights' sizes: 256 MiB
MAX_TEXT_BYTES = 1 << 30  # of a text to read: 1 GiB
_TRIES = 5


def path_of(given: str | Path) -> Path:
    """The path that a user gave; ``~`` is the home, and ``~name`` is unchanged where there is no such user."""
    return Path(os.path.expanduser(given))


def is_utf8(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8; names of files and arguments may have other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def forbidden(path: str | Path) -> str | None:
    """Why this user may not read what is at ``path``, or see whether anything is; None if they may, or nothing is.

    ``os.path.isfile`` and its like say no to what they may not see, and a walk passes it over.
    """
    try:
        with os.scandir(path):
            return None
    except NotADirectoryError:
        return None if os.access(path, os.R_OK) else os.strerror(errno.EACCES)
    except PermissionError as error:
        return error.strerror
    except (OSError, ValueError):  # nothing is there
        return None


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a file; a device or a pipe is read up to the limit, as one without an end would fill the memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds more than ``limit`` bytes, or its name is none that a disk can have.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # 0 of a device or a pipe
        found = b"" if size > limit else file.read(limit + 1)
    if max(size, len(found)) > limit:
        raise ValueError(f"it holds more than {limit >> 20} MiB, which is the limit")
    return found


def read_text(path: str | Path, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text in a file, its line ends as ``\\n``.

    Raises:
        OSError, ValueError: as :func:`read_bytes`; a UnicodeDecodeError where it is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def replace_file(path: Path, write: Callable[[Path], object], is_private: bool = False) -> None:
    """Have ``write`` fill a new file, and let it take the place of ``path``: whole or not at all.

    The new file stands beside ``path`` under a name of its own, and is newly created: no link is followed, and
    two processes that write the same file do not meet.

    Args:
        path: the file; its folder is made if need be. An older file is there until the new one is on disk.
        write: is given the path of an empty file.
        is_private: this user alone may read the file; else whoever the umask says.

    Raises:
        OSError: it cannot be written; and whatever ``write`` raises.
    """
    for left in reversed(range(_TRIES)):
        part = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch(0o600 if is_private else 0o666, exist_ok=False)
            mode = stat.S_IMODE(part.stat().st_mode)
            write(part)
            if stat.S_IMODE(part.stat().st_mode) != mode:  # safetensors puts a file there that is its owner's alone
                part.chmod(mode)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except FileNotFoundError:  # another process has just removed the folder
            if not left:
                raise
        else:
            return
        finally:
            with contextlib.suppress(OSError, ValueError):
                part.unlink(missing_ok=True)
