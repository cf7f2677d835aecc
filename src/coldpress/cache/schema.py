"""What a file of a saved cache must say and hold, checked before anything is made of it.

A checksum tells that a file is as it was written, not that a cache wrote it. Here types, sizes, dtypes, places and
numbers are compared with each other and with the model, so that what follows can rely on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coldpress.stores.bits import KVBits

__all__ = ["MASK", "TOKENS", "Malformed", "check_said", "check_tensors", "sizes_of"]

MASK = "attention_mask"
TOKENS = "token_ids"
STORES = ("dense", "ragged", "thin", "quantised", "quantised ragged")
_MOST = 2**40  # of a number of tokens: no text is longer, and sums of such numbers are exact
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Parts = dict[str, Tensor]


class Malformed(ValueError):
    """What a file says or holds is none of a cache."""


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise Malformed(what)


def _is_int(value: Any, least: int = 0, most: int = _MOST) -> bool:
    return type(value) is int and least <= value <= most


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


_SAID: dict[str, Callable[[Any], bool]] = {
    "coldpress": _is(str),
    "sha256": _is(str),
    "model": _is(dict),
    "press": _maybe(_is(dict)),
    "chunk_tokens": _maybe(lambda value: _is_int(value, 1)),
    "positions": lambda value: value in ("original", "rerotate"),
    "kv_bits": _maybe(_is(dict)),
    "seed": _maybe(lambda value: _is_int(value, 0, 2**62)),
    "has_padding": _is(bool),
    "layers": _is(list),
}
_MODEL: dict[str, Callable[[Any], bool]] = {
    "name": _is(str),
    "dtype": lambda value: type(value) is str and value in _DTYPES,
    "sizes": _is(dict),
    "kind": _is(dict),
    "weights": _is(str),
}
_PRESS: dict[str, Callable[[Any], bool]] = {"repr": _is(str), "goes_on": _is(bool), "data": _maybe(_is(dict))}
_KV_BITS: dict[str, Callable[[Any], bool]] = {
    "bits": lambda value: _is_int(value) and value in (8, 4, 2),
    "group_size": lambda value: _is_int(value, 1),
    "residual_tokens": _is_int,
}
_LAYER: dict[str, Callable[[Any], bool]] = {
    "store": lambda value: type(value) is str and value in STORES,
    "room": _is_int,
    "seen": lambda value: _is_int(value, 1),
    "tail_start": _is_int,
    "window": _maybe(lambda value: _is_int(value, 1)),
    "is_prefilled": _is(bool),
    "n_new": _is_int,
    "pairs": lambda value: type(value) is list and len(value) == 2 and all(map(_is_int, value)),
    "verdicts_end": _maybe(_is_int),
}


def check_said(said: Any, own: dict[str, Any]) -> None:
    """Check the text of a file by itself, and against the facts ``own`` of the model that is to go on.

    Raises:
        Malformed: naming the field.
    """
    _check_fields(said, _SAID, "")
    _check_fields(said["model"], _MODEL, "model.")
    for part in ("sizes", "kind"):
        _need(said["model"][part].keys() == own[part].keys(), f"model.{part}")
    if said["press"] is not None:
        _check_fields(said["press"], _PRESS, "press.")
        _need(said["press"]["data"] is not None or not said["press"]["goes_on"], "press.data")
    if said["kv_bits"] is not None:
        _check_fields(said["kv_bits"], _KV_BITS, "kv_bits.")
        _need(said["kv_bits"].keys() == _KV_BITS.keys(), "kv_bits")
    layers = said["layers"]
    _need(0 < len(layers) <= own["sizes"]["num_hidden_layers"], "layers")
    for index, layer in enumerate(layers):
        if layer is not None:
            _check_fields(layer, _LAYER, f"layers.{index}.")
            after = max(layer["tail_start"], layer["n_new"], layer["verdicts_end"] or 0)
            _need(after <= layer["seen"], f"layers.{index}: a place after the {layer['seen']} tokens that were seen")
            _need(layer["pairs"][1] <= layer["pairs"][0], f"layers.{index}.pairs")
            _need(("quantised" not in layer["store"]) or said["kv_bits"] is not None, f"layers.{index}.store")
    _need(len({layer["seen"] for layer in layers if layer is not None}) == 1, "seen, which is one number")


def _check_fields(found: Any, wanted: dict[str, Callable[[Any], bool]], where: str) -> None:
    _need(type(found) is dict, where.rstrip(".") or "the whole")
    for name, fits in wanted.items():
        _need(name in found and fits(found[name]), f"{where}{name}")


def sizes_of(config: Any) -> dict[str, set[int]]:
    """What a model's configuration calls numbers of heads and dimensions; layers may differ in them."""
    said: dict[str, Any] = config.to_dict()
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    found = {
        "kv_heads": {getattr(config, "num_key_value_heads", None) or heads},
        "heads": {heads},
        "head_dim": {head_dim or config.hidden_size // heads},
        "hidden_size": {config.hidden_size},
        "vocab_size": {config.vocab_size},
    }
    names = {"kv_heads": ("key_value_heads", "kv_heads"), "heads": ("attention_heads",), "head_dim": ("head_dim",)}
    for size, parts in names.items():
        for name, value in said.items():
            if any(part in name for part in parts):
                found[size] |= {n for n in (value if isinstance(value, list) else [value]) if _is_int(n, 1)}
    return found


def check_tensors(said: dict[str, Any], tensors: Parts, sizes: dict[str, set[int]], n_recent: int) -> None:
    """Check all tensors of a file against what the text says of them, and each other.

    Args:
        said: as :func:`check_said` has checked it.
        tensors: ``layers.I.NAME``, the mask, and the tokens.
        sizes: of the model, from :func:`sizes_of`.
        n_recent: queries that the press remembers, 0 for none.

    Raises:
        Malformed: naming the tensor.
    """
    dtype, rows = _DTYPES[said["model"]["dtype"]], set()
    for index, about in enumerate(said["layers"]):
        prefix = f"layers.{index}."
        parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        _need(about is not None or not parts, f"{prefix.rstrip('.')}, which is empty")
        if about is not None:
            try:
                rows.add(_check_layer(about, parts, dtype, said["kv_bits"], sizes, n_recent))
            except Malformed as error:
                raise Malformed(f"{prefix}{error}") from error
    _need(len(rows) == 1, "the number of rows, which is one for all layers")
    seen = next(layer["seen"] for layer in said["layers"] if layer is not None)
    mask = _Layer(tensors).maybe(MASK, torch.bool, *rows, seen)
    _need(mask is not None or not said["has_padding"], f"{MASK}, which is not there")
    tokens = _Layer(tensors).maybe(TOKENS, torch.int64, *rows, seen)
    if tokens is not None:
        _need(bool(((tokens >= 0) & (tokens < max(sizes["vocab_size"]))).all()), f"{TOKENS} beyond the vocabulary")
    left = next(
        (name for name in tensors if name not in (MASK, TOKENS) and not _is_of_a_layer(name, said["layers"])), None
    )
    _need(left is None, f"{left}, which belongs to nothing")


def _is_of_a_layer(name: str, layers: list[Any]) -> bool:
    start, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    return start == "layers" and index.isdecimal() and str(int(index)) == index and int(index) < len(layers)


class _Layer:
    """The tensors of one layer, taken one by one; what is left over at the end is too much."""

    def __init__(self, parts: Parts):
        self.left = dict(parts)

    def take(self, name: str, dtype: torch.dtype | None, *shape: int | None, finite: bool = True) -> Tensor:
        """One tensor of this dtype and shape; None for a size that is free."""
        part = self.left.pop(name, None)
        _need(part is not None, f"{name}, which is not there")
        assert part is not None
        _need(dtype is None or part.dtype == dtype, f"{name}, of {part.dtype}")
        fits = part.dim() == len(shape) and all(b in (None, a) for a, b in zip(part.shape, shape, strict=True))
        _need(fits, f"{name}, of shape {tuple(part.shape)}")
        if finite and part.is_floating_point():
            _need(bool(part.isfinite().all()), f"{name}, with numbers that are not finite")
        return part

    def maybe(self, name: str, *how: Any, **options: Any) -> Tensor | None:
        return self.take(name, *how, **options) if name in self.left else None


def _check_layer(
    about: dict[str, Any],
    parts: Parts,
    dtype: torch.dtype,
    kv_bits: dict[str, Any] | None,
    sizes: dict[str, set[int]],
    n_recent: int,
) -> int:
    """Check one layer; the number of its rows."""
    layer, store = _Layer(parts), about["store"]
    n_tail = about["seen"] - about["tail_start"]  # tokens after what was kept
    kept = layer.maybe("kept", torch.int32, None, None, None)
    n_kept = 0 if kept is None else kept.shape[2]
    _need(kept is not None or about["tail_start"] == 0 or about["window"] is not None, "kept, which is not there")
    if store in ("ragged", "quantised ragged"):
        n_rows, n_heads, *dims = _check_ragged(layer, store, kept, n_tail, dtype, kv_bits)
    elif store == "quantised":
        n_rows, n_heads, *dims = _check_quantised(layer, n_kept + n_tail, dtype, kv_bits)
    else:
        n_rows, n_heads, *dims = _check_dense(layer, n_kept + n_tail, dtype, is_thin=store == "thin")
    _need(n_rows > 0 and n_heads in sizes["kv_heads"], f"{n_heads} heads")
    _need(set(dims) <= sizes["head_dim"], f"heads of {dims[0]} and {dims[1]} channels")
    dim = dims[0]
    if kept is not None:
        _need(kept.shape[:2] == (n_rows, n_heads), "kept")
        _check_positions(kept, about["tail_start"])
    n_most = n_rows * n_heads * about["seen"]
    _need(about["pairs"][0] <= n_most, "pairs")
    layer.maybe("carry", torch.float32, n_rows, n_heads, n_kept, finite=False)
    fine = layer.maybe("fine", None, n_rows, n_heads, None, None)
    if fine is not None:
        fits = fine.is_floating_point() and fine.shape[2] <= n_kept + n_tail and fine.shape[3] <= dim
        _need(fits and store in ("dense", "ragged"), "fine")
    recent = layer.maybe("recent", dtype, n_rows, None, None, None)
    _need(recent is not None or not n_recent or about["window"] is not None, "recent, which is not there")
    if recent is not None:
        fits = recent.shape[1] in sizes["heads"] and recent.shape[3] == dim
        _need(fits and recent.shape[2] <= min(n_recent, about["seen"]), "recent")
        _check_columns(layer, "recent_at", recent.shape[2], n_rows, about["seen"])
    unseen = layer.maybe("unseen", None, n_rows, None, None)
    if unseen is not None:
        fits = unseen.is_floating_point() and unseen.shape[2] in sizes["hidden_size"]
        _need(fits and unseen.shape[1] <= about["seen"], "unseen")
        _check_columns(layer, "unseen_at", unseen.shape[1], n_rows, about["seen"])
    n_new = layer.maybe("n_new", torch.int64, n_rows)
    _need(n_new is None or (int(n_new.min()) >= 0 and int(n_new.max()) == about["n_new"]), "n_new")
    stays = layer.maybe("stays", torch.bool, n_rows, n_heads, None)
    _need((stays is None) == (about["verdicts_end"] is None), "verdicts_end")
    _need(stays is None or stays.shape[2] <= about["verdicts_end"], "stays")
    _need(not layer.left, f"{next(iter(layer.left), '')}, which belongs to nothing")
    return n_rows


def _check_columns(layer: _Layer, name: str, n: int, n_rows: int, seen: int) -> None:
    """int64 ``[B, n]``, if it is there: -1 for no token, then ascending columns in 0 .. seen - 1."""
    at = layer.maybe(name, torch.int64, n_rows, n)
    if at is not None:
        _need(bool(((at >= -1) & (at < seen)).all()), f"{name}, with a column that is not in 0 .. {seen - 1}")
        now, later = at[:, :-1], at[:, 1:]
        _need(bool(((later > now) | (now == -1)).all()), f"{name}, whose columns do not ascend")


def _check_positions(kept: Tensor, end: int) -> None:
    """int32 ``[B, Hkv, n]``: ascending in 0 .. end - 1, then -1 for empty slots; only the last place may come again."""
    is_filled = kept >= 0
    _need(bool((kept >= -1).all()) and bool((kept < end).all()), f"kept, with a place that is not in 0 .. {end - 1}")
    if kept.shape[2] > 1:
        now, later = kept[..., :-1], kept[..., 1:]
        is_next = (later > now) | ((later == now) & (now == end - 1))
        _need(bool((is_next | ~is_filled[..., 1:]).all()), "kept, whose places do not ascend")
        _need(bool((is_filled[..., :-1] | ~is_filled[..., 1:]).all()), "kept, with an empty slot between others")


def _check_dense(layer: _Layer, n: int, dtype: torch.dtype, is_thin: bool) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values of a dense store of ``n`` slots, or of one with thin keys."""
    values = layer.take("store.values", dtype, None, None, n, None)
    n_rows, n_heads = values.shape[:2]
    keys = layer.take("store.keys", dtype, n_rows, n_heads, None if is_thin else n, None)
    dim, n_thin = keys.shape[3], n - keys.shape[2]
    if is_thin:
        narrow = layer.take("store.narrow", dtype, n_rows, n_heads, n_thin, None)
        channels = layer.take("store.channels", torch.int16, n_rows, n_heads, dim)
        each = torch.arange(dim, dtype=torch.int16).expand_as(channels)
        _need(narrow.shape[3] <= dim and torch.equal(channels.sort(-1).values, each), "store.channels")
        others = layer.take("store.others", dtype, n_rows, n_heads, None, dim - narrow.shape[3])
        wide = layer.take("store.wide", torch.int32, n_rows, n_heads, others.shape[2])
        _need(bool(((wide >= 0) & (wide <= n_thin)).all()), "store.wide")
    return n_rows, n_heads, dim, values.shape[3]


def _check_flat(layer: _Layer, of: str, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Pairs of each segment of a ragged store, int64 ``[B, Hkv]``; channels of its keys and values."""
    counts = layer.take(f"{of}counts", torch.int64, None, None)
    keys = layer.take(f"{of}keys", dtype, None, None)
    values = layer.take(f"{of}values", dtype, keys.shape[0], None)
    _need(counts.numel() > 0 and bool(((counts >= 0) & (counts <= len(keys))).all()), f"{of}counts")
    n_later, rest = divmod(len(keys) - int(counts.sum()), counts.numel())
    _need(n_later >= 0 and rest == 0, f"{of}counts")
    return counts + n_later, keys.shape[1], values.shape[1]


def _check_ragged(
    layer: _Layer, store: str, kept: Tensor | None, n_tail: int, dtype: torch.dtype, kv_bits: dict[str, Any] | None
) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values of a store whose heads hold different numbers."""
    _need(kept is not None, "kept, which is not there")
    assert kept is not None
    if store == "ragged":
        held, *dims = _check_flat(layer, "store.", dtype)
    else:
        held, *dims = _check_flat(layer, "store.tail.", dtype)
        held = held + _check_codes(layer, dims, held.numel(), dtype, kv_bits).view_as(held)
        counts = layer.take("store.counts", torch.int64, held.numel() + 1)
        _need(torch.equal(counts[:-1], (held - n_tail).flatten()) and int(counts[-1]) == n_tail, "store.counts")
    own = (kept >= 0).sum(-1) + n_tail  # [B, Hkv]
    _need(torch.equal(held, own), "store.counts, which are not those of kept")
    return held.shape[0], held.shape[1], dims[0], dims[1]


def _check_quantised(
    layer: _Layer, n: int, dtype: torch.dtype, kv_bits: dict[str, Any] | None
) -> tuple[int, int, int, int]:
    """Rows, heads and channels of keys and values of a store of ``n`` slots, the first ones in few bits."""
    values = layer.take("store.tail.values", dtype, None, None, None, None)
    n_rows, n_heads, n_tail, dim_v = values.shape
    keys = layer.take("store.tail.keys", dtype, n_rows, n_heads, n_tail, None)
    _need(dim_v > 0, "store.tail.values")
    coded = _check_codes(layer, [keys.shape[3], dim_v], n_rows * n_heads, dtype, kv_bits)
    _need(bool((coded + n_tail == n).all()), "store.n_blocks")
    return n_rows, n_heads, keys.shape[3], dim_v


def _check_codes(
    layer: _Layer, dims: list[int], n_segments: int, dtype: torch.dtype, kv_bits: dict[str, Any] | None
) -> Tensor:
    """How many pairs of each segment are in few bits, int64 ``[segments]``; ``dims`` of keys and values."""
    assert kv_bits is not None
    bits, g = kv_bits["bits"], kv_bits["group_size"]
    how = layer.take("store.how", torch.int64, 3)
    _need(how.tolist() == [bits, g, kv_bits["residual_tokens"]], "store.how")
    blocks = layer.maybe("store.n_blocks", torch.int64, n_segments)
    if blocks is None:
        return torch.zeros(n_segments, dtype=torch.int64)
    _need(bool(((blocks >= 0) & (blocks <= _MOST // g)).all()), "store.n_blocks")
    n, kind = int(blocks.sum()), torch.bfloat16 if dtype == torch.float32 else dtype
    n_steps = dims[1] // KVBits(**kv_bits).channels(dims[1])
    for which, dim, shape in (("keys", dims[0], (n, 1, dims[0])), ("values", dims[1], (n, g, n_steps))):
        layer.take(f"store.{which}.packed", torch.uint8, n, g, -(-dim * bits // 8))
        layer.take(f"store.{which}.scale", kind, *shape)
        layer.take(f"store.{which}.zero", dtype, *shape)
    return blocks * g
