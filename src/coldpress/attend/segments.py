"""Attention where heads store different numbers of pairs: segments, one for each KV head of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coldpress.attend.one_token import attend_once, can_attend_once

__all__ = ["attend_group", "attend_segments", "causal_bias", "segment_bias"]


def attend_group(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attention of S segments that lie side by side.

    Args:
        query: ``[S, G, Q, D]``, G query heads to each segment.
        key, value: ``[S, n, D]``, ``[S, n, Dv]``.
        bias: float32 ``[1 or S, Q or 1, n]``, added to the logits, or None.
        scaling: of the logits.

    Returns:
        ``[S, G, Q, Dv]``.
    """
    if can_attend_once(query, key, value):
        return attend_once(query[:, :, 0], key, value, bias, scaling)[:, :, None]
    bias = None if bias is None else bias[:, None].to(query.dtype)
    is_single = query.shape[2] == 1
    if is_single:  # the heads of a group are the queries of one head
        query, key, value = query.transpose(1, 2), key[:, None], value[:, None]
    else:
        key, value = (states[:, None].expand(-1, query.shape[1], -1, -1) for states in (key, value))
    output = nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scaling)
    return output.transpose(1, 2) if is_single else output


def attend_segments(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], biases: Sequence[Tensor | None], scaling: float
) -> Tensor:
    """Attention of ``query [B, Hq, Q, D]`` over the B * Hkv segments ``[n, D]``, ``[n, Dv]``: ``[B, Q, Hq, Dv]``.

    Args:
        biases: float32 ``[Q or 1, n]`` of each segment; None for causal order.
    """
    n_batch, n_query_heads, n_queries, dim = query.shape
    queries = query.reshape(len(keys), -1, n_queries, dim)  # [B * Hkv, G, Q, D]
    outputs = []
    for own, key, value, bias in zip(queries, keys, values, biases, strict=True):
        bias = causal_bias(len(key), n_queries, None, key.device) if bias is None else bias[None]
        outputs.append(attend_group(own[None], key[None], value[None], bias, scaling))
    return torch.cat(outputs).reshape(n_batch, n_query_heads, n_queries, -1).transpose(1, 2).contiguous()


def causal_bias(n: int, n_queries: int, end: Tensor | None, device: torch.device) -> Tensor | None:
    """Minus infinity where one of ``n`` slots is hidden from one of the newest queries: float32 ``[1 or S, Q, n]``.

    Args:
        end: int64 ``[S, 1, 1]``, how many of the slots each segment uses; None if all are used.

    Returns:
        None if every query sees every slot.
    """
    if n_queries == 1 and end is None:
        return None
    last = (n if end is None else end) - n_queries + torch.arange(n_queries, device=device)[:, None]
    is_hidden = torch.arange(n, device=device) > (last if end is not None else last[None])
    return torch.zeros(is_hidden.shape, device=device).masked_fill_(is_hidden, -torch.inf)


def segment_bias(bias: Tensor, n_first: Tensor, n_longest: int, n_later: int, n: int) -> Tensor:
    """A bias over padded slots as the segments themselves have their slots.

    Args:
        bias: float32 ``[S, Q or 1, n_longest + n_later]``, the first slots padded to the longest segment's.
        n_first: int64 ``[S]``, how many of the first slots each segment uses.
        n_longest, n_later: slots before, and of, later tokens.
        n: slots of a segment in memory, at least ``n_first + n_later``.

    Returns:
        float32 ``[S, Q or 1, n]``, minus infinity in slots that are empty.
    """
    slot, first = torch.arange(n, device=bias.device), n_first[:, None]
    source = torch.where(slot < first, slot, slot - first + n_longest)  # [S, n]
    is_empty = slot >= first + n_later
    own = bias.gather(2, source.clamp(max=bias.shape[2] - 1)[:, None].expand(-1, bias.shape[1], -1))
    return own.masked_fill(is_empty[:, None], -torch.inf)
