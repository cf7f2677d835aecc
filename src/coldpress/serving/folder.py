"""The folder that snapshots go to when there is no room for them in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.file import save_cache
from coldpress.cache.pins import checked_pins
from coldpress.cache.pressed import PressedCache
from coldpress.core.data import as_data, from_data
from coldpress.errors import CacheError, InputError, OutputError, PressError
from coldpress.io.files import path_of, read_text, replace_file
from coldpress.serving.keys import seed_of
from coldpress.serving.snapshot import Snapshot, is_wording, row
from coldpress.stores.bits import bits_from

__all__ = ["Folder"]

_KEY = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}\.(safetensors|json)")
_PART = re.compile(r"\.[0-9a-f]{16}\.tmp")  # of io/files.py, left by a process that was killed while it wrote
_CHECKSUM = "sha256"
_PART_LIVES_S = 3600.0  # another process may be writing a younger one


class Folder:
    """Files of snapshots by key, within a number of bytes; the least recently used ones go first.

    A snapshot has two files: its pairs, and, written after them, what was declared. Files of earlier processes are
    used, and count; those of other models and of declarations that are not known here count too, until it is their
    turn to go. What is damaged, and a declaration without its pairs, are removed when they are found. Other processes
    may share the folder: a file that one of them has removed is not there, and no harm is done. What is in the folder
    under other names is left alone.

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
        self._stamps: dict[str, tuple[int, ...]] = {}  # by key, of the declarations that were read and understood
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._look()
        except OSError as error:
            raise OutputError(
                f"The folder {path} cannot be used ({error.strerror or error}); name another one."
            ) from error
        self._trim()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(self._sizes.values())

    def size(self, key: str) -> int:
        """Bytes of the files of one snapshot; 0 where there are none."""
        return self._sizes.get(key, 0)

    def keys(self) -> list[str]:
        """Keys of the snapshots, the least recently used first."""
        with self._lock:
            return list(self._sizes)

    def there(self) -> set[str]:
        """Keys of the snapshots that are there now, those of other processes too, which count from now on."""
        try:
            return self._look()
        except OSError:
            return set()

    def unread(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` whose declarations were not read and understood yet, or are other files since."""
        stamps = {key: _stamp(self._declaration(key)) for key in sorted(keys)}
        return [key for key, stamp in stamps.items() if stamp is not None and stamp != self._stamps.get(key)]

    def write(self, snapshot: Snapshot, model: PreTrainedModel) -> None:
        """Write a snapshot and its declaration, unless they are there: whole or not at all.

        One that is larger than the budget is not kept.

        Raises:
            OutputError: it cannot be written, for instance because the disk is full.
            CacheError: a file cannot hold it.
        """
        key, path, cache = snapshot.id, self._path(snapshot.id), snapshot._cache
        if not path.exists():
            if cache is None:  # another thread has just removed it
                return
            save_cache(cache, path, model, None, is_private=True)  # it holds the tokens of the text
        try:
            if not self._declaration(key).exists():
                self._declare(snapshot)
        finally:  # the pairs are there
            self.there()
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
            if cache.session._seed != seed_of(key):
                raise CacheError(f"{path} holds other pairs of its tokens than its name says.")
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
        """What was declared under a key, by this process or another; None where that is not known here.

        Raises:
            CacheError: the files are damaged or not all there; they are gone now.
        """
        if not _KEY.fullmatch(key) or self._is_orphan(key):
            return None
        path = self._declaration(key)
        stamp = _stamp(path)
        try:
            said = _intact(read_text(path), key)
        except OSError:  # a press that JSON cannot hold has none
            return None
        except (ValueError, RecursionError) as error:
            self.remove(key)
            raise CacheError(f"{path} is damaged.") from error
        self._note(key, is_used=False)
        try:
            press = None if said["press"] is None else from_data(said["press"])
            bits = None if said["kv_bits"] is None else bits_from(said["kv_bits"])
            source, ids = said["source"], row(said["ids"])
            if source is not None and not is_wording(source):
                return None
            pins = checked_pins(said["pins"] or None)
            found = Snapshot(key, ids, source, press, bits, said["chunk_tokens"], pins)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
            return None  # of a press, or of a version of coldpress, that is not known here, or not yet
        if stamp is not None:
            self._stamps[key] = stamp
        return found

    def _declare(self, snapshot: Snapshot) -> None:
        """Write what was declared, for this user alone, as it holds the text."""
        with contextlib.suppress(PressError, TypeError):  # a press that JSON cannot hold has to be declared anew
            declared = {
                "source": snapshot.source,
                "ids": snapshot.ids,
                "press": None if snapshot.press is None else as_data(snapshot.press),
                "kv_bits": None if snapshot.kv_bits is None else vars(snapshot.kv_bits),
                "chunk_tokens": snapshot.chunk_tokens,
                "pins": snapshot.pins,
            }
            said = json.dumps({**declared, _CHECKSUM: _checksum(snapshot.id, declared)})

            try:
                replace_file(self._declaration(snapshot.id), lambda part: part.write_text(said, "utf-8"), True)
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

    def _look(self) -> set[str]:
        """Count what is there and was not known, remove what a killed process has left, and return the keys.

        Raises:
            OSError: the folder cannot be read.
        """
        times: dict[str, float] = {}
        declared = set()
        for file in self.path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _PART.fullmatch(file.name):
                    if time.time() - file.stat().st_mtime > _PART_LIVES_S:
                        file.unlink()
                elif _FILE.fullmatch(file.name):
                    if file.suffix == ".json":
                        declared.add(file.stem)
                    else:
                        times[file.stem] = file.stat().st_mtime
        for key in sorted(times, key=lambda key: (times[key], key)):
            if not self.size(key):
                self._note(key)
        orphans = [key for key in sorted(declared - times.keys()) if self._is_orphan(key)]
        return set(times) - set(orphans)

    def _is_orphan(self, key: str) -> bool:
        """Whether the pairs are not there; a declaration without them is removed, as nothing would ever use it."""
        if self._path(key).is_file():
            return False
        path = self._declaration(key)
        if path.exists():
            warnings.warn(f"{path} is removed, as the snapshot that it declares has no file any more.", stacklevel=3)
            self.remove(key)
        return True

    def _note(self, key: str, is_used: bool = True) -> None:
        """Note the bytes of a snapshot if it is still there, and that it was just used."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            n_bytes = self._path(key).stat().st_size
            with contextlib.suppress(FileNotFoundError):
                n_bytes += self._declaration(key).stat().st_size
            is_used = is_used or key not in self._sizes
            self._sizes[key] = n_bytes
            if is_used:
                self._sizes.move_to_end(key)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._sizes.pop(key, None)
            self._stamps.pop(key, None)

    def _trim(self) -> None:
        while self.budget_bytes is not None and self.n_bytes > self.budget_bytes:
            for key in self.keys()[:1]:
                self.remove(key)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What is another of another file, and after a change; None where there is no file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _checksum(key: str, declared: dict[str, Any]) -> str:
    """What damage to a declaration changes, and what another one under the same key does not have."""
    return hashlib.sha256(json.dumps([key, declared], sort_keys=True).encode()).hexdigest()


def _intact(text: str, key: str) -> dict[str, Any]:
    """The declaration that a file holds. Raises ValueError or RecursionError where it is not what was written."""
    said = json.loads(text)
    if not isinstance(said, dict) or said.pop(_CHECKSUM, None) != _checksum(key, said):
        raise ValueError("not what was written")
    return said
