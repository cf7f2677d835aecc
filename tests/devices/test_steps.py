"""A decoded token on a device: it is launched and not waited for; compiled, it is what it is outside the block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tests.contract.architectures import tokens
from tests.devices.device import Device, close, decoded, filled
from tests.devices.test_stores import HEADS, KINDS, SNAP, bits
from torch.nn.functional import pad

from coldpress import PressedCache, PyramidKVPress, compiled
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import CacheError
from coldpress.stores.parts import stays_in_place

KINDS_OF_ONE_ROW = {
    name: KINDS[name] for name in ("dense", "dense, pressed", "ragged", "thin", "kivi 4", "k8v4", "k4v4, ragged")
}


@pytest.mark.parametrize("name", KINDS_OF_ONE_ROW)
@pytest.mark.thinned(3)
def test_a_decoded_token_makes_the_host_wait_for_nothing(name: str, device: Device) -> None:
    """Of one row, where no pairs have to be encoded: no number is read back, and none is copied to the device."""
    model, kind = device.models("llama")[1], KINDS_OF_ONE_ROW[name]
    cache = filled(model, kind.press, device.put(tokens(1, 100)), **kind.options)
    one = device.put(tokens(1, 1))
    with torch.no_grad():
        for _ in range(2):  # which move to buffers with room
            model(one, **cache_argument(cache))
        with waiting_is_an_error(device):
            model(one, **cache_argument(cache))


@contextmanager
def waiting_is_an_error(device: Device) -> Iterator[None]:
    if device.pretended is None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        device.counted()
        yield
        assert [dict(found) for found in device.counted()] == [{}, {}]


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["dense", "dense, pressed", "ragged", "k8v4"])
def test_padding_makes_the_host_wait_once(name: str, how: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that a call brings is looked at once, whatever it hides."""
    if how == "compiled":
        if name == "k8v4":
            pytest.skip("has no graph on a device")
        if device.pretended is not None:
            run_as_it_is(monkeypatch)
    model, kind, mask = device.models("llama")[1], KINDS[name], torch.ones(2, 100, dtype=torch.long)
    mask[1, :7] = 0
    cache = PressedCache(kind.press, **kind.options)
    one = device.put(tokens(2, 1))
    masks = [device.put(pad(mask, (0, i), value=1)) for i in range(5)]
    with torch.no_grad():
        model(device.put(tokens(2, 100)), attention_mask=masks[0], **cache_argument(cache))
        with compiled(model, tell=None) if how == "compiled" else nullcontext():
            for shown in masks[1:-1]:  # which move to buffers with room
                model(one, attention_mask=shown, **cache_argument(cache))
            with waiting_once(device):
                model(one, attention_mask=masks[-1], **cache_argument(cache))


@contextmanager
def waiting_once(device: Device) -> Iterator[None]:
    if device.pretended is not None:
        device.counted()
        yield
        waits, uploads = device.counted()
        assert sum(waits.values()) == 1 and not uploads
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(one.message) for one in said) == 1


COMPILED = {"dense": SNAP, "ragged": HEADS, "layers": PyramidKVPress(0.5, window_size=8)}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.thinned(2)
def test_a_compiled_step(name: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the CPU, of several caches in turns and after forks, crops and moves to larger buffers.

    On a pretended device the step is run as torch.compile is given it. On a GPU it is a graph, which is recorded for
    the buffers of each cache: there are more of these than torch would compile steps for. The host launches a token
    and neither waits for it nor copies to the device.
    """
    here, there = device.models("llama")
    if device.pretended is not None:
        run_as_it_is(monkeypatch)
    press, lines = COMPILED[name], []
    own, twin = (filled(model, press, tokens(1, 100).to(model.device)) for model in (there, here))
    with compiled(there, new_tokens=8, tell=lines.append) as done:
        for _ in range(10 if device.pretended is None else 1):
            other, another = own.fork(), twin.fork()
            close(decoded(there, other, 12), decoded(here, another, 12))
            for cache in (other, another):
                cache.crop(-4)
            close(decoded(there, own, 2), decoded(here, twin, 2))
            close(decoded(there, other, 4), decoded(here, another, 4))
        one = device.put(tokens(1, 1))
        with torch.no_grad():
            for _ in range(3):
                there(one, **cache_argument(own))
            with waiting_is_an_error(device):
                there(one, **cache_argument(own))
    assert done.steps >= 20 and (device.pretended is not None or 1 <= done.forms <= 6)


def test_a_compiled_step_refuses_what_has_no_graph(device: Device) -> None:
    model = device.models("llama")[1]
    cache = filled(model, SNAP, device.put(tokens(1, 100)), **bits(8, 4))
    with compiled(model, tell=None), pytest.raises(CacheError, match="on the CPU in RotatedBits"):
        decoded(model, cache, 1)


def test_a_buffer_at_another_address_is_recorded_again(device: Device) -> None:
    """And not compiled again: torch would do that eight times and then no more."""
    buffer = device.put(torch.zeros(2))
    stays_in_place(buffer)
    assert buffer._dynamo_static_input_type == "unguarded"


def run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as it is in the place of a compiled one, which takes itself for that."""
    runs = [False]

    def plain(step: Any, **options: Any) -> Any:
        def run(*given: Any) -> Any:
            runs[0] = True
            try:
                return step(*given)
            finally:
                runs[0] = False

        return run

    monkeypatch.setattr(torch, "compile", plain)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: runs[0])


def test_no_logits_are_written_to_memory_for_a_mask(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA has no kernel for a mask over keys that heads share but the one that needs a number for every pair."""
    own, shared = torch.nn.functional.scaled_dot_product_attention, []

    def attend(*given: Any, **options: Any) -> torch.Tensor:
        if options.get("enable_gqa"):
            shared.append(given[3])
        result: torch.Tensor = own(*given, **options)
        return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    (here, there), ids = device.models("llama"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = here(ids, **given, **cache_argument(PressedCache())).logits
        shared.clear()
        found = there(
            device.put(ids), **{name: device.put(own) for name, own in given.items()}, **cache_argument(PressedCache())
        )
        assert not shared
        close(found.logits[:, 5:], expected[:, 5:])
        there(device.put(ids), **cache_argument(PressedCache()))
        assert shared == [None, None]
