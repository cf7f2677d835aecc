"""The folder that snapshots go to when there is no room for them in memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path

from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pins import checked_pins
from coldpress.cache.pressed import PressedCache
from coldpress.core.data import as_data, from_data
from coldpress.errors import CacheError, InputError, OutputError, PressError
from coldpress.io.files import path_of, read_text, replace_file
from coldpress.serving.snapshot import Snapshot, is_wording, row
from coldpress.stores.bits import bits_from

__all__ = ["Folder"]

_KEY = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
_PART = re.compile(r"\.[0-9a-f]{16}\.tmp")  # of io/files.py, left by a process that was killed while it wrote
_PART_LIVES_S = 3600.0  # another process may be writing a younger one


class Folder:
    """Files of snapshots by key, within a number of bytes; the least recently used ones go first.

    Beside each file another one says what was declared. Files of earlier processes are used, and count. Other
    processes may share the folder: a file that one of them has removed is not there, and no harm is done. What is in
    the folder under other names is left alone.

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
        with self._lock:
            return sum(self._sizes.values())

    def size(self, key: str) -> int:
        """Bytes of one file; 0 where there is none."""
        return self._sizes.get(key, 0)

    def keys(self) -> list[str]:
        """Keys of the files, the least recently used first."""
        with self._lock:
            return list(self._sizes)

    def there(self) -> set[str]:
        """Keys of the files that are there now, those of other processes too."""
        try:
            return {file.stem for file in self.path.iterdir() if _FILE.fullmatch(file.name)}
        except OSError:
            return set()

    def write(self, snapshot: Snapshot, model: PreTrainedModel) -> None:
        """Write a snapshot and its declaration, unless they are there: whole or not at all.

        One that is larger than the budget is not kept.

        Raises:
            OutputError: it cannot be written, for instance because the disk is full.
            CacheError: a file cannot hold it.
        """
        key, path = snapshot.id, self._path(snapshot.id)
        if not path.exists():
            assert snapshot._cache is not None
            snapshot._cache.save(path, model)
        if not self._declaration(key).exists():
            self._declare(snapshot)
        self._note(key)
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
            is_there = path.is_file()
            self.remove(key)
            if not is_there:  # somebody has just removed it
                return None
            raise CacheError(str(error)) from error
        self._note(key)
        with contextlib.suppress(OSError):
            os.utime(path)  # which makes no file, as touch() would
        return cache

    def declaration(self, key: str) -> Snapshot | None:
        """What was declared under a key, by this process or another; None where that is not known, or damaged."""
        if not _KEY.fullmatch(key) or not self._path(key).is_file():
            return None
        try:
            said = json.loads(read_text(self._declaration(key)))
            press = None if said["press"] is None else from_data(said["press"])
            bits = None if said["kv_bits"] is None else bits_from(said["kv_bits"])
            source, ids = said["source"], row(said["ids"])
            if not (source is None or is_wording(source)):
                raise ValueError("the source is no wording")
            found = Snapshot(key, ids, source, press, bits, said["chunk_tokens"], checked_pins(said["pins"] or None))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
            return None  # the prefix has to be declared anew
        with self._lock, contextlib.suppress(OSError):
            self._sizes.setdefault(key, self._path(key).stat().st_size)
        return found

    def _declare(self, snapshot: Snapshot) -> None:
        """Write what was declared, for this user alone, as it holds the text."""
        with contextlib.suppress(PressError, TypeError):  # a press that JSON cannot hold has to be declared anew
            said = json.dumps(
                {
                    "source": snapshot.source,
                    "ids": snapshot.ids,
                    "press": None if snapshot.press is None else as_data(snapshot.press),
                    "kv_bits": None if snapshot.kv_bits is None else vars(snapshot.kv_bits),
                    "chunk_tokens": snapshot.chunk_tokens,
                    "pins": snapshot.pins,
                }
            )

            def write(part: Path) -> None:
                part.chmod(0o600)
                part.write_text(said, encoding="utf-8")

            try:
                replace_file(self._declaration(snapshot.id), write)
            except OSError as error:
                raise OutputError(f"{self.path} cannot be written to ({error}).") from error

    def remove(self, key: str) -> None:
        """Delete the files of a snapshot, if they are there."""
        for path in (self._declaration(key), self._path(key)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._forget(key)

    def _path(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _declaration(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _note(self, key: str) -> None:
        """Note that a file was just used, if it is still there."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            self._sizes[key] = self._path(key).stat().st_size
            self._sizes.move_to_end(key)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._sizes.pop(key, None)

    def _trim(self) -> None:
        while self.budget_bytes is not None and self.n_bytes > self.budget_bytes:
            for key in self.keys()[:1]:
                self.remove(key)
