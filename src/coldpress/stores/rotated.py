"""RotatedBits: pairs in few bits, one by one, in channels that a Hadamard matrix has mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.errors import CacheError
from coldpress.stores.codec import Blocks, TokenCodec
from coldpress.stores.hadamard import rotated
from coldpress.stores.kernels import KeyProducts, value_sums, verdict
from coldpress.stores.rows import key_codes, least_and_step, packed_codes, rows_of, value_parts
from coldpress.stores.segments import Segments

__all__ = ["RotatedBits"]

_BITS = (8, 4, 2)
_ROWS = 1 << 15  # that are rotated at once


@dataclass(frozen=True)
class RotatedBits(TokenCodec):
    """Each pair in few bits by itself: ``PressedCache(press, storage=RotatedBits(8, 4))``.

    The key of a token, after the rotary embedding, and its value are each multiplied with a normalised Hadamard matrix
    H, which spreads what single channels have over all of them, and stored as integers q of 0 .. 2^bits - 1 with a
    least number m and a step s of their own: m + s * q, off by s / 2 at most. H is symmetric and its own inverse, so
    the products of rotated queries and keys are those of the queries and keys, and H undoes a sum of rotated values.
    Where the number of channels is no power of two, H has blocks (:func:`coldpress.stores.hadamard.hadamard`).

    No pair depends on another one, so they are appended, evicted while decoding and moved between rows as they are,
    and none is quantised twice. A decoding step on the CPU multiplies with the codes and adds up rows of codes where
    torch has kernels for it that are faster here (``stores/kernels.py``), and else unpacks one head at a time; anything
    else sees a copy of one layer at a time.

    Source: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 4; per token as the values of Liu et al. 2024, KIVI,
    arXiv:2402.02750. Differs from QuaRot: no weights are rotated, keys and values of all channels share a step, and the
    first and newest tokens stay as they are.

    Args:
        key_bits, value_bits: 8, 4 or 2 each. Step and least number take 32 bits more of a row, of 8-bit values 64.
        sinks: first pairs of each head that stay as they are, at least 0.
        newest: newest pairs of each head that stay as they are, at least 0; up to 63 older ones wait for others.

    Raises:
        CacheError: bits not in {8, 4, 2}, or sinks or newest below 0; at a call, a key or value that has no row.
    """

    key_bits: int = 8
    value_bits: int = 4
    sinks: int = 4
    newest: int = 128

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if type(bits) is not int or bits not in _BITS:
                raise CacheError(f"RotatedBits: {name} must be 8, 4 or 2, got {bits!r}.")
        for name in ("sinks", "newest"):
            n = getattr(self, name)
            if type(n) is not int or n < 0:
                raise CacheError(f"RotatedBits: {name} must be an integer of at least 0, got {n!r}.")

    @property
    def exact_tokens(self) -> int:  # type: ignore[override]
        return self.newest

    @property
    def first_tokens(self) -> int:  # type: ignore[override]
        return self.sinks

    @torch.autocast("cpu", enabled=False)  # which cannot join rows in float16
    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """Codes, steps and least numbers of ``keys [N, 1, D]``, rows of ``values [N, 1, Dv]`` (``stores/rows.py``)."""
        parts = []
        for key, value in zip(keys[:, 0].split(_ROWS), values[:, 0].split(_ROWS), strict=True):
            codes, least, step = least_and_step(rotated(key), self.key_bits, torch.float16)
            if self.key_bits == 8:
                codes = codes ^ 128  # int8 codes less 128
            rows = rows_of(rotated(value), self.value_bits)
            parts.append((packed_codes(codes, self.key_bits), step, least, rows))
        names = ("keys.codes", "keys.step", "keys.least", "values.rows")
        return {name: torch.cat(own)[:, None] for name, own in zip(names, zip(*parts, strict=True), strict=True)}

    def decode_keys(self, blocks: Blocks, out: Tensor) -> None:
        codes = key_codes(blocks["keys.codes"].flatten(0, -2), self.key_bits, out.shape[-1])
        step, least = (blocks[name].flatten().float() for name in ("keys.step", "keys.least"))
        if self.key_bits == 8:
            least = least + 128 * step
        out.copy_(rotated(codes * step[:, None] + least[:, None]).view(out.shape))

    def decode_values(self, blocks: Blocks, out: Tensor) -> None:
        codes, step, least = value_parts(blocks["values.rows"].flatten(0, -2), self.value_bits, out.shape[-1])
        out.copy_(rotated(codes * step[:, None] + least[:, None]).view(out.shape))

    def logits(self, query: Tensor, held: Segments) -> list[Tensor]:
        query = rotated(query)
        products, total = KeyProducts(query, self.key_bits), query.sum(-1, keepdim=True)  # [S, G, 1]
        steps, leasts = (held.buffer(name).float() for name in ("keys.step", "keys.least"))
        if self.key_bits == 8:
            leasts.add_(steps, alpha=128)
        if held.is_even:  # all segments at once
            steps, leasts = (part.view(len(query), 1, -1)[..., : held.counts[0]] for part in (steps, leasts))
            found = products.of(slice(None), held.even("keys.codes"))
            return list(found.mul_(steps).addcmul_(total, leasts))
        logits = []
        for i, span in enumerate(held.spans()):
            own = products.of(slice(i, i + 1), held.segment("keys.codes", i)[None])[0]
            logits.append(own.mul_(steps[span]).addcmul_(total[i], leasts[span]))
        return logits

    def sums(self, weights: Sequence[Tensor], held: Segments, dim: int) -> Tensor:
        return rotated(value_sums(weights, held.buffer("values.rows"), held.places(), self.value_bits, dim))

    def try_kernels(self) -> None:
        """Find out now which way its codes are read, so that no decoding step has to."""
        verdict("keys", self.key_bits)
        verdict("values", self.value_bits)
