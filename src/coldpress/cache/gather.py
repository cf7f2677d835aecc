"""gathered: what was kept of each group of rows, put together as the slots of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coldpress.cache.rows import RowGroup
from coldpress.cache.slots import BIAS, CARRIED, RESIDUAL, Slots
from coldpress.core.column import PINNED, Column
from coldpress.core.kept import Kept
from coldpress.errors import PressError
from coldpress.stores.base import Store
from coldpress.stores.thin import ThinKeys, ThinStore

__all__ = ["gathered"]


def gathered(
    source: Slots,
    groups: Sequence[RowGroup],
    parts: Sequence[Kept],
    buffers: tuple[Tensor, Tensor] | None,
    padding: float | None,
    kinds: Mapping[str, Column],
) -> Slots:
    """Slots that store ``parts``, which were kept of the groups of rows of ``source``.

    Args:
        buffers: keys and values to write to, or None.
        padding: as in :meth:`Slots.replaced`.
        kinds: the columns that the press declares, by name.

    Raises:
        PressError: a pair carries a column that no press declares.
    """
    keys, values = source.filled.keys, source.filled.values
    n_batch, n_heads, _, dim = keys.shape
    longest = max(part.positions.shape[-1] for part in parts)
    positions = torch.full((n_batch, n_heads, longest), -1, dtype=torch.int32, device=keys.device)
    is_whole = len(parts) == 1 and isinstance(groups[0].rows, slice)  # then there is nothing to put together
    is_whole = is_whole and buffers is None and _is_new(parts[0].keys, keys) and _is_new(parts[0].values, values)
    if is_whole:
        buffers = parts[0].keys, parts[0].values
    if buffers is None:
        shape = n_batch, n_heads, longest
        buffers = keys.new_zeros(*shape, dim), values.new_zeros(*shape, values.shape[-1])
    k, v = buffers
    for group, part in zip(groups, parts, strict=True):
        n = part.positions.shape[-1]
        if not is_whole:
            k[group.rows, :, :n], v[group.rows, :, :n] = part.keys, part.values
        positions[group.rows, :, :n] = group.original(part.positions).int()
    store: Store | None = None
    if source.filled.keeps_codes:
        at = positions.new_full(positions.shape, -1, dtype=torch.int64)
        for group, part in zip(groups, parts, strict=True):
            at[group.rows, :, : part.positions.shape[-1]] = group.stored_slots(part.positions)
        store = source.filled.taken(at, k[:, :, :longest], v[:, :, :longest])
    if parts[0].channels is not None:
        channels = parts[0].channels.new_zeros(n_batch, n_heads, parts[0].channels.shape[2])
        for group, part in zip(groups, parts, strict=True):
            channels[group.rows] = part.channels  # type: ignore[assignment]
        thin = ThinKeys.of(k, (positions >= 0).sum(-1), channels, parts[0].n_wide)
        store = ThinStore(thin, v, dim)
    columns = _columns(groups, parts, positions, {**source.kinds, **kinds})
    return source.replaced(k, v, positions, columns, padding, store, kinds)


def _columns(
    groups: Sequence[RowGroup], parts: Sequence[Kept], positions: Tensor, kinds: Mapping[str, Column]
) -> dict[str, Tensor]:
    """The columns of all parts, each with its fill where a group has none."""
    by_part = [_columns_of(part) for part in parts]
    found = {}
    for name in dict.fromkeys(name for own in by_part for name in own):
        if name not in kinds:
            raise PressError(
                f"A press kept pairs with a column {name!r} that it does not declare: add Column({name!r})."
            )
        entries = [(group.rows, own[name]) for group, own in zip(groups, by_part, strict=True) if name in own]
        n, like = max(own.shape[2] for _, own in entries), entries[0][1]
        shape = (*positions.shape[:2], n, *like.shape[3:])
        column = torch.full(shape, kinds[name].fill, dtype=like.dtype, device=positions.device)
        for rows, own in entries:
            column[rows, :, : own.shape[2]] = own
        found[name] = column
    return found


def _columns_of(part: Kept) -> dict[str, Tensor]:
    own = {name: column for name, column in part.columns.items() if name != PINNED}  # follows from positions
    named = {CARRIED.name: part.carry, RESIDUAL.name: part.rounding_residual, BIAS.name: part.bias}
    return own | {name: column for name, column in named.items() if column is not None}


def _is_new(tensor: Tensor, source: Tensor) -> bool:
    """Whether ``tensor`` shares no memory with ``source``, and fills its own memory."""
    storage = tensor.untyped_storage()
    is_all = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
    return is_all and storage.data_ptr() != source.untyped_storage().data_ptr()
