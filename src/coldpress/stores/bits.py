"""KVBits: keys and values in few bits, keys per channel and values per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coldpress.errors import CacheError
from coldpress.stores.codec import Blocks, Codec, check_codec
from coldpress.stores.codes import Codes

__all__ = ["BITS", "KVBits", "storage_of"]

BITS = (8, 4, 2)


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
            raise CacheError(f"kv_bits must be 8, 4 or 2, or a KVBits of these, got {self.bits!r}.")
        for name, least in (("group_size", 1), ("residual_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CacheError(f"KVBits: {name} must be an integer of at least {least}, got {value!r}.")

    @classmethod
    def of(cls, given: int | KVBits | None) -> KVBits | None:
        """The KVBits of ``kv_bits=``, which may be the number of bits alone."""
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


def storage_of(kv_bits: int | Codec | None, storage: object = None) -> Codec | None:
    """The codec of ``kv_bits=`` or ``storage=``.

    Raises:
        CacheError: both, or something that is no codec.
    """
    if storage is None:
        return check_codec(kv_bits) if isinstance(kv_bits, Codec) else KVBits.of(kv_bits)
    if kv_bits is not None or not isinstance(storage, Codec):
        raise CacheError(f"storage must be a coldpress.Codec, and no kv_bits beside it; got {storage!r}.")
    return check_codec(storage)
