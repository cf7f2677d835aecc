"""RowGroup: the rows of a batch taken apart, so that a press sees each as it would see that row alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.architecture.rope import Rope
from coldpress.cache.newest import Newest, Pending
from coldpress.cache.pins import Pins, pinned
from coldpress.cache.slots import CARRIED, RESIDUAL, Slots
from coldpress.core.call import LayerCall
from coldpress.core.kept import Kept
from coldpress.core.pick import column_at, pick
from coldpress.core.view import LayerView

__all__ = ["Known", "RowGroup", "moved_up", "n_after", "view_of_newest"]


@dataclass(frozen=True, eq=False)
class Known:
    """What a cache knows beside the pairs of a layer.

    Attributes:
        find_rope, find_seed: as those of :class:`LayerView`.
        token_ids: int64 ``[B, T]`` of the prefill, where they are known.
        pins: spans of tokens that nothing may evict.
        rerotates: keys stand side by side at the end of the text.
    """

    find_rope: Callable[[], Rope | None]
    find_seed: Callable[[], int]
    token_ids: Tensor | None = None
    pins: Pins = ()
    rerotates: bool = False


@dataclass(frozen=True, eq=False)
class RowGroup:
    """The rows of a batch that have the same number of tokens to choose from, and their view without padding.

    Attributes:
        rows: indices of the rows in the batch, or all of them as a slice.
        slots: int64 ``[b, 1 or Hkv, T]``, where in the input each token of the view stood; None where that is
            ``0 .. T - 1``.
        view: those rows alone.
        n_pairs: (row, head, token) triples of these rows that a cache without a press would store.
        stored: int64 ``[b, Hkv, T]``, in which slot of the layer each of them is; None: as ``slots``.
        is_whole: the view is all that is stored, as it is stored.
    """

    rows: Tensor | slice
    slots: Tensor | None
    view: LayerView
    n_pairs: int
    stored: Tensor | None = None
    is_whole: bool = False

    @classmethod
    def of_prefill(cls, slots: Slots, call: LayerCall, padding: Tensor | None, known: Known) -> list[RowGroup]:
        """Take the stored pairs of a layer apart into groups of rows of equal length.

        Args:
            slots: of all tokens seen; nothing was evicted yet.
            call: the attention call of these tokens.
            padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
            known: what the cache knows beside the pairs.
        """
        keys, values, query = slots.filled.keys, slots.filled.values, call.query
        n_tokens, device, ids = keys.shape[2], keys.device, known.token_ids
        reach = n_tokens if call.sliding_window is None else min(n_tokens, max(1, call.sliding_window - 1))
        if ids is not None and ids.shape != (keys.shape[0], n_tokens):
            ids = None
        if padding is None:
            if reach == n_tokens:
                view = _view(known, call, keys, values, query, 0)
                _pin(view, known.pins, slice(None))
                view.hidden_states, view.token_ids = call.hidden_states, ids
                return [cls(slice(None), None, view, keys.shape[:3].numel())]
            padding = torch.ones(keys.shape[0], n_tokens, dtype=torch.bool, device=device)
        lengths = padding.sum(-1).tolist()
        groups = []
        for length in sorted({n for n in lengths if n > 0}):
            rows = torch.tensor([i for i, n in enumerate(lengths) if n == length], device=device)
            at = torch.stack([padding[row].nonzero()[-reach:, 0] for row in rows])  # [b, T]
            k, v, q = (_take(states, rows, at) for states in (keys, values, query))
            view = _view(known, call, k, v, q, length - at.shape[1])
            _pin(view, known.pins, rows)
            if call.hidden_states is not None:
                view.hidden_states = _take(call.hidden_states[:, None], rows, at)[:, 0]
            view.token_ids = None if ids is None else ids[rows].gather(1, at)
            groups.append(cls(rows, at[:, None], view, k.shape[:3].numel()))
        return groups

    @classmethod
    def of_text_so_far(
        cls,
        slots: Slots,
        call: LayerCall,
        padding: Tensor | None,
        pending: Pending,
        known: Known,
        borrows: bool = False,
    ) -> list[RowGroup]:
        """Take what a layer stores while decoding apart into groups of rows with as many pairs in every head.

        Rows with a head that stores nothing have no queries in their view: there is nothing to choose from.

        Args:
            slots: what was kept of the tokens seen.
            call: the last attention call.
            padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
            pending: each row's newest queries and hidden states, in one part without padding each.
            known: what the cache knows beside the pairs.
            borrows: views may be of the store itself, which changes with the next call.
        """
        keys, values, queries, unseen = slots.filled.keys, slots.filled.values, pending.queries, pending.hidden_states
        assert queries is not None
        (n_batch, n_heads, *_), device = keys.shape, keys.device
        seen, columns = slots.seen, slots.columns()
        reach = seen if call.sliding_window is None else max(1, call.sliding_window - 1)
        if padding is None and not slots.has_gaps and reach == seen and queries.at is None:
            return [cls._as_stored(slots, call, pending, known, borrows)]
        at = slots.positions()  # [B, Hkv, T] in the input, -1 for an empty slot
        is_seen, position = at >= 0, at
        lengths = [seen] * n_batch
        unseen_counts = [0] * n_batch if unseen is None else unseen.counts()
        if padding is not None:
            rank = (padding.cumsum(-1) - 1)[:, None].expand(n_batch, n_heads, -1)
            position = rank.gather(2, at.clamp(min=0))
            is_seen = is_seen & padding[:, None].expand(n_batch, n_heads, -1).gather(2, at.clamp(min=0))
            lengths = padding.sum(-1).tolist()
        if call.sliding_window is not None:
            oldest = torch.tensor(lengths, device=device)[:, None, None] - reach
            is_seen = is_seen & (position >= oldest)
        counts = is_seen.sum(-1)  # [B, Hkv]
        keyed: dict[tuple[int, int, int, bool, tuple[int, ...]], list[int]] = {}
        for row, (length, n, new, n_known, heads) in enumerate(
            zip(lengths, queries.counts(), pending.n_new, unseen_counts, counts.tolist(), strict=True)
        ):
            if max(heads) > 0:
                key = length, n if min(heads) > 0 else 0, new, n_known >= new, tuple(heads)
                keyed.setdefault(key, []).append(row)
        groups = []
        for (length, n, new, is_known, heads), members in keyed.items():
            longest = max(heads)
            rows = slice(None) if len(members) == n_batch else torch.tensor(members, device=device)
            order = (~is_seen[rows]).to(torch.uint8).argsort(dim=-1, stable=True)[..., :longest]  # those first
            is_ragged = min(heads) < longest
            k, v = pick(keys[rows], order), pick(values[rows], order)
            q = queries.states[rows, :, queries.n - n :]
            view = _view(known, call, k, v, q, length - longest)
            view.positions = position[rows].gather(2, order)
            if is_ragged:
                view.counts = counts[rows]
                is_empty = torch.arange(longest, device=device) >= view.counts[..., None]
                view.positions = view.positions.masked_fill(is_empty, -1)
            own = {name: column_at(column[rows], order) for name, column in columns.items()}
            _add_columns(view, own, rows, known)
            view.n_new = new
            if unseen is not None and is_known:
                view.hidden_states = unseen.states[rows, 0, unseen.n - new :]
            n_pairs = len(members) * n_heads * min(length, reach)
            groups.append(cls(rows, at[rows].gather(2, order), view, n_pairs, order))
        return groups

    @classmethod
    def _as_stored(cls, slots: Slots, call: LayerCall, pending: Pending, known: Known, borrows: bool) -> RowGroup:
        """All rows and slots as they are: no slot is empty, and no row has padding."""
        keys, values, queries, unseen = slots.filled.keys, slots.filled.values, pending.queries, pending.hidden_states
        assert queries is not None
        keys, values = (keys, values) if borrows else (keys.clone(), values.clone())
        at = slots.positions(is_own=not borrows)
        view = _view(known, call, keys, values, queries.states, slots.seen - at.shape[2])
        view.positions, view.n_new = at, pending.n_new[0]
        if borrows and slots.filled.takes_codec:  # pairs that no codec has taken
            view.outlines = slots.outlines
        if unseen is not None and unseen.n >= view.n_new:
            view.hidden_states = unseen.states[:, 0, unseen.n - view.n_new :]
        _add_columns(view, slots.columns(), slice(None), known)
        stored = torch.arange(at.shape[2], device=at.device).expand(at.shape)
        return cls(slice(None), at, view, keys.shape[0] * keys.shape[1] * slots.seen, stored, is_whole=True)

    def all(self) -> Kept:
        """Everything in the view."""
        view = self.view
        slots = torch.arange(view.n_tokens, device=view.keys.device).expand(view.keys.shape[:3])
        return Kept(view.keys, view.values, view.held(slots), view.carried, columns=view.columns)

    def original(self, positions: Tensor) -> Tensor:
        """Slots of the view, ``[b, Hkv, n]`` with -1 for none, as positions in the input."""
        if self.slots is None:
            return positions
        slots = self.slots.expand(-1, positions.shape[1], -1)
        return torch.where(positions < 0, positions, slots.gather(2, positions.clamp(min=0)))

    def stored_slots(self, positions: Tensor) -> Tensor:
        """Slots of the view, ``[b, Hkv, n]`` with -1 for none, as slots of the layer."""
        at = self.slots if self.stored is None else self.stored
        if at is None or self.is_whole:
            return positions
        at = at.expand(-1, positions.shape[1], -1)
        return at.gather(2, positions.clamp(min=0)).masked_fill(positions < 0, -1)

    def scatter(self, column: Tensor, entries: Tensor) -> None:
        """Write entries ``[b, Hkv, T, ...]``, one for each token of the view, into a column of the layer's slots."""
        at = self.slots if self.stored is None else self.stored
        if at is None:
            column[self.rows, :, : entries.shape[2]] = entries
            return
        own = column[self.rows]  # a copy, unless it is all
        at = at.expand(-1, entries.shape[1], -1)
        at = at.view(*at.shape, *(1 for _ in entries.shape[3:])).expand_as(entries)
        column[self.rows] = own.scatter(2, at, entries)


def view_of_newest(slots: Slots, call: LayerCall, padding: Tensor | None, known: Known) -> LayerView:
    """The tokens of this call alone, as far as a layer still stores them; all rows, with their padding.

    For scores that depend on nothing but their own token. With padding, ``positions`` count each row's real tokens.
    """
    seen, n = slots.seen, min(call.query.shape[2], slots.n)
    keys, values = slots.filled.newest(n)
    view = _view(known, call, keys, values, call.query[:, :, -n:], seen - n)
    if call.hidden_states is not None:
        view.hidden_states = call.hidden_states[:, -n:]
    if padding is not None:
        view.positions = (padding.cumsum(-1) - 1)[:, None, seen - n : seen].expand(view.keys.shape[:3])
    _pin(view, known.pins, slice(None))
    return view


def moved_up(
    newest: Newest,
    turn: Callable[[Tensor, Tensor], Tensor],
    padding: Tensor | None,
    before: Tensor,
    after: Tensor,
) -> Newest:
    """The newest queries after the gaps behind them were closed, as they are for the keys.

    Args:
        turn: rotates float32 states by so many positions.
        padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
        before, after: int64 ``[B, Hkv, T]``, positions of what was stored before that, and is now.
    """
    if padding is not None:
        is_real = padding[:, None].expand(-1, before.shape[1], -1)
        before, after = (at.masked_fill(~is_real.gather(2, at.clamp(min=0)), -1) for at in (before, after))
    at, queries = newest.columns(), newest.states
    moves = n_after(before, at) - n_after(after, at)  # [B, Hkv, Q]
    if not bool(moves.any()):
        return newest
    by_head = moves.repeat_interleave(queries.shape[1] // moves.shape[1], dim=1)
    return Newest((turn(queries.float(), by_head).to(queries.dtype),), newest.end, newest.at)


def _add_columns(view: LayerView, columns: Mapping[str, Tensor], rows: Tensor | slice, known: Known) -> None:
    """Note in a view of the rows ``rows`` of a batch what its pairs carry, and where they stand."""
    own = dict(columns)
    view.carried, residual = own.pop(CARRIED.name, None), own.pop(RESIDUAL.name, None)
    view.columns = own
    _pin(view, known.pins, rows)
    if known.rerotates:
        _find_places(view)
        view.rounding_residual = residual


def _pin(view: LayerView, pins: Pins, rows: Tensor | slice) -> None:
    """Note in a view of the rows ``rows`` of a batch which of its tokens are pinned."""
    if not pins:
        return
    if len(pins) > 1 and isinstance(rows, Tensor):
        pins = tuple(pins[row] for row in rows.tolist())
    position = view.positions
    if position is None:
        position = torch.arange(view.first_position, view.end, device=view.keys.device).expand(view.keys.shape[:3])
    view.columns = {**view.columns, "pinned": pinned(pins, position)}


def _view(known: Known, call: LayerCall, keys: Tensor, values: Tensor, queries: Tensor, first: int) -> LayerView:
    return LayerView(
        keys,
        values,
        queries,
        module=call.module,
        scaling=call.scaling,
        layer_idx=call.layer_idx,
        n_layers=call.n_layers,
        first_position=first,
        sliding_window=call.sliding_window,
        softcap=call.softcap,
        sinks=call.sinks,
        find_rope=known.find_rope,
        find_seed=known.find_seed,
    )


def _find_places(view: LayerView) -> None:
    """Note where keys and queries stand if the stored pairs stand side by side at the end of the text.

    A token's place has as many tokens after it as are stored after it.
    """
    stored = view.positions
    assert stored is not None
    slot = torch.arange(view.n_tokens, device=stored.device)
    n_stored = (stored >= 0).sum(-1, keepdim=True)
    view.places = (slot - n_stored + view.end).clamp(max=view.end - 1)
    query_at = torch.arange(view.end - view.n_queries, view.end, device=stored.device)
    view.query_places = (view.end - 1 - n_after(stored, query_at)).clamp(min=0)


def n_after(stored: Tensor, at: Tensor) -> Tensor:
    """How many of ``stored`` ``[B, Hkv, T]``, -1 for none, are larger than each of ``at`` ``[B, Q]`` or ``[Q]``.

    Returns:
        int64 ``[B, Hkv, Q]``.
    """
    at = at[:, None] if at.dim() == 2 else at
    ordered = stored.masked_fill(stored < 0, torch.iinfo(stored.dtype).max).sort(-1).values
    up_to = torch.searchsorted(ordered, at.expand(*stored.shape[:2], -1).contiguous(), right=True)
    return (stored >= 0).sum(-1, keepdim=True) - up_to


def _take(states: Tensor, rows: Tensor | slice, slots: Tensor) -> Tensor:
    """Rows ``[b]`` and their slots ``[b, n]`` of ``[B, H, T, D]``: ``[b, H, n, D]``."""
    return pick(states[rows], slots[:, None].expand(-1, states.shape[1], -1))
