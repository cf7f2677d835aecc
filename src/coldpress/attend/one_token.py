"""Attention of one new token over the pairs that are stored, on the CPU, at the speed at which memory is read.

One query per head leaves nothing to compute with a pair but two products of vectors, so the time is that of reading
keys and values. ``scaled_dot_product_attention`` is made for many queries and reads them at less than half of that
speed; of the two products below the first comes to two thirds of it and the second to all of it.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from coldpress.core.pick import pick

__all__ = ["attend_blocks", "attend_once", "attend_some", "can_attend_once", "products", "weighted_sums"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEWEST = 256  # pairs of a head from which on reading them takes longer than calling torch a few times more


def can_attend_once(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attend_once` is for these tensors: one query per head, on the CPU, without gradients.

    It would be right, but no faster, for a few pairs.

    Args:
        query: ``[..., Q, D]``.
        key, value: ``[..., n, D]``, float32, bfloat16 or float16.
    """
    if query.shape[-2] != 1 or query.device.type != "cpu" or query.dtype not in _DTYPES or key.shape[-2] < _FEWEST:
        return False
    return not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))


def attend_once(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attention of one query per head: ``softmax(query @ key^T * scaling) @ value``, the logits in float32.

    Args:
        query: ``[S, G, D]``, S key-value heads of all rows, G query heads to each.
        key: ``[S, n, D]``.
        value: ``[S, n, Dv]``.
        bias: float32, broadcastable to ``[S, G, n]``, added to the logits; or None.
        scaling: of the logits.

    Returns:
        ``[S, G, Dv]``.
    """
    logits = products(query.float() * scaling, key.float())
    if bias is not None:
        logits += bias
    weights = logits.softmax(-1)
    if value.stride(2) == 1 and value.stride(1) == value.shape[2]:
        return weighted_sums(weights.to(value.dtype), value)
    return torch.bmm(weights, value.float()).to(value.dtype)


def attend_some(query: Tensor, key: Tensor, value: Tensor, at: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """As :func:`attend_once`, over some of the pairs: keys are copied out, values are read where they are.

    Args:
        query: ``[B, Hq, 1, D]``.
        key: ``[B, Hkv, n, D]``.
        value: ``[B, Hkv, n, Dv]``.
        at: int64 ``[B, Hkv, m]``, which pairs.
        bias: float32 ``[B, Hkv, m]``, added to their logits.
        scaling: of the logits.

    Returns:
        ``[B, 1, Hq, Dv]``.
    """
    grouped = query.float().reshape(at.shape[0] * at.shape[1], -1, query.shape[3]) * scaling
    logits = products(grouped, pick(key, at).flatten(0, 1).float())
    weights = logits.add_(bias.flatten(0, 1)[:, None]).softmax(-1)
    if value.stride(3) == 1 and value.stride(2) == value.shape[3]:
        output = weighted_sums(weights.to(value.dtype), value.flatten(0, 1), at.flatten(0, 1))
    else:
        output = torch.bmm(weights, pick(value, at).flatten(0, 1).float()).to(value.dtype)
    return output.reshape(at.shape[0], 1, query.shape[1], -1)


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment: Tensor,
    n_used: Tensor,
    n_slots: int,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As :func:`attend_once`, of S segments of different lengths, each of whole blocks of slots.

    All blocks share two products: softmax is taken in each, and then over the blocks of a segment.

    Args:
        query: ``[S, G, D]``.
        key: ``[N * c, D]``, N blocks of c slots.
        value: ``[N * c, Dv]``; finite in empty slots too.
        segment: int64 ``[N]``, which segment each block belongs to.
        n_used: int64 ``[N]``, how many slots are in use from the first one of each block on: none if not positive,
            all if c or more. No segment is empty.
        n_slots: c.
        scaling: of the logits.
        bias: float32 ``[N, c]``, added to the logits, minus infinity in slots that are empty; or None.
        softcap: logits x are softcap * tanh(x / softcap) before the bias.
        sinks: float32 ``[S, G]``, logits that take weight from the pairs and have no value.

    Returns:
        ``[S, G, Dv]``.
    """
    n_segments, group, dim = query.shape
    n_blocks = len(segment)
    own = (query.float() * scaling).index_select(0, segment)
    logits = torch.bmm(own, key.view(n_blocks, n_slots, dim).float().transpose(1, 2))  # [N, G, c]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is None:
        is_empty = torch.arange(n_slots, device=key.device) >= n_used[:, None]
        logits.masked_fill_(is_empty[:, None], -torch.inf)
    else:
        logits += bias[:, None]
    largest = logits.new_full((n_segments, group), -torch.inf) if sinks is None else sinks.clone()
    largest.scatter_reduce_(0, segment[:, None].expand(-1, group), logits.amax(2), "amax")
    weights = logits.sub_(largest.index_select(0, segment)[..., None]).exp_()
    mass = weights.sum(2)  # [N, G]
    total = largest.zero_() if sinks is None else (sinks - largest).exp_()
    total.index_add_(0, segment, mass)
    is_narrow = value.dtype == torch.float16  # embedding_bag's sums are in it too, and have to stay in its range
    if is_narrow:
        weights.div_(mass.clamp_min(torch.finfo(mass.dtype).tiny)[..., None])
    if torch.compiler.is_compiling():  # a compiled step has no use for the memory
        rows, starts = _block_rows.__wrapped__(group, n_slots, n_blocks, key.device)
    else:
        rows, starts = _block_rows(group, n_slots, 1 << (n_blocks - 1).bit_length(), key.device)
    sums = embedding_bag(
        rows[: n_blocks * group * n_slots],
        value,
        starts[: n_blocks * group],
        mode="sum",
        per_sample_weights=weights.to(value.dtype).flatten(),
    ).float()
    if is_narrow:
        sums.mul_(mass.view(-1, 1))
    output = sums.new_zeros(n_segments, group, value.shape[1]).index_add_(0, segment, sums.view(n_blocks, group, -1))
    return (output / total[..., None]).to(value.dtype)


@lru_cache(maxsize=2)
def _block_rows(group: int, n_slots: int, n_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of each block, ``group`` times, and where bags begin; those of fewer blocks are the first of these."""
    with torch.inference_mode(False):
        rows = torch.arange(n_blocks * n_slots, dtype=torch.int32, device=device).view(-1, 1, n_slots)
        starts = torch.arange(n_blocks * group, dtype=torch.int32, device=device) * n_slots
        return rows.expand(-1, group, -1).flatten(), starts


def products(query: Tensor, key: Tensor) -> Tensor:
    """``query [S, G, D]`` times ``key [S, n, D]``: ``[S, G, n]``.

    A batched product reads faster than that of one matrix and a vector. So one segment is taken for two, which overlap
    by one key where their number is odd.
    """
    n_segments, n, dim = key.shape
    half = n // 2
    if n_segments == 1:
        key = key.as_strided((2, n - half, dim), (half * key.stride(1), key.stride(1), key.stride(2)))
        query = query.expand(2, -1, -1)
    is_group = torch.compiler.is_compiling() and query.shape[1] > 1  # softmax over its columns is slow in a loop
    found = (_by_rows if is_group or _rows_are_faster() else _by_columns)(query, key)
    return found if n_segments > 1 else torch.cat([found[:1, :, :half], found[1:]], dim=2)


def _by_rows(query: Tensor, key: Tensor) -> Tensor:
    return torch.bmm(query, key.transpose(1, 2))


def _by_columns(query: Tensor, key: Tensor) -> Tensor:
    columns = query.contiguous().transpose(1, 2)  # [S, D, G]; with other strides bmm is slow
    return torch.bmm(key, columns).transpose(1, 2)


@torch.compiler.assume_constant_result
def _rows_are_faster() -> bool:
    return _tried_orders()


@lru_cache(maxsize=1)
def _tried_orders() -> bool:
    """Whether the product by rows is faster here: either may be, by half, from processor to processor."""
    with torch.inference_mode():
        query, key = torch.ones(8, 1, 64), torch.ones(8, 2048, 64)
        took = []
        for _ in range(6):  # the first of each is not counted
            for product in (_by_rows, _by_columns):
                start = time.perf_counter()
                product(query, key)
                took.append(time.perf_counter() - start)
    return min(took[2::2]) < min(took[3::2])


def weighted_sums(weights: Tensor, value: Tensor, at: Tensor | None = None) -> Tensor:
    """``weights [S, G, n]`` times ``value [S, n, Dv]``, whose rows are whole: ``[S, G, Dv]``.

    With ``at``, int64 ``[S, m]``, the weights ``[S, G, m]`` are those of these rows.

    The rows of all segments are those of one table, and embedding_bag, which adds up rows of a table with weights,
    fetches them ahead; a matrix product with few rows does not.
    """
    (n_segments, n, dim), group = value.shape, weights.shape[1]
    if not n:
        return value.new_zeros(n_segments, group, dim)
    pitch = value.stride(0) // dim if n_segments > 1 else n
    if pitch * dim != value.stride(0) and n_segments > 1:
        value = value if at is None else pick(value[None], at[None])[0]
        return torch.bmm(weights.float(), value.float()).to(value.dtype)
    table = value.as_strided(((n_segments - 1) * pitch + n, dim), (dim, 1))
    if at is not None:
        first = torch.arange(n_segments, device=at.device)[:, None, None] * pitch
        rows = (at[:, None] + first).expand(-1, group, -1).flatten()
        starts = torch.arange(n_segments * group, device=at.device) * at.shape[1]
        sums = embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights.flatten())
        return sums.view(n_segments, group, dim)
    is_alone = n_segments * group == 1
    n_parts = min(torch.get_num_threads(), n) if is_alone else 1  # each bag is added up by one thread
    find = _rows.__wrapped__ if torch.compiler.is_compiling() else _rows  # a compiled step has no use for the memory
    rows, starts = find(n_segments, group, pitch, n, n_parts)
    sums = embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights.flatten())
    return sums.view(n_segments, group, dim) if n_parts == 1 else sums.sum(0)[None, None]


@lru_cache(maxsize=16)  # the layers of a model ask for the same rows in turn, one for each length of a batch's rows
def _rows(n_segments: int, group: int, pitch: int, n: int, n_parts: int) -> tuple[Tensor, Tensor]:
    """Where the first n of every ``pitch`` rows are in the table, ``group`` times, and where bags begin in the list."""
    with torch.inference_mode(False):
        rows = (torch.arange(n_segments)[:, None, None] * pitch + torch.arange(n)).expand(-1, group, -1).flatten()
        return rows, torch.arange(n_segments * group) * n if n_parts == 1 else torch.arange(n_parts) * (n // n_parts)
