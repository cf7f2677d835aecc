"""Rows of numbers in few bits, a step and a least number to each: what one token has of one head."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from coldpress.errors import CacheError

__all__ = [
    "code_bytes",
    "key_codes",
    "least_and_step",
    "packed_codes",
    "row_bytes",
    "rows_of",
    "steps_type",
    "unpacked_codes",
    "value_parts",
]


def steps_type(bits: int) -> torch.dtype:
    """The type of a row's step and least number: what torch's sums over such rows expect."""
    return torch.float32 if bits == 8 else torch.float16


def code_bytes(n: int, bits: int) -> int:
    """Bytes of the codes of ``n`` numbers."""
    return -(-n * bits // 8)


def row_bytes(n: int, bits: int) -> int:
    """Bytes of a row of ``n`` numbers: its codes, step and least number."""
    return code_bytes(n, bits) + 2 * steps_type(bits).itemsize


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., D]`` of 0 .. 2^bits - 1, uint8, as bytes ``[..., ceil(D * bits / 8)]``.

    The first of the channels that share a byte has its lowest bits.
    """
    if bits == 8:
        return codes.contiguous()
    per_byte, n = 8 // bits, codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -n % per_byte)).unflatten(-1, (-1, per_byte))
    packed = codes[..., 0].contiguous()
    for i in range(1, per_byte):
        packed |= codes[..., i] << (i * bits)
    return packed


def unpacked_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes of each row of bytes, float32 ``[..., n]``."""
    if bits == 8:
        return packed.float()
    if packed.device.type == "cpu" and packed.numel() and _can_unpack(bits):
        return _unpacked_rows(packed, bits)[..., :n]
    per_byte = 8 // bits
    out = torch.empty(*packed.shape, per_byte, device=packed.device)
    for i in range(per_byte):
        out[..., i] = (packed >> (i * bits)) & (2**bits - 1)
    return out.flatten(-2)[..., :n]


def _unpacked_rows(packed: Tensor, bits: int) -> Tensor:
    """As :func:`unpacked_codes`, by torch's operation on rows with steps; these are 1, and the least numbers 0."""
    steps = torch.tensor([1.0, 0.0], dtype=torch.float16).view(torch.uint8)
    rows = torch.cat([packed, steps.expand(*packed.shape[:-1], -1)], dim=-1)
    operations = torch.ops.quantized
    unpack = operations.embedding_bag_4bit_unpack if bits == 4 else operations.embedding_bag_2bit_unpack
    return unpack(rows.flatten(0, -2)).view(*packed.shape[:-1], -1)


@lru_cache(maxsize=2)
def _can_unpack(bits: int) -> bool:
    """Try the operation with codes that are known."""
    codes = torch.arange(48, dtype=torch.uint8).view(3, 16) % 2**bits
    try:
        return torch.equal(_unpacked_rows(packed_codes(codes, bits), bits), codes.float())
    except (RuntimeError, AttributeError, NotImplementedError):  # this torch, or this processor, has no such operation
        return False


def least_and_step(numbers: Tensor, bits: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of rows ``numbers [N, D]`` and what undoes them: a number is ``least + step * code``.

    The least number is rounded down and the step up, so that codes reach both ends and no number is off by more than
    half a step.

    Args:
        kind: of steps and least numbers, float16 or float32.

    Returns:
        Codes, uint8 ``[N, D]``; the least number and the step of each row, ``kind [N]``.

    Raises:
        CacheError: a number is beyond what ``kind`` holds.
    """
    numbers, most = numbers.float(), 2**bits - 1
    low, high = numbers.aminmax(dim=-1)
    least = low.to(kind)
    least = torch.where(least.float() > low, least.nextafter(torch.full_like(least, -torch.inf)), least)
    wanted = (high - least.float()) / most
    step = wanted.to(kind)
    step = torch.where(step.float() < wanted, step.nextafter(torch.full_like(step, torch.inf)), step)
    if not bool((least.isfinite() & step.isfinite()).all()):
        raise CacheError(
            f"A key or value has numbers from {float(low.min()):.3g} to {float(high.max()):.3g}, which {bits} bits "
            f"with steps in {str(kind).removeprefix('torch.')} cannot hold; store the pairs as they are."
        )
    wide = step.float()[..., None]
    codes = ((numbers - least.float()[..., None]) / wide.where(wide > 0, 1.0)).round_().clamp_(0, most)
    return codes.to(torch.uint8), least, step


def rows_of(numbers: Tensor, bits: int) -> Tensor:
    """``numbers [N, D]`` as rows of bytes: codes, then the step and the least number, uint8 ``[N, row_bytes]``."""
    codes, least, step = least_and_step(numbers, bits, steps_type(bits))
    steps = torch.stack([step, least], dim=-1).view(torch.uint8)
    return torch.cat([packed_codes(codes, bits), steps], dim=-1)


def key_codes(codes: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of rows of keys as numbers, float32 ``[..., dim]``; of 8 bits, less 128."""
    return codes.view(torch.int8).float() if bits == 8 else unpacked_codes(codes, bits, dim)


def value_parts(rows: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, float32 ``[n, dim]``, steps and least numbers, float32 ``[n]``, of rows of values."""
    n = code_bytes(dim, bits)
    steps = rows[:, n:].contiguous().view(steps_type(bits)).float()
    return unpacked_codes(rows[:, :n], bits, dim), steps[:, 0], steps[:, 1]
