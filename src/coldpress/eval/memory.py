"""The one memory meter: the peak of a block of work, above what was there before it.

On a GPU torch's allocator keeps exact peaks. On the CPU torch keeps none, so the kernel's high-water mark of
the process's resident memory (VmHWM) is used, which sees every page however short its life; unlike
`ru_maxrss` it can be reset, so an earlier and larger peak does not leak into the reading. Resident memory
includes file pages: load the weights before the block, or their first touch is counted.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from coldpress.errors import DeviceError, MissingDependencyError

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_SLACK_BYTES = 4 << 20  # a high-water mark further than this above the RSS was not reset
POLL_INTERVAL_S = 0.002


@dataclass(frozen=True)
class MemoryReading:
    """What a block of work needed, all in bytes.

    kind              peak_bytes                                            delta_bytes
    cuda_allocated    tensors, summed over the devices' own peaks           peak - baseline
    vmhwm             resident memory, exact                                peak - baseline
    rss_polled        resident memory, sampled every 2 ms: a lower bound    peak - baseline
    maxrss_process    highest resident memory since the process started     None: it cannot be reset

    peak_reserved_bytes: what the CUDA allocator held, as nvidia-smi sees it; None on the CPU.
    """

    kind: str
    peak_bytes: int
    baseline_bytes: int
    delta_bytes: int | None
    peak_reserved_bytes: int | None = None

    def facts(self) -> dict[str, Any]:
        """The memory's part of a result record."""
        return {
            "peak_mem_bytes": self.peak_bytes,
            "peak_mem_kind": self.kind,
            "peak_mem_baseline_bytes": self.baseline_bytes,
            "peak_mem_delta_bytes": self.delta_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
        }


class _Backend(Protocol):
    def start(self) -> None: ...
    def stop(self) -> MemoryReading: ...


class MemoryMeter:
    """Measure the peak memory of a block: ``with meter: work()``, then ``meter.result``.

    A meter can be used again, and then holds the last block's result; it cannot be nested, since there is one
    high-water mark per process. A block that raises is measured all the same. Entering collects garbage and
    gives free memory back to the system, so keep it out of timed code.

    Raises DeviceError for a CUDA device that is not there, MissingDependencyError where neither /proc, psutil
    nor the module resource can tell the process's memory, RuntimeError when `result` is read too early.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self._backend = _choose_backend(self.device)
        self._result: MemoryReading | None = None

    def __enter__(self) -> MemoryMeter:
        self._result = None
        gc.collect()
        self._backend.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._result = self._backend.stop()

    @property
    def result(self) -> MemoryReading:
        """The reading of the last block that ended."""
        if self._result is None:
            raise RuntimeError("no reading yet: read result after the block `with meter:` has ended")
        return self._result


def _choose_backend(device: torch.device) -> _Backend:
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device {str(device)!r} is not there: torch sees no CUDA device; use 'cpu'")
        return _CudaAllocated()
    if _reset_high_water_mark():
        return _HighWaterMark()
    try:
        return _PolledResident(importlib.import_module("psutil").Process())
    except ImportError:
        pass
    try:
        return _ProcessMaximum(importlib.import_module("resource"))
    except ImportError as error:
        raise MissingDependencyError("measuring memory here needs psutil: pip install psutil") from error


def _status_bytes(field: bytes) -> int:
    """A field of /proc/self/status, which counts in KiB; OSError where there is none."""
    for line in STATUS.read_bytes().splitlines():
        if line.startswith(field + b":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field.decode()}")


def _reset_high_water_mark() -> bool:
    """Set VmHWM to the present RSS; False where it cannot be set, or where writing has no effect."""
    try:
        CLEAR_REFS.write_text("5")
        return _status_bytes(b"VmHWM") - _status_bytes(b"VmRSS") <= RESET_SLACK_BYTES
    except OSError:
        return False


def _return_free_memory() -> None:
    """Have glibc give freed blocks back, so that work which reuses them is seen; elsewhere do nothing."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _CudaAllocated:
    """The allocator counts on the host when tensors are made and freed, so nothing has to be synchronised."""

    def start(self) -> None:
        torch.cuda.init()
        self._devices = range(torch.cuda.device_count())
        torch.cuda.empty_cache()  # else blocks cached earlier count as reserved by this work
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        self._baseline = sum(torch.cuda.memory_allocated(d) for d in self._devices)

    def stop(self) -> MemoryReading:
        peak = sum(torch.cuda.max_memory_allocated(d) for d in self._devices)
        reserved = sum(torch.cuda.max_memory_reserved(d) for d in self._devices)
        return MemoryReading("cuda_allocated", peak, self._baseline, peak - self._baseline, reserved)


class _HighWaterMark:
    def start(self) -> None:
        _return_free_memory()
        _reset_high_water_mark()
        self._baseline = _status_bytes(b"VmHWM")

    def stop(self) -> MemoryReading:
        peak = _status_bytes(b"VmHWM")
        return MemoryReading("vmhwm", peak, self._baseline, peak - self._baseline)


class _PolledResident:
    def __init__(self, process: Any) -> None:
        self._process = process

    def start(self) -> None:
        _return_free_memory()
        self._done = threading.Event()
        self._baseline = self._peak = self._resident()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> MemoryReading:
        last = self._resident()
        self._done.set()
        self._thread.join()
        peak = max(self._peak, last)
        return MemoryReading("rss_polled", peak, self._baseline, peak - self._baseline)

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _poll(self) -> None:
        while not self._done.wait(POLL_INTERVAL_S):
            self._peak = max(self._peak, self._resident())


class _ProcessMaximum:
    def __init__(self, resource: Any) -> None:
        self._resource = resource

    def start(self) -> None:
        self._baseline = self._maximum()

    def stop(self) -> MemoryReading:
        return MemoryReading("maxrss_process", self._maximum(), self._baseline, None)

    def _maximum(self) -> int:
        usage = int(self._resource.getrusage(self._resource.RUSAGE_SELF).ru_maxrss)
        return usage if sys.platform == "darwin" else usage * 1024  # bytes on macOS, KiB elsewhere
