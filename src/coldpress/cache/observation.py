"""Observation: what a press sees at each attention call, says of each pair, keeps, and has a query read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coldpress.cache.costs import costing
from coldpress.cache.rows import RowGroup
from coldpress.cache.slots import OWN, Slots
from coldpress.core.column import PINNED, Column
from coldpress.core.kept import Kept, checked_kept
from coldpress.core.pick import column_at
from coldpress.core.press import Press, parts
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.stores.codec import Codec

__all__ = ["Said", "carrying", "declared", "kept_by", "note", "observed", "selected", "to_choose_from"]

Said = Sequence[Mapping[str, Tensor]]  # new values of columns, [b, Hkv, T, ...], for each group of rows


def declared(press: Press | None) -> dict[str, Column]:
    """The columns that the parts of a press declare, by name.

    Raises:
        PressError: a name is the cache's own, or two parts mean different things by it.
    """
    found: dict[str, Column] = {}
    for part in () if press is None else parts(press):
        for column in part.columns:
            if column.name in OWN or column.name == PINNED:
                raise PressError(
                    f"{type(part).__name__}: a column {column.name!r} is the cache's own; call it otherwise."
                )
            if found.setdefault(column.name, column) != column:
                raise PressError(f"Two presses in {press!r} declare a column {column.name!r}, and not the same one.")
    return found


def carrying(press: Press | None, groups: Sequence[RowGroup]) -> list[RowGroup]:
    """The groups with views that have all columns which the press declares: the fill where nothing is known yet."""
    kinds, found = declared(press), []
    for group in groups:
        view = group.view
        new = {name: kind.new(view.keys) for name, kind in kinds.items() if name not in view.columns}
        found.append(_with_columns(group, new))
    return found


def to_choose_from(press: Press, groups: Sequence[RowGroup], codec: Codec | None) -> list[RowGroup]:
    """The groups with views in which that is pinned too which parts of the press let nothing evict.

    They know as well what their pairs will take in memory, stored by ``codec``.
    """
    found = []
    for group in costing(press, codec, groups):
        own = [pins for part in parts(press) if (pins := part.pins(group.view)) is not None]
        if own and PINNED in group.view.columns:
            own.append(group.view.columns[PINNED])
        found.append(_with_columns(group, {PINNED: torch.stack(own).any(0)} if own else {}))
    return found


def _with_columns(group: RowGroup, new: Mapping[str, Tensor]) -> RowGroup:
    if not new:
        return group
    view = replace(group.view, columns={**group.view.columns, **new}, _memo={})
    view.outlines = group.view.outlines
    return replace(group, view=view)


def observed(press: Press, groups: Sequence[RowGroup]) -> tuple[list[RowGroup], Said]:
    """What the parts of a press say of the pairs in each group's view, and the groups with views that have it.

    Nothing is said of rows without a new token.
    """
    groups, kinds = carrying(press, groups), declared(press)
    said: list[dict[str, Tensor]] = [{} for _ in groups]
    for part in parts(press):
        if part.observes:
            for group, own in zip(groups, said, strict=True):
                if group.view.n_queries:
                    own.update(_checked(part, "observe", part.observe(group.view), group.view, kinds))
    return [_with_columns(group, own) for group, own in zip(groups, said, strict=True)], said


def _checked(
    press: Press, method: str, said: Mapping[str, Tensor], view: LayerView, kinds: Mapping[str, Column]
) -> dict[str, Tensor]:
    """What ``observe`` or ``renew`` returned, in the dtypes that were declared."""
    found = {}
    for name, own in said.items():
        if name not in kinds:
            raise PressError(f"{type(press).__name__}.{method} returned {name!r}, which is not among its columns.")
        shape = kinds[name].shape(*view.keys.shape[:3])
        if own.shape != shape:
            raise PressError(
                f"{type(press).__name__}.{method} returned {name!r} of shape {list(own.shape)}, not {list(shape)}."
            )
        found[name] = own.to(kinds[name].dtype)
    return found


def kept_by(press: Press, group: RowGroup, kept: object) -> Kept | None:
    """What a press keeps of a group of rows, with what its parts renew of their columns.

    Raises:
        PressError: a pinned token is not among it.
    """
    view = group.view
    found = checked_kept(press, kept, view.columns.get(PINNED))
    if found is None:
        return None
    new: dict[str, Tensor] = {}
    kinds = declared(press)
    for part in parts(press):
        if part.columns:
            new.update(_checked(part, "renew", part.renew(view), view, kinds))
    at = found.positions.clamp(min=0)
    return found._replace(columns={**found.columns, **{name: column_at(own, at) for name, own in new.items()}})


def note(slots: Slots, press: Press, groups: Sequence[RowGroup], said: Said) -> None:
    """Put the new values into the columns of a layer's slots."""
    store = slots.filled
    for column in declared(press).values():
        if not any(column.name in own for own in said):
            continue
        whole = slots.column(column.name)
        if whole is None:
            shape = column.shape(store.n_rows, store.n_heads, store.n)
            whole = torch.full(shape, column.fill, dtype=column.dtype, device=store.device)
        whole = whole.clone()
        for group, own in zip(groups, said, strict=True):
            if column.name in own:
                group.scatter(whole, own[column.name])
        slots.put(column, whole)


def selected(reader: Press, groups: Sequence[RowGroup], slots: Slots) -> Tensor | None:
    """The slots that each row's query reads, int64 ``[B, Hkv, n]``, -1 for none; None: all.

    Rows in groups of which the press says nothing read all that they have; a head that reads nothing, its newest slot.
    """
    said = [reader.select(group.view) if group.view.n_queries else None for group in groups]
    if all(own is None for own in said):
        return None
    found = []
    for group, own in zip(groups, said, strict=True):
        view = group.view
        if own is None:
            own = view.held(torch.arange(view.n_tokens, device=view.keys.device).expand(view.keys.shape[:3]))
        found.append((group.rows, own if group.stored is None else group.stored_slots(own)))
    n, like = max(own.shape[2] for _, own in found), found[0][1]
    read = like.new_full((slots.filled.n_rows, like.shape[1], max(n, 1)), -1)
    for rows, own in found:
        read[rows, :, : own.shape[2]] = own
    reads_nothing = (read < 0).all(-1)
    read[..., 0] = read[..., 0].masked_fill(reads_nothing, slots.n - 1)
    return read
