"""Schema of the store of one layer in the file of a saved cache: its pairs, as they are or encoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coldpress.cache.taken import MOST, Malformed, Taken, need
from coldpress.stores.bits import KVBits
from coldpress.stores.codec import Blocks, Codec, TokenCodec, form_of

__all__ = ["STORES", "Codes", "check_store", "codes_of"]

STORES = ("dense", "ragged", "thin", "quantised", "quantised ragged", "coded", "coded ragged", "packed")
# the layer, channels of keys and values, segments, dtype: how many pairs of each segment are encoded, int64 [segments]
Codes = Callable[[Taken, list[int], int, torch.dtype], Tensor]


def codes_of(kv_bits: dict[str, Any] | None, codec: Codec | None) -> Codes:
    """How encoded pairs are checked: those of ``kv_bits``, or of a codec that is no KVBits."""
    if isinstance(codec, TokenCodec):
        return partial(_check_rows, codec)
    return partial(_check_codes, kv_bits) if codec is None else partial(_check_blocks, codec)


def check_store(
    layer: Taken, store: str, kept: Tensor | None, n_tail: int, dtype: torch.dtype, codes: Codes
) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values.

    Args:
        store: one of :data:`STORES`.
        kept: int32 ``[B, Hkv, n]``, positions of what was kept, before ``n_tail`` later tokens; None: nothing was.
    """
    n = (0 if kept is None else kept.shape[2]) + n_tail
    is_by_token = isinstance(codes, partial) and codes.func is _check_rows
    need((store == "packed") == is_by_token or store in ("dense", "ragged", "thin"), "store")
    if store == "packed":
        return _check_packed(layer, kept, n_tail, dtype, codes)
    if "ragged" in store:
        return _check_ragged(layer, kept, n_tail, dtype, None if store == "ragged" else codes)
    if store in ("quantised", "coded"):
        return _check_coded(layer, n, dtype, codes)
    return _check_dense(layer, n, dtype, is_thin=store == "thin")


def _check_dense(layer: Taken, n: int, dtype: torch.dtype, is_thin: bool) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values of a dense store of ``n`` slots, or of one with thin keys."""
    values = layer.take("store.values", dtype, None, None, n, None)
    n_rows, n_heads = values.shape[:2]
    keys = layer.take("store.keys", dtype, n_rows, n_heads, None if is_thin else n, None)
    dim, n_thin = keys.shape[3], n - keys.shape[2]
    if is_thin:
        narrow = layer.take("store.narrow", dtype, n_rows, n_heads, n_thin, None)
        channels = layer.take("store.channels", torch.int16, n_rows, n_heads, dim)
        each = torch.arange(dim, dtype=torch.int16).expand_as(channels)
        need(narrow.shape[3] <= dim and torch.equal(channels.sort(-1).values, each), "store.channels")
        others = layer.take("store.others", dtype, n_rows, n_heads, None, dim - narrow.shape[3])
        wide = layer.take("store.wide", torch.int32, n_rows, n_heads, others.shape[2])
        need(bool(((wide >= 0) & (wide <= n_thin)).all()), "store.wide")
    return n_rows, n_heads, dim, values.shape[3]


def _check_flat(layer: Taken, of: str, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Pairs of each segment of a ragged store, int64 ``[B, Hkv]``; channels of its keys and values."""
    counts = layer.take(f"{of}counts", torch.int64, None, None)
    keys = layer.take(f"{of}keys", dtype, None, None)
    values = layer.take(f"{of}values", dtype, keys.shape[0], None)
    need(counts.numel() > 0 and bool(((counts >= 0) & (counts <= len(keys))).all()), f"{of}counts")
    n_later, rest = divmod(len(keys) - int(counts.sum()), counts.numel())
    need(n_later >= 0 and rest == 0, f"{of}counts")
    return counts + n_later, keys.shape[1], values.shape[1]


def _check_ragged(
    layer: Taken, kept: Tensor | None, n_tail: int, dtype: torch.dtype, codes: Codes | None
) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values of a store whose heads store different numbers."""
    need(kept is not None, "kept, which is not there")
    assert kept is not None
    if codes is None:
        stored, *dims = _check_flat(layer, "store.", dtype)
    else:
        stored, *dims = _check_flat(layer, "store.tail.", dtype)
        stored = stored + codes(layer, dims, stored.numel(), dtype).view_as(stored)
        counts = layer.take("store.counts", torch.int64, stored.numel() + 1)
        need(torch.equal(counts[:-1], (stored - n_tail).flatten()) and int(counts[-1]) == n_tail, "store.counts")
    own = (kept >= 0).sum(-1) + n_tail  # [B, Hkv]
    need(torch.equal(stored, own), "store.counts, which are not those of kept")
    return stored.shape[0], stored.shape[1], dims[0], dims[1]


def _check_coded(layer: Taken, n: int, dtype: torch.dtype, codes: Codes) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values of a store of ``n`` slots, the first ones encoded."""
    values = layer.take("store.tail.values", dtype, None, None, None, None)
    n_rows, n_heads, n_tail, dim_v = values.shape
    keys = layer.take("store.tail.keys", dtype, n_rows, n_heads, n_tail, None)
    need(dim_v > 0, "store.tail.values")
    coded = codes(layer, [keys.shape[3], dim_v], n_rows * n_heads, dtype)
    need(bool((coded + n_tail == n).all()), "store.n_blocks")
    return n_rows, n_heads, keys.shape[3], dim_v


def _check_packed(
    layer: Taken, kept: Tensor | None, n_tail: int, dtype: torch.dtype, codes: Codes
) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values of a store of pairs that were encoded one by one."""
    first = layer.take("store.n_first", torch.int64, None, None)
    need(first.numel() > 0, "store.n_first")
    front, exact = (layer.take(f"store.{name}", torch.int64, *first.shape) for name in ("n_front", "n_exact"))
    keys = layer.take("store.exact.keys", dtype, None, None)
    values = layer.take("store.exact.values", dtype, keys.shape[0], None)
    dims = [keys.shape[1], values.shape[1]]
    need(min(dims) > 0, "store.exact.keys")
    need(bool(((exact >= 0) & (exact <= len(keys))).all()) and int(exact.sum()) == len(keys), "store.n_exact")
    need(bool(((front >= 0) & (front <= exact)).all()), "store.n_front")
    need(torch.equal(first, torch.zeros_like(first) if kept is None else (kept >= 0).sum(-1)), "store.n_first")
    n_codes = codes(layer, dims, first.numel(), dtype).view_as(first)
    need(torch.equal(exact + n_codes, first + n_tail), "store.n_codes")
    return first.shape[0], first.shape[1], dims[0], dims[1]


def _check_rows(codec: Codec, layer: Taken, dims: list[int], n_segments: int, dtype: torch.dtype) -> Tensor:
    """As :func:`_check_codes`, of a codec that encodes pairs one by one."""
    n_codes = layer.take("store.n_codes", torch.int64, None, None).flatten()
    need(len(n_codes) == n_segments and bool(((n_codes >= 0) & (n_codes <= MOST)).all()), "store.n_codes")
    for name, one in _form(codec, dims, dtype).items():
        layer.take(f"store.{name}", one.dtype, int(n_codes.sum()), *one.shape[2:])
    return n_codes


def _form(codec: Codec, dims: list[int], dtype: torch.dtype) -> Blocks:
    try:
        return form_of(codec, dims, dtype)
    except Exception as error:  # any error of a codec with unchecked parameters
        raise Malformed(f"storage that encodes ({' '.join(str(error).split())[:200]})") from error


def _check_blocks(codec: Codec, layer: Taken, dims: list[int], n_segments: int, dtype: torch.dtype) -> Tensor:
    """As :func:`_check_codes`, of a codec: blocks are such as it makes of zeros."""
    blocks = layer.maybe("store.n_blocks", torch.int64, n_segments)
    if blocks is None:
        return torch.zeros(n_segments, dtype=torch.int64)
    need(bool(((blocks >= 0) & (blocks <= MOST // codec.block_tokens)).all()), "store.n_blocks")
    for name, one in _form(codec, dims, dtype).items():
        layer.take(f"store.{name}", one.dtype, int(blocks.sum()), *one.shape[1:])
    return blocks * codec.block_tokens


def _check_codes(
    kv_bits: dict[str, Any] | None, layer: Taken, dims: list[int], n_segments: int, dtype: torch.dtype
) -> Tensor:
    """How many pairs of each segment are in few bits, int64 ``[segments]``; ``dims`` of keys and values."""
    assert kv_bits is not None
    bits, g = kv_bits["bits"], kv_bits["group_size"]
    how = layer.take("store.how", torch.int64, 3)
    need(how.tolist() == [bits, g, kv_bits["residual_tokens"]], "store.how")
    blocks = layer.maybe("store.n_blocks", torch.int64, n_segments)
    if blocks is None:
        return torch.zeros(n_segments, dtype=torch.int64)
    need(bool(((blocks >= 0) & (blocks <= MOST // g)).all()), "store.n_blocks")
    n, kind = int(blocks.sum()), torch.bfloat16 if dtype == torch.float32 else dtype
    n_steps = dims[1] // KVBits(**kv_bits).channels(dims[1])
    for which, dim, shape in (("keys", dims[0], (n, 1, dims[0])), ("values", dims[1], (n, g, n_steps))):
        layer.take(f"store.{which}.packed", torch.uint8, n, g, -(-dim * bits // 8))
        layer.take(f"store.{which}.scale", kind, *shape)
        layer.take(f"store.{which}.zero", dtype, *shape)
    return blocks * g
