"""Device: where a test runs, real or pretended, and the same model on it and on the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from tests.contract.architectures import BY_NAME, tokens
from tests.pretended import PretendedCuda, moved
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import BasePress, PressedCache, use_coldpress
from coldpress.architecture.cache_argument import cache_argument

__all__ = ["Device", "close", "decoded", "filled"]


@dataclass
class Device:
    """A device beside the CPU.

    Attributes:
        name: as torch has it.
        pretended: what counts how often the host waits; None for a real device.
    """

    name: str
    pretended: PretendedCuda | None

    def put(self, value: Any) -> Any:
        """A tensor or a model on the device."""
        return moved(value) if self.pretended is not None else value.to(self.name)

    def models(self, name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The tiny model of an architecture on the CPU and, with the same weights, on the device."""
        here, there = BY_NAME[name].build(), BY_NAME[name].build()
        for model in (here, there):
            use_coldpress(model)
        return here, self.put(there)

    def counted(self) -> tuple[Counter[str], Counter[str]]:
        """How often the host has waited, and has copied to the device, since this was asked last."""
        assert self.pretended is not None
        found = self.pretended.waits, self.pretended.uploads
        self.pretended.waits, self.pretended.uploads = Counter(), Counter()
        return found


def filled(model: PreTrainedModel, press: BasePress | None, ids: Tensor, **options: Any) -> PressedCache:
    cache = PressedCache(press, **options)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    return cache


def decoded(model: PreTrainedModel, cache: PressedCache, n: int, rows: int = 1) -> Tensor:
    """Logits of n tokens, one at a time, on the CPU."""
    found = []
    with torch.no_grad():
        for token in tokens(rows, n, seed=1).split(1, -1):
            found.append(model(token.to(model.device), **cache_argument(cache)).logits.cpu())
    return torch.cat(found, dim=1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 5e-4) -> None:
    """As far as ``tolerance`` of the largest number, which is more than one."""
    torch.testing.assert_close(
        actual.cpu(), expected.cpu(), atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0
    )
