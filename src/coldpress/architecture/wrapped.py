"""The transformers model inside of what a user calls a model."""

from __future__ import annotations

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.errors import ModelError

__all__ = ["transformers_model"]


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """What ``model`` runs in the end: itself, or the first transformers model inside a wrapper.

    PEFT, DistributedDataParallel and others wrap the model that they run, and may call it past their own ``forward``.

    Raises:
        ModelError: there is none inside, ``torch.compile`` has made the model, or DataParallel copies it.
    """
    name = type(model).__name__
    if isinstance(model, nn.DataParallel):
        raise ModelError("DataParallel runs copies of the model; give it model.module, or one process to each device.")
    modules = list(model.modules())
    at = next((i for i, module in enumerate(modules) if isinstance(module, PreTrainedModel)), None)
    if at is None:
        raise ModelError(f"coldpress needs a transformers model, and {name} holds none.")
    inner: PreTrainedModel = modules[at]
    outer = (*modules[: at + 1], getattr(inner, "base_model", inner))
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in outer):
        raise ModelError(
            "torch.compile() has made this model, and what it compiles cannot be watched; give the model as it was, "
            "and decode inside 'with coldpress.compiled(model):'."
        )
    return inner
