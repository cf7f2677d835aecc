"""The pretended device refuses what a real one does, and counts what makes the host wait."""

from __future__ import annotations

import pytest
import torch
from tests.pretended import CUDA, PretendedCuda, moved
from torch.nn.functional import embedding, linear


def test_tensors_know_where_they_are() -> None:
    with PretendedCuda():
        made = torch.arange(6, device="cuda").view(2, 3)
        for tensor in (made, made + 1, made[0], made.float().softmax(-1), made.new_zeros(3), torch.zeros_like(made)):
            assert tensor.device == CUDA and tensor.is_cuda
        assert torch.zeros(2).device.type == "cpu" and made.cpu().device.type == "cpu"
        assert torch.zeros(2).to(made.device).is_cuda and torch.zeros(2).to(made).is_cuda
        assert all(part.is_cuda for part in made.split(1)) and made.max(0).values.is_cuda
        here = torch.zeros(2)
        assert here.to("cuda").is_cuda and not here.is_cuda
        here[0] = made[0, 0]  # one number goes anywhere
        assert not here.is_cuda


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + torch.arange(3),
        lambda x: torch.cat([x, torch.zeros(3)]),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.masked_fill(torch.tensor([True, False, True]), 0.0),
        lambda x: torch.where(x > 0, torch.zeros(3), x),
        lambda x: linear(x, torch.ones(2, 3)),
        lambda x: embedding(torch.tensor([1]), x[:, None]),
        lambda x: torch.zeros(3).index_copy_(0, torch.tensor([0]), x[:1]),
        lambda x: torch.arange(3)[x.long()],
        lambda x: x.numpy(),
    ],
)
def test_two_devices_are_refused(call: object) -> None:
    with PretendedCuda(), pytest.raises((RuntimeError, TypeError), match=r"same device|cuda:7 device type"):
        call(torch.ones(3, device="cuda"))  # type: ignore[operator]


def test_what_waits_is_counted() -> None:
    with PretendedCuda() as device:
        x = moved(torch.ones(3))
        assert not device.waits and not device.uploads
        for wait in (x.tolist, x[0].item, lambda: bool(x.all()), lambda: x[x > 0], x.nonzero, x.cpu):
            device.waits.clear()
            wait()
            assert sum(device.waits.values()) == 1
        torch.tensor([1], device="cuda")
        torch.ones(3).to(x.device)
        assert sum(device.uploads.values()) == 2
