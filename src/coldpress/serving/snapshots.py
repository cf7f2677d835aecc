"""Snapshots: prefixes that are read and compressed once, and forked by every request that begins with them."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pins import Pins, Spans, checked_pins
from coldpress.cache.pressed import PressedCache
from coldpress.core.definition import as_given
from coldpress.core.press import Press
from coldpress.errors import CacheError, InputError, OutputError, PressError
from coldpress.models.supported import use_coldpress
from coldpress.serving.folder import Folder
from coldpress.serving.keys import key_of, origin_of, seed_of
from coldpress.serving.reading import compressed
from coldpress.serving.snapshot import Prefix, Snapshot, as_bytes, is_wording, row
from coldpress.serving.wording import Message, prefix_ids
from coldpress.stores.bits import storage_of
from coldpress.stores.codec import Codec

__all__ = ["Snapshots"]


class _Own:
    """What stands for the settings of a Snapshots itself."""

    def __repr__(self) -> str:
        return "the snapshots' own"


OWN: Any = _Own()


class Snapshots:
    """Prefixes that a model reads and a press compresses once, for any number of requests.

    A prefix is declared; nothing is stored of other texts. Requests that begin with its tokens fork it, and their own
    tokens stay as they are::

        snapshots = Snapshots(model, tokenizer, SnapKVPress(0.5), budget_bytes=2 << 30, folder="snapshots")
        snapshots.add(document)
        ids = tokenizer(document + question, return_tensors="pt").input_ids
        model.generate(ids, cache=snapshots.fork(ids), max_new_tokens=50)

    Where the memory's budget is spent, the least recently used ones go to the folder, and where the folder's is spent,
    out of it. Their declarations stay, and what is asked again is made again: an answer does not depend on what was
    asked before. Several threads may use it. Prefixes are read one at a time; two threads that ask for the same one
    wait for one reading. Do not run the model in another thread while a prefix is added, as presses watch it then.

    Args:
        model: put on coldpress's attention. Its weights and adapters stay as they are from now on.
        tokenizer: for texts and messages; None where only token ids are given.
        press: that compresses a prefix, unless :meth:`add` says otherwise; None keeps all.
        budget_bytes: of keys and values in memory; None: no limit. Forks that are under way are not counted.
        folder: where snapshots go that memory has no room for; None: they are made again. Those that another process
            has written there, of the same model, are declared from the start.
        disk_budget_bytes: of the folder; None: no limit.
        chunk_tokens: a prefix is read in pieces of so many tokens, and compressed after each.
        kv_bits: 8, 4, 2, a name such as ``"k8v4"``, or a KVBits or RotatedBits: how pairs are stored.
        pin: spans of the tokens of every prefix that nothing may evict.
        max_snapshots: declarations; one more, and the least recently used one is removed.

    Attributes:
        hits, misses: requests that began with a snapshot, and those that did not.
        tokens_saved: tokens of requests that the model did not have to read.
        built, loaded, damaged, unwritten: prefixes that were read by the model, read from files, found damaged in
            files, and not written because a file could not be.

    Raises:
        PressError: the press goes on while decoding, so that the tokens of requests would not stay as they are.
        InputError, CacheError: an argument is none that can work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        press: Press | None = None,
        *,
        budget_bytes: int | None = None,
        folder: str | Path | None = None,
        disk_budget_bytes: int | None = None,
        chunk_tokens: int | None = None,
        kv_bits: int | str | Codec | None = None,
        pin: Spans | None = None,
        max_snapshots: int = 1024,
    ):
        for name, value in (("budget_bytes", budget_bytes), ("disk_budget_bytes", disk_budget_bytes)):
            _check_integer(name, value, 0)
        _check_integer("max_snapshots", max_snapshots, 1)
        if folder is None and disk_budget_bytes is not None:
            raise InputError("disk_budget_bytes is of a folder; give folder= too.")
        use_coldpress(model)
        self.model, self.tokenizer = model, tokenizer
        self.press, self.chunk_tokens, self.kv_bits, self.pin = press, chunk_tokens, storage_of(kv_bits), pin
        self.budget_bytes, self.max_snapshots = budget_bytes, max_snapshots
        self._check(press, chunk_tokens, self.kv_bits, pin)
        self._folder = None if folder is None else Folder(folder, disk_budget_bytes)
        self._origin = origin_of(model, tokenizer)
        self._by_id: OrderedDict[str, Snapshot] = OrderedDict()  # the least recently used first
        self._bytes_of: dict[str, bytes] = {}  # token ids as bytes, which are compared at once
        self._lock = threading.Lock()  # of these and of the counters; held for moments
        self._reading, self._moving = threading.Lock(), threading.Lock()
        self.hits = self.misses = self.tokens_saved = self.built = self.loaded = self.damaged = self.unwritten = 0
        for key in [] if self._folder is None else self._folder.keys()[-max_snapshots:]:
            self._restore(key)

    def add(
        self,
        prefix: Prefix,
        *,
        press: Press | None = OWN,
        chunk_tokens: int | None = OWN,
        kv_bits: int | str | Codec | None = OWN,
        pin: Spans | None = OWN,
    ) -> Snapshot:
        """Declare a prefix, and read and compress it unless it is there.

        Args:
            prefix: a text, messages ``[{"role": "user", "content": ...}]`` whose last one may go on, or token ids.
            press, chunk_tokens, kv_bits, pin: for this prefix alone, in the place of the snapshots' own.

        Raises:
            InputError: no tokens, no tokenizer for a text, or a snapshot that memory can never hold and no folder.
            PressError, CacheError: as for the snapshots' own settings, or the press cannot compress this prefix.
        """
        press = self.press if press is OWN else press
        chunk_tokens = self.chunk_tokens if chunk_tokens is OWN else chunk_tokens
        bits = self.kv_bits if kv_bits is OWN else storage_of(kv_bits)
        pins = self._check(press, chunk_tokens, bits, self.pin if pin is OWN else pin)
        ids, source = self._ids(prefix)
        key = key_of(self._origin, ids, press, bits, chunk_tokens, pins)
        with self._lock:
            is_new = key not in self._by_id
        found = self._declared(Snapshot(key, ids, source, press, bits, chunk_tokens, pins))
        try:
            self._hold(found)
        except BaseException:
            if is_new:
                self.remove(key)
            raise
        return found

    def find(self, ids: Sequence[int] | Tensor) -> Snapshot | None:
        """The longest snapshot that a request begins with, None without one; nothing is counted.

        At least one token of the request is not the snapshot's, as the model has to run to answer. Among equally long
        ones the snapshots' own settings come first, then what was declared earlier.

        Args:
            ids: of the request, int64 ``[T]`` or ``[1, T]``.
        """
        asked, best = as_bytes(row(ids)), None
        with self._lock:
            for key, prefix in self._bytes_of.items():  # as they were declared
                if len(prefix) < len(asked) and asked.startswith(prefix):
                    found = self._by_id[key]
                    if best is None or self._rank(found) > self._rank(best):
                        best = found
        return best

    def fork(self, ids: Sequence[int] | Tensor) -> PressedCache:
        """A cache for a request: a fork of the longest snapshot that it begins with, or an empty one without a press.

        ``cache.seen_tokens`` of the request's tokens are in it; hand all ids and the cache to ``generate``.
        """
        found = self.find(ids)
        if found is None:
            self.count_miss()
            return PressedCache()
        return found.fork()

    def get(self, key: str) -> Snapshot | None:
        """The snapshot with this id, declared here or in the folder; None without one."""
        return self._by_id.get(key) or self._restore(key)

    def __iter__(self) -> Iterator[Snapshot]:
        """All snapshots, the most recently used first."""
        with self._lock:
            return iter(list(reversed(self._by_id.values())))

    def __len__(self) -> int:
        return len(self._by_id)

    def remove(self, key: str) -> bool:
        """Forget a snapshot, its file too; whether it was there. Forks of it that are under way go on."""
        with self._lock:
            found = self._by_id.pop(key, None)
            self._bytes_of.pop(key, None)
            if found is not None:
                found._is_removed, found._cache, found.memory_bytes = True, None, 0
        if found is not None and self._folder is not None:
            self._folder.remove(key)
        return found is not None

    def refresh(self) -> None:
        """Know what other processes on the folder have declared since, and forget what they have removed."""
        if self._folder is None:
            return
        known = self._folder.keys()
        there = self._folder.there()
        for key in self._folder.unread(there - self._by_id.keys()):
            self._restore(key)
        for key in set(known) - there:
            self.remove(key)
            self._folder.remove(key)  # of one that was not declared here, it is no longer counted

    def flush(self) -> None:
        """Write what is in memory alone to the folder, so that another process finds it there."""
        for snapshot in self:
            with self._moving, snapshot._lock:
                self._write(snapshot)

    def count_miss(self) -> None:
        """Count a request that begins with no snapshot."""
        with self._lock:
            self.misses += 1

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys and values in memory."""
        return sum(snapshot.memory_bytes for snapshot in self)

    @property
    def disk_bytes(self) -> int:
        """Bytes of files in the folder, those of earlier processes included."""
        return 0 if self._folder is None else self._folder.n_bytes

    def counts(self) -> dict[str, int]:
        """All counters, and ``snapshots``, ``memory_bytes`` and ``disk_bytes``."""
        names = ("hits", "misses", "tokens_saved", "built", "loaded", "damaged", "unwritten")
        with self._lock:
            found = {name: getattr(self, name) for name in names} | {"snapshots": len(self._by_id)}
        return found | {"memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}

    # What snapshots ask

    def disk_bytes_of(self, snapshot: Snapshot) -> int:
        """See :attr:`Snapshot.disk_bytes`."""
        return 0 if self._folder is None else self._folder.size(snapshot.id)

    def forked(self, snapshot: Snapshot, is_counted: bool = True) -> tuple[PressedCache, bool]:
        """See :meth:`Snapshot.fork`, and whether the model had to read it; what is no request is not counted as one."""
        fork, was_read = self._hold(snapshot)
        if not is_counted:
            return fork, was_read
        with self._lock:
            self.hits += 1
            snapshot.uses += 1
            self.tokens_saved += 0 if was_read else snapshot.n_tokens
        return fork, was_read

    # Making, keeping, moving

    def _hold(self, snapshot: Snapshot) -> tuple[PressedCache, bool]:
        """A fork of a snapshot, which is in memory then, and whether the model has had to read it."""
        with snapshot._lock:  # whoever comes second waits, and finds it there
            cache, was_read = snapshot._cache, False
            if cache is None:
                if snapshot._is_removed:
                    raise CacheError(f"The snapshot {snapshot.id} was removed; declare it again.")
                cache = self._loaded(snapshot)
                if cache is None:
                    cache, was_read = self._built(snapshot), True
                n_bytes = cache.kv_bytes()
                if self._folder is None and self.budget_bytes is not None and n_bytes > self.budget_bytes:
                    raise InputError(
                        f"The snapshot takes {n_bytes:,} bytes and budget_bytes allows {self.budget_bytes:,}: compress "
                        "it more, raise budget_bytes, or name a folder."
                    )
                with self._lock:
                    if not snapshot._is_removed:
                        snapshot._cache, snapshot.memory_bytes = cache, n_bytes
                    snapshot.achieved_ratio = cache.achieved_ratio()
                    self.built, self.loaded = self.built + was_read, self.loaded + (not was_read)
            fork = cache.fork()
            fork.session.chunk_tokens = None  # what follows is no piece of the prefix
        with self._lock:
            if snapshot.id in self._by_id:
                self._by_id.move_to_end(snapshot.id)
        self._move_out()
        return fork, was_read

    def _declared(self, new: Snapshot) -> Snapshot:
        """The snapshot with the key of ``new``, which is that one unless there is one."""
        with self._lock:
            found = self._by_id.setdefault(new.id, new)
            if found is new:
                new._owner = self
                self._bytes_of[new.id] = as_bytes(new.ids)
            self._by_id.move_to_end(new.id)
            surplus = list(self._by_id)[: max(0, len(self._by_id) - self.max_snapshots)]
        for old in surplus:
            self.remove(old)
        return found

    def _restore(self, key: str) -> Snapshot | None:
        """Declare what another process has written to the folder; None where that is of another model, or damaged."""
        try:
            found = None if self._folder is None else self._folder.declaration(key)
        except CacheError as error:
            self._note_damage(error, "is removed, and made again when it is declared again")
            return None
        if found is None:
            return None
        said = key_of(self._origin, found.ids, found.press, found.kv_bits, found.chunk_tokens, found.pins)
        return self._declared(found) if said == key else None

    def _loaded(self, snapshot: Snapshot) -> PressedCache | None:
        if self._folder is None:
            return None
        try:
            return self._folder.read(snapshot.id, snapshot.ids, self.model)
        except CacheError as error:
            self._note_damage(error, "is made again")
            return None

    def _note_damage(self, error: CacheError, what_follows: str) -> None:
        with self._lock:
            self.damaged += 1
        warnings.warn(f"A snapshot {what_follows}: {error}", UserWarning, stacklevel=3)

    def _built(self, snapshot: Snapshot) -> PressedCache:
        cache = PressedCache(
            snapshot.press,
            chunk_tokens=snapshot.chunk_tokens,
            kv_bits=snapshot.kv_bits,
            pin=snapshot.pins or None,
        )
        cache.session._seed = seed_of(snapshot.id)
        with self._reading:
            compressed(self.model, self.tokenizer, snapshot.ids, cache)
        return cache

    def _move_out(self) -> None:
        """Let the least recently used snapshots go to the folder until the others are within the memory's budget."""
        with self._moving:
            while self.budget_bytes is not None and self.memory_bytes > self.budget_bytes:
                with self._lock:
                    last = next((s for s in self._by_id.values() if s._cache is not None), None)
                if last is None:
                    return
                with last._lock:
                    self._write(last)
                    with self._lock:
                        last._cache, last.memory_bytes = None, 0

    def _write(self, snapshot: Snapshot) -> None:
        if self._folder is None or snapshot._cache is None:
            return
        try:
            self._folder.write(snapshot, self.model)
            if snapshot._is_removed:  # meanwhile
                self._folder.remove(snapshot.id)
        except (OutputError, CacheError) as error:
            with self._lock:
                self.unwritten += 1
            warnings.warn(f"A snapshot is not written, and is made again when asked: {error}", stacklevel=2)

    def _rank(self, snapshot: Snapshot) -> tuple[int, bool]:
        own = (self.press, self.chunk_tokens, self.kv_bits, checked_pins(self.pin))
        said = (snapshot.press, snapshot.chunk_tokens, snapshot.kv_bits, snapshot.pins)
        return snapshot.n_tokens, said == own

    def _check(self, press: Press | None, chunk_tokens: int | None, kv_bits: Codec | None, pin: Spans | None) -> Pins:
        if press is not None and not isinstance(press, Press):
            raise PressError(f"press must be a press such as coldpress.SnapKVPress(0.5), got {as_given(press)}.")
        if press is not None and press.evicts_while_decoding:
            raise PressError(
                f"{press!r} goes on while decoding, and the tokens of a request stay as they are: give a press that "
                "stops after the prefill."
            )
        pins = PressedCache(press, chunk_tokens=chunk_tokens, kv_bits=kv_bits, pin=pin).session.pins
        if len(pins) > 1:
            raise InputError(f"A prefix is one row: give pin spans of its tokens, [(0, 40)]; got {pin!r}.")
        return pins

    def _ids(self, prefix: Prefix) -> tuple[list[int], str | Sequence[Message] | None]:
        if is_wording(prefix):
            if self.tokenizer is None:
                raise InputError("A text needs a tokenizer; give Snapshots one, or give token ids.")
            source: Any = prefix
            return prefix_ids(self.tokenizer, source), source
        ids = row(prefix)  # type: ignore[arg-type]
        if not ids:
            raise InputError("A prefix needs at least one token; got none.")
        return ids, None


def _check_integer(name: str, value: int | None, least: int) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}.")
