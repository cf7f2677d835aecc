"""Where the embedded model lies."""

from __future__ import annotations

from importlib import resources
from typing import Any

__all__ = ["demo_files", "demo_model"]


def demo_files() -> Any:
    """The folder of the embedded model among the package's resources."""
    return resources.files("coldpress") / "assets" / "demo" / "model"


def demo_model() -> str:
    """The folder of the embedded model, a toy of 6.8 million parameters, as ``from_pretrained`` takes it.

    The command line calls it ``--model demo``. It needs no network.
    """
    return str(demo_files())
