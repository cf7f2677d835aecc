"""Weights that accelerate stores in memory or on disk, and copies to a device while their layer runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coldpress.errors import ModelError

__all__ = ["device_of", "weight_of"]


def device_of(module: nn.Module) -> torch.device | None:
    """The device on which ``module`` computes; None where neither a hook nor a weight says it."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for own in (hook, *getattr(hook, "hooks", ())):
            device = getattr(own, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next((weight.device for weight in module.parameters() if not weight.is_meta), None)


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The weight ``name`` of ``module`` itself, wherever it is stored.

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
    raise ModelError(f"{type(module).__name__} has a {name} that is stored nowhere; load the model again.")
