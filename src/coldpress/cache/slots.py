"""Slots: the stored pairs of one layer. Keys and values in a store, and a table of columns that follow the pairs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.cache.newest import newest_from
from coldpress.core.column import Column
from coldpress.core.outlines import Outlines
from coldpress.core.pick import column_at
from coldpress.stores.base import Store
from coldpress.stores.dense import DenseStore
from coldpress.stores.ragged import RaggedStore

__all__ = ["BIAS", "CARRIED", "OWN", "RESIDUAL", "STAYS", "WASTE", "Slots"]

CARRIED = Column("carried", torch.nan)  # what the press gave its kept pairs to carry
RESIDUAL = Column("rounding_residual", 0.0)  # float32 key minus stored key, in the keys' dtype, [..., Drot]
STAYS = Column("stays", True, torch.bool)  # what the press has said of tokens that are still among the newest
BIAS = Column("bias", 0.0)  # added to the logits of a key: ln m where it stands for m tokens
OWN = {column.name: column for column in (CARRIED, RESIDUAL, STAYS, BIAS)}
_IN_BYTES = (RESIDUAL.name, BIAS.name)  # without which the pairs would be others
_FORGET_MIN_TOKENS = 64  # that are worth a copy
_SLACK_TOKENS = 64  # out of a sliding window's reach and yet kept, so that as many of the newest can be cropped
WASTE = 0.01  # of padded slots, from which on heads are stored one after the other instead


class Slots:
    """The pairs of one layer in slots ``0 .. T - 1``, and which token each of them is.

    The first n slots are what the press kept, at positions of their own; the slots after them are, in order and without
    gaps, the tokens seen since. A layer that was never compressed has ``n == 0``. Positions of the later ones follow
    from two numbers on the host, so decoding reads nothing back from the device.

    A column has an entry ``[B, Hkv, ...]`` for each of the first slots; slots after these have its fill. All operations
    on the pairs are here, and take every column along. Tensors of columns are never written to, so forks share them.

    Attributes:
        store: keys and values; None before the first token.
        seen: tokens that the model has seen: the logical length.
        tail_start: original position of the first slot after the kept ones.
        kept: int32 ``[B, Hkv, n]``, original positions of the kept pairs; -1 in the last places of a head that keeps
            fewer than the longest. None: n is 0.
        has_gaps: whether some slot of ``kept`` is empty.
        kinds: the columns that there may be, by name.
        outlines: what a press that reads a part has worked out of the first slots.
    """

    def __init__(self) -> None:
        self.store: Store | None = None
        self.seen = self.tail_start = 0
        self.kept: Tensor | None = None
        self.has_gaps = False
        self._columns: dict[str, Tensor] = {}
        self.kinds: dict[str, Column] = dict(OWN)
        self.outlines = Outlines()

    @property
    def n(self) -> int:
        """T, slots in use: of the longest head, where heads differ."""
        return 0 if self.store is None else self.store.n

    @property
    def n_kept(self) -> int:
        return 0 if self.kept is None else self.kept.shape[2]

    @property
    def n_kept_pairs(self) -> int:
        """(row, head, token) triples that were kept."""
        return 0 if self.kept is None else int((self.kept >= 0).sum())

    def n_pairs(self, sliding_window: int | None, padding: Tensor | None) -> tuple[int, int]:
        """Triples that a cache without a press would store, and those that this one stores.

        Neither padding nor what is out of a sliding window's reach is counted.

        Args:
            padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
        """
        store = self.filled
        near = 0 if sliding_window is None else max(0, self.seen - max(1, sliding_window - 1))
        newest = max(near, self.tail_start)
        if padding is None:
            before, after = store.n_rows * (self.seen - near), store.n_rows * (self.seen - newest)
        else:
            before, after = (int(padding[:, first : self.seen].sum()) for first in (near, newest))
        kept = 0 if self.kept is None else int((self.kept >= near).sum())
        return before * store.n_heads, after * store.n_heads + kept

    @property
    def filled(self) -> Store:
        """The store, of slots that are not empty."""
        assert self.store is not None
        return self.store

    def tensors(self) -> tuple[Tensor, ...]:
        """What the keys and values take, with what is needed to read them as they are, or a part of them."""
        own = () if self.store is None else self.store.tensors()
        return *own, *self.outlines.tensors(), *(self._columns[name] for name in _IN_BYTES if name in self._columns)

    def positions(self, is_own: bool = True) -> Tensor:
        """Original positions of the pairs, int64 ``[B, Hkv, T]``, ascending; -1 where a head stores fewer.

        Args:
            is_own: in memory of their own, so that they can be written to.
        """
        store = self.store
        if store is None:
            return torch.empty(0, 0, 0, dtype=torch.long)
        tail = torch.arange(self.tail_start, self.seen, device=store.device).expand(store.n_rows, store.n_heads, -1)
        if self.kept is None:
            return tail.clone() if is_own else tail
        return torch.cat([self.kept.long(), tail], dim=-1)

    # -- columns --------------------------------------------------------------------------------------------------

    def column(self, name: str) -> Tensor | None:
        """A column for all slots, ``[B, Hkv, T, ...]``; None where no slot has an entry."""
        own = self._columns.get(name)
        if own is None:
            return None
        return _filled(own, self.n, self.kinds[name])

    def entries(self, name: str) -> Tensor | None:
        """The entries of a column, of the first slots; the same tensor as long as they are the same."""
        return self._columns.get(name)

    def columns(self) -> dict[str, Tensor]:
        """All columns, by name."""
        return {name: column for name in self._columns if (column := self.column(name)) is not None}

    def fill(self, name: str) -> float | bool:
        """What a slot without an entry has in a column."""
        return self.kinds[name].fill

    def has(self, name: str) -> bool:
        """Whether any slot has an entry in a column."""
        return name in self._columns

    def put(self, kind: Column, entries: Tensor | None) -> None:
        """Give the first slots these entries, ``[B, Hkv, m, ...]``, and the later ones the fill; None: all the fill."""
        self.kinds[kind.name] = kind
        if entries is None:
            self._columns.pop(kind.name, None)
        else:
            self._columns[kind.name] = entries

    # -- operations on the pairs ----------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        """Add the pairs of new tokens, ``[B, Hkv, Q, D]``."""
        if self.store is None:
            self.store = DenseStore(keys, values, is_borrowed=True)
        else:
            self.store.append(keys, values, is_tight)
        self.seen += keys.shape[2]

    def commit(self, n: int) -> None:
        """Count ``n`` tokens that a compiled step wrote in place."""
        self.filled.commit(n)
        self.seen += n

    def crop(self, length: int) -> None:
        """Forget the newest tokens, down to a logical length that leaves what was kept alone."""
        if self.store is not None:
            self.store.crop(self.store.n - (self.seen - length))
        self.seen = length
        self.outlines.crop(self.n)
        self._columns = {name: own[:, :, : self.n] for name, own in self._columns.items()}

    def index_rows(self, rows: Tensor) -> None:
        """Select the rows ``rows``, int64 ``[B']``."""
        store = self.filled
        before, n_before = store.n, self.n_kept
        self.outlines.forget()
        store.index_rows(rows)
        n_kept = n_before if store.n_first is None else store.n_first
        if self.kept is not None:
            self.kept = self.kept.index_select(0, rows)[..., :n_kept]
            self.has_gaps = self.has_gaps if store.n_first is None else bool((self.kept < 0).any())
        for name, own in self._columns.items():
            own = own.index_select(0, rows)
            if store.n < before:  # the longest head has gone
                own = torch.cat([own[:, :, :n_kept], own[:, :, n_before:]], dim=2)
            self._columns[name] = own

    def shared(self) -> Slots:
        """Slots of the same pairs that go their own way; whichever of the two is written to first copies."""
        other = Slots()
        vars(other).update(vars(self))
        other._columns, other.kinds = dict(self._columns), dict(self.kinds)
        other.store = None if self.store is None else self.store.shared()
        other.outlines = self.outlines.shared()
        return other

    def replaced(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        columns: Mapping[str, Tensor],
        padding: float | None = WASTE,
        store: Store | None = None,
        kinds: Mapping[str, Column] | None = None,
    ) -> Slots:
        """Slots that store these pairs as what was kept of the tokens seen so far.

        Args:
            keys, values: ``[B, Hkv, n, D]``, not shared; any number where ``positions`` are -1.
            positions: int32 ``[B, Hkv, n]``, ascending; -1 in the last places of a head that keeps fewer.
            columns: entries ``[B, Hkv, n, ...]``, or of the first slots, by name.
            padding: the share of slots that may be padding before heads are stored one after the other; None: any.
            store: of these pairs, where it is made already.
            kinds: of columns that are new here, by name.
        """
        other = Slots()
        other.kept, other.seen, other.tail_start = positions, self.seen, self.seen
        other._columns, other.kinds = dict(columns), {**self.kinds, **(kinds or {})}
        n_pairs = int((positions >= 0).sum())
        other.has_gaps = n_pairs < positions.numel()
        if store is not None:
            other.store = store
        elif other.has_gaps and padding is not None and n_pairs <= (1 - padding) * positions.numel():
            n = positions.shape[2]  # buffers that are used again have more slots
            other.store = RaggedStore(keys[:, :, :n], values[:, :, :n], positions >= 0)
        else:
            other.store = DenseStore(keys, values)
            other.store.crop(positions.shape[2])
        return other

    def forget_first(self, n_kept_too: int) -> bool:
        """Free the first slots, the kept ones among them, as far as the store can; whether any have gone.

        Args:
            n_kept_too: how many slots may go, at least as many as were kept.
        """
        n_first = self.filled.droppable(n_kept_too)
        if n_first < self.n_kept:
            return False
        self.store = self.filled.without_first(n_first)
        self.outlines.forget()
        self.tail_start += n_first - self.n_kept
        self.kept, self.has_gaps = None, False
        self._columns = {name: own[:, :, n_first:] for name, own in self._columns.items() if own.shape[2] > n_first}
        return True

    def forget_unreachable(self, window: int, padding: Tensor | None) -> None:
        """Free the slots that no later token can see, as soon as there are enough to be worth the copy.

        Args:
            window: how many tokens back a query sees.
            padding: bool ``[B, seen]``, False where a token is padding; None if there is none.
        """
        oldest = self.seen - (window - 1) - _SLACK_TOKENS  # position of the first slot that has to be kept
        n_free = self.n_kept + oldest - self.tail_start
        if oldest < self.tail_start or n_free < max(_FORGET_MIN_TOKENS, window // 2):
            return
        if padding is not None:  # a row with padding in its window reaches further back
            oldest = min(oldest, int(newest_from(padding, window - 1 + _SLACK_TOKENS).min()))
            if oldest <= self.tail_start:
                return
        self.forget_first(self.n_kept + oldest - self.tail_start)

    def settle(self, stop: int, stays: Tensor, padding: float | None = WASTE) -> None:
        """Of the tokens up to ``stop``, the kept ones move up behind what their head keeps; the others are freed.

        Costs a copy of these tokens and of those after them, and of the columns; not of the pairs that are kept.

        Args:
            stays: bool ``[B, Hkv, m]``, which of the tokens ``tail_start .. stop - 1`` are kept.
            padding: as in :meth:`replaced`.
        """
        store, start, kept = self.filled, self.tail_start, self.kept
        self.outlines.forget()
        if kept is None:
            kept = torch.empty(store.n_rows, store.n_heads, 0, dtype=torch.int32, device=store.device)
        n_kept, m = kept.shape[2], stop - start
        n_each = (kept >= 0).sum(-1, keepdim=True)  # [B, Hkv, 1]
        n_then = n_each[..., 0] + stays.sum(-1)
        longest, shortest, n_pairs = torch.stack([n_then.max(), n_then.min(), n_then.sum()]).tolist()
        order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)  # the kept ones first
        to = n_each + torch.arange(m, device=order.device)  # the others land in empty slots, or go over
        at = (start + order).int().masked_fill(~stays.gather(2, order), -1)
        self.kept = pad(kept, (0, m), value=-1).scatter_(2, to, at)[..., :longest].contiguous()
        for name, own in self._columns.items():
            whole = _filled(own, max(own.shape[2], n_kept + m), self.kinds[name])
            moved = column_at(whole[:, :, n_kept : n_kept + m], order)
            first = _filled(whole[:, :, :n_kept], n_kept + m, self.kinds[name]).clone()
            first.scatter_(2, to.view(*to.shape, *(1 for _ in own.shape[3:])).expand_as(moved), moved)
            self._columns[name] = torch.cat([first[:, :, :longest], whole[:, :, n_kept + m :]], dim=2)
        store.settle(n_kept, order, to, stays, longest)
        if not store.is_ragged and padding is not None and n_pairs <= (1 - padding) * self.kept.numel():
            self.store = RaggedStore(store.keys[:, :, :longest], store.values[:, :, :longest], self.kept >= 0)
            self.store.append(store.keys[:, :, longest:], store.values[:, :, longest:])
        self.tail_start, self.has_gaps = stop, shortest < longest


def _filled(entries: Tensor, n: int, kind: Column) -> Tensor:
    """Entries ``[B, Hkv, m, ...]`` for n slots: the later ones have the column's fill."""
    more = n - entries.shape[2]
    if more <= 0:
        return entries[:, :, :n]
    shape = (*entries.shape[:2], more, *entries.shape[3:])
    return torch.cat([entries, entries.new_full(shape, kind.fill)], dim=2)
