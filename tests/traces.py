"""What a block could leave behind."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """Everything a block could leave behind on a model."""
    return {
        name: (
            type(module),
            {key: len(value) if isinstance(value, dict) else None for key, value in vars(module).items()},
            module.forward.__func__,
        )
        for name, module in model.named_modules()
    }
