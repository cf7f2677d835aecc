"""Codes: blocks of numbers as integers of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    pass

__all__ = ["Codes"]


_BLOCK_ELEMENTS = 1 << 22  # of float32 copies in memory at once while pairs are quantised (16 MiB)


@dataclass(frozen=True, eq=False)
class Codes:
    """N blocks of ``[g, C]`` numbers as integers of few bits; immutable, so that forks may share them.

    Attributes:
        packed: uint8 ``[N, g, ceil(C * bits / 8)]``; of a byte, the lowest bits belong to the first channels.
        scale: the steps: ``[N, 1, C]``, each for the g tokens of a channel, or ``[N, g, C / size]``, each for ``size``
            channels of a token. bfloat16 where the numbers were float32: a step that is rounded up costs nothing else.
        zero: the least numbers, likewise, in the type that the numbers had: so they are exact.
        bits: of an integer.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, numbers: Tensor, bits: int, size: int | None) -> Codes:
        """Quantise ``numbers [N, g, C]`` over the tokens of each block or, with ``size``, over so many channels."""
        numbers = numbers.detach()
        n_each = max(1, _BLOCK_ELEMENTS // max(1, numbers[:1].numel()))
        parts = [_quantised(part, bits, size) for part in numbers.split(n_each)]
        packed, scale, zero = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(packed, scale, zero, bits)

    def write(self, out: Tensor) -> None:
        """Fill ``out [..., g, C]``, the N blocks in as many dimensions as it has before these two."""
        lead = out.shape[:-2]
        packed = self.packed.view(*lead, *self.packed.shape[1:])
        width = packed.shape[-1]
        for i in range(8 // self.bits):
            part = out[..., i * width : (i + 1) * width]
            own = packed[..., : part.shape[-1]] >> (i * self.bits) if i else packed[..., : part.shape[-1]]
            part.copy_(own if self.bits == 8 else own & (2**self.bits - 1))
        scale, zero = (each.view(*lead, *each.shape[1:]).to(out.dtype) for each in (self.scale, self.zero))
        if scale.shape[-2] == out.shape[-2] and scale.shape[-1] != out.shape[-1]:
            out = out.unflatten(-1, (scale.shape[-1], -1))
            scale, zero = scale[..., None], zero[..., None]
        torch.addcmul(zero, out, scale, out=out)

    def numbers(self, dtype: torch.dtype, n_channels: int) -> Tensor:
        """``[N, g, C]``: the numbers, decoded."""
        out = torch.empty(*self.packed.shape[:2], n_channels, dtype=dtype, device=self.packed.device)
        self.write(out)
        return out


def _quantised(numbers: Tensor, bits: int, size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed integers, steps and least numbers of ``numbers [N, g, C]``, for :class:`Codes`."""
    most = 2**bits - 1
    kind = torch.bfloat16 if numbers.dtype == torch.float32 else numbers.dtype
    groups = numbers.float() if size is None else numbers.float().unflatten(-1, (-1, size))
    dim = 1 if size is None else -1
    zero = groups.amin(dim, keepdim=True)
    step = (groups.amax(dim, keepdim=True) - zero) / most
    scale = (step * (1 + torch.finfo(kind).eps)).to(kind)  # rounded up, so that the largest number gets the last code
    step = scale.float()
    codes = ((groups - zero) / step.where(step > 0, 1.0)).round_().clamp_(0, most).to(torch.uint8)
    if size is not None:
        codes, scale, zero = codes.flatten(-2), scale[..., 0], zero[..., 0]
    per_byte = 8 // bits
    width = -(-numbers.shape[-1] // per_byte)
    codes = pad(codes, (0, per_byte * width - numbers.shape[-1]))
    packed = codes[..., :width].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        packed |= codes[..., i * width : (i + 1) * width] << (i * bits)
    return packed, scale, zero.to(numbers.dtype)
