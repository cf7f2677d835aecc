"""Attention of one new token over the pairs that are stored, on the CPU, at the speed at which memory is read.

One query per head leaves nothing to compute with a pair but two products of vectors, so the time is that of reading
keys and values. ``scaled_dot_product_attention`` is made for many queries and reads them at less than half of that
speed; of the two products below the first comes to two thirds of it and the second to all of it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["attend_once", "can_attend_once"]

_FEWEST = 256  # pairs of a head from which on reading them takes longer than calling torch a few times more


def can_attend_once(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attend_once` is for these tensors: one query per head, on the CPU, in float32, without gradients.

    It would be right, but no faster, for a few pairs.

    Args:
        query: ``[..., Q, D]``.
        key, value: ``[..., n, D]``.
    """
    if query.shape[-2] != 1 or query.device.type != "cpu" or query.dtype != torch.float32 or key.shape[-2] < _FEWEST:
        return False
    return not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))


def attend_once(query: Tensor, key: Tensor, value: Tensor, is_hidden: Tensor | None, scaling: float) -> Tensor:
    """Attention of one query per head: ``softmax(query @ key^T * scaling) @ value``.

    Args:
        query: ``[S, G, D]``, S key-value heads of all rows, G query heads to each.
        key: ``[S, n, D]``.
        value: ``[S, n, Dv]``.
        is_hidden: bool, broadcastable to ``[S, G, n]``, True for pairs that the queries do not see; or None.
        scaling: of the logits.

    Returns:
        ``[S, G, Dv]``.
    """
    query = query * scaling
    if query.shape[1] == 1:
        logits = _products(query[:, 0], key)[:, None]  # [S, 1, n]
    else:
        logits = torch.bmm(query, key.transpose(1, 2))  # [S, G, n]
    if is_hidden is not None:
        logits.masked_fill_(is_hidden, -torch.inf)
    weights = logits.softmax(-1)
    if query.shape[1] == 1 and value.stride(2) == 1 and value.stride(1) == value.shape[2]:
        return _weighted_sums(weights[:, 0], value)[:, None]
    return torch.bmm(weights, value)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """``query [S, D]`` times ``key [S, n, D]``: ``[S, n]``.

    A batched product reads faster than that of one matrix and a vector, and faster in this order than in the other. So
    one segment is taken for two, which overlap by one key where their number is odd.
    """
    n_segments, n, dim = key.shape
    half = n // 2
    if n_segments == 1:
        key = key.as_strided((2, n - half, dim), (half * key.stride(1), key.stride(1), key.stride(2)))
        query = query.expand(2, -1)
    columns = query[:, None].transpose(1, 2)  # [S, D, 1]; query[..., None] has strides with which bmm is slow
    products = torch.bmm(key, columns)[..., 0]
    return products if n_segments > 1 else torch.cat([products[0, :half], products[1]])[None]


def _weighted_sums(weights: Tensor, value: Tensor) -> Tensor:
    """``weights [S, n]`` times ``value [S, n, Dv]``, whose rows are whole: ``[S, Dv]``.

    The rows of all segments are those of one table, and embedding_bag, which adds up rows of a table with weights,
    fetches them ahead; a matrix product with one row does not.
    """
    n_segments, n, dim = value.shape
    pitch = value.stride(0) // dim if n_segments > 1 else n
    if pitch * dim != value.stride(0) and n_segments > 1:
        return torch.bmm(weights[:, None], value)[:, 0]
    table = value.as_strided(((n_segments - 1) * pitch + n, dim), (dim, 1))
    n_parts = 1 if n_segments > 1 else min(torch.get_num_threads(), n)  # each bag is added up by one thread
    rows, starts = _rows(n_segments, pitch, n, n_parts)
    sums = embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights.reshape(-1))
    return sums if n_parts == 1 else sums.sum(0, keepdim=True)


@lru_cache(maxsize=1)  # the layers of a model mostly ask for the same rows in turn
def _rows(n_segments: int, pitch: int, n: int, n_parts: int) -> tuple[Tensor, Tensor]:
    """Where the first n of every ``pitch`` rows are in the table, and where the bags begin in this list."""
    with torch.inference_mode(False):
        rows = (torch.arange(n_segments)[:, None] * pitch + torch.arange(n)).flatten()
        return rows, torch.arange(n_segments) * n if n_parts == 1 else torch.arange(n_parts) * (n // n_parts)
