"""Every store on a device: it is filled there, and goes on as on the CPU, to which a file takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tokens
from tests.devices.device import Device, close, decoded, filled
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    KVBits,
    PressedCache,
    RotatedBits,
    SnapKVPress,
    ThinKPress,
)
from coldpress.architecture.cache_argument import cache_argument

N = 60
SNAP = SnapKVPress(0.5, window_size=8)
HEADS = AdaKVPress(SNAP)
GOES_ON = DecodingPress(KnormPress(), compression_interval=5, target_size=24)


@dataclass(frozen=True)
class Kind:
    """A kind of store; ``tolerance`` where codes may be rounded otherwise on another device."""

    press: BasePress | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 5e-4


def bits(*given: int) -> dict[str, Any]:
    return {"storage": RotatedBits(*given, sinks=2, newest=8)}


CODES = 5e-3

KINDS = {
    "dense": Kind(),
    "dense, pressed": Kind(SNAP),
    "ragged": Kind(HEADS),
    "thin": Kind(ThinKPress(0.5, 8)),
    "kivi 8": Kind(SNAP, {"kv_bits": KVBits(8, 8, 8)}, CODES),
    "kivi 4": Kind(None, {"kv_bits": KVBits(4, 8, 8)}, CODES),
    "kivi 2, ragged": Kind(HEADS, {"kv_bits": KVBits(2, 8, 8)}, CODES),
    "k8v8": Kind(None, bits(8, 8), CODES),
    "k8v4": Kind(SNAP, bits(8, 4), CODES),
    "k4v4, ragged": Kind(HEADS, bits(4, 4), CODES),
    "dense, goes on": Kind(GOES_ON),
    "ragged, goes on": Kind(DecodingPress(AdaKVPress(KnormPress()), compression_interval=5, target_size=24)),
    "k8v4, goes on": Kind(GOES_ON, bits(8, 4), CODES),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.thinned(5)
def test_a_store_goes_on_as_on_the_cpu(name: str, device: Device, tmp_path: Path) -> None:
    """Appended to, encoded, evicted from, forked, cropped, saved and loaded: the same tokens, and the same logits."""
    kind = KINDS[name]
    here, there = device.models("llama")
    own = filled(there, kind.press, device.put(tokens(1, N)), **kind.options)
    assert {tensor.device.type for layer in own.pressed_layers() for tensor in layer.tensors()} == {"cuda"}
    own.save(tmp_path / "cache.safetensors", there)
    twin, back = (PressedCache.load(tmp_path / "cache.safetensors", model) for model in (here, there))
    fork = own.fork()
    expected = decoded(here, twin, 12)
    close(decoded(there, own, 12), expected, kind.tolerance)
    close(decoded(there, back, 12), expected, kind.tolerance)
    if kind.press is None or not kind.press.evicts_while_decoding:
        for cache in (own, twin):
            cache.crop(-3)
    close(decoded(there, own, 3), decoded(here, twin, 3), kind.tolerance)
    close(decoded(there, fork, 12), expected, kind.tolerance)
    assert own.stored_lengths() == twin.stored_lengths()
    assert all(torch.equal(own.positions(i).cpu(), twin.positions(i)) for i in range(2))


@pytest.mark.parametrize("name", ["dense, pressed", "ragged", "kivi 4", "k8v4", "k4v4, ragged"])
@pytest.mark.thinned(3)
def test_rows_with_padding(name: str, device: Device, tmp_path: Path) -> None:
    """Rows of different lengths, which are then repeated and change places, as those of beams do."""
    kind = KINDS[name]
    here, there = device.models("llama")
    mask = torch.ones(2, N, dtype=torch.long)
    mask[0, :20] = 0
    own = PressedCache(kind.press, **kind.options)
    with torch.no_grad():
        there(device.put(tokens(2, N)), attention_mask=device.put(mask), **cache_argument(own))
    own.save(tmp_path / "cache.safetensors", there, attention_mask=mask)
    twin = PressedCache.load(tmp_path / "cache.safetensors", here)
    logits = []
    for model, cache in ((there, own), (here, twin)):
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 0, 3, 1]).to(model.device))
        logits.append(with_mask(model, cache, mask[[1, 0, 1, 0]]))
    close(*logits, kind.tolerance)


def with_mask(model: Any, cache: PressedCache, mask: Tensor) -> Tensor:
    """Logits of four tokens after rows that are padded."""
    found = []
    for i, token in enumerate(tokens(4, 4, seed=1).split(1, -1), 1):
        longer = torch.nn.functional.pad(mask, (0, i), value=1)
        at = (longer.sum(-1, keepdim=True) - 1).to(model.device)
        given = {"attention_mask": longer.to(model.device), "position_ids": at}
        with torch.no_grad():
            found.append(model(token.to(model.device), **given, **cache_argument(cache)).logits.cpu())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["dense, pressed", "ragged", "kivi 4", "k8v4"])
@pytest.mark.thinned(4)
def test_what_is_generated(name: str, device: Device) -> None:
    kind = KINDS[name]
    here, there = device.models("llama")
    prompt, options = tokens(1, N), {"max_new_tokens": 12, "do_sample": False}
    texts = []
    for model, ids in ((here, prompt), (there, device.put(prompt))):
        cache = PressedCache(kind.press, **kind.options)
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), **options).cpu())
    assert torch.equal(*texts)


def test_a_model_on_two_devices(device: Device) -> None:
    """Layers of a model on the device and on the CPU, as device_map= places them; each layer's pairs are beside it."""
    here, split = device.models("llama")
    split = split.cpu() if device.pretended is None else device.models("llama")[0]
    place(split, device)
    for press, options, tolerance in ((HEADS, {}, 5e-4), (SNAP, bits(8, 4), CODES)):
        own, twin = (filled(model, press, tokens(1, N), **options) for model in (split, here))
        kinds = [layer.slots.filled.device.type for layer in own.pressed_layers()]
        assert kinds == ["cuda", "cpu"]
        assert own.stored_lengths() == twin.stored_lengths()
        close(decoded(split, own, 4), decoded(here, twin, 4), tolerance)


def place(model: Any, device: Device) -> None:
    """The first layer on the device, all else on the CPU."""
    if device.pretended is None:
        accelerate = pytest.importorskip("accelerate")
        names = {"model.embed_tokens": "cpu", "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": "cpu"}
        rest = {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(model, names | rest, main_device="cpu", force_hooks=True)
        return

    def to(where: str) -> Any:
        def move(module: Any, args: Any, kwargs: Any) -> Any:
            return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to(where), (args, kwargs))

        return move

    device.put(model.model.layers[0])
    for module, where in ((model.model.layers[0], device.name), (model.model.layers[1], "cpu")):
        module.register_forward_pre_hook(to(where), with_kwargs=True)
