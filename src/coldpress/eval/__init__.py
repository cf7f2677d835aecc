"""Measuring quality, speed and memory under compression.

``coldpress.eval.load_results`` reads results into a pandas DataFrame; see :mod:`coldpress.eval.frame`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldpress.eval.frame import load_results

__all__ = ["load_results"]


def __getattr__(name: str) -> Any:
    if name == "load_results":  # only where somebody asks for it
        from coldpress.eval.frame import load_results

        return load_results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
