"""Hadamard matrices: a rotation that spreads what one channel has over many."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["hadamard", "rotated"]


@lru_cache(maxsize=16)
def hadamard(n: int) -> Tensor:
    """A symmetric matrix H with ``H @ H = 1``: float32 ``[n, n]``.

    Sylvester's, ``H_2m = [[H_m, H_m], [H_m, -H_m]] / sqrt(2)``. It has a power of two of rows; for any other n, blocks
    of the powers of two that add up to n stand on the diagonal, the largest one first: 80 is 64 + 16, 96 is 64 + 32.

    Source: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 3.
    """
    blocks, size = [], 1 << n.bit_length()
    while size := size // 2:
        if n & size:
            block = torch.ones(1, 1)
            while block.shape[0] < size:
                block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
            blocks.append(block / size**0.5)
    with torch.inference_mode(False):
        return torch.block_diag(*blocks).clone()


def rotated(numbers: Tensor) -> Tensor:
    """``numbers [..., D]`` times :func:`hadamard`, in float32, autocast or not; twice is what there was before."""
    with torch.autocast(numbers.device.type, enabled=False):
        return numbers.float() @ _on(numbers.shape[-1], numbers.device)


@lru_cache(maxsize=16)
def _on(n: int, device: torch.device) -> Tensor:
    """The matrix on a device, where a decoding step asks for it again and again."""
    with torch.inference_mode(False):
        return hadamard(n).to(device)
