"""RowGroup: the rows of a batch taken apart, so that a press sees each as it would see that row alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coldpress.cache.newest import Newest
from coldpress.core.call import LayerCall
from coldpress.core.kept import Kept
from coldpress.core.pick import pick
from coldpress.core.view import LayerView

__all__ = ["RowGroup", "n_after", "view_of_newest"]


@dataclass(frozen=True, eq=False)
class RowGroup:
    """The rows of a batch that have the same number of tokens to choose from, and their view without padding.

    Attributes:
        rows: indices of the rows in the batch, or all of them as a slice.
        slots: int64 ``[b, 1 or Hkv, T]``, where in the input each token of the view stood; None where that is
            ``0 .. T - 1``.
        view: those rows alone.
        n_pairs: (row, head, token) triples of these rows that a cache without a press would hold.
    """

    rows: Tensor | slice
    slots: Tensor | None
    view: LayerView
    n_pairs: int

    @classmethod
    def of_prefill(cls, layer: Any, call: LayerCall, padding: Tensor | None) -> list[RowGroup]:
        """Take the stored pairs of ``layer`` apart into groups of rows of equal length.

        Args:
            layer: holds all tokens seen; nothing was evicted yet.
            call: the attention call of these tokens.
            padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
        """
        keys, values, query = layer.keys, layer.values, call.query
        assert keys is not None and values is not None
        n_tokens, device, ids = keys.shape[2], keys.device, layer.session.token_ids
        reach = n_tokens if call.sliding_window is None else min(n_tokens, max(1, call.sliding_window - 1))
        if ids is not None and ids.shape != (keys.shape[0], n_tokens):
            ids = None
        if padding is None:
            if reach == n_tokens:
                view = _view(layer, call, keys, values, query, 0)
                view.hidden_states, view.token_ids = call.hidden_states, ids
                return [cls(slice(None), None, view, keys.shape[:3].numel())]
            padding = torch.ones(keys.shape[0], n_tokens, dtype=torch.bool, device=device)
        lengths = padding.sum(-1).tolist()
        groups = []
        for length in sorted({n for n in lengths if n > 0}):
            rows = torch.tensor([i for i, n in enumerate(lengths) if n == length], device=device)
            slots = torch.stack([padding[row].nonzero()[-reach:, 0] for row in rows])  # [b, T]
            k, v, q = (_take(states, rows, slots) for states in (keys, values, query))
            view = _view(layer, call, k, v, q, length - slots.shape[1])
            if call.hidden_states is not None:
                view.hidden_states = _take(call.hidden_states[:, None], rows, slots)[:, 0]
            view.token_ids = None if ids is None else ids[rows].gather(1, slots)
            groups.append(cls(rows, slots[:, None], view, k.shape[:3].numel()))
        return groups

    @classmethod
    def of_text_so_far(
        cls,
        layer: Any,
        call: LayerCall,
        padding: Tensor | None,
        queries: Newest,
        n_new: list[int],
        unseen: Newest | None = None,
    ) -> list[RowGroup]:
        """Take what ``layer`` holds while decoding apart into groups of rows with as many pairs in every head.

        Rows with a head that holds nothing have no queries in their view: there is nothing to choose from.

        Args:
            layer: holds what was kept of the tokens seen.
            call: the last attention call.
            padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
            queries: ``[B, Hq, Q, D]`` of each row's newest tokens, in one part without padding.
            n_new: how many tokens of each row have come since the press was asked last.
            unseen: ``[B, 1, n, hidden]``, hidden states of these, likewise; None if they are not known.
        """
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        (n_batch, n_heads, *_), device = keys.shape, keys.device
        at = layer.positions()  # [B, Hkv, T] in the input, -1 for an empty slot
        is_held, position = at >= 0, at
        seen, carried, rounding_residual = layer.get_seq_length(), layer.carried(), layer.rounding_residual()
        lengths = [seen] * n_batch
        unseen_counts = [0] * n_batch if unseen is None else unseen.counts()
        if padding is not None:
            rank = (padding.cumsum(-1) - 1)[:, None].expand(n_batch, n_heads, -1)
            position = rank.gather(2, at.clamp(min=0))
            is_held = is_held & padding[:, None].expand(n_batch, n_heads, -1).gather(2, at.clamp(min=0))
            lengths = padding.sum(-1).tolist()
        reach = seen
        if call.sliding_window is not None:
            reach = max(1, call.sliding_window - 1)
            oldest = torch.tensor(lengths, device=device)[:, None, None] - reach
            is_held = is_held & (position >= oldest)
        counts = is_held.sum(-1)  # [B, Hkv]
        keyed: dict[tuple[int, int, int, bool, tuple[int, ...]], list[int]] = {}
        for row, (length, n, new, known, heads) in enumerate(
            zip(lengths, queries.counts(), n_new, unseen_counts, counts.tolist(), strict=True)
        ):
            if max(heads) > 0:
                key = length, n if min(heads) > 0 else 0, new, known >= new, tuple(heads)
                keyed.setdefault(key, []).append(row)
        groups = []
        for (length, n, new, is_known, heads), members in keyed.items():
            longest = max(heads)
            rows = slice(None) if len(members) == n_batch else torch.tensor(members, device=device)
            order = (~is_held[rows]).to(torch.uint8).argsort(dim=-1, stable=True)[..., :longest]  # the held ones first
            is_ragged = min(heads) < longest
            k, v = pick(keys[rows], order), pick(values[rows], order)
            q = queries.states[rows, :, queries.n - n :]
            view = _view(layer, call, k, v, q, length - longest)
            view.positions = position[rows].gather(2, order)
            if is_ragged:
                view.counts = counts[rows]
                is_empty = torch.arange(longest, device=device) >= view.counts[..., None]
                view.positions = view.positions.masked_fill(is_empty, -1)
            if carried is not None:
                view.carried = carried[rows].gather(2, order)
            if layer.session.rerotates:
                _find_places(view)
                view.rounding_residual = None if rounding_residual is None else pick(rounding_residual[rows], order)
            view.n_new = new
            if unseen is not None and is_known:
                view.hidden_states = unseen.states[rows, 0, unseen.n - new :]
            n_pairs = len(members) * n_heads * min(length, reach)
            groups.append(cls(rows, at[rows].gather(2, order), view, n_pairs))
        return groups

    def all(self) -> Kept:
        """Everything in the view."""
        view = self.view
        slots = torch.arange(view.n_tokens, device=view.keys.device).expand(view.keys.shape[:3])
        return Kept(view.keys, view.values, view.held(slots), view.carried)

    def original(self, positions: Tensor) -> Tensor:
        """Slots of the view, ``[b, Hkv, n]`` with -1 for none, as positions in the input."""
        if self.slots is None:
            return positions
        slots = self.slots.expand(-1, positions.shape[1], -1)
        return torch.where(positions < 0, positions, slots.gather(2, positions.clamp(min=0)))


def view_of_newest(layer: Any, call: LayerCall, padding: Tensor | None) -> LayerView:
    """The tokens of this call alone, as far as ``layer`` still holds them; all rows, with their padding.

    For scores that depend on nothing but their own token. With padding, ``positions`` count each row's real tokens.
    """
    assert layer._store is not None
    seen, n = layer._seen, min(call.query.shape[2], layer._store.n)
    keys, values = layer._store.newest(n)
    view = _view(layer, call, keys, values, call.query[:, :, -n:], seen - n)
    if call.hidden_states is not None:
        view.hidden_states = call.hidden_states[:, -n:]
    if padding is not None:
        view.positions = (padding.cumsum(-1) - 1)[:, None, seen - n : seen].expand(view.keys.shape[:3])
    return view


def _view(layer: Any, call: LayerCall, keys: Tensor, values: Tensor, queries: Tensor, first: int) -> LayerView:
    session = layer.session
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
        find_rope=lambda: layer.rope(call),
        find_seed=lambda: session.seed,
    )


def _find_places(view: LayerView) -> None:
    """Note where keys and queries stand if those that are held stand side by side at the end of the text.

    A token's place has as many tokens after it as are held of those after it.
    """
    held = view.positions
    assert held is not None
    slot = torch.arange(view.n_tokens, device=held.device)
    n_held = (held >= 0).sum(-1, keepdim=True)
    view.places = (slot - n_held + view.end).clamp(max=view.end - 1)
    query_at = torch.arange(view.end - view.n_queries, view.end, device=held.device)
    view.query_places = (view.end - 1 - n_after(held, query_at)).clamp(min=0)


def n_after(held: Tensor, at: Tensor) -> Tensor:
    """How many of ``held`` ``[B, Hkv, T]``, -1 for none, are larger than each of ``at`` ``[B, Q]`` or ``[Q]``.

    Returns:
        int64 ``[B, Hkv, Q]``.
    """
    at = at[:, None] if at.dim() == 2 else at
    ordered = held.masked_fill(held < 0, torch.iinfo(held.dtype).max).sort(-1).values
    up_to = torch.searchsorted(ordered, at.expand(*held.shape[:2], -1).contiguous(), right=True)
    return (held >= 0).sum(-1, keepdim=True) - up_to


def _take(states: Tensor, rows: Tensor | slice, slots: Tensor) -> Tensor:
    """Rows ``[b]`` and their slots ``[b, n]`` of ``[B, H, T, D]``: ``[b, H, n, D]``."""
    return pick(states[rows], slots[:, None].expand(-1, states.shape[1], -1))
