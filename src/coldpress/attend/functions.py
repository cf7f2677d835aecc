"""Attention over stored pairs: scaled dot product, the model's own eager function, flash attention."""

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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    n_batch, n_heads, n_queries, _ = query.shape
    n_kv_heads = key.shape[1]
    is_causal = visible is None and n_queries > 1
    if not dropout and can_attend_once(query, key, value):
        is_hidden = None if visible is None else ~visible.expand(n_batch, n_kv_heads, 1, -1).flatten(0, 1)
        grouped = query.reshape(n_batch * n_kv_heads, -1, query.shape[3])
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        output = attend_once(grouped, key.flatten(0, 1), value.flatten(0, 1), is_hidden, scaling)
        return output.reshape(n_batch, 1, n_heads, -1), None
    if n_queries == 1 and n_heads != n_kv_heads:  # the heads of a group become queries: nothing is repeated
        output = nn.functional.scaled_dot_product_attention(
            query.reshape(n_batch, n_kv_heads, -1, query.shape[3]), key, value, visible, dropout, scale=scaling
        )
        return output.reshape(n_batch, 1, n_heads, -1), None
    if visible is not None and visible.shape[1] > 1:
        visible = visible.repeat_interleave(n_heads // n_kv_heads, dim=1)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, visible, dropout, is_causal, scale=scaling, enable_gqa=n_heads != n_kv_heads
    )
    return output.transpose(1, 2).contiguous(), None


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    n_queries, n_stored, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if visible is None and n_queries > 1:
        visible = torch.ones(n_queries, n_stored, dtype=torch.bool, device=key.device).tril()[None, None]
    bias = visible
    if visible is not None and visible.dtype == torch.bool:
        if visible.shape[1] > 1:
            visible = visible.repeat_interleave(group, dim=1)
        lowest = torch.finfo(query.dtype).min
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=key.device).masked_fill_(~visible, lowest)
    return own_eager(module)(module, query, key, value, bias, scaling=scaling, dropout=dropout, **kwargs)


def flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Attended:
    n_queries = query.shape[2]
    if visible is not None and (visible.shape[:2] != (1, 1) or not _is_causal(visible, n_queries)):
        return sdpa(module, query, key, value, visible, scaling, dropout, **kwargs)
    output = flash_attn_func()(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        dropout_p=dropout, softmax_scale=scaling, causal=n_queries > 1,
    )  # fmt: skip
    return output, None


def _is_causal(visible: Tensor, n_queries: int) -> bool:
    """Whether a ``[1, 1, Q, T]`` mask is plain causal order aligned to the last key, as flash-attention means it."""
    if visible.dtype != torch.bool:
        return False
    n_stored = visible.shape[3]
    slot = torch.arange(n_stored, device=visible.device)
    return torch.equal(visible[0, 0], slot <= slot[n_stored - n_queries :, None])


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
