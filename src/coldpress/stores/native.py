"""Kernels: attention of one query per head over pairs and codes, by ``native.cpp``, compiled when it is needed.

A pair in few bits is read in one pass, without a copy of what it stands for. That takes a C++ compiler, as
torch.compile does; without one, and where they are faster, torch's own operations do it (``stores/packed_part.py``).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from coldpress.stores.hadamard import rotated
from coldpress.stores.segments import Segments

__all__ = ["CODES", "Kind", "attend_native", "kernel"]

CODES = ("keys.codes", "keys.step", "keys.least", "values.rows")  # the tensors of RotatedBits' codes

_SOURCE = Path(__file__).with_name("native.cpp")
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),  # sums in any order; NaN and infinity stay
)
_SECONDS = 120  # after which a compiler is given up


class Kind(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        dtype: of pairs that are as they are.
        bits: of codes, keys and values.
        channels: of keys and values.
    """

    dtype: torch.dtype
    bits: tuple[int, int]
    channels: tuple[int, int]


@lru_cache(maxsize=64)
def kernel(kind: Kind) -> ctypes.CDLL | None:
    """The kernel for pairs of one kind; None where there is no compiler for it, or it does not work."""
    found = (shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name)
    compiler, number = next(filter(None, found), None), _NUMBERS.get(kind.dtype)
    if compiler is None or number is None or os.name != "posix":
        return None
    names = ("NUMBER", "KEY_BITS", "VALUE_BITS", "KEY_CHANNELS", "VALUE_CHANNELS")
    meant = [f"-D{name}={value}" for name, value in zip(names, (number, *kind.bits, *kind.channels), strict=True)]
    for threads in (["-fopenmp"], []):  # some compilers have no OpenMP; then one thread does it all
        try:
            with tempfile.TemporaryDirectory(prefix="coldpress-") as folder:  # gone when the library is loaded
                library = os.path.join(folder, "kernel.so")
                command = [compiler, *_FLAGS, *threads, *meant, str(_SOURCE), "-o", library]
                subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS)
                return ctypes.CDLL(library)
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def attend_native(
    library: ctypes.CDLL,
    queries: Tensor,
    exact: Segments,
    codes: Segments,
    n_front: Sequence[int],
    biases: Sequence[Tensor | None],
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As :func:`coldpress.stores.packed_part.attend_packed`, with the :func:`kernel` for this kind of pairs."""
    n_segments, group, _ = queries.shape
    queries, turned = queries.contiguous(), rotated(queries)
    own = [None if bias is None else bias.float().contiguous() for bias in biases]
    sinks = None if sinks is None else sinks.float().contiguous()
    found = queries.new_empty(2, n_segments, group, exact.buffer("values").shape[1])
    has_bias = any(bias is not None for bias in own)
    library.attend(
        *(ctypes.c_int64(n) for n in (n_segments, group, torch.get_num_threads())),
        *map(_at, (queries, turned, exact.buffer("keys"), exact.buffer("values"))),
        *map(_numbers, ([span.start for span in exact.spans()], exact.counts)),
        *map(_at, (codes.buffer(name) for name in CODES)),
        *map(_numbers, ([span.start for span in codes.spans()], codes.counts, n_front)),
        (ctypes.c_void_p * n_segments)(*map(_address, own)) if has_bias else None,
        ctypes.c_float(softcap or 0.0),
        _at(sinks),
        *map(_at, found),
    )
    return rotated(found[0]).add_(found[1])


def _address(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_address(tensor))


def _numbers(counts: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(counts))(*counts)
