"""float16 on the CPU: a warning where it reads a prompt more slowly than another type would."""

from __future__ import annotations

import functools
import time
import warnings

import torch
from torch import Tensor

__all__ = ["note_float16", "seconds", "warn_if_slow"]

MANY = 256  # tokens in a call, all rows together: fewer are read in a moment
SLOW = 1.5  # times; less is noise


def note_float16(query: Tensor) -> None:
    """Warn, once in a process, if this CPU reads prompts like ``query [B, Hq, Q, D]`` more slowly in float16."""
    if query.dtype != torch.float16 or query.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if query.shape[0] * query.shape[-2] >= MANY:
        warn_if_slow()


@functools.cache
def warn_if_slow() -> None:
    """Warn if another type is much faster."""
    took = {name: seconds(getattr(torch, name)) for name in ("float16", "float32", "bfloat16")}
    best = min(took, key=took.__getitem__)
    times = took["float16"] / took[best]
    if times > SLOW:
        warnings.warn(
            f"This CPU takes {times:.1f} times as long for float16 products as for {best}: a prompt is read sooner "
            f"after model.to(torch.{best}).",
            stacklevel=2,
        )


def seconds(dtype: torch.dtype) -> float:
    """Of one product of 256 rows and a weight of 512 times 512, in ``dtype``: the best of three."""
    rows, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    took = []
    for _ in range(4):
        begin = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        took.append(time.perf_counter() - begin)
    return min(took[1:])
