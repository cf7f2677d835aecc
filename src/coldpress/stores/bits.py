"""KVBits: keys and values in few bits, keys per channel and values per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from coldpress.errors import CacheError
from coldpress.stores.codec import Blocks, Codec, check_codec
from coldpress.stores.codes import Codes
from coldpress.stores.mixed import Mixed
from coldpress.stores.rotated import RotatedBits

__all__ = ["BITS", "MIXED", "ROTATED", "KVBits", "bits_from", "bits_name", "storage_of"]

BITS = (8, 4, 2)
MIXED = "mixed"  # Mixed()
ROTATED = tuple(f"k{keys}v{values}" for keys in BITS for values in BITS)  # RotatedBits(keys, values)


@dataclass(frozen=True)
class KVBits(Codec):
    """Storage of pairs in few bits; ``PressedCache(kv_bits=4)`` stands for ``kv_bits=KVBits(4)``.

    Keys are quantised per channel over group_size tokens, values per token over group_size channels (of as many as
    divide them, at most). A group is stored as integers q of 0 .. 2^bits - 1, with its least number m and a step s:
    m + s * q. Each head's newest residual_tokens pairs stay as they are, and so do those that make no whole group.

    Source: Liu et al. 2024, KIVI, arXiv:2402.02750.

    Args:
        bits: 8, 4 or 2.
        group_size: numbers that share a step, at least 1.
        residual_tokens: newest pairs of each head that are stored in full precision, at least 0.

    Raises:
        CacheError: bits not in {8, 4, 2}, a group_size below 1 or residual_tokens below 0.
    """

    names: ClassVar[Mapping[bool, str]] = {False: "quantised", True: "quantised ragged"}

    bits: int
    group_size: int = 64
    residual_tokens: int = 128

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise CacheError(
                "kv_bits must be 8, 4 or 2, a name such as 'k8v4' (RotatedBits: keys in 8 bits, values in 4), 'mixed' "
                f"(Mixed, within a budget in bytes), or a codec, got {self.bits!r}."
            )
        for name, least in (("group_size", 1), ("residual_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CacheError(f"KVBits: {name} must be an integer of at least {least}, got {value!r}.")

    @classmethod
    def of(cls, given: int | KVBits | None) -> KVBits | None:
        """The KVBits of a number of bits."""
        return given if given is None or isinstance(given, KVBits) else cls(given)

    @property
    def block_tokens(self) -> int:  # type: ignore[override]
        return self.group_size

    @property
    def exact_tokens(self) -> int:  # type: ignore[override]
        return self.residual_tokens

    def channels(self, n_channels: int) -> int:
        """How many of ``n_channels`` channels of a value share a step."""
        fitting = [n for n in range(8, self.group_size + 1) if n_channels % n == 0]
        return fitting[-1] if fitting else n_channels

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        sides = {
            "keys": Codes.of(keys, self.bits, None),
            "values": Codes.of(values, self.bits, self.channels(values.shape[-1])),
        }
        return {
            f"{side}.{name}": getattr(codes, name)
            for side, codes in sides.items()
            for name in ("packed", "scale", "zero")
        }

    def decode_keys(self, blocks: Blocks, out: Tensor) -> None:
        self._codes(blocks, "keys").write(out)

    def decode_values(self, blocks: Blocks, out: Tensor) -> None:
        self._codes(blocks, "values").write(out)

    def _codes(self, blocks: Blocks, side: str) -> Codes:
        return Codes(blocks[f"{side}.packed"], blocks[f"{side}.scale"], blocks[f"{side}.zero"], self.bits)


def storage_of(
    kv_bits: int | str | Codec | None,
    storage: object = None,
    *,
    group_size: int | None = None,
    newest: int | None = None,
) -> Codec | None:
    """The codec of ``kv_bits=`` or ``storage=``: 8, 4, 2 are KVBits, ``"k8v4"`` and its like RotatedBits; ``"mixed"``.

    Args:
        group_size: of KVBits; None, or as many numbers as KVBits has by itself: not said.
        newest: pairs of each head that stay as they are; None, or as many as in KVBits: as many as by themselves.

    Raises:
        CacheError: both, something that is no codec, no such bits, or groups in RotatedBits, which have none.
    """
    if storage is not None:
        if kv_bits is not None or not isinstance(storage, Codec):
            raise CacheError(f"storage must be a coldpress.Codec, and no kv_bits beside it; got {storage!r}.")
        return check_codec(storage)
    group_size = None if group_size == KVBits.group_size else group_size
    newest = None if newest == KVBits.residual_tokens else newest
    if kv_bits is None or isinstance(kv_bits, Codec):
        return kv_bits if kv_bits is None else check_codec(kv_bits)
    if isinstance(kv_bits, str) and kv_bits in (*ROTATED, MIXED):
        if group_size is not None:
            raise CacheError(f"{kv_bits} encodes pairs one by one, so there are no groups: leave their size out.")
        own: RotatedBits | Mixed = Mixed() if kv_bits == MIXED else RotatedBits(int(kv_bits[1]), int(kv_bits[3]))
        return own if newest is None else replace(own, newest=newest)
    given = {name: n for name, n in (("group_size", group_size), ("residual_tokens", newest)) if n is not None}
    return KVBits(kv_bits, **given)  # type: ignore[arg-type]  # which says what it takes


def bits_name(codec: Codec | None) -> int | str | None:
    """What ``kv_bits=`` stands for a codec: 8, 4, 2, ``"k8v4"`` and its like or ``"mixed"``; the class of others."""
    if codec is None or isinstance(codec, KVBits):
        return None if codec is None else codec.bits
    if isinstance(codec, Mixed):
        return MIXED
    return f"k{codec.key_bits}v{codec.value_bits}" if isinstance(codec, RotatedBits) else type(codec).__name__


def bits_from(said: Mapping[str, Any]) -> Codec:
    """The codec of its parameters, as a record or a file has them."""
    if "candidates" in said:
        return Mixed(**said)
    return RotatedBits(**said) if "key_bits" in said else KVBits(**said)
