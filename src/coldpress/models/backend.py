"""The attention backend: one forward of one layer, then the press.

transformers knows it by three names, for ``attn_implementation=`` and ``set_attn_implementation``:

    "coldpress"        torch's scaled_dot_product_attention underneath
    "coldpress_eager"  the model's own eager attention
    "coldpress_fa2"    flash-attention 2 where no mask is needed, scaled_dot_product_attention elsewhere

With a PressedCache the mask function hands the 2-D padding mask through, and the backend builds what it needs: stored
slots are visible where they are in use, new tokens in causal order, sliding windows by position. With any other
cache, or none, both functions hand the call on to transformers' own, so the model computes what it did before.

Soft caps and attention sinks are known to the model's own eager function only, so models that have them run on that
one under every name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from coldpress.architecture.cache_argument import argument_name
from coldpress.architecture.places import place_of
from coldpress.architecture.rotation import watched
from coldpress.attend.functions import Attended, eager, flash, own_eager, sdpa
from coldpress.backends import BACKENDS
from coldpress.cache.session import THREAD, uncompiled
from coldpress.core.call import LayerCall
from coldpress.errors import CacheError, ModelError
from coldpress.models.half import note_float16
from coldpress.models.step import CURRENT, Seen, StepCache
from coldpress.models.supported import refuse
from coldpress.stores.parts import DensePart

__all__ = ["STEP_WATCHERS", "WATCHERS", "attention", "mask", "register"]

_UNKNOWN = ("position_bias", "head_mask", "indices", "block_indices", "sinks")  # arguments that only some models pass

WATCHERS: list[Callable[[nn.Module], None]] = []  # told of each module that attends without a PressedCache
STEP_WATCHERS: list[Callable[[nn.Module, Any], None]] = []  # of each that attends for one token with one, not compiled

_PLAIN = ("sdpa", "flash_attention_2")  # arithmetic that is a softmax and nothing else


def register() -> None:
    """Register the backends with transformers, instead of the stand-ins of ``registration.py``.

    Changes nothing for models that do not ask for them.
    """
    for ours, native in BACKENDS.items():
        AttentionInterface.register(ours, partial(attention, native))
        AttentionMaskInterface.register(ours, partial(mask, native))


# -- masks --------------------------------------------------------------------------------------------------------


def mask(native: str, *args: Any, **kwargs: Any) -> Any:
    """The mask of a call, as a model asks for it."""
    if torch.compiler.is_compiling() and THREAD.masks_for is not None:
        return _masked_outside(native, *args, **kwargs)
    return _masked(native, *args, **kwargs)


def _masked(native: str, *args: Any, **kwargs: Any) -> Any:
    """The 2-D mask for a PressedCache (None if it hides nothing); transformers' own mask for everything else.

    Looking what it hides waits for the device, once in a call, as transformers' own mask function for sdpa does.
    """
    layer, THREAD.masks_for = THREAD.masks_for, None
    THREAD.leaves_masks_out = layer is not None
    if layer is None:
        return ALL_MASK_ATTENTION_FUNCTIONS["eager" if native == "eager" else "sdpa"](*args, **kwargs)
    seen = kwargs["kv_length"]
    n_queries = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
    if seen == n_queries:
        refuse(kwargs["config"], "This model")
    if kwargs.get("use_vmap") or not kwargs.get("allow_is_causal_skip", True):
        raise ModelError("This call needs a custom attention mask, which a PressedCache does not support.")
    padding: Tensor | None = kwargs.get("attention_mask")
    if padding is None:
        layer.begin(n_queries, None)
        return None
    n_rows = kwargs["batch_size"]
    if padding.dim() != 2:
        raise CacheError(
            f"A PressedCache takes 2-D attention masks ([rows, tokens]) only, got the shape {tuple(padding.shape)}."
        )
    if padding.shape[1] != seen:
        raise CacheError(
            f"attention_mask has {padding.shape[1]} columns; with this call the cache has seen {seen} tokens "
            f"({seen - n_queries} before, {n_queries} now). Pass a mask for all {seen}, or none."
        )
    if padding.shape[0] != n_rows:
        raise CacheError(f"attention_mask has {padding.shape[0]} rows and the call {n_rows}; pass a row for each.")
    return layer.begin(n_queries, padding)


_masked_outside = uncompiled(_masked)


# -- attention ----------------------------------------------------------------------------------------------------


def attention(
    native: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Attended:
    """Attention of one layer of a model: ``query [B, Hq, Q, D]``, ``key`` and ``value [B, Hkv, T, D]``, both final."""
    is_compiling = torch.compiler.is_compiling()
    is_of_bytes = is_compiling and attention_mask is not None and attention_mask.dtype == torch.uint8
    if is_of_bytes and CURRENT.cache is not None:  # without a step it is somebody's own, which the attention refuses
        return _in_step(module, query, scaling, CURRENT.cache, **kwargs)
    attend = _attended_outside if is_compiling and THREAD.updated is not None else _attended
    return attend(native, module, query, key, value, attention_mask, scaling, dropout, **kwargs)


def _attended(
    native: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    """As :func:`attention`, outside of a compiled step."""
    note_float16(query)
    watched(query, key)
    layer, THREAD.updated = THREAD.updated, None
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if native != "eager" and (softcap is not None or sinks is not None):
        native = "special"
    if layer is None or not layer.is_offered(key, value):
        for watch in WATCHERS:
            watch(module)
        return _unpressed(native, module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if query.shape[2] == 1:
        for tell in STEP_WATCHERS:
            tell(module, layer)
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.dtype != torch.bool):
        raise CacheError(
            f"A PressedCache takes 2-D attention masks ([rows, tokens]) only; {type(module).__name__} was given a 4-D "
            "one, or its model made one."
        )
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ModelError(f"{type(module).__name__} attends with {name!r}, which coldpress does not support.")
    if not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} lets tokens see later ones, as encoders do; coldpress needs a causal decoder."
        )
    window = kwargs.pop("sliding_window", None)
    dropout = dropout if module.training else 0.0
    rank, n_layers, is_local = place_of(module.config, layer.index)
    call = LayerCall(
        module=module,
        query=query,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=sinks,
        sliding_window=window,
        layer_idx=rank,
        n_layers=n_layers,
        is_local=is_local and window is not None,
        hidden_states=_hidden_states(module),
    )
    compute = {"sdpa": sdpa, "flash_attention_2": flash}.get(native, eager)

    def arithmetic(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Attended:
        return compute(module, queries, keys, values, bias, scaling, dropout, **kwargs)

    attended: Attended = layer.run(call, attention_mask, arithmetic, native in _PLAIN and not dropout)
    return attended


_attended_outside = uncompiled(_attended)


def _in_step(
    module: nn.Module,
    query: Tensor,
    scaling: float | None,
    cache: StepCache,
    **kwargs: Any,
) -> Attended:
    """Attention of one token over the part of its layer, in a compiled step (``step.py``).

    torch.compile keeps what is raised here to itself; the prompt was refused for it already, or ``_decode`` does it.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ModelError(f"{type(module).__name__} attends with {name!r}, which coldpress does not support.")
    index: Any = module.layer_idx
    part, sight = cache.parts[index], cache.sights[index]
    softcap, sinks, window = kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.pop("sliding_window", None)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache.is_watched:
        cache.seen[index] = Seen(query, factor, softcap, sinks, window)
    if (softcap is None and sinks is None) or not isinstance(part, DensePart):
        return part.attend(query, sight, factor, softcap, sinks), None
    return eager(module, query, part.keys, part.values, part.bias(sight), factor, 0.0, **kwargs)


def _hidden_states(module: nn.Module) -> Tensor | None:
    """The hidden states that ``module`` was given in this call, if a press needs them."""
    seen, THREAD.hidden_states = THREAD.hidden_states, None
    return seen[1] if seen is not None and seen[0] is module else None


def _unpressed(
    native: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    """Attention without a PressedCache, with the mask that transformers made for sdpa or eager."""
    if kwargs.get("cache") is not None and argument_name() != "cache":  # older versions pass on what they do not know
        raise CacheError(f"This transformers calls the argument {argument_name()}, not cache, and left the cache out.")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if THREAD.leaves_masks_out and is_causal and 1 < query.shape[2] < key.shape[2]:
        raise ModelError(
            f"{type(module).__name__} attends to keys that its cache did not give it, which coldpress does not support."
        )
    if native == "special" and (is_causal or mask is not None):
        return eager(module, query, key, value, mask, scaling, dropout, **kwargs)
    if native in ("special", "eager"):
        return own_eager(module)(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if native == "flash_attention_2" and is_causal and (mask is not None or query.shape[2] in (1, key.shape[2])):
        return flash(module, query, key, value, mask, scaling, dropout, **kwargs)
    attended: Attended = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return attended


register()
