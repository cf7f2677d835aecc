"""Every press on a pretended device: nothing that it makes is left on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tests.contract.architectures import tokens
from tests.devices.device import Device
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, block, small_press

from coldpress import PressedCache, press_names
from coldpress.architecture.cache_argument import cache_argument

pytestmark = pytest.mark.usefixtures("given_artefacts", "given_weights")
NAMES = sorted({*WITH_RATIO, *IN_BLOCK, *OTHERS, *press_names(at_prefill=False)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thinned(12)
def test_a_press_stays_on_the_device(name: str, device: Device) -> None:
    """A prompt, and as many tokens after it as a schedule waits for."""
    model, press = device.models("llama")[1], small_press(name, "llama")
    cache, ids = PressedCache(None if name in IN_BLOCK else press), device.put(tokens(1, 45))
    with torch.no_grad(), block(model, press) if name in IN_BLOCK else nullcontext():
        model(ids, **cache_argument(cache))
    with torch.no_grad():
        for token in device.put(tokens(1, 6)).split(1, -1):
            assert model(token, **cache_argument(cache)).logits.is_cuda
    assert all(tensor.is_cuda for layer in cache.pressed_layers() for tensor in layer.tensors())
