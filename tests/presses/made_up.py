"""Artefacts for tiny models that nobody calibrates: random numbers of the right shape, for tests that ask for them."""

from __future__ import annotations

import pytest
import torch

from coldpress.io.artefacts import Artefact, Shape
from coldpress.learned.calibrated import Calibrated


def made_up(press: Calibrated, shape: Shape, why: str = "") -> Artefact:
    """The same numbers for every model of one shape."""
    tensors = {}
    for i, (name, sizes) in enumerate(press.layer_shapes(shape).items()):
        generator = torch.Generator().manual_seed(i)
        tensor = torch.randn(shape.n_layers, *(size or 1 for size in sizes), generator=generator)
        if name == "covariance":
            tensor = tensor @ tensor.transpose(-1, -2) / len(tensor)
        if name in ("gates", "removed"):
            tensor = tensor.sigmoid()
        tensors[name] = torch.zeros_like(tensor) if name == "thresholds" else tensor
    return Artefact(press.artefact, tensors)


@pytest.fixture
def given_artefacts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated presses that find no artefact get a made-up one, instead of saying that it is missing."""
    monkeypatch.setattr(Calibrated, "missing", made_up)
