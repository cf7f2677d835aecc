"""Tokens picked out of keys and values, and how many to work on at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["at_once", "column_at", "pick"]


_CPU_ELEMENTS = 1 << 18  # numbers worked on at once on a CPU: 1 MiB in float32, which stays in its cache


_DEVICE_ELEMENTS = 1 << 24  # the same on devices where every step costs a launch (64 MiB)


def at_once(device: torch.device, n_numbers: int) -> int:
    """How many tokens to work on at once, at least 1, when each of them takes ``n_numbers`` numbers."""
    return max(1, (_CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS) // max(1, n_numbers))


def pick(states: Tensor, at: Tensor) -> Tensor:
    """Tokens ``at`` ``[B, H, n]`` of ``[B, H, T, D]``: ``[B, H, n, D]``.

    index_select copies a token's D numbers at once; gather and indexing go number by number, which takes five times as
    long on a CPU. It wants rows of one matrix, so ``states``, whatever the order of its heads and tokens in memory,
    is seen as one whose rows begin at every multiple of what all its strides have in common.
    """
    if states.stride(3) != 1:
        states = states.contiguous()
    strides = states.stride()[:3]
    step = math.gcd(*(stride for stride, n in zip(strides, states.shape, strict=False) if n > 1)) or 1
    last = sum(stride * max(0, n - 1) for stride, n in zip(strides, states.shape, strict=False))
    index = at * (strides[2] // step)
    for dim in (0, 1):
        shape = [-1 if i == dim else 1 for i in range(3)]
        index = index + (torch.arange(states.shape[dim], device=at.device) * (strides[dim] // step)).view(shape)
    matrix = states.as_strided((last // step + 1, states.shape[3]), (step, 1))
    return matrix.index_select(0, index.flatten()).view(*at.shape, states.shape[3])


def column_at(column: Tensor, at: Tensor) -> Tensor:
    """Entries ``at``, int64 ``[B, H, n]``, of a column ``[B, H, T, ...]``: ``[B, H, n, ...]``."""
    index = at.view(*at.shape, *(1 for _ in column.shape[3:])).expand(*at.shape, *column.shape[3:])
    return column.gather(2, index)
