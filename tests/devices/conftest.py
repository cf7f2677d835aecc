"""The devices that a test of this folder runs on: a pretended one on every machine, and the GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from tests.devices.device import Device
from tests.pretended import PretendedCuda

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.filterwarnings("default")])  # torch has advice


@pytest.fixture(params=["pretended", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device beside the CPU; the whole test runs on it, and compares with the CPU."""
    with ExitStack() as stack:
        if request.param == "cuda":
            if not torch.cuda.is_available():
                pytest.skip("needs a CUDA device")
            yield Device("cuda", None)
        else:
            yield Device("cuda:7", stack.enter_context(PretendedCuda()))
