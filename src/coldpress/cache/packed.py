"""One layer as plain state, tensors and JSON, for the file of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.cache.eviction import EvictingLayer
from coldpress.cache.newest import Newest, Pending
from coldpress.cache.phase import Phase
from coldpress.cache.slots import CARRIED, RESIDUAL, STAYS
from coldpress.core.column import Column
from coldpress.stores.base import Store
from coldpress.stores.bits import KVBits
from coldpress.stores.coded import CodedStore
from coldpress.stores.dense import DenseStore
from coldpress.stores.encoded import encoded_from
from coldpress.stores.ragged import RaggedStore
from coldpress.stores.thin import ThinStore

__all__ = ["pack_layer", "unpack_layer"]

_PLAIN: dict[str, type[DenseStore | RaggedStore]] = {"dense": DenseStore, "ragged": RaggedStore, "thin": ThinStore}
_ROOM = 1 << 13  # tokens that memory is taken for before they come, or as many as were seen; more when they do
_NAMES = {CARRIED.name: "carry", RESIDUAL.name: "fine"}  # of columns that have a place of their own in a file


def pack_layer(layer: EvictingLayer, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Add the tensors of one layer to ``tensors``, and return the rest of it, in the types of JSON."""
    slots, pending, press = layer.slots, layer.pending, layer.session.press
    store = slots.store
    if store is None:
        return None
    parts = {f"store.{name}": tensor for name, tensor in store.packed().items()}
    if isinstance(layer.session.storage, KVBits) and isinstance(store, CodedStore):
        how = layer.session.storage
        parts["store.how"] = torch.tensor([how.bits, how.group_size, how.residual_tokens])
    if slots.kept is not None:
        parts["kept"] = slots.kept  # [B, Hkv, n] int32
    columns = slots.columns()
    for name, own in _NAMES.items():
        if name in columns:
            entries = columns.pop(name)
            parts[own] = entries[:, :, : slots.n_kept] if own == "carry" else entries
    stays = columns.pop(STAYS.name, None)
    if stays is not None:
        parts["stays"] = stays[:, :, slots.n_kept :]
    parts |= {f"columns.{name}": column for name, column in columns.items()}
    n_recent = 0 if press is None else press.n_recent_queries
    if n_recent and pending.queries is not None:
        _pack_newest("recent", pending.queries.newest(n_recent, layer.shown), slots.seen, parts)
    if pending.hidden_states is not None:
        _pack_newest("unseen", pending.hidden_states.newest(max(pending.n_new), layer.shown), slots.seen, parts)
        parts["unseen"] = parts["unseen"][:, 0]  # [B, n, hidden]
    if len(set(pending.n_new)) > 1:
        parts["n_new"] = torch.tensor(pending.n_new)  # rows that have padding after the prompt
    tensors |= {f"layers.{layer.index}.{name}": tensor for name, tensor in parts.items()}
    said = {
        "store": store.name,
        "room": store.room,
        "seen": slots.seen,
        "tail_start": slots.tail_start,
        "window": layer.window,
        "is_prefilled": layer.session.chunk_tokens is not None and layer.phase.is_whole,
        "n_new": max(pending.n_new, default=0),
        "pairs": list(layer.n_pairs),
        "verdicts_end": None if stays is None else slots.seen,
    }
    said |= {"codec": layer.taken} if layer.taken else {}
    return said | ({"columns": {name: slots.fill(name) for name in columns}} if columns else {})


def _pack_newest(name: str, newest: Newest, seen: int, parts: dict[str, Tensor]) -> None:
    """Add what a layer remembers of the newest tokens, ``[B, H, n, D]`` in one part, and their columns if need be."""
    is_known = newest.end == seen  # else later tokens have come of which nothing is remembered
    parts[name] = newest.states if is_known else newest.states[:, :, :0]
    if is_known and newest.at is not None:
        parts[f"{name}_at"] = newest.at  # int64 [B, n]


def unpack_layer(layer: EvictingLayer, said: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Make an empty layer what the saved one was; takes its tensors out of ``tensors``."""
    prefix = f"layers.{layer.index}."
    names = [name for name in tensors if name.startswith(prefix)]
    parts = {name.removeprefix(prefix): tensors.pop(name).to(device) for name in names}
    slots, layer.taken = layer.slots, said.get("codec", 0)
    own = {name.removeprefix("store."): part for name, part in parts.items() if name.startswith("store.")}
    slots.store = _store(said["store"], own, min(said["room"], max(_ROOM, said["seen"])), layer)
    slots.seen, slots.tail_start, layer.window = said["seen"], said["tail_start"], said["window"]
    is_whole = layer.session.chunk_tokens is None or said["is_prefilled"]
    layer.phase = Phase.LATER if is_whole else Phase.PIECE
    slots.kept = parts.get("kept")
    slots.has_gaps = slots.kept is not None and bool((slots.kept < 0).any())
    slots.put(CARRIED, parts.get("carry"))
    slots.put(RESIDUAL, parts.get("fine"))
    if "stays" in parts:
        first = said["verdicts_end"] - parts["stays"].shape[2]  # the first token that was judged
        skipped = slots.n_kept + first - slots.tail_start
        stays = parts["stays"]
        slots.put(STAYS, pad(stays, (skipped, 0), value=True) if skipped >= 0 else stays[:, :, -skipped:])
    for name, fill in said.get("columns", {}).items():
        column = parts[f"columns.{name}"]
        slots.put(Column(name, fill, column.dtype, column.shape[3] if column.dim() == 4 else None), column)
    layer.n_pairs = said["pairs"][0], said["pairs"][1]
    if "unseen" in parts:
        parts["unseen"] = parts["unseen"][:, None]
    recent, unseen = (
        Newest((parts[name],), slots.seen, parts.get(f"{name}_at")) if name in parts else None
        for name in ("recent", "unseen")
    )
    n_new = parts["n_new"].tolist() if "n_new" in parts else [said["n_new"]] * slots.filled.n_rows
    layer.pending = Pending(recent, unseen, n_new if recent is not None else [])


def _store(name: str, parts: dict[str, Tensor], room: int, layer: EvictingLayer) -> Store:
    if name in _PLAIN:
        return _PLAIN[name].unpacked(parts, room)
    assert layer.codec is not None
    return encoded_from(parts, room, layer.codec)
