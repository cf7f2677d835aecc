"""The folder that snapshots go to when there is no room for them in memory."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path

from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pressed import PressedCache
from coldpress.errors import CacheError, OutputError, PressError
from coldpress.io.files import path_of

__all__ = ["Folder"]

_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
_PART = re.compile(r"\.[0-9a-f]{16}\.tmp")  # of io/files.py, left by a process that was killed while it wrote
_PART_LIVES_S = 3600.0  # another process may be writing a younger one


class Folder:
    """Files of snapshots by key, within a number of bytes; the least recently used ones go first.

    Files of earlier processes are used, and count. Other processes may share the folder: a file that one of them has
    removed is not there, and no harm is done. What is in the folder under other names is left alone.

    Args:
        path: made if need be.
        budget_bytes: of all files; None: no limit.

    Raises:
        OutputError: the folder cannot be made or read.
    """

    def __init__(self, path: str | Path, budget_bytes: int | None):
        self.path, self.budget_bytes = path_of(path), budget_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # bytes by key, the least recently used first
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = []
            for file in self.path.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    state = file.stat()
                    if _PART.fullmatch(file.name) and time.time() - state.st_mtime > _PART_LIVES_S:
                        file.unlink()
                    elif _FILE.fullmatch(file.name):
                        there.append((state.st_mtime, file.stem, state.st_size))
        except OSError as error:
            raise OutputError(
                f"The folder {path} cannot be used ({error.strerror or error}); name another one."
            ) from error
        self._sizes.update((key, size) for _, key, size in sorted(there))
        self._trim()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def size(self, key: str) -> int:
        """Bytes of one file; 0 where there is none."""
        return self._sizes.get(key, 0)

    def write(self, key: str, cache: PressedCache, model: PreTrainedModel) -> None:
        """Write a cache, unless it is there: whole or not at all. One that is larger than the budget is not kept.

        Raises:
            OutputError: it cannot be written, for instance because the disk is full.
            CacheError: a file cannot hold it.
        """
        path = self._path(key)
        if not path.exists():
            cache.save(path, model)
        with self._lock, contextlib.suppress(FileNotFoundError):
            self._sizes[key] = path.stat().st_size
            self._sizes.move_to_end(key)
        self._trim()

    def read(self, key: str, ids: list[int], model: PreTrainedModel) -> PressedCache | None:
        """The cache of the tokens ``ids``; None where there is no file.

        Raises:
            CacheError: the file is damaged or holds something else; it is gone now.
        """
        path = self._path(key)
        if not path.is_file():
            self._forget(key)
            return None
        try:
            cache = PressedCache.load(path, model)
            if cache.token_ids is None or cache.token_ids[0].tolist() != ids:
                raise CacheError(f"{path} holds other tokens than its name says.")
        except (CacheError, PressError) as error:
            self.remove(key)
            raise CacheError(str(error)) from error
        with self._lock:
            self._sizes[key] = self._sizes.pop(key, 0) or path.stat().st_size
        with contextlib.suppress(OSError):
            path.touch()
        return cache

    def remove(self, key: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)
        self._forget(key)

    def _path(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _forget(self, key: str) -> None:
        with self._lock:
            self._sizes.pop(key, None)

    def _trim(self) -> None:
        while self.budget_bytes is not None and self.n_bytes > self.budget_bytes:
            self.remove(next(iter(self._sizes)))
