"""PressedLayer: the pairs of one layer, and the two lengths they have.

The *logical* length is how many tokens the model has seen; transformers asks for it and derives the positions of the
next tokens. The *stored* length is how many pairs the layer still stores.

A layer of the model runs ``cache.update(...)`` and then the attention function (``models/backend.py``) in the same
thread. The attention function claims the layer that was updated last, and calls :meth:`PressedLayer.run`: attention,
and then what the press makes of it (``eviction.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from coldpress.architecture.generating import refuse_dropping, switching_refusal
from coldpress.attend.one_token import attend_some, can_attend_once
from coldpress.cache.choosing import ChoosingLayer
from coldpress.cache.masks import additive_mask
from coldpress.cache.observation import selected
from coldpress.cache.phase import Phase, check_piece, phase_after
from coldpress.cache.pins import among_real, pinned
from coldpress.cache.session import THREAD, Session, uncompiled
from coldpress.cache.slots import CARRIED
from coldpress.core.call import LayerCall
from coldpress.core.pick import column_at, pick
from coldpress.errors import CacheError
from coldpress.stores.base import Store

__all__ = ["Arithmetic", "PressedLayer", "next_layer"]

Attended = tuple[Tensor, Tensor | None]  # output [B, Q, Hq, Dv], weights or None
# query [B, Hq, Q, D], keys [B, Hkv, T, D], values, bias [B or 1, Hkv or 1, Q or 1, T] or None
Arithmetic = Callable[[Tensor, Tensor, Tensor, Tensor | None], Attended]


class PressedLayer(ChoosingLayer):
    """The pairs of one layer: what transformers asks of a layer of a cache, and the one call of its attention."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True

    # -- what transformers asks of a layer ----------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        return self.slots.store is not None

    @property
    def keys(self) -> Tensor | None:
        """Stored keys, ``[B, Hkv, T, D]``; a copy where heads store different numbers, fewer channels or few bits."""
        return None if self.slots.store is None else self.slots.store.keys

    @property
    def values(self) -> Tensor | None:
        """Stored values, ``[B, Hkv, T, Dv]``; a copy where heads store different numbers of them, or few bits."""
        return None if self.slots.store is None else self.slots.store.values

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the first update brings shapes, dtype and device."""

    @uncompiled
    def get_seq_length(self, *args: Any) -> int:
        self.session.check_claimed()
        self.refuse_dropping()
        return self.slots.seen

    def refuse_dropping(self) -> None:
        """Raise if ``generate`` is about to throw this cache away."""
        if self.session.switch_at is not None and 0 < self.slots.seen <= self.session.switch_at:
            refuse_dropping(self.slots.seen, self.session.switch_at)

    @uncompiled
    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        self.session.check_claimed()
        THREAD.masks_for = self  # transformers does not tell its mask functions whose masks they make
        return self.slots.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the pairs of new tokens, ``[B, Hkv, Q, D]``; return all stored keys and values.

        Where heads are stored one after the other, it returns what it was given: :meth:`run` attends to the rest.
        """
        session, slots, n_new = self.session, self.slots, key_states.shape[2]
        session.check_claimed()
        THREAD.masks_for = None
        chunk = session.chunk_tokens
        if chunk is not None:
            may_guess = session.press is None or session.prefill_end is not None
            check_piece(self.phase, n_new, slots.seen, chunk, may_guess)
        session.check_layer(self.index, slots.seen, n_new)
        if session.switch_at is not None and 0 < slots.seen <= session.switch_at < slots.seen + n_new:
            raise switching_refusal(session.switch_at)
        if slots.store is not None:
            _check_alike(slots.store, key_states, value_states)
        phase = phase_after(self.phase, n_new, slots.seen + n_new, chunk, session.prefill_end)
        is_piece = chunk is not None and phase.is_prefill and session.press is not None
        slots.append(key_states, value_states, is_tight=is_piece)  # a piece is cut back before the next one comes
        self.phase = phase
        store = slots.filled
        self._offered = (key_states, value_states) if store.is_ragged else (store.keys, store.values)
        THREAD.updated = session.unclaimed = self
        return self._offered

    def is_offered(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are the very tensors that the last :meth:`update` returned."""
        return self._offered is not None and self._offered[0] is keys and self._offered[1] is values

    def reset(self) -> None:
        """Forget everything but the session's press."""
        self.session.forget_steps()
        self.clear()

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens: keep ``max_length`` of the tokens seen, or drop ``-max_length`` if negative.

        Raises:
            CacheError: as :meth:`cropped_length`.
        """
        length, seen = self.cropped_length(max_length), self.slots.seen
        if not length:
            return self.reset()  # the next call is a prefill, of as many rows as it brings
        if length == seen:
            return
        real = [seen - length] * len(self.pending.n_new)
        if self.shown is not None:
            real = self.shown[:, length:].sum(-1).tolist() if self.pending.n_new else []
            self.shown = self.shown[:, :length]
        self.slots.crop(length)
        self.pending = self.pending.until(length, real)

    def cropped_length(self, max_length: int) -> int:
        """The logical length after ``crop(max_length)``; like transformers 5, ``crop(0)`` changes nothing.

        Raises:
            CacheError: tokens would have to go that the press has already compressed.
        """
        slots = self.slots
        length = max_length if max_length > 0 else slots.seen + max_length
        if length >= slots.seen:
            return slots.seen
        oldest = slots.tail_start  # the shortest length that leaves the next token all it may see
        if slots.kept is None and oldest > 0:
            assert self.window is not None
            oldest += self.window - 1
        if length < oldest:
            raise CacheError(
                f"Cannot crop to {length} tokens: pairs that a cache of that length needs are gone. "
                f"Crop to {oldest} or more, fork() the cache before adding to it, or prefill again."
            )
        first = slots.seen - (0 if slots.store is None else slots.store.n_croppable)
        if length < first and self.session.storage is not None:
            raise CacheError(
                f"Cannot crop to {length} tokens: those before {first} are stored in few bits, in groups that cannot "
                "be cut. Crop to that or more, fork() the cache before adding to it, keep more of the newest as they "
                "are, with kv_bits=KVBits(bits, residual_tokens=...), or store them one by one, with kv_bits='k8v4'."
            )
        return length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.slots.store is not None:
            self.batch_select_indices(torch.arange(self.slots.store.n_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices
        if self.shown is not None:
            self.shown = self.shown.index_select(0, rows.to(self.shown.device))
        if self.slots.store is None:
            return
        rows = rows.to(self.slots.store.device)
        self.session.forget_rows()
        self.slots.index_rows(rows)
        self.pending = self.pending.index_rows(rows)

    def offload(self) -> None:
        raise CacheError("PressedCache does not offload to the CPU; use it without cache offloading.")

    prefetch = offload

    # -- attention ------------------------------------------------------------------------------------------------

    def begin(self, n_new: int, mask: Tensor | None) -> Tensor | None:
        """A call of the model with ``n_new`` tokens begins, with a mask, bool ``[B, seen + n_new]``, or None.

        Returns:
            The mask; None if it hides nothing.
        """
        return self.session.begin(self.slots.seen, n_new, mask, self.shown)

    def run(self, call: LayerCall, mask: Tensor | None, arithmetic: Arithmetic, is_plain: bool) -> Attended:
        """Attention of the tokens that came with the last :meth:`update`, and then what the press makes of it.

        Args:
            call: what the attention function knows of this layer.
            mask: bool ``[B, seen]``, False where a token is hidden; None if none is.
            arithmetic: attention over keys and values with one additive mask.
            is_plain: it is a softmax over the logits and nothing else, which a store may do in its own way.

        Returns:
            ``[B, Q, Hq, Dv]``, and weights or None.
        """
        store, n_queries = self.slots.filled, call.query.shape[2]
        read, own = self._read_slots(call), self.session.call
        by_head = store.is_ragged and is_plain and read is None
        leaving = self._leaving(n_queries)
        bias = additive_mask(self.slots, n_queries, mask, call.sliding_window, own, leaving, by_head)
        if read is not None:
            result = self._attend_to(call, read, bias, arithmetic, is_plain)
        elif by_head:
            result = store.attend(call.query, bias, call.scaling), None
        else:
            keys, values = (store.keys, store.values) if store.is_ragged or self._offered is None else self._offered
            result = arithmetic(call.query, keys, values, bias)
        self.after_attention(call)
        return result

    def _read_slots(self, call: LayerCall) -> Tensor | None:
        """The slots that the query of a decoding step reads, int64 ``[B, Hkv, n]``, -1 for none; None: all."""
        if self.phase is not Phase.LATER or call.query.shape[2] > 1 or call.is_local:
            return None
        readers = self.session.roles.readers
        return selected(readers[0], self._groups_of_call(call, self.padding()), self.slots) if readers else None

    def _attend_to(
        self, call: LayerCall, read: Tensor, bias: Tensor | None, arithmetic: Arithmetic, is_plain: bool
    ) -> Attended:
        """Attention over the slots ``read`` alone."""
        store, at, query = self.slots.filled, read.clamp(min=0), call.query
        bias = torch.zeros(1, 1, 1, store.n, device=read.device) if bias is None else bias
        own = bias.expand(store.n_rows, store.n_heads, 1, -1)[:, :, 0].gather(2, at).masked_fill(read < 0, -torch.inf)
        self.n_read = self.n_read + (read >= 0).sum()
        self.n_readable += int(self.slots.n_kept_pairs + store.n_rows * store.n_heads * (store.n - self.slots.n_kept))
        keys, values = store.keys, store.values
        if is_plain and can_attend_once(query, keys, values):
            return attend_some(query, keys, values, at, own, call.scaling), None
        return arithmetic(query, pick(keys, at), pick(values, at), own[:, :, None])

    # -- what coldpress adds --------------------------------------------------------------------------------------

    @property
    def has_padding(self) -> bool:
        """Whether there are tokens that no call was shown."""
        return self.shown is not None and not bool(self.shown.all())

    @property
    def stored_length(self) -> int:
        """Slots in use, T: the length of the stored tensors (of the longest head, where heads differ)."""
        return self.slots.n

    @property
    def is_ragged(self) -> bool:
        """Whether heads are stored one after the other, so that :meth:`update` returns the new pairs alone."""
        return self.slots.store is not None and self.slots.store.is_ragged

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the keys and values."""
        return self.slots.tensors()

    def positions(self) -> Tensor:
        """Original positions of the stored pairs, int64 ``[B, Hkv, T]``, ascending; -1 where a head stores fewer.

        They differ within a head, but for pairs that belong to no token (RestoreKVPress).
        """
        return self.slots.positions()

    def columns(self) -> dict[str, Tensor]:
        """What each stored pair carries, by name, ``[B, Hkv, T, ...]``; ``pinned`` among them where tokens are."""
        own = self.slots.columns()
        if self.session.pins and self.slots.store is not None:
            own["pinned"] = pinned(self.session.pins, among_real(self.positions(), self.shown))
        return own

    def carried(self) -> Tensor | None:
        """What the press gave the stored pairs to carry, float32 ``[B, Hkv, T]``, NaN for those that came later."""
        return self.slots.column(CARRIED.name)

    def keep(self, slots: Tensor) -> None:
        """Keep some of the stored pairs and free the others.

        Args:
            slots: int64 ``[B, Hkv, n]``, ascending slots of the stored tensors; -1 in the last places of a head that
                keeps fewer.
        """
        at, store = slots.clamp(min=0), self.slots.filled
        keys, values = (
            states.gather(2, at[..., None].expand(-1, -1, -1, states.shape[3])) for states in (store.keys, store.values)
        )
        own = self.slots.columns()
        own.pop(CARRIED.name, None)  # it has been asked for
        columns = {name: column_at(column, at) for name, column in own.items()}
        self.store(keys, values, self.positions().gather(2, at).masked_fill(slots < 0, -1), columns)

    def store(
        self, keys: Tensor, values: Tensor, positions: Tensor, columns: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store these pairs instead of those that are there, as what the press kept of the tokens seen so far.

        Args:
            keys, values: ``[B, Hkv, n, D]``; the layer's own from now on.
            positions: int64 ``[B, Hkv, n]``, ascending; -1 in the last places of a head that stores fewer.
            columns: what they carry, ``[B, Hkv, n, ...]`` by name.
        """
        before = max(self.n_pairs[0], int((self.positions() >= 0).sum()))
        self.slots = self.slots.replaced(keys, values, positions.int(), columns or {}, self._padding_allowed())
        self.pending.hidden_states, self.pending.n_new = None, []
        self.n_pairs = before, self.slots.n_kept_pairs


def next_layer(session: Session) -> PressedLayer:
    """The next layer of the cache that ``session`` belongs to, in order."""
    session.n_layers += 1
    return PressedLayer(session, session.n_layers - 1)


def _check_alike(store: Store, keys: Tensor, values: Tensor) -> None:
    """Raise :class:`CacheError` if new pairs are of other rows, dtype or device than those that are stored."""
    if keys.shape[0] != store.n_rows:
        raise CacheError(
            f"The cache holds {store.n_rows} rows and the call has {keys.shape[0]}. For several "
            "sequences or beams from one prefix call cache.batch_repeat_interleave(n) first, or start with an "
            "empty cache."
        )
    own_keys, own_values = store.tensors()[:2]
    if own_keys.dtype != keys.dtype or own_values.dtype != values.dtype or own_keys.device != keys.device:
        stored, brought = _said(own_keys, own_values), _said(keys, values)
        raise CacheError(
            f"The cache holds keys and values in {stored} and the call brings them in {brought}: the model's "
            "dtype or device, or autocast, is not what it was when the cache was filled. Run the model as it ran "
            "then, or start with an empty cache."
        )


def _said(*states: Tensor) -> str:
    """Dtypes and devices of keys and values, in words."""
    words = [f"{str(part.dtype).removeprefix('torch.')} on {part.device}" for part in states]
    return " and ".join(dict.fromkeys(words))
