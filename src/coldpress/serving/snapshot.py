"""A snapshot: a declared prefix, its settings, and its compressed cache while there is room for it."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from coldpress.cache.pins import Pins
from coldpress.cache.pressed import PressedCache
from coldpress.core.press import Press
from coldpress.errors import InputError
from coldpress.serving.wording import Message
from coldpress.stores.codec import Codec

__all__ = ["Prefix", "Snapshot", "as_bytes", "is_wording", "row"]

Prefix = str | Sequence[Message] | Sequence[int] | Tensor


@dataclass(eq=False)
class Snapshot:
    """A declared prefix and, as long as there is room for it, its compressed cache; made by :meth:`Snapshots.add`.

    Attributes:
        id: the key, 32 hexadecimal digits: the same prefix under the same settings of the same model has the same one.
        ids: the tokens of the prefix.
        source: the text or messages that it was made of; None where token ids were given.
        press, kv_bits, chunk_tokens, pins: how it is compressed and stored.
        memory_bytes: of keys and values in memory; 0 where they are not there.
        achieved_ratio: fraction of the pairs that the press has removed; None before it was compressed here.
        uses: how many requests have forked it.
    """

    id: str
    ids: list[int] = field(repr=False)
    source: str | Sequence[Message] | None = field(repr=False)
    press: Press | None
    kv_bits: Codec | None
    chunk_tokens: int | None
    pins: Pins
    memory_bytes: int = 0
    achieved_ratio: float | None = None
    uses: int = 0
    _owner: Any = field(default=None, repr=False)
    _cache: PressedCache | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _is_removed: bool = field(default=False, repr=False)

    @property
    def n_tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.ids)

    @property
    def disk_bytes(self) -> int:
        """Bytes of its files; 0 where there are none."""
        return int(self._owner.disk_bytes_of(self))

    @property
    def tier(self) -> str:
        """``memory``, ``disk``, or ``declared``: neither, so that it is made again when it is asked next."""
        return "memory" if self._cache is not None else "disk" if self.disk_bytes else "declared"

    @property
    def is_removed(self) -> bool:
        """Whether it was removed, so that it cannot be forked any more."""
        return self._is_removed

    def fork(self) -> PressedCache:
        """A cache that stores the prefix and goes its own way; what follows the prefix is stored whole.

        The prefix is read from its file, or by the model once more, where it is not in memory.

        Raises:
            CacheError: the snapshot was removed.
        """
        found: PressedCache = self._owner.forked(self)[0]
        return found


def is_wording(prefix: Any) -> bool:
    """Whether a prefix is a text or messages, and no token ids.

    Raises:
        InputError: something in a list of messages is no message.
    """
    if isinstance(prefix, str):
        return True
    if not isinstance(prefix, (list, tuple)) or not any(isinstance(part, Mapping) for part in prefix):
        return False
    for part in prefix:
        if not isinstance(part, Mapping) or not all(isinstance(part.get(name), str) for name in ("role", "content")):
            raise InputError(f"A message must have a role and a content that are texts, got {str(part)[:80]}.")
    return True


def row(ids: Sequence[int] | Tensor) -> list[int]:
    """Token ids, int64 ``[T]`` or ``[1, T]``, as a list of integers. Raises :class:`InputError` for anything else."""
    if isinstance(ids, Tensor):
        if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1) or ids.is_floating_point():
            raise InputError(f"Token ids must be int64 [T] or [1, T], got {ids.dtype} {tuple(ids.shape)}.")
        ids = ids.flatten().tolist()
    if not all(type(token) is int and token >= 0 for token in ids):
        raise InputError("A prefix must be a text, messages with role and content, or token ids of at least 0.")
    return list(ids)


def as_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as bytes: one is a prefix of another where these are."""
    return array("q", ids).tobytes()
