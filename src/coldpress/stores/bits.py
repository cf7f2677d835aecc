"""KVBits: how a cache holds its pairs in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coldpress.errors import CacheError

if TYPE_CHECKING:
    pass

__all__ = ["BITS", "KVBits"]


BITS = (8, 4, 2)


@dataclass(frozen=True)
class KVBits:
    """How a cache holds its pairs in few bits; ``PressedCache(kv_bits=4)`` stands for ``kv_bits=KVBits(4)``.

    Keys are quantised per channel over group_size tokens, values per token over group_size channels (of as many as
    divide them, at most). A group is held as integers q of 0 .. 2^bits - 1, with its least number m and a step s:
    m + s * q. Each head's newest residual_tokens pairs stay as they are, and so do those that make no whole group.

    Args:
        bits: 8, 4 or 2.
        group_size: numbers that share a step, at least 1.
        residual_tokens: newest pairs of each head that stay in full precision, at least 0.

    Raises:
        CacheError: numbers that cannot be meant.
    """

    bits: int
    group_size: int = 64
    residual_tokens: int = 128

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise CacheError(f"kv_bits must be 8, 4 or 2, or a KVBits of these, got {self.bits!r}.")
        for name, least in (("group_size", 1), ("residual_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CacheError(f"KVBits: {name} must be an integer of at least {least}, got {value!r}.")

    @classmethod
    def of(cls, given: int | KVBits | None) -> KVBits | None:
        """What ``kv_bits=`` was given, which may be the number of bits alone."""
        return given if given is None or isinstance(given, KVBits) else cls(given)

    def n_groups(self, n_tokens: int) -> int:
        """How many groups of the first of ``n_tokens`` tokens are older than the newest ones that stay as they are."""
        return max(0, (n_tokens - self.residual_tokens) // self.group_size)

    def channels(self, n_channels: int) -> int:
        """How many of ``n_channels`` channels of a value share a step."""
        fitting = [n for n in range(8, self.group_size + 1) if n_channels % n == 0]
        return fitting[-1] if fitting else n_channels
