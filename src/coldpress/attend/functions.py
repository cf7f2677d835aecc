"""Attention over stored pairs: scaled dot product, the model's own eager function, flash attention.

Each takes ``query [B, Hq, Q, D]``, ``key [B, Hkv, T, D]``, ``value [B, Hkv, T, Dv]`` and one bias: float32
``[B or 1, Hkv or 1, Q or 1, T]`` that is added to the logits, minus infinity where a query does not see a pair. None is
causal order, and for one query, all pairs. Without a PressedCache it is the mask that transformers made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coldpress.attend.one_token import attend_once, can_attend_once
from coldpress.errors import MissingDependencyError, ModelError

__all__ = ["Attended", "eager", "flash", "flash_attn_func", "own_eager", "sdpa"]


Attended = tuple[Tensor, Tensor | None]  # output [B, Q, Hq, Dv], weights [B, Hq, Q, T] or None


def sdpa(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    n_batch, n_heads, n_queries, _ = query.shape
    n_kv_heads = key.shape[1]
    is_causal, is_grouped = bias is None and n_queries > 1, bool(n_heads != n_kv_heads)
    if not dropout and can_attend_once(query, key, value):
        own = None if bias is None else _as_bias(bias).expand(n_batch, n_kv_heads, 1, -1).flatten(0, 1)
        grouped = query.reshape(n_batch * n_kv_heads, -1, query.shape[3])
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        output = attend_once(grouped, key.flatten(0, 1), value.flatten(0, 1), own, scaling)
        return output.reshape(n_batch, 1, n_heads, -1), None
    if bias is not None and bias.is_floating_point():
        bias = bias.to(query.dtype)
    if n_queries == 1 and is_grouped:  # the heads of a group become queries: nothing is repeated
        output = nn.functional.scaled_dot_product_attention(
            query.reshape(n_batch, n_kv_heads, -1, query.shape[3]), key, value, bias, dropout, scale=scaling
        )
        return output.reshape(n_batch, 1, n_heads, -1), None
    if bias is not None and bias.shape[1] > 1:
        bias = bias.repeat_interleave(n_heads // n_kv_heads, dim=1)
    if is_grouped and not _shares_keys(key, value, bias):
        key, value = (states.repeat_interleave(n_heads // n_kv_heads, dim=1) for states in (key, value))
        is_grouped = False
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, bias, dropout, is_causal, scale=scaling, enable_gqa=is_grouped
    )
    return output.transpose(1, 2).contiguous(), None


def _shares_keys(key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Whether torch has a kernel for query heads that share keys, beside the one that writes all logits to memory.

    On CUDA there is none with a mask; transformers repeats keys there too (``integrations/sdpa_attention.py``).
    """
    return key.device.type != "cuda" or (bias is None and key.shape[3] == value.shape[3] <= 256)


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    n_queries, n_stored, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if bias is None and n_queries > 1:
        bias = torch.ones(n_queries, n_stored, dtype=torch.bool, device=key.device).tril()[None, None]
    if bias is not None:
        if bias.shape[1] > 1:
            bias = bias.repeat_interleave(group, dim=1)
        bias = _as_bias(bias).clamp(min=torch.finfo(query.dtype).min).to(query.dtype)  # as transformers has its masks
    return own_eager(module)(module, query, key, value, bias, scaling=scaling, dropout=dropout, **kwargs)


def flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    n_queries = query.shape[2]
    if bias is not None and (bias.shape[:2] != (1, 1) or not _is_causal(bias, n_queries)):
        return sdpa(module, query, key, value, bias, scaling, dropout, **kwargs)
    output = flash_attn_func()(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        dropout_p=dropout, softmax_scale=scaling, causal=n_queries > 1,
    )  # fmt: skip
    return output, None


def _as_bias(mask: Tensor) -> Tensor:
    """A mask of transformers, bool with True where a query sees, as a bias of the logits."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def _is_causal(bias: Tensor, n_queries: int) -> bool:
    """Whether a ``[1, 1, Q, T]`` mask is plain causal order aligned to the last key, as flash-attention means it."""
    slot = torch.arange(bias.shape[3], device=bias.device)
    is_hidden = slot > slot[bias.shape[3] - n_queries :, None]
    return torch.equal(
        _as_bias(bias)[0, 0].float(),
        torch.zeros(is_hidden.shape, device=bias.device).masked_fill_(is_hidden, -torch.inf),
    )


def flash_attn_func() -> Callable[..., Tensor]:
    try:
        from flash_attn import flash_attn_func as function
    except ImportError as error:
        raise MissingDependencyError(
            "flash_attention_2 needs the package flash-attn and an NVIDIA GPU: pip install flash-attn "
            "--no-build-isolation, or use attn_implementation sdpa."
        ) from error
    return function


def own_eager(module: nn.Module) -> Callable[..., Attended]:
    """The eager attention of the module's own modeling file: it knows soft caps, sinks and other specialities."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(f"{type(module).__name__} has no eager attention; use attn_implementation sdpa.")
    eager: Callable[..., Attended] = function
    return eager
