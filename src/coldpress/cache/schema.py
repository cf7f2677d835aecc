"""Schema of the file of a saved cache, checked before anything is made of it.

A checksum tells that a file is as it was written, not that a cache wrote it. Here types, sizes, dtypes, places and
numbers are compared with each other and with the model, so that what follows can rely on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from coldpress.cache.schema_stores import STORES, Codes, check_store, codes_of
from coldpress.cache.slots import BIAS, OWN
from coldpress.cache.taken import Malformed, Parts, Taken, is_int, need
from coldpress.core.column import PINNED, Column
from coldpress.stores.codec import Codec

__all__ = ["MASK", "TOKENS", "check_said", "check_tensors", "sizes_of"]

MASK = "attention_mask"
TOKENS = "token_ids"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _is_row_of_spans(value: Any) -> bool:
    if type(value) is not list or not all(type(span) is list and len(span) == 2 for span in value):
        return False
    return all(is_int(start) and is_int(stop, start + 1) for start, stop in value)


_SAID: dict[str, Callable[[Any], bool]] = {
    "coldpress": _is(str),
    "sha256": _is(str),
    "model": _is(dict),
    "press": _maybe(_is(dict)),
    "chunk_tokens": _maybe(lambda value: is_int(value, 1)),
    "positions": lambda value: value in ("original", "rerotate"),
    "kv_bits": _maybe(_is(dict)),
    "seed": _maybe(lambda value: is_int(value, 0, 2**62)),
    "has_padding": _is(bool),
    "layers": _is(list),
}
_NEWER: dict[str, Callable[[Any], bool]] = {  # what format 2 may say, one of them at least, and format 1 does not
    "pins": lambda value: type(value) is list and any(value) and all(map(_is_row_of_spans, value)),
    "storage": lambda value: type(value) is dict and value.keys() == _STORAGE.keys(),
    "columns": lambda value: value is True,
}
_OPTIONAL: dict[str, Callable[[Any], bool]] = {"cut_tokens": is_int}  # what any format may say, and none has to
_STORAGE: dict[str, Callable[[Any], bool]] = {"class": _is(str), "parameters": _is(dict)}
_MODEL: dict[str, Callable[[Any], bool]] = {
    "name": _is(str),
    "dtype": lambda value: type(value) is str and value in _DTYPES,
    "sizes": _is(dict),
    "kind": _is(dict),
    "weights": _is(str),
}
_PRESS: dict[str, Callable[[Any], bool]] = {"repr": _is(str), "goes_on": _is(bool), "data": _maybe(_is(dict))}
_KV_BITS: dict[str, Callable[[Any], bool]] = {
    "bits": lambda value: is_int(value) and value in (8, 4, 2),
    "group_size": lambda value: is_int(value, 1),
    "residual_tokens": is_int,
}
_LAYER: dict[str, Callable[[Any], bool]] = {
    "store": lambda value: type(value) is str and value in STORES,
    "room": is_int,
    "seen": lambda value: is_int(value, 1),
    "tail_start": is_int,
    "window": _maybe(lambda value: is_int(value, 1)),
    "is_prefilled": _is(bool),
    "n_new": is_int,
    "pairs": lambda value: type(value) is list and len(value) == 2 and all(map(is_int, value)),
    "verdicts_end": _maybe(is_int),
}


def check_said(said: Any, own: dict[str, Any], version: int) -> None:
    """Check the text of a file by itself, and against the facts ``own`` of the model that is to go on.

    Args:
        version: of the format.

    Raises:
        Malformed: naming the field.
    """
    newer = {name: fits for name, fits in _NEWER.items() if type(said) is dict and name in said}
    optional = {name: fits for name, fits in _OPTIONAL.items() if type(said) is dict and name in said}
    _check_fields(said, _SAID | newer | optional, "")
    need(bool(newer) == (version > 1), f"{', '.join(newer) or 'nothing that is newer'} in format {version}")
    if "storage" in said:
        _check_fields(said["storage"], _STORAGE, "storage.")
        need(said["kv_bits"] is None, "storage beside kv_bits")
    _check_fields(said["model"], _MODEL, "model.")
    for part in ("sizes", "kind"):
        need(said["model"][part].keys() == own[part].keys(), f"model.{part}")
    if said["press"] is not None:
        _check_fields(said["press"], _PRESS, "press.")
        need(said["press"]["data"] is not None or not said["press"]["goes_on"], "press.data")
    if said["kv_bits"] is not None:
        _check_fields(said["kv_bits"], _KV_BITS, "kv_bits.")
        need(said["kv_bits"].keys() == _KV_BITS.keys(), "kv_bits")
    layers = said["layers"]
    need(0 < len(layers) <= own["sizes"]["num_hidden_layers"], "layers")
    for index, layer in enumerate(layers):
        if layer is not None:
            _check_fields(layer, _LAYER, f"layers.{index}.")
            after = max(layer["tail_start"], layer["n_new"], layer["verdicts_end"] or 0)
            need(after <= layer["seen"], f"layers.{index}: a place after the {layer['seen']} tokens that were seen")
            need(layer["pairs"][1] <= layer["pairs"][0], f"layers.{index}.pairs")
            need("quantised" not in layer["store"] or said["kv_bits"] is not None, f"layers.{index}.store")
            need(
                not any(name in layer["store"] for name in ("coded", "packed")) or "storage" in said,
                f"layers.{index}.store",
            )
            need("codec" not in layer or ("storage" in said and is_int(layer["codec"], 1)), f"layers.{index}.codec")
            need("columns" not in layer or (type(layer["columns"]) is dict and said.get("columns")), "columns")
    need(len({layer["seen"] for layer in layers if layer is not None}) == 1, "seen, which is one number")


def _check_fields(found: Any, wanted: dict[str, Callable[[Any], bool]], where: str) -> None:
    need(type(found) is dict, where.rstrip(".") or "the whole")
    for name, fits in wanted.items():
        need(name in found and fits(found[name]), f"{where}{name}")


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
                found[size] |= {n for n in (value if isinstance(value, list) else [value]) if is_int(n, 1)}
    return found


def check_tensors(
    said: dict[str, Any],
    tensors: Parts,
    sizes: dict[str, set[int]],
    n_recent: int,
    codec: Codec | None = None,
    kinds: Mapping[str, Column] | None = None,
) -> None:
    """Check all tensors of a file against what the text says of them, and each other.

    Args:
        said: as :func:`check_said` has checked it.
        tensors: ``layers.I.NAME``, the mask, and the tokens.
        sizes: of the model, from :func:`sizes_of`.
        n_recent: queries that the press remembers, 0 for none.
        codec: the file's, where it is no KVBits.
        kinds: the columns that the press declares, by name.

    Raises:
        Malformed: naming the tensor.
    """
    dtype, rows, kinds = _DTYPES[said["model"]["dtype"]], set(), {BIAS.name: BIAS, **(kinds or {})}
    codecs = (None,) if codec is None else codec.codecs
    for index, about in enumerate(said["layers"]):
        prefix = f"layers.{index}."
        parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        need(about is not None or not parts, f"{prefix.rstrip('.')}, which is empty")
        if about is not None:
            try:
                need(about.get("codec", 0) < len(codecs), "codec")
                codes = codes_of(said["kv_bits"], codecs[about.get("codec", 0)])
                rows.add(_check_layer(about, parts, dtype, codes, sizes, n_recent, kinds))
            except Malformed as error:
                raise Malformed(f"{prefix}{error}") from error
    need(len(rows) == 1, "the number of rows, which is one for all layers")
    need(len(said.get("pins", [0])) in (1, *rows), "pins, of another number of rows")
    seen = next(layer["seen"] for layer in said["layers"] if layer is not None)
    mask = Taken(tensors).maybe(MASK, torch.bool, *rows, seen)
    need(mask is not None or not said["has_padding"], f"{MASK}, which is not there")
    tokens = Taken(tensors).maybe(TOKENS, torch.int64, *rows, seen)
    if tokens is not None:
        need(bool(((tokens >= 0) & (tokens < max(sizes["vocab_size"]))).all()), f"{TOKENS} beyond the vocabulary")
    left = next(
        (name for name in tensors if name not in (MASK, TOKENS) and not _is_of_a_layer(name, said["layers"])), None
    )
    need(left is None, f"{left}, which belongs to nothing")


def _is_of_a_layer(name: str, layers: list[Any]) -> bool:
    start, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    return start == "layers" and index.isdecimal() and str(int(index)) == index and int(index) < len(layers)


def _check_layer(
    about: dict[str, Any],
    parts: Parts,
    dtype: torch.dtype,
    codes: Codes,
    sizes: dict[str, set[int]],
    n_recent: int,
    kinds: Mapping[str, Column],
) -> int:
    """Check one layer; the number of its rows."""
    layer, store = Taken(parts), about["store"]
    n_tail = about["seen"] - about["tail_start"]  # tokens after what was kept
    kept = layer.maybe("kept", torch.int32, None, None, None)
    n_kept = 0 if kept is None else kept.shape[2]
    need(kept is not None or about["tail_start"] == 0 or about["window"] is not None, "kept, which is not there")
    n_rows, n_heads, *dims = check_store(layer, store, kept, n_tail, dtype, codes)
    need(n_rows > 0 and n_heads in sizes["kv_heads"], f"{n_heads} heads")
    need(set(dims) <= sizes["head_dim"], f"heads of {dims[0]} and {dims[1]} channels")
    dim = dims[0]
    if kept is not None:
        need(kept.shape[:2] == (n_rows, n_heads), "kept")
        _check_positions(kept, about["tail_start"])
    n_most = n_rows * n_heads * about["seen"]
    need(about["pairs"][0] <= n_most, "pairs")
    layer.maybe("carry", torch.float32, n_rows, n_heads, n_kept, finite=False)
    fine = layer.maybe("fine", None, n_rows, n_heads, None, None)
    if fine is not None:
        fits = fine.is_floating_point() and fine.shape[2] <= n_kept + n_tail and fine.shape[3] <= dim
        need(fits and store in ("dense", "ragged"), "fine")
    recent = layer.maybe("recent", dtype, n_rows, None, None, None)
    need(recent is not None or not n_recent or about["window"] is not None, "recent, which is not there")
    if recent is not None:
        fits = recent.shape[1] in sizes["heads"] and recent.shape[3] == dim
        need(fits and recent.shape[2] <= min(n_recent, about["seen"]), "recent")
        _check_columns(layer, "recent_at", recent.shape[2], n_rows, about["seen"])
    unseen = layer.maybe("unseen", None, n_rows, None, None)
    if unseen is not None:
        fits = unseen.is_floating_point() and unseen.shape[2] in sizes["hidden_size"]
        need(fits and unseen.shape[1] <= about["seen"], "unseen")
        _check_columns(layer, "unseen_at", unseen.shape[1], n_rows, about["seen"])
    n_new = layer.maybe("n_new", torch.int64, n_rows)
    need(n_new is None or (int(n_new.min()) >= 0 and int(n_new.max()) == about["n_new"]), "n_new")
    stays = layer.maybe("stays", torch.bool, n_rows, n_heads, None)
    need((stays is None) == (about["verdicts_end"] is None), "verdicts_end")
    need(stays is None or stays.shape[2] <= about["verdicts_end"], "stays")
    for name, fill in about.get("columns", {}).items():
        _check_carried(layer, name, fill, (n_rows, n_heads, n_kept + n_tail), kinds.get(name))
    need(not layer.left, f"{next(iter(layer.left), '')}, which belongs to nothing")
    return n_rows


def _check_carried(layer: Taken, name: str, fill: Any, shape: tuple[int, int, int], kind: Column | None) -> None:
    """A column that pairs carry, for the first slots or all of them; as the press declares it, where it is known."""
    where, given = f"columns.{name}", layer.left.get(f"columns.{name}")
    need(name != PINNED and (name not in OWN or name == BIAS.name), where)
    width = None if given is None or given.dim() < 4 else given.shape[3]
    column = layer.take(where, None, *shape[:2], None, *(() if width is None else (width,)), finite=name == BIAS.name)
    need(column.shape[2] <= shape[2] and width != 0, f"{where}, of shape {tuple(column.shape)}")
    need(_is_fill(fill, column.dtype), f"{where}, of {column.dtype} with the fill {fill!r}")
    if kind is not None:
        is_same = fill == kind.fill or (fill != fill and kind.fill != kind.fill)
        is_declared = is_same and (column.dtype, width) == (kind.dtype, kind.width)
        need(is_declared, f"{where}, which is not what the press declares")


def _is_fill(value: Any, dtype: torch.dtype) -> bool:
    if dtype == torch.bool or dtype.is_complex:
        return type(value) is bool and dtype == torch.bool
    if dtype.is_floating_point:
        return type(value) in (int, float)
    return type(value) is int and torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _check_columns(layer: Taken, name: str, n: int, n_rows: int, seen: int) -> None:
    """int64 ``[B, n]``, if it is there: -1 for no token, then ascending columns in 0 .. seen - 1."""
    at = layer.maybe(name, torch.int64, n_rows, n)
    if at is not None:
        need(bool(((at >= -1) & (at < seen)).all()), f"{name}, with a column that is not in 0 .. {seen - 1}")
        now, later = at[:, :-1], at[:, 1:]
        need(bool(((later > now) | (now == -1)).all()), f"{name}, whose columns do not ascend")


def _check_positions(kept: Tensor, end: int) -> None:
    """int32 ``[B, Hkv, n]``: ascending in 0 .. end - 1, then -1 for empty slots; only the last place may come again."""
    is_filled = kept >= 0
    need(bool((kept >= -1).all()) and bool((kept < end).all()), f"kept, with a place that is not in 0 .. {end - 1}")
    if kept.shape[2] > 1:
        now, later = kept[..., :-1], kept[..., 1:]
        is_next = (later > now) | ((later == now) & (now == end - 1))
        need(bool((is_next | ~is_filled[..., 1:]).all()), "kept, whose places do not ascend")
        need(bool((is_filled[..., :-1] | ~is_filled[..., 1:]).all()), "kept, with an empty slot between others")
