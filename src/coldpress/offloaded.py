"""Weights that accelerate holds in memory or on disk, and brings to a device while their layer runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from coldpress.errors import ModelError

__all__ = ["held"]


def held(module: nn.Module, name: str) -> Tensor:
    """The weight ``name`` of ``module`` itself, wherever it is held.

    Raises:
        ModelError: nowhere.
    """
    weight: Tensor = getattr(module, name)
    if not weight.is_meta:
        return weight
    hook: Any = getattr(module, "_hf_hook", None)
    for own in (hook, *getattr(hook, "hooks", ())):
        if getattr(own, "weights_map", None) is not None:
            weight = own.weights_map[name]
            return weight
    raise ModelError(f"{type(module).__name__} has a {name} that is held nowhere; load the model again.")
