"""Costs: what the pairs of a layer take in the memory of a cache, which a budget in bytes is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from coldpress.cache.rows import RowGroup
from coldpress.core.press import Press, parts
from coldpress.stores.codec import Codec, form_of

__all__ = ["costing", "stored_bytes"]


def costing(press: Press, codec: Codec | None, groups: Sequence[RowGroup]) -> list[RowGroup]:
    """The groups with views that know what their pairs will take."""
    return [
        replace(group, view=replace(view, stored_bytes=stored_bytes(press, codec, view.keys, view.values)))
        for group in groups
        for view in (group.view,)
    ]


def stored_bytes(press: Press | None, codec: Codec | None, keys: Tensor, values: Tensor) -> Callable[[int], int] | None:
    """What n pairs of every head take, of one row; None where each takes the same and nothing is added."""
    added = 0 if press is None else sum(part.adds_bytes for part in parts(press))
    if codec is None and not added:
        return None
    n_heads, dims, dtype = keys.shape[1], (keys.shape[3], values.shape[3]), keys.dtype
    pair, block = sum(dims) * keys.element_size(), None

    def stored_bytes(n: int) -> int:
        nonlocal block
        n_encoded = 0 if codec is None else codec.n_encoded(n)
        if not n_encoded or codec is None:
            return n_heads * n * (pair + added)
        if block is None:  # asked for by budgets in bytes alone
            block = sum(part.nbytes for part in form_of(codec, dims, dtype).values())
        return n_heads * ((n - n_encoded) * pair + n_encoded // codec.block_tokens * block + n * added)

    return stored_bytes
