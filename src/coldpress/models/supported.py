"""Which models coldpress can run, and how one is put on its attention backend."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import NAMES
from coldpress.architecture.wrapped import transformers_model
from coldpress.attend.functions import flash_attn_func
from coldpress.backends import BACKENDS
from coldpress.errors import ModelError

__all__ = ["refuse", "underlying", "use_coldpress"]


_FROM_NATIVE = {native: ours for ours, native in BACKENDS.items()} | {"flex_attention": "coldpress"}


# of transformers' own layers of a cache, those with keys and values, with a state, or empty
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")


def underlying(implementation: str | None) -> str | None:
    """The transformers backend whose arithmetic ``implementation`` uses."""
    return BACKENDS.get(implementation or "", implementation)


def use_coldpress(model: PreTrainedModel, arithmetic: str | None = None) -> None:
    """Put ``model`` on coldpress's attention backend; nothing happens where it is already there.

    Args:
        model: a decoder whose attention goes through transformers' attention interface.
        arithmetic: ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``; None keeps what the model uses now.

    Raises:
        ModelError: an encoder-decoder, a model without the attention interface, one with chunked attention, with
            layers that share a cache or that keep more in it than keys and values, or without any that keep these.
        MissingDependencyError: ``flash_attention_2`` without the package flash-attn.
    """
    model = transformers_model(model)
    name = type(model).__name__
    config = model.config
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; coldpress compresses decoder-only models (causal LMs).")
    takes_cache = getattr(model, "_supports_default_dynamic_cache", lambda: True)()
    if not (takes_cache and _takes_cache(model)):
        raise ModelError(f"{name} keeps what it has seen in a cache of its own, which coldpress cannot compress.")
    refuse(text, name)
    current = text._attn_implementation or "sdpa"
    if arithmetic is None:
        if current in BACKENDS:
            return
        target = _FROM_NATIVE.get(current, "coldpress")
    elif arithmetic in _FROM_NATIVE:
        target = _FROM_NATIVE[arithmetic]
    else:
        raise ModelError(f"attn_implementation must be sdpa, eager or flash_attention_2, got {arithmetic!r}.")
    if target == "coldpress_fa2":
        flash_attn_func()
    if target == current:
        return
    refusal = (
        f"{name} does not dispatch its attention through transformers' attention interface, which coldpress needs "
        "(models written before it, such as those with ALiBi, do not)."
    )
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        raise ModelError(refusal)
    model.set_attn_implementation(target)
    if text._attn_implementation != target:
        raise ModelError(refusal)


def _takes_cache(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name in NAMES or p.kind is p.VAR_KEYWORD for p in parameters)


def refuse(config: Any, name: str) -> None:
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(f"{name} attends within fixed chunks, which coldpress does not support yet.")
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        raise ModelError(f"{name} has layers that read another layer's cache, which coldpress does not support yet.")
    layers = {type(layer) for layer in DynamicCache(config=config).layers}  # layers of transformers' own cache
    others = sorted(layer.__name__ for layer in layers if layer.__name__ not in _LAYERS)
    if others:
        raise ModelError(
            f"{name} has layers that keep a state beside their keys and values, or something else than these "
            f"({', '.join(others)}), which coldpress does not support yet."
        )
    if layers and not any(issubclass(layer, DynamicLayer) for layer in layers):
        raise ModelError(f"{name} has no layers that keep keys and values, so there is nothing to compress.")
