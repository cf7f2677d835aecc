"""Kernels: products with packed rows as they are stored, and sums of rows of codes, by operations of torch.

Each is tried once with small integers, of which the result is known. Where one is there, gives the right numbers and
is faster than unpacking (``stores/kernels.py``), a decoding step uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CHANNELS", "Digits", "bag_sums", "integer_products", "products_are_right", "sums_are_right"]

CHANNELS = 32  # a multiple of which integers are multiplied in
_Places = tuple[tuple[int, int], ...]  # first row and number of rows of each segment


class Digits(NamedTuple):
    """Queries as they are, and as integers: step * (first digit + second digit / 254).

    So a query is off by max |q| / 127 / 508 in each channel at most, and a product by that times the sum of its codes.

    Attributes:
        step: float32 ``[S, G, 1]``.
        numbers: int8 ``[S, 2 * G, D]``, the first digits of all queries of a segment and then the second ones.
    """

    step: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, query: Tensor) -> Digits:
        """Those of ``query [S, G, D]``, float32."""
        step = query.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny) / 127
        first = (query / step).round_()
        second = ((query / step - first) * 254).round_()
        return cls(step, torch.cat([first, second], dim=1).to(torch.int8))

    def of_segments(self, which: slice) -> Digits:
        """Those of the queries of some segments."""
        return Digits(self.step[which], self.numbers[which])


def integer_products(digits: Digits, codes: Tensor, bits: int) -> Tensor:
    """Products of queries with the codes of segments of one length: float32 ``[S, G, n]``.

    Args:
        digits: of the queries, of a multiple of CHANNELS channels.
        codes: uint8 ``[S, n, W]``; of 8 bits, less 128 as int8.
        bits: of a code, 8 or 4.
    """
    step, numbers = digits
    found = numbers.new_empty(*numbers.shape[:2], codes.shape[1], dtype=torch.int32)
    if bits == 8:
        for own, code, out in zip(numbers, codes.view(torch.int8), found, strict=True):
            torch._int_mm(own, code.T, out=out)
    else:
        even, odd = (numbers[..., i::2].contiguous() for i in (0, 1))
        for first, second, code, out in zip(even, odd, codes, found, strict=True):
            torch._int_mm(first, (code & 15).view(torch.int8).T, out=out)
            out += torch._int_mm(second, (code >> 4).view(torch.int8).T)
    high, low = found.float().chunk(2, dim=1)
    return torch.add(high, low, alpha=1 / 254).mul_(step)


def bag_sums(weights: Tensor, rows: Tensor, places: _Places, bits: int) -> Tensor:
    """Sums of rows with weights: float32 ``[S, G, columns]``, of as many columns as the codes of a row's bytes.

    Args:
        weights: float32 ``[G, N]``, N rows of all segments one after the other.
        rows: uint8 ``[rows, bytes]``: codes, a step and a least number, in the order that torch has them.
        places: where the rows of each segment are.
        bits: of a code, 8, 4 or 2.
    """
    at, starts = _bags(places)
    sums = [_OPERATIONS[bits](rows, at, starts, False, 0, False, own.contiguous(), None, False) for own in weights]
    return torch.stack(sums, dim=1)


@lru_cache(maxsize=16)  # the layers of a model ask for the same rows in turn, one for each length of a batch's rows
def _bags(places: _Places) -> tuple[Tensor, Tensor]:
    """The rows of all segments one after the other, and where each segment begins among them."""
    with torch.inference_mode(False):
        at = torch.cat([torch.arange(start, start + n, dtype=torch.int32) for start, n in places])
        starts = torch.tensor([0, *(n for _, n in places[:-1])], dtype=torch.int32).cumsum(0).int()
        return at, starts


_OPERATIONS: dict[int, Callable[..., Tensor]] = {
    8: lambda *given: torch.ops.quantized.embedding_bag_byte_rowwise_offsets(*given),
    4: lambda *given: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(*given),
    2: lambda *given: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets(*given),
}


def sums_are_right(bits: int) -> bool:
    """Try :func:`bag_sums` with rows whose codes, steps and least numbers are known."""
    kind = torch.float32 if bits == 8 else torch.float16
    codes = (torch.arange(7 * 16).view(7, 16) * 37 + 11) % 2**bits
    steps = torch.tensor([[0.5, -1.0], [0.25, 2.0], [1.0, 0.0], [2.0, 3.0], [0.125, -4.0], [1.0, 1.0], [4.0, -8.0]])
    per_byte = 8 // bits
    shifts = torch.arange(per_byte) * bits
    packed = (codes.view(7, -1, per_byte) << shifts).sum(-1).to(torch.uint8)
    rows = torch.cat([packed, steps.to(kind).view(torch.uint8)], dim=1)
    weights = torch.tensor([[1.0, -0.5, 2.0, 0.25, 1.0], [0.5, 3.0, -1.0, 1.0, 2.0]])
    numbers = codes * steps[:, :1] + steps[:, 1:]
    expected = torch.stack([weights[:, :2] @ numbers[:2], weights[:, 2:] @ numbers[4:]])
    try:
        found = bag_sums(weights, rows, ((0, 2), (4, 3)), bits)
    except (RuntimeError, AttributeError, NotImplementedError):  # this torch, or this processor, has no such operation
        return False
    return found.shape == expected.shape and bool((found - expected).abs().max() < 1e-4)


def products_are_right(bits: int) -> bool:
    """Try :func:`integer_products` with known integers, the largest ones among them."""
    if bits == 2:
        return False  # which it does not know
    numbers = (torch.arange(2 * 64).view(1, 2, 64) * 89 % 255 - 127).to(torch.int8)
    numbers[:, 0] = 127
    codes = (torch.arange(1500 * 8 * bits).view(1, 1500, 8 * bits) * 31 % 256).to(torch.uint8)
    codes[:, :2] = torch.tensor([[128], [127]])  # -128 and 127 as int8
    if bits == 8:
        whole = codes.view(torch.int8).float()
    else:
        whole = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float()
    high, low = (numbers.float() @ whole.transpose(1, 2)).chunk(2, dim=1)
    try:
        found = integer_products(Digits(torch.ones(1, 1, 1), numbers), codes, bits)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool(torch.equal(found, torch.add(high, low, alpha=1 / 254)))
