"""Processes that torchrun starts."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator

from coldpress.errors import ModelError

__all__ = ["check_launched", "followers_silent"]


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
