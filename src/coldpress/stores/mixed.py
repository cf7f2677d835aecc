"""Mixed: several ways to store pairs in few bits, of which each layer takes the one that costs its output least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coldpress.errors import CacheError
from coldpress.stores.codec import Blocks, TokenCodec
from coldpress.stores.rotated import RotatedBits

__all__ = ["Mixed"]


@dataclass(frozen=True)
class Mixed(TokenCodec):
    """A budget in bytes, spent over pairs and bits: ``PressedCache(SnapKVPress(budget_bytes=N), storage=Mixed())``.

    Fewer bits leave room for more pairs. When a prompt has been read, each layer is stored in every candidate, with as
    many pairs as its part of the budget has room for in these bits, chosen by the press for that number, and encoded.
    It takes the candidate with the smallest error of its output: with o[q] the attention output of the last 64
    queries over all pairs of the layer, and p[q] that over what is stored, the sum of |p[q] - o[q]|^2 over the sum of
    |o[q]|^2, over all heads and rows of the batch. Where the press chooses among the pairs of all layers at once
    (SampledDefensiveKVPress, KVzipPress), the whole cache takes the candidate with the smallest sum of these errors
    over its layers; a press that reads the text again does so for each candidate. From then on the cache is one of
    RotatedBits; :meth:`coldpress.PressedCache.codecs` says which ones were taken. Layers that no budget counts (those
    with a sliding window beside others) are stored in the first candidate.

    Source: our own; bits as in RotatedBits.

    Args:
        candidates: pairs of key_bits and value_bits, 8, 4 or 2 each; among equal errors the earlier one is taken.
        sinks, newest: first and newest pairs of each head that stay as they are, as in RotatedBits.

    Raises:
        CacheError: no candidates, one of them twice, or what RotatedBits refuses; in a cache, a press without
            budget_bytes, one that evicts while decoding, changes keys or has a plan of its own for the layers
            (PyramidKVPress), chunk_tokens, or positions="rerotate".
    """

    chooses: ClassVar[bool] = True

    candidates: Sequence[tuple[int, int]] = ((8, 4), (4, 4), (4, 2))
    sinks: int = 4
    newest: int = 32

    def __post_init__(self) -> None:
        try:
            given = tuple((keys, values) for keys, values in self.candidates)
        except (TypeError, ValueError):
            given = ()
        if not given or len(set(given)) < len(given):
            raise CacheError(
                "Mixed: candidates must be different pairs of bits for keys and values, such as ((8, 4), (4, 2)), got "
                f"{self.candidates!r}."
            )
        object.__setattr__(self, "candidates", given)
        assert self.codecs  # RotatedBits says what it takes

    @property
    def codecs(self) -> tuple[RotatedBits, ...]:
        return tuple(RotatedBits(*bits, self.sinks, self.newest) for bits in self.candidates)

    @property
    def exact_tokens(self) -> int:  # type: ignore[override]
        return self.newest

    @property
    def first_tokens(self) -> int:  # type: ignore[override]
        return self.sinks

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """As the first candidate does."""
        return self.codecs[0].encode(keys, values)

    def decode_keys(self, blocks: Blocks, out: Tensor) -> None:
        self.codecs[0].decode_keys(blocks, out)

    def decode_values(self, blocks: Blocks, out: Tensor) -> None:
        self.codecs[0].decode_values(blocks, out)
