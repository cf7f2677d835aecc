"""encoded: the store that goes with a codec, made of pairs as they are or of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from coldpress.stores.base import Store
from coldpress.stores.codec import Codec, TokenCodec
from coldpress.stores.coded import CodedStore
from coldpress.stores.dense import DenseStore
from coldpress.stores.packed import PackedStore
from coldpress.stores.ragged import RaggedStore

__all__ = ["encoded", "encoded_from"]


def encoded(store: Store, codec: Codec, kept: Tensor | None) -> Store:
    """The pairs of a store that takes codecs, the older ones encoded.

    Args:
        store: the pairs, the new store's own from now on.
        kept: int32 ``[B, Hkv, n]``, positions of the first slots, -1 where a head does not use one; None: n is 0.
    """
    if not isinstance(codec, TokenCodec):
        assert isinstance(store, DenseStore | RaggedStore)
        return CodedStore(store, codec)
    n_kept = 0 if kept is None else kept.shape[2]
    counts = torch.zeros(store.n_rows, store.n_heads, dtype=torch.int64) if kept is None else (kept >= 0).sum(-1)
    return PackedStore(codec, store.keys, store.values, counts.to(store.device), store.n - n_kept)


def encoded_from(parts: dict[str, Tensor], room: int, codec: Codec) -> Store:
    """The store of a codec from the parts that its ``packed()`` gave, with room for ``room`` more tokens."""
    kind = PackedStore if isinstance(codec, TokenCodec) else CodedStore
    return kind.unpacked(parts, room, codec)  # type: ignore[arg-type]
