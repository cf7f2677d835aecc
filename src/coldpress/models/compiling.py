"""What torch.compile is doing: told in a line while it takes its time, and counted."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Compiled", "Watch", "inductor", "say"]


def say(line: str) -> None:
    """Print one line to where warnings go."""
    print(f"coldpress: {line}", file=sys.stderr, flush=True)


class Compiled:
    """What a :func:`coldpress.compiled` block has done so far.

    Attributes:
        steps: calls of the model that ran as compiled steps.
        forms: forms of the step that torch.compile made in the block: for other lengths, for other kinds of layers.
        compile_s: seconds that these took.
    """

    def __init__(self) -> None:
        self.steps = self.forms = 0
        self.compile_s = 0.0


class _Here(threading.local):
    watch: Watch | None = None


_HERE = _Here()


class Watch:
    """Around a step: tells when torch compiles a form of it, and counts the time of that call.

    Args:
        done: where forms and their time are counted.
        name: of the model.
        tell: is given the lines; None: nobody is told.
        is_new: no form of this step was compiled before.
    """

    def __init__(self, done: Compiled, name: str, tell: Callable[[str], None] | None, is_new: bool):
        self.done, self.name, self.tell, self.is_new = done, name, tell, is_new
        self.has_begun = False

    def __enter__(self) -> None:
        self.start = time.perf_counter()
        _HERE.watch = self
        if self.is_new:
            self.begin()

    def __exit__(self, *error: object) -> None:
        _HERE.watch = None
        if not self.has_begun or error[0] is not None:
            return
        seconds = time.perf_counter() - self.start
        self.done.forms += 1
        self.done.compile_s += seconds
        if self.tell is not None:
            self.tell(f"compiled in {seconds:.1f} s")

    def begin(self) -> None:
        """torch compiles now."""
        if not self.has_begun and self.tell is not None:
            what = "a decoding step" if self.is_new else "a decoding step for other lengths"
            self.tell(f"torch.compile makes {what} of {self.name}, which may take a minute ...")
        self.has_begun = True


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """The backend of torch.compile: its own, of which the thread's watch is told; on CUDA, graphs."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    if _HERE.watch is not None:
        _HERE.watch.begin()
    is_on_cuda = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in inputs)
    options = list_mode_options("reduce-overhead") if is_on_cuda else None
    return compile_fx(graph, list(inputs), config_patches=options)
