"""LayerView: what a press may see of one layer, computed when asked for, and only once.

A view has no padding: rows of a padded batch are taken apart before they get here (see ``cache/rows.py``), so that what
a press does to a row is what it does to that row alone. Nor has it what a sliding window has left behind: such a view
begins at ``first_position`` of its rows. After the prefill its tokens are consecutive. While decoding they are what is
stored of the text so far, and where heads store different numbers, the shorter ones end in empty slots (``counts``);
scorers never see those, because such a view is scored head by head (:meth:`LayerView.of_head`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coldpress.architecture.projection import weight_of_heads
from coldpress.architecture.rope import Rope
from coldpress.core.choice import protect
from coldpress.core.kept import Kept, Place
from coldpress.core.moves import moved_keys, side_by_side, unrotated
from coldpress.core.outlines import Outlines
from coldpress.core.pick import at_once, column_at, pick
from coldpress.core.weights import Weights

__all__ = ["LayerView"]

_T = TypeVar("_T")


@dataclass(eq=False)
class LayerView:
    """One layer right after its attention, for the rows of a batch that have the same number of tokens.

    Attributes:
        keys: ``[B, Hkv, T, D]`` after rotation and normalisation, in the model's dtype.
        values: ``[B, Hkv, T, Dv]``.
        queries: ``[B, Hq, Q, D]``, the queries of the last ``Q`` tokens of the text (all of it after a prefill).
        module: the attention module; its weights and ``config`` may be read.
        scaling: what ``q @ k`` is multiplied with before the softmax.
        layer_idx, n_layers: this layer among the layers that are compressed, counted from 0.
        first_position: position of the first token of the view among the real tokens of its rows, counted from 0.
            Where ``positions`` are given, only ``first_position + T``, the length of the text so far, has a meaning.
        positions: int64 ``[B, Hkv, T]``, ascending, where tokens are not consecutive (decoding, :meth:`among`); -1 in
            empty slots. None where they are consecutive from ``first_position`` on.
        counts: int64 ``[B, Hkv]``, tokens that each head stores, where heads differ; None where all slots are filled.
        carried: float32 ``[B, Hkv, T]``, what the press gave each token to carry (:class:`Kept`), NaN for those that
            have come since; None if it gave nothing.
        places: int64 ``[B, Hkv, T]``, the positions at which the keys stand where that is not ``positions``: in a cache
            that moves its keys up (``positions="rerotate"``); of no account in empty slots.
        query_places: int64 ``[B, Hkv, Q]``, likewise of the queries, which differ by KV head.
        rounding_residual: ``[B, Hkv, T, Drot]`` in the keys' dtype or None, as in :class:`Kept`.
        columns: what else each pair carries, ``[B, Hkv, T, ...]`` by name: what the press declares (``Press.columns``),
            and ``pinned``, bool, of tokens that nothing may evict.
        n_new: how many tokens have come since the press was asked last; all of them at the prefill.
        n_counted: while a prefill goes on in pieces, the length of the text that a budget is a share of; else None.
        hidden_states: ``[B, n, hidden]``, input of the attention layer for the last n tokens: all after a prefill,
            those since the last time while decoding. None unless a press asks for it inside ``with press(model):``.
        token_ids: int64 ``[B, T]`` after a prefill inside ``with press(model):``, else None.
        sliding_window: how many tokens back a query sees, or None for all.
        softcap: ``c`` where the model replaces attention logits by ``c * tanh(logits / c)``, else None.
        sinks: ``[Hq]``, a logit of each head that takes part in the softmax and belongs to no token, or None.
        stored_bytes: of n pairs of every head, of one row, as the cache will store them; None: as they are here.
        find_rope, find_seed: give the layer's rotary embedding, None where it has none, and :attr:`seed`.
        outlines: of the first slots: the layer's own where the view is what the layer stores, else new ones.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    module: nn.Module
    scaling: float
    layer_idx: int
    n_layers: int
    first_position: int = 0
    positions: Tensor | None = None
    counts: Tensor | None = None
    carried: Tensor | None = None
    places: Tensor | None = None
    query_places: Tensor | None = None
    rounding_residual: Tensor | None = None
    n_new: int | None = None
    n_counted: int | None = None
    hidden_states: Tensor | None = None
    token_ids: Tensor | None = None
    whole: LayerView | None = None  # what a view of one head was taken from
    row_head: tuple[int, int] = (0, 0)  # and where it stood there
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    find_rope: Callable[[], Rope | None] = lambda: None
    find_seed: Callable[[], int] = lambda: 0
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    stored_bytes: Callable[[int], int] | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    outlines: Outlines = field(default_factory=Outlines, init=False, repr=False)  # so not those of a replaced view

    @property
    def n_tokens(self) -> int:
        """T, the number of stored tokens."""
        return self.keys.shape[2]

    @property
    def end(self) -> int:
        """Length of the text so far: the position of the next token among the real tokens of its rows."""
        return self.first_position + self.n_tokens

    @property
    def place(self) -> Place:
        """This layer among the others, and what a token costs in it."""
        token_bytes = self.keys.element_size() * self.keys.shape[1] * (self.keys.shape[-1] + self.values.shape[-1])
        return Place(self.layer_idx, self.n_layers, token_bytes, self.stored_bytes)

    @property
    def n_queries(self) -> int:
        """Q, the number of tokens whose queries are here: the last ones."""
        return self.queries.shape[2]

    @property
    def seed(self) -> int:
        """Changes from cache to cache, repeats with ``torch.manual_seed``; drawn by the first press that asks."""
        return self.find_seed()

    @property
    def group_size(self) -> int:
        """G, the query heads that share a KV head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def once(self, name: Hashable, compute: Callable[[], _T]) -> _T:
        """``compute()`` the first time, the same object every later time that ``name`` is asked for."""
        value: _T = self._memo[name] if name in self._memo else self._memo.setdefault(name, compute())
        return value

    def forget(self) -> None:
        """Drop what was computed once, views of single heads among it: they refer to the whole view, and it to them."""
        self._memo.clear()

    def part(self, start: int, stop: int) -> LayerView:
        """The view of tokens ``start .. stop - 1`` alone, at their own positions; the same object every time."""

        def compute() -> LayerView:
            skipped = self.n_tokens - self.n_queries  # tokens whose queries are not here
            here = slice(max(0, start - skipped), max(0, stop - skipped))
            return replace(
                self,
                keys=self.keys[:, :, start:stop],
                values=self.values[:, :, start:stop],
                queries=self.queries[:, :, here],
                first_position=self.first_position + start,
                positions=None if self.positions is None else self.positions[..., start:stop],
                **self._following(lambda column: column[:, :, start:stop]),
                query_places=None if self.query_places is None else self.query_places[..., here],
                counts=None if self.counts is None else (self.counts - start).clamp(0, stop - start),
                hidden_states=self._hidden_states_of(start, stop),
                token_ids=None if self.token_ids is None else self.token_ids[:, start:stop],
                _memo={},
            )

        return self.once(("part", start, stop), compute)

    def among(self, chosen: Tensor, stop: int, n_queries: int) -> LayerView:
        """What this layer would store after token ``stop - 1`` if nothing but ``chosen`` had been kept.

        Args:
            chosen: int64 ``[B, Hkv, n]``, ascending positions in the view, the last ``n_queries`` of them
                ``stop - n_queries .. stop - 1`` in every head.
            stop: end of the text so far.
            n_queries: tokens whose queries are looked at.
        """
        skipped = self.n_tokens - self.n_queries
        here = slice(max(0, stop - n_queries - skipped), max(0, stop - skipped))
        kept, end = self.take(chosen), self.first_position + stop
        return replace(
            self,
            keys=kept.keys,
            values=kept.values,
            queries=self.queries[:, :, here],
            query_places=None if self.query_places is None else self.query_places[..., here],
            first_position=end - chosen.shape[2],  # so that the queries, those of the last tokens, are in their places
            positions=chosen + self.first_position,
            **self._following(lambda column: column_at(column, chosen)),
            hidden_states=self._hidden_states_of(stop - n_queries, stop),
            token_ids=None,
            _memo={},
        )

    def _following(self, take: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What follows each pair, ``[B, Hkv, T, ...]``, as ``take`` leaves it."""
        named = {"carried": self.carried, "places": self.places, "rounding_residual": self.rounding_residual}
        own = {name: None if column is None else take(column) for name, column in named.items()}
        return {**own, "columns": {name: take(column) for name, column in self.columns.items()}}

    def _hidden_states_of(self, start: int, stop: int) -> Tensor | None:
        """Those of tokens ``start .. stop - 1`` that are there."""
        if self.hidden_states is None:
            return None
        skipped = self.n_tokens - self.hidden_states.shape[1]
        return self.hidden_states[:, max(0, start - skipped) : max(0, stop - skipped)]

    def of_head(self, row: int, head: int) -> LayerView:
        """The pairs of one head of one row, without empty slots: B and Hkv are 1; the same object every time."""

        def compute() -> LayerView:
            n = self.n_tokens if self.counts is None else int(self.counts[row, head])
            group = slice(head * self.group_size, (head + 1) * self.group_size)
            here = slice(row, row + 1), slice(head, head + 1), slice(0, n)
            return replace(
                self,
                keys=self.keys[here],
                values=self.values[here],
                queries=self.queries[row : row + 1, group],
                first_position=self.end - n,
                positions=None if self.positions is None else self.positions[here],
                counts=None,
                **self._following(lambda column: column[here]),
                query_places=None if self.query_places is None else self.query_places[here[:2]],
                hidden_states=None if self.hidden_states is None else self.hidden_states[row : row + 1],
                token_ids=None,
                sinks=None if self.sinks is None else self.sinks[group],
                whole=self,
                row_head=(row, head),
                _memo={},
            )

        return self.once(("of_head", row, head), compute)

    def n_first(self, n: int) -> int:
        """How many slots, from the start of every head, belong to the first ``n`` tokens of the text."""
        if self.positions is None:
            return min(max(0, n - self.first_position), self.n_tokens)
        return int(((self.positions >= 0) & (self.positions < n)).sum(-1).min()) if n else 0

    def guard(self, scores: Tensor, must: Tensor) -> Tensor:
        """``scores`` ``[B, Hkv, T]``, infinite at the tokens that must be kept, minus infinity in empty slots."""
        scores = protect(scores, must)
        return scores if self.positions is None else scores.masked_fill(self.positions < 0, -torch.inf)

    def held(self, chosen: Tensor) -> Tensor:
        """``chosen``, int64 ``[B, Hkv, n]``, with -1 for empty slots, and no longer than its longest head."""
        if self.counts is None:
            return chosen
        chosen = chosen.masked_fill(chosen >= self.counts[..., None], -1)
        return chosen[..., : int((chosen >= 0).sum(-1).max())]

    def take(self, chosen: Tensor) -> Kept:
        """The pairs at ``chosen``, int64 ``[B, Hkv, n]`` positions in the view, -1 for none."""
        at = chosen.clamp(min=0)
        columns = {name: column_at(column, at) for name, column in self.columns.items()}
        return Kept(pick(self.keys, at), pick(self.values, at), chosen, columns=columns)

    def window_attention(self, window: int) -> Tensor:
        """Attention weights of the last ``window`` queries: float32 ``[B, Hkv, G, window, T]``.

        Each row sums to 1, or to less where the model has attention sinks.
        """
        rows, span = self._weights().rows, self._span(window)
        return self.once(("window_attention", window), lambda: rows(*span))

    def window_logits(self, window: int) -> Tensor:
        """What :meth:`window_attention` is the softmax of; minus infinity where a query does not see a key."""
        return self._weights().logits(*self._span(window))[0]

    def _span(self, window: int) -> tuple[int, int]:
        if not 1 <= window <= self.n_queries:
            raise ValueError(f"window must be in 1..{self.n_queries}, got {window}")
        return self.n_queries - window, self.n_queries

    def attention_column_sums(self, n_queries: int | None = None) -> Tensor:
        """What each key received from the last ``n_queries`` (None: all), mean over the group: float32 ``[B, Hkv, T]``.

        The sum over queries of the attention matrix, taken block by block: no ``[T, T]`` tensor is ever made.
        """
        n = self.n_queries if n_queries is None else min(n_queries, self.n_queries)
        return self.once(("attention_column_sums", n), lambda: self._weights().column_sums(self.n_queries - n))

    def attention_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Attention weights of all queries, block by block: the first query of each, float32 ``[B, Hkv, G, n, T']``.

        Keys that no query of a block sees may be left out at the end.
        """
        block = min(1024, at_once(self.queries.device, self.queries.shape[:2].numel() * self.n_tokens))
        for start in range(0, self.n_queries, block):
            yield start, self._weights().rows(start, min(start + block, self.n_queries))

    def unrotated_queries(self) -> Tensor:
        """The queries as they were before rotary embedding, float32 ``[B, Hq, Q, D]``.

        Raises:
            ModelError: the model rotates in a way that cannot be undone from outside.
        """

        def compute() -> Tensor:
            rope = self.find_rope()
            if rope is not None and self.query_places is not None:
                at = self.query_places.repeat_interleave(self.group_size, dim=1)
                return rope.rotate_each(self.queries.float(), *self._back(rope, at))
            positions = torch.arange(self.end - self.n_queries, self.end, device=self.queries.device)
            return self.queries.float() if rope is None else unrotated(rope, self.queries, positions)

        return self.once("unrotated_queries", compute)

    def unrotated_keys(self) -> Tensor:
        """The keys as they were before rotary embedding, float32 ``[B, Hkv, T, D]``.

        Raises:
            ModelError: the model rotates in a way that cannot be undone from outside.
        """

        def compute() -> Tensor:
            rope = self.find_rope()
            if rope is None:
                return self.keys.float()
            end, device = self.end, self.keys.device
            if self.positions is None:
                return unrotated(rope, self.keys, torch.arange(self.first_position, end, device=device))
            if self.places is not None:
                return rope.rotate_each(self.keys.float(), *self._back(rope, self.places))
            back = rope.inverse(*rope.cos_sin(torch.arange(end, device=device)))
            return rope.rotate_each(self.keys.float(), *back, self.positions.clamp(min=0))

        return self.once("unrotated_keys", compute)

    @staticmethod
    def _back(rope: Rope, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What undoes the rotation to ``places``, as :meth:`Rope.rotate_each` takes it; for places near each other."""
        first = places.min()
        near = torch.arange(int(places.max() - first) + 1, device=places.device)
        return *rope.inverse(*rope.cos_sin(near + first)), places - first

    def side_by_side(self, kept: Kept) -> Kept:
        """``kept`` with keys that stand side by side at the end of the text, as all those of the view do.

        A kept key moves up by as many positions as tokens after it go, in float32. The rounding residual, float32 key
        minus stored key, is stored (``rounding_residual``), so that errors of repeated moves do not add up.
        """
        rope = self.find_rope()
        if rope is None or kept.positions.numel() == 0:
            return kept
        n_stored = self.n_tokens if self.counts is None else self.counts[..., None]
        return side_by_side(kept, n_stored, self.rounding_residual, rope)

    def moved_keys(self, kept: Kept, places: Tensor) -> Tensor:
        """The keys of ``kept`` as they would be at ``places``, int64 ``[B, Hkv, n]`` positions in the view.

        They are rotated back and forth, in one step, by the model's own rotary embedding for a text of this length, in
        float32; the dimensions that it does not rotate stay as they are. A layer that rotates nothing gets its keys
        back.
        """
        rope = self.find_rope()
        if rope is None:
            return kept.keys
        turned = rope.cos_sin(torch.arange(self.first_position, self.end, device=self.keys.device))
        return moved_keys(kept.keys, kept.positions, places, turned, rope)

    def value_norms(self) -> Tensor:
        """||v||_2 of every value: float32 ``[B, Hkv, T]``."""

        def compute() -> Tensor:
            block = at_once(self.values.device, self.values[:, :, :1].numel())
            return torch.cat([part.float().square().sum(-1) for part in self.values.split(block, dim=2)], dim=-1).sqrt()

        return self.once("value_norms", compute)

    def projected_value_norms(self) -> Tensor:
        """||W_O v||_1 of every value, the mean over the group's heads: float32 ``[B, Hkv, T]``.

        W_O is the slice of the layer's output projection that belongs to a query head; its bias does not count.

        Raises:
            ModelError: the layer has no output projection that coldpress knows.
        """

        def compute() -> Tensor:
            heads = weight_of_heads(self.module, self.queries.shape[1], self.values)
            block = at_once(self.values.device, self.values.shape[:2].numel() * heads.shape[3])
            norms = []
            for values in self.values.float().split(block, dim=2):
                by_head = [(values @ heads[:, g]).abs_().sum(-1) for g in range(self.group_size)]
                norms.append(torch.stack(by_head).mean(0))  # a norm of order 1 takes twice as long on a CPU
            return torch.cat(norms, dim=-1)

        if self.whole is not None:
            row, head = self.row_head
            return self.whole.projected_value_norms()[row : row + 1, head : head + 1, : self.n_tokens]
        return self.once("projected_value_norms", compute)

    def mean_future_rotation(self, states: Tensor, n_positions: int) -> Tensor:
        """Rotate float32 ``[B, H, n, D]`` by the mean rotation of the ``n_positions`` positions after the last one."""
        rope, name = self.find_rope(), ("mean_rotation", n_positions)
        if rope is None:
            return states
        return rope.rotate(states, *self.once(name, lambda: rope.mean_rotation(self.end, n_positions, states.device)))

    def _weights(self) -> Weights:
        return Weights(
            self.queries, self.keys, self.scaling, self.softcap, self.sinks, self.sliding_window, self.first_position,
            self.positions, self.counts, self.columns.get("bias"),
        )  # fmt: skip
