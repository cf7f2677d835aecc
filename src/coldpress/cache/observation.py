"""What a press is shown at each attention call, what it says of each pair, and which pairs it has a query read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coldpress.cache.rows import RowGroup
from coldpress.cache.slots import Slots
from coldpress.core.press import Press, parts

__all__ = ["Said", "note", "observed", "readers", "selected", "shown"]

Said = Sequence[Mapping[str, Tensor]]  # new values of columns, [b, Hkv, T, ...], for each group of rows


def observed(press: Press, groups: Sequence[RowGroup]) -> Said:
    """What the parts of a press say of the pairs in each group's view; nothing of rows without a new token."""
    said: list[dict[str, Tensor]] = [{} for _ in groups]
    for part in parts(press):
        if part.observes:
            for group, own in zip(groups, said, strict=True):
                if group.view.n_queries:
                    own.update(part.observe(group.view))
    return said


def shown(groups: Sequence[RowGroup], said: Said) -> list[RowGroup]:
    """The groups with views whose columns have the new values."""
    return [
        replace(group, view=replace(group.view, columns={**group.view.columns, **own}, _memo={})) if own else group
        for group, own in zip(groups, said, strict=True)
    ]


def note(slots: Slots, press: Press, groups: Sequence[RowGroup], said: Said) -> None:
    """Put the new values into the columns of a layer's slots."""
    store = slots.filled
    for column in (column for part in parts(press) for column in part.columns):
        if not any(column.name in own for own in said):
            continue
        whole = slots.column(column.name)
        if whole is None:
            shape = (store.n_rows, store.n_heads, store.n, *(() if column.width is None else (column.width,)))
            whole = torch.full(shape, column.fill, dtype=column.dtype, device=store.device)
        whole = whole.clone()
        for group, own in zip(groups, said, strict=True):
            if column.name in own:
                group.scatter(whole, own[column.name].to(column.dtype))
        slots.put(column, whole)


def readers(press: Press | None) -> list[Press]:
    """The parts of a press that choose what a decoding query reads."""
    return [] if press is None else [part for part in parts(press) if part.reads_part]


def selected(reader: Press, groups: Sequence[RowGroup], n_rows: int) -> Tensor | None:
    """The slots that each row's query reads, int64 ``[B, Hkv, n]``, -1 for none; None: all.

    Rows in groups of which the press says nothing read all that they have.
    """
    said = [reader.select(group.view) if group.view.n_queries else None for group in groups]
    if all(own is None for own in said):
        return None
    found = []
    for group, own in zip(groups, said, strict=True):
        view = group.view
        if own is None:
            own = view.held(torch.arange(view.n_tokens, device=view.keys.device).expand(view.keys.shape[:3]))
        stored = own if group.stored is None else group.stored.gather(2, own.clamp(min=0)).masked_fill(own < 0, -1)
        found.append((group.rows, stored))
    n, like = max(own.shape[2] for _, own in found), found[0][1]
    read = like.new_full((n_rows, like.shape[1], n), -1)
    for rows, own in found:
        read[rows, :, : own.shape[2]] = own
    return read
