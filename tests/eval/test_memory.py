"""The memory meter sees what a block needed: not less, and not what came before it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coldpress.errors import DeviceError, MissingDependencyError
from coldpress.eval import memory
from coldpress.eval.memory import MemoryMeter, MemoryReading
from coldpress.records.wording import format_bytes

MIB = 1 << 20
CPU = torch.device("cpu")
SLACK_BYTES = 12 * MIB  # what Python, torch's threads and the kernel's own counting add


def reads_high_water_mark() -> bool:
    """Whether a meter goes by VmHWM: where it can be reset."""
    with MemoryMeter(CPU) as meter:
        pass
    return meter.result is not None and meter.result.kind == "vmhwm"


resettable = pytest.mark.skipif(
    not (sys.platform == "linux" and reads_high_water_mark()),
    reason="the kernel's high-water mark cannot be reset here",
)


def allocate(mib: int, hold_s: float = 0.0) -> None:
    """Touch every page of a tensor of `mib` MiB and free it."""
    tensor = torch.ones(mib * MIB // 4, dtype=torch.float32)
    time.sleep(hold_s)
    del tensor


def without_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system without /proc/self/clear_refs."""
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@resettable
def test_a_transient_allocation_is_the_delta() -> None:
    allocate(1)  # torch's own first-use memory is not part of this
    meter = MemoryMeter(CPU)
    with meter:
        allocate(64)
    reading = meter.result
    assert reading.kind == "vmhwm"
    assert reading.delta_bytes == reading.peak_bytes - reading.baseline_bytes
    assert 63 * MIB <= reading.delta_bytes <= 64 * MIB + SLACK_BYTES
    assert reading.peak_reserved_bytes is None


@resettable
def test_an_earlier_larger_peak_does_not_leak_into_the_reading() -> None:
    meter = MemoryMeter(CPU)
    with meter:
        allocate(256)
    large = meter.result
    with meter:
        allocate(64)
    small = meter.result
    assert large.delta_bytes is not None and small.delta_bytes is not None
    assert large.delta_bytes >= 255 * MIB
    assert 63 * MIB <= small.delta_bytes <= 64 * MIB + SLACK_BYTES
    assert small.peak_bytes < large.peak_bytes - 150 * MIB


@resettable
def test_memory_freed_before_the_block_does_not_hide_what_the_block_needs() -> None:
    """Small blocks stay with glibc when freed; the block's own allocations would reuse them unseen."""

    def many_small_blocks() -> list[bytearray]:
        return [bytearray(64 * 1024) for _ in range(1024)]  # 64 MiB, each below glibc's mmap threshold

    pinned = many_small_blocks()[-1]  # the heap cannot shrink below the block that lives on
    meter = MemoryMeter(CPU)
    with meter:
        many_small_blocks()
    assert len(pinned) > 0
    assert meter.result.delta_bytes is not None
    assert meter.result.delta_bytes >= 56 * MIB


@resettable
def test_what_was_there_before_is_baseline_not_delta() -> None:
    kept = torch.ones(64 * MIB // 4)
    meter = MemoryMeter(CPU)
    with meter:
        pass
    assert meter.result.baseline_bytes > kept.nbytes
    assert meter.result.delta_bytes is not None
    assert meter.result.delta_bytes < SLACK_BYTES


@resettable
def test_a_block_that_raises_is_measured_and_its_error_passes() -> None:
    meter = MemoryMeter(CPU)
    with pytest.raises(ZeroDivisionError), meter:
        allocate(32)
        raise ZeroDivisionError
    assert meter.result.delta_bytes is not None
    assert meter.result.delta_bytes >= 31 * MIB


def test_a_reset_without_effect_is_not_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sandboxes accept the write to clear_refs and ignore it: the mark stays far above the RSS."""
    (tmp_path / "clear_refs").touch()
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "clear_refs")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_bytes(b"Name:\t\xff\nVmHWM:\t  900000 kB\nVmRSS:\t  100000 kB\n")
    assert not reads_high_water_mark()
    (tmp_path / "status").write_bytes(b"Name:\t\xff\nVmHWM:\t  100100 kB\nVmRSS:\t  100000 kB\n")
    assert reads_high_water_mark()
    (tmp_path / "status").write_bytes(b"Name:\tpython\n")
    assert not reads_high_water_mark()


def test_polling_where_the_mark_cannot_be_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    without_reset(monkeypatch, tmp_path)
    allocate(1)
    meter = MemoryMeter(CPU)
    with meter:
        allocate(64, hold_s=0.1)
    assert meter.result.kind == "rss_polled"
    assert meter.result.delta_bytes is not None
    assert 56 * MIB <= meter.result.delta_bytes <= 64 * MIB + SLACK_BYTES


def test_the_process_maximum_has_no_delta(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    without_reset(monkeypatch, tmp_path)
    without(monkeypatch, "psutil")
    meter = MemoryMeter(CPU)
    with meter:
        pass
    reading = meter.result
    assert (reading.kind, reading.delta_bytes) == ("maxrss_process", None)
    unit = 1 if sys.platform == "darwin" else 1024
    assert reading.peak_bytes == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_nothing_to_measure_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_reset(monkeypatch, tmp_path)
    without(monkeypatch, "psutil", "resource")
    with pytest.raises(MissingDependencyError, match="pip install psutil"):
        MemoryMeter(CPU)


def test_result_is_not_there_before_the_block_ended() -> None:
    meter = MemoryMeter(CPU)
    with pytest.raises(RuntimeError, match="no reading yet"):
        meter.result  # noqa: B018
    with meter:
        pass
    with meter, pytest.raises(RuntimeError, match="no reading yet"):
        meter.result  # noqa: B018


def test_cuda_adds_up_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pretended devices: baselines 10 and 20, peaks 110 and 320, reserved 200 and 400."""
    calls: list[Any] = []
    for name, value in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 2,
        "empty_cache": lambda: calls.append("empty_cache"),
        "reset_peak_memory_stats": lambda device: calls.append(device),
        "memory_allocated": lambda device: (10, 20)[device],
        "max_memory_allocated": lambda device: (110, 320)[device],
        "max_memory_reserved": lambda device: (200, 400)[device],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    meter = MemoryMeter(torch.device("cuda:1"))
    with meter:
        pass
    assert meter.result == MemoryReading("cuda_allocated", 430, 30, 400, 600)
    assert calls == ["empty_cache", 0, 1]


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="'cuda'"):
        MemoryMeter(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_of_a_block() -> None:
    device = torch.device("cuda")
    kept = torch.ones(16 * MIB // 4, device=device)
    del_me = torch.ones(256 * MIB // 4, device=device)
    del del_me
    meter = MemoryMeter(device)
    with meter:
        tensor = torch.ones(64 * MIB // 4, device=device)
        del tensor
    assert meter.result.delta_bytes == 64 * MIB
    assert meter.result.baseline_bytes >= kept.nbytes
    assert meter.result.peak_reserved_bytes is not None
    assert meter.result.peak_bytes <= meter.result.peak_reserved_bytes < meter.result.peak_bytes + 128 * MIB


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "n/a"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (-3 * MIB, "-3.00 MiB"),
        (5 << 30, "5.00 GiB"),
        (3000 << 40, "3000.00 TiB"),
    ],
)
def test_format_bytes(count: int | None, text: str) -> None:
    assert format_bytes(count) == text
