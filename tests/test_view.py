"""Picking tokens of heads out of tensors, however these lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coldpress.core.pick import pick

B, H, T, D, N = 2, 3, 10, 4, 6
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of B * H * T * 3 * D numbers, as [B, H, T, D]
    "heads first": lambda x: x[: B * H * T * D].view(B, H, T, D),
    "tokens first": lambda x: x[: B * H * T * D].view(B, T, H, D).transpose(1, 2),
    "part of a fused projection": lambda x: x.view(B, T, H, 3, D).transpose(1, 2)[..., 1, :],
    "start of a buffer": lambda x: x.view(B, H, 3 * T, D)[:, :, :T],
    "one row and head": lambda x: x.view(B, H, 3 * T, D)[1:, 2:, :T],
    "one token": lambda x: x.view(B, H, 3 * T, D)[:, :, 1:2],
    "dimensions first": lambda x: x[: B * H * T * D].view(B, H, D, T).transpose(2, 3),
    "heads that share": lambda x: x[: B * T * D].view(B, 1, T, D).expand(B, H, T, D),
    "nothing": lambda x: x[:0].view(B, H, 0, D),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pick(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(B * H * T * 3 * D, generator=generator, requires_grad=True)
    states = LAYOUTS[layout](numbers)
    n_batch, n_heads, n_tokens, _ = states.shape
    at = torch.randint(max(1, n_tokens), (n_batch, n_heads, N if n_tokens else 0), generator=generator)
    picked = pick(states, at)
    assert picked.shape == (*at.shape, D)
    slow = [[[states[b, h, t] for t in at[b, h].tolist()] for h in range(n_heads)] for b in range(n_batch)]
    for b in range(n_batch):
        for h in range(n_heads):
            for i, row in enumerate(slow[b][h]):
                assert torch.equal(picked[b, h, i], row)
    if not n_tokens:
        return
    weights = torch.randn(picked.shape, generator=generator)
    (found,) = torch.autograd.grad((picked * weights).sum(), numbers)
    rows = torch.stack([torch.stack([torch.stack(head) for head in row]) for row in slow])
    (expected,) = torch.autograd.grad((rows * weights).sum(), numbers)
    torch.testing.assert_close(found, expected)
