"""Models whose heads are shared out among processes (tensor parallelism, ``tp_plan="auto"``).

Every process holds some of the KV heads, of every layer, and compresses these. A press that looks at each head alone
chooses there as it would in one process; one that compares heads, or gives them one budget to share, would choose
something else in each, so it is refused.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from coldpress.errors import ModelError, PressError

if TYPE_CHECKING:
    from coldpress.presses.base import BasePress

__all__ = ["check_heads", "check_launched", "followers_silent", "is_sharded"]


def is_sharded(module: nn.Module, n_heads: int) -> bool:
    """Whether ``module``, an attention layer that was given ``n_heads`` query heads, has but some of its model's."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    wanted = getattr(getattr(module, "config", None), "num_attention_heads", n_heads)
    return isinstance(wanted, int) and n_heads < wanted


def check_heads(press: BasePress, module: nn.Module, n_heads: int) -> None:
    """Raise :class:`PressError` if ``module`` has but some of the heads and ``press`` may need them all."""
    if not is_sharded(module, n_heads):
        return
    from coldpress.presses.base import parts

    for part in parts(press):
        if not vars(type(part)).get("heads_alone"):  # a subclass may do something else
            raise PressError(
                f"{type(part).__name__} may need all heads of a layer at once, and under tensor parallelism every "
                "process has some of them; use a press that looks at each head alone, such as SnapKVPress, KnormPress "
                "or ExpectedAttentionPress, or device_map='auto' instead of tp_plan."
            )
        if getattr(part, "budget_bytes", None) is not None:
            raise PressError(
                "budget_bytes counts the bytes of all heads, and under tensor parallelism every process has some of "
                "them; give budget_tokens or a compression_ratio."
            )


def check_launched() -> None:
    """Raise :class:`ModelError` unless ``torchrun`` has started this process among several."""
    if any(name not in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        raise ModelError(
            "--tp_plan auto shares a model out among processes that torchrun starts: torchrun --nproc_per_node 2 -m "
            "coldpress.cli ppl ... --tp_plan auto"
        )


@contextlib.contextmanager
def followers_silent() -> Iterator[str | None]:
    """In all processes but the first, nothing is printed; gives these a folder for results that is thrown away."""
    if int(os.environ.get("RANK", "0")) == 0:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        nowhere = io.StringIO()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield folder
