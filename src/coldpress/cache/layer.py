"""PressedLayer: the pairs of one layer, and the two lengths they have.

The *logical* length is how many tokens the model has seen; transformers asks for it and derives the positions of the
next tokens. The *stored* length is how many pairs the layer still holds.

A layer of the model runs ``cache.update(...)`` and then the attention function (``attention.py``) in the same thread.
The attention function claims the layer that was updated last, and calls :meth:`PressedLayer.after_attention`, which is
where pairs are evicted.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from coldpress.architecture.generating import refuse_dropping, refuse_guesses, switching_point, switching_refusal
from coldpress.architecture.rope import Rope
from coldpress.cache.newest import Newest, newest_from
from coldpress.cache.rows import RowGroup, n_after, view_of_newest
from coldpress.cache.session import THREAD, Session, uncompiled
from coldpress.cache.verdicts import Verdicts
from coldpress.core.call import LayerCall
from coldpress.core.kept import Kept, checked_kept
from coldpress.core.requirements import check_heads
from coldpress.errors import CacheError
from coldpress.stores.dense import DenseStore
from coldpress.stores.quantised import QuantizedRaggedStore, QuantizedStore
from coldpress.stores.ragged import RaggedStore
from coldpress.stores.thin import ThinKeys, ThinStore

if TYPE_CHECKING:
    from coldpress.core.press import Press

__all__ = ["PressedLayer", "next_layer"]

_WASTE = 0.01  # of padded slots, from which on heads are held one after the other instead
_FORGET_MIN_TOKENS = 64  # that are worth a copy
_SLACK_TOKENS = 64  # out of a sliding window's reach and yet kept, so that as many of the newest can be cropped


class PressedLayer(CacheLayerMixin):
    """The pairs of one layer: a store that holds them, and the original positions of what is in it.

    Slots ``0 .. n - 1`` hold what the press kept (positions in ``_kept``); the slots after them hold, in order and
    without gaps, the tokens seen since. A layer that was never compressed has ``n == 0``.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, session: Session, index: int):
        self.session = session
        self.index = index  # in cache.layers
        self._window: int | None = None  # sliding window of a layer that forgets what is out of its reach
        self._is_prefilled = False  # the last piece of a prompt in pieces has come
        self._ended_short = False  # with the last call, which was the first and had fewer tokens than a piece
        self._shown: Tensor | None = None  # as the session's, after the last call
        self._clear()

    def _clear(self) -> None:
        self._store: DenseStore | RaggedStore | QuantizedStore | QuantizedRaggedStore | None = None
        self._seen = 0  # logical length
        self._kept: Tensor | None = None  # [B, Hkv, n] int32 original positions, -1 = empty slot
        self._has_gaps = False  # some slot of _kept is empty
        self._tail_start = 0  # original position of the first slot after the kept ones
        # what was handed to the model, to recognise the call in which it comes back
        self._offered: tuple[Tensor, Tensor] | None = None
        self._pairs_before = self._pairs_after = 0  # (row, head, token) triples before and after compression
        self._recent: Newest | None = None  # queries, [B, Hq, n, D], for a press that goes on while decoding
        self._unseen: Newest | None = None  # hidden states of the tokens below, [B, 1, n, hidden], where it needs them
        self.n_new: list[int] = []  # tokens of each row since such a press was asked last
        self._carry: Tensor | None = None  # [B, Hkv, n] float32, what the press gave its kept pairs to carry
        self._residual: Tensor | None = None  # [B, Hkv, m, Drot], what the first m keys lack that were moved up
        self._verdicts: Verdicts | None = None  # of the tokens after the kept ones, where the press judges them

    # -- what transformers asks of a layer ----------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        return self._store is not None

    @property
    def keys(self) -> Tensor | None:
        """Stored keys, ``[B, Hkv, T, D]``; a copy where heads hold different numbers, fewer channels or few bits."""
        return None if self._store is None else self._store.keys

    @property
    def values(self) -> Tensor | None:
        """Stored values, ``[B, Hkv, T, Dv]``; a copy where heads hold different numbers of them, or few bits."""
        return None if self._store is None else self._store.values

    @property
    def is_ragged(self) -> bool:
        """Whether heads are held one after the other, so that :meth:`update` returns the new pairs alone."""
        return isinstance(self._store, (RaggedStore, QuantizedRaggedStore))

    def tensors(self) -> tuple[Tensor, ...]:
        """What holds the keys and values."""
        own = () if self._store is None else self._store.tensors()
        return own if self._residual is None else (*own, self._residual)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the first update brings shapes, dtype and device."""

    def is_offered(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are the very tensors that the last :meth:`update` returned."""
        return self._offered is not None and self._offered[0] is keys and self._offered[1] is values

    @uncompiled
    def get_seq_length(self, *args: Any) -> int:
        self.session.check_claimed()
        self.session.seen = None
        self.refuse_dropping()
        return self._seen

    def refuse_dropping(self) -> None:
        """Raise if ``generate`` is about to throw this cache away."""
        if self.session.switch_at is not None and 0 < self._seen <= self.session.switch_at:
            refuse_dropping(self._seen, self.session.switch_at)

    @uncompiled
    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        self.session.check_claimed()
        THREAD.masks_for, self.session.seen = self.session, self._seen
        self.session.shown = self._shown
        if self._seen > 0:
            self.session.branches = []  # the prefill is over
        elif self.session.press is not None:
            refuse_guesses()
        return self._seen + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the pairs of new tokens, ``[B, Hkv, Q, D]``; return all stored keys and values.

        Where heads are held one after the other, it returns what it was given: attention asks this layer for the rest.
        """
        self.session.check_claimed()
        THREAD.masks_for = None
        chunk = self.session.chunk_tokens
        if chunk is not None:
            self._check_piece(chunk, key_states.shape[2])
        if self.session.seen not in (None, self._seen):
            raise CacheError(
                "The layers of this cache have seen different numbers of tokens: an earlier call failed half-way, then "
                "reset() this cache; or the model runs a layer more than once in a call, or without its cache, which "
                "coldpress does not support."
            )
        switch_at, n_new = self.session.switch_at, key_states.shape[2]
        if switch_at is not None and 0 < self._seen <= switch_at < self._seen + n_new:
            raise switching_refusal(switch_at)
        if self._store is None:
            self._store = DenseStore(key_states, value_states, is_borrowed=True)
        else:
            if key_states.shape[0] != self._store.n_rows:
                raise CacheError(
                    f"The cache holds {self._store.n_rows} rows and the call has {key_states.shape[0]}. For several "
                    "sequences or beams from one prefix call cache.batch_repeat_interleave(n) first, or start with an "
                    "empty cache."
                )
            self._check_alike(key_states, value_states)
            is_tight = chunk is not None and not self._is_prefilled and self.session.press is not None
            self._store.append(key_states, value_states, is_tight)  # it is cut back before the next ones come
        self._seen += key_states.shape[2]
        self._offered = (key_states, value_states) if self.is_ragged else (self._store.keys, self._store.values)
        THREAD.updated = self.session.unclaimed = self
        return self._offered

    def _check_alike(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise :class:`CacheError` if new pairs have another dtype or device than those that are held."""
        assert self._store is not None
        keys, values = self._store.tensors()[:2]
        if keys.dtype != key_states.dtype or values.dtype != value_states.dtype or keys.device != key_states.device:
            held, brought = _said(keys, values), _said(key_states, value_states)
            raise CacheError(
                f"The cache holds keys and values in {held} and the call brings them in {brought}: the model's "
                "dtype or device, or autocast, is not what it was when the cache was filled. Run the model as it ran "
                "then, or start with an empty cache."
            )

    def _check_piece(self, chunk: int, n_new: int) -> None:
        """Raise :class:`CacheError` if a call of ``n_new`` tokens is no piece of a prompt, or nobody can tell."""
        if not self._is_prefilled and n_new > chunk:
            raise CacheError(
                f"This PressedCache has chunk_tokens={chunk} and was given {n_new} tokens in one call, "
                "which cannot be cut up from inside the model. Run the prompt by coldpress.prefill(model, input_ids, "
                f"cache), or by generate(..., prefill_chunk_size={chunk})."
            )
        if self.session.press is None or self.session.prefill_end is not None:
            return
        if self._store is None and n_new == 1:
            raise CacheError(
                f"This PressedCache has chunk_tokens={chunk} and was given a single token first, so it cannot tell "
                "where the prompt ends. Run the prompt by coldpress.prefill(model, input_ids, cache), or by "
                f"generate(..., prefill_chunk_size={max(2, chunk)}) with as many chunk_tokens."
            )
        if self._ended_short and n_new > 1:
            raise CacheError(
                f"This PressedCache has chunk_tokens={chunk} and took a first call of {self._seen} tokens for the "
                f"whole prompt, and {n_new} more came right after it, so it cannot tell where the prompt ends. Bring "
                f"pieces of {chunk} tokens, or run the prompt by coldpress.prefill(model, input_ids, cache); then a "
                "question may follow."
            )

    def has_written(self, n: int) -> None:
        """Somebody has put the pairs of ``n`` new tokens into the slots after those in use (``compiling.py``)."""
        assert type(self._store) is DenseStore
        self._store.n += n
        self._seen += n

    def reset(self) -> None:
        """Forget everything; the session's press stays."""
        self._is_prefilled, self._ended_short, self._shown = False, False, None
        self.session.forget_steps()
        self._clear()

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens: keep ``max_length`` of the tokens seen, or drop ``-max_length`` if negative.

        Raises:
            CacheError: as :meth:`cropped_length`.
        """
        length = self.cropped_length(max_length)
        if not length:
            return self.reset()  # the next call is a prefill, of as many rows as it brings
        dropped = self._seen - length
        if not dropped:
            return
        if self._store is not None:
            self._store.crop(self._store.n - dropped)
        if self.n_new:
            real = [dropped] * len(self.n_new) if self._shown is None else self._shown[:, length:].sum(-1).tolist()
            self.n_new = [max(0, n - gone) for n, gone in zip(self.n_new, real, strict=True)]
        self._seen = length
        self._shown = None if self._shown is None else self._shown[:, :length]
        self._recent, self._unseen = (
            None if newest is None else newest.until(length) for newest in (self._recent, self._unseen)
        )
        self._verdicts = None if self._verdicts is None else self._verdicts.until(length)

    def cropped_length(self, max_length: int) -> int:
        """The logical length after ``crop(max_length)``; like transformers 5, ``crop(0)`` changes nothing.

        Raises:
            CacheError: tokens would have to go that the press has already compressed.
        """
        length = max_length if max_length > 0 else self._seen + max_length
        if length >= self._seen:
            return self._seen
        oldest = self._tail_start  # the shortest length that leaves the next token all it may see
        if self._kept is None and oldest > 0:
            assert self._window is not None
            oldest += self._window - 1
        if length < oldest:
            raise CacheError(
                f"Cannot crop to {length} tokens: pairs that a cache of that length needs are gone. "
                f"Crop to {oldest} or more, fork() the cache before adding to it, or prefill again."
            )
        if isinstance(self._store, (QuantizedStore, QuantizedRaggedStore)):
            exact = self._seen - self._store.n_exact
            if length < exact:
                raise CacheError(
                    f"Cannot crop to {length} tokens: those before {exact} are held in few bits, in groups that cannot "
                    "be cut. Crop to that or more, fork() the cache before adding to it, or keep more of the newest "
                    "tokens as they are, with kv_bits=KVBits(bits, residual_tokens=...)."
                )
        return length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._index_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._index_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._store is not None:
            self._index_rows(torch.arange(self._store.n_rows).repeat_interleave(repeats))

    def offload(self) -> None:
        raise CacheError("PressedCache does not offload to the CPU; use it without cache offloading.")

    prefetch = offload

    # -- what coldpress adds ------------------------------------------------------------------------------------

    @property
    def was_compressed(self) -> bool:
        """Whether a press has evicted pairs of this layer."""
        return self._pairs_after < self._pairs_before

    @property
    def has_padding(self) -> bool:
        """Whether there are tokens that no call was shown, by its attention mask."""
        return self._shown is not None and not bool(self._shown.all())

    @property
    def stored_length(self) -> int:
        """Slots in use, T: the length of the stored tensors (of the longest head, where heads differ)."""
        return 0 if self._store is None else self._store.n

    def positions(self) -> Tensor:
        """Original positions of the stored pairs, int64 ``[B, Hkv, T]``, ascending; -1 where a head stores fewer.

        They differ within a head, but for pairs that belong to no token (RestoreKVPress).
        """
        store = self._store
        if store is None:
            return torch.empty(0, 0, 0, dtype=torch.long)
        tail = torch.arange(self._tail_start, self._seen, device=store.device).expand(store.n_rows, store.n_heads, -1)
        return tail.clone() if self._kept is None else torch.cat([self._kept.long(), tail], dim=-1)

    def carried(self) -> Tensor | None:
        """What the press gave the stored pairs to carry, float32 ``[B, Hkv, T]``, NaN for those that came later."""
        if self._carry is None:
            return None
        return pad(self._carry, (0, self.stored_length - self._carry.shape[2]), value=torch.nan)

    def rounding_residual(self) -> Tensor | None:
        """What the stored keys lack that were rotated more precisely than they are held: ``[B, Hkv, T, Drot]``."""
        if self._residual is None:
            return None
        return pad(self._residual, (0, 0, 0, self.stored_length - self._residual.shape[2]))

    def visibility(self, n_queries: int, mask: Tensor | None, sliding_window: int | None) -> Tensor | None:
        """Which stored slots each of the last ``n_queries`` tokens sees: bool ``[B or 1, Hkv or 1, Q or 1, T]``.

        None where every query sees every slot, or where plain causal order says it all (nothing stored before).

        Args:
            n_queries: Q, the tokens of this call; they are the last slots.
            mask: bool ``[B, seen]``, False where a token is hidden; None if none is.
            sliding_window: how many tokens back a query sees (itself included), or None.
        """
        assert self._store is not None
        device, n_stored = self._store.device, self._store.n
        before = n_stored - n_queries
        if sliding_window is not None and self._seen <= sliding_window:
            sliding_window = None
        leaving = self._leaving(n_queries)
        plain = mask is None and not self._has_gaps and sliding_window is None and leaving is None
        if plain and (n_queries == 1 or before == 0):
            return None
        slot = torch.arange(n_stored, device=device)
        query_slot = torch.arange(before, n_stored, device=device)[:, None]
        visible = (slot <= query_slot)[None, None]  # [1, 1, Q, T]
        n_kept = 0 if self._kept is None else self._kept.shape[2]
        if self._has_gaps and self._kept is not None:
            filled = pad(self._kept >= 0, (0, n_stored - n_kept), value=True)
            visible = visible & filled[:, :, None]
        if leaving is not None:
            visible = visible & ~pad(leaving, (n_kept, n_stored - n_kept - leaving.shape[2]))[:, :, None]
        if mask is not None:
            visible = visible & self._unhidden(mask)[:, :, None]
        if sliding_window is not None:
            position, query_at = self._ranks(self._padding())
            query_at = query_at[..., -n_queries:, None]
            visible = visible & (position[:, :, None] > query_at - sliding_window)
        if mask is not None and self.session.hides_new:  # no row of the softmax is empty: who sees nothing sees itself
            visible = visible | ((slot == query_slot) & ~visible.any(-1, keepdim=True))
        return visible

    def _unhidden(self, mask: Tensor) -> Tensor:
        """Which stored slots ``mask`` (bool ``[B, seen]``) does not hide: bool ``[B, Hkv or 1, T]``."""
        tail = mask[:, None, self._tail_start :]
        if self._kept is None:
            return tail
        n_heads, n_kept = self._kept.shape[1:]
        if not self.session.hides_shown:
            return pad(tail, (n_kept, 0), value=True)
        shown = self._padding()
        assert shown is not None
        hidden = (shown & ~mask)[:, None].expand(-1, n_heads, -1)
        kept = ~hidden.gather(2, self._kept.clamp(min=0).long())
        return torch.cat([kept, tail.expand(-1, n_heads, -1)], dim=-1)

    def _leaving(self, n_new: int) -> Tensor | None:
        """Which tokens after the kept ones have left their row's window and are held for other rows only.

        A row alone would have freed them: bool ``[B, Hkv, m]`` of the first m tokens after the kept ones, or None.
        """
        press, shown = self.session.press, self._shown
        if self._verdicts is None or shown is None or press is None or not press.n_waiting:
            return None
        stops = newest_from(shown[:, : self._seen - n_new], press.n_waiting).to(self._verdicts.stays.device)
        m = int(stops.max()) - self._tail_start
        if m <= 0:
            return None
        column = torch.arange(self._tail_start, self._tail_start + m, device=stops.device)
        return ~self._verdicts.of(self._tail_start, self._tail_start + m) & (column < stops[:, None])[:, None]

    def _padding(self) -> Tensor | None:
        """Which of the tokens seen some call was shown, bool ``[B, seen]``; None if all were."""
        shown = self.session.shown
        return None if shown is None or self._store is None else shown.to(self._store.device)

    def _ranks(self, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions of the stored slots ``[B or 1, Hkv or 1, T]`` and of all tokens seen ``[B or 1, 1, seen]``.

        Sliding windows count real tokens, as they would in each row alone: padding takes no position. A token that only
        some calls hide keeps its own.
        """
        assert self._store is not None
        if padding is None:
            rank = torch.arange(self._seen, device=self._store.device).expand(1, 1, -1)
        else:
            rank = (padding.cumsum(-1) - 1)[:, None]
        tail = rank[..., self._tail_start :]
        if self._kept is None:
            return tail, rank
        n_batch, n_heads = self._kept.shape[:2]
        kept = rank.expand(n_batch, n_heads, -1).gather(2, self._kept.clamp(min=0).long())
        return torch.cat([kept, tail.expand(n_batch, n_heads, -1)], dim=-1), rank

    def attend(
        self, query: Tensor, mask: Tensor | None, sliding_window: int | None, scaling: float | None
    ) -> Tensor | None:
        """Attention head by head, ``[B, Q, Hq, Dv]``, where heads are held one after the other.

        Returns None if they are not, or if a mask is needed beside causal order: :meth:`visibility` has it, and
        ``keys`` and ``values`` are as it needs them.
        """
        if not isinstance(self._store, (RaggedStore, QuantizedRaggedStore)):
            return None
        if sliding_window is not None and self._seen > sliding_window:
            return None
        if mask is not None and (self.session.hides_shown or not bool(mask[:, self._tail_start :].all())):
            return None
        if self._leaving(query.shape[2]) is not None:
            return None
        return self._store.attend(query, scaling)

    def after_attention(self, call: LayerCall) -> None:
        """Compress after the prefill, or each piece of it, or when the press says so; free what no token will see.

        To a press, padding is what no call was shown. A token that only this call hides is none, and may stay.

        Args:
            call: what the attention function knows of this layer.
        """
        session = self.session
        padding = self._padding()
        session.unclaimed = self._offered = None
        is_first = self._seen == call.query.shape[2]
        for own in (session, *(branch.session for branch in session.live_branches())):
            if own.evicts_while_decoding or own.on_attention is not None or (is_first and own.press is not None):
                own.note_steps(call.module, call.query.shape[2], self._seen, padding)
        if session.on_attention is not None:
            session.on_attention(self, call)
        is_prefill, is_last = self._is_prefill(call.query.shape[2])
        if is_first:
            session.switch_at = switching_point(call.module.config)
        session.was_asked = session.was_asked or (session.press is not None and not call.is_local)
        if is_first and session.rerotates and not call.is_local:
            Rope.to_move(call.module, session.rope(call.module, call.query.device))
        self._window = call.sliding_window
        branches = [branch.layer(self.index) for branch in session.live_branches()] if is_first else []
        groups: list[RowGroup] = []
        has_padding = padding is not None and session.kv_bits is not None  # it is not quantised along with the rest
        if is_first and not call.is_local and (session.press is not None or branches or has_padding):
            groups = RowGroup.of_prefill(self, call, padding)
            self._count_for_budgets(groups, is_last)
        for branch in branches:
            branch._window = call.sliding_window
        before = self.positions() if session.rerotates and is_prefill else None
        sharing = [branch for branch in branches if not branch.compress_from(self, groups)]
        if is_first:
            self.compress_from(self, groups)
        elif is_prefill and not call.is_local and session.press is not None:
            self._compress_piece(session.press, call, padding, is_last)
        for group in groups:
            group.view.forget()
        if call.sliding_window is not None:
            self._forget_unreachable(call.sliding_window, padding)
        if is_first and isinstance(self._store, DenseStore) and self._store.is_borrowed:
            self._store.own(self._store.n)
        for branch in sharing:
            n_pairs = branch._pairs_before
            branch.share(self)
            branch._pairs_before = branch._pairs_after = n_pairs
        for layer in (self, *branches):
            layer._shown = padding
            try:
                layer._go_on(call, padding, is_prefill, before)
            except Exception as error:
                if layer is self:
                    raise
                layer.session.error = error
                traceback.clear_frames(error.__traceback__)
            press = layer.session.press
            is_chosen = is_last and not (press is not None and (press.needs_model or press.chooses_together))
            if is_chosen or press is None or not is_prefill:
                layer.quantise()  # else when they have

    def rope(self, call: LayerCall) -> Rope | None:
        """The rotary embedding of this layer, for what undoes its rotation or moves its keys; None without one.

        Raises:
            ModelError: it cannot be undone, or tokens of the text are not at consecutive positions.
        """
        rope = self.session.rope(call.module, call.query.device)
        if rope is not None:
            rope.n_seen = self._seen
            self.session.steps(call.module).check(type(call.module).__name__, rope.turn_by)
        return rope

    def quantise(self) -> None:
        """Hold all but the newest pairs in few bits, if the cache is to; what is held so already is left alone."""
        store, kv_bits = self._store, self.session.kv_bits
        if kv_bits is not None:
            self._residual = None  # nothing moves any more
        if isinstance(store, (QuantizedStore, QuantizedRaggedStore)):
            store.quantise()
        elif isinstance(store, RaggedStore) and kv_bits is not None:
            self._store = QuantizedRaggedStore(store, kv_bits)
        elif isinstance(store, ThinStore) and kv_bits is not None:
            raise CacheError("Keys in fewer channels cannot be held in fewer bits as well; leave kv_bits out.")
        elif isinstance(store, DenseStore) and kv_bits is not None:
            self._store = QuantizedStore(store, kv_bits)

    def _is_prefill(self, n_new: int) -> tuple[bool, bool]:
        """Whether the newest ``n_new`` tokens belong to the prefill, and whether it ends with them.

        A prompt comes in one call, unless the cache has ``chunk_tokens``. Then :func:`coldpress.prefill` says where it
        ends; where somebody else feeds it (``generate(prefill_chunk_size=...)``), it goes on while calls bring
        ``chunk_tokens`` tokens, a call with fewer is its last piece, and a single token is generated, or stored as one.
        What this cannot be right for is refused (:meth:`_check_piece`).
        """
        chunk, end, is_first = self.session.chunk_tokens, self.session.prefill_end, self._seen == n_new
        if chunk is None:
            return is_first, True
        is_prefill = not self._is_prefilled and (is_first or end is not None or n_new > 1)
        is_last = n_new < chunk if end is None else self._seen >= end
        self._is_prefilled = not is_prefill or is_last
        self._ended_short = is_first and is_last and end is None
        return is_prefill, is_last

    def _count_for_budgets(self, groups: list[RowGroup], is_last: bool) -> None:
        """Note in the views of a prompt in pieces what their budgets are of; the one place that says it.

        A ratio is a fraction of the text so far, and a budget is what it is; both hold for each row by itself. As long
        as more is to come, a text shorter than ``chunk_tokens`` is given the budget of a text of that length: else a
        first piece of three tokens would lose its attention sinks to a ratio.
        """
        chunk = self.session.chunk_tokens
        if chunk is None:
            return
        for view in (group.view for group in groups):
            n = view.end if is_last else max(view.end, chunk)
            view.n_counted = n if view.sliding_window is None else min(n, max(1, view.sliding_window - 1))

    def _compress_piece(self, press: Press, call: LayerCall, padding: Tensor | None, is_last: bool) -> None:
        """Cut back to the budget after a later piece of the prompt: what was kept and the piece are chosen from."""
        n, hidden = call.query.shape[2], call.hidden_states
        queries = Newest((call.query,), self._seen).newest(n, padding)
        states = None if hidden is None else Newest((hidden[:, None],), self._seen).newest(n, padding)
        groups = RowGroup.of_text_so_far(self, call, padding, queries, queries.counts(), states)
        self._count_for_budgets(groups, is_last)
        kept: list[Kept | None] = []
        try:
            for view in (group.view for group in groups):
                kept.append(checked_kept(press, press.compress(view)) if view.n_queries else None)  # none: no new token
        except Exception as error:
            self.session.error = error
            raise
        assert self._store is not None
        is_less = any(group.view.n_tokens < self._store.n for group in groups)  # without padding, within the window
        if is_less or any(part is not None for part in kept):
            self._hold(self, groups, kept, is_tight=True)
        else:
            self._count_pairs(call, padding)
        for group in groups:
            group.view.forget()

    def _go_on(self, call: LayerCall, padding: Tensor | None, is_prefill: bool, before: Tensor | None) -> None:
        """What a press that goes on while decoding does after a call, and with the queries that it remembers.

        Args:
            before: int64 ``[B, Hkv, T]``, positions of what a prefill was cut back from, where keys then move up.
        """
        press = self.session.press
        if press is None or call.is_local or self.session.error is not None:
            return
        if press.evicts_while_decoding:
            check_heads(press, call.module, call.query.shape[1])
        if press.n_waiting and (press.judges_prompt or not is_prefill):
            self._judge(press, call, padding)
        if press.n_recent_queries:
            self._compress_when_due(press, call, padding, is_prefill, before)

    def _judge(self, press: Press, call: LayerCall, padding: Tensor | None) -> None:
        """Have the press say which of the new tokens stay, and free the others when they are no longer the newest."""
        stays = press.judge(view_of_newest(self, call, padding))
        before = Verdicts(stays[..., :0], self._seen - stays.shape[2]) if self._verdicts is None else self._verdicts
        self._verdicts = before.and_then(stays, self._seen)
        stop = self._seen - press.n_waiting
        if padding is not None:  # a row with padding among its newest tokens reaches further back
            stop = min(stop, int(newest_from(padding, press.n_waiting).min()))
        if stop > self._tail_start:
            self._settle(stop, padding)
            self._verdicts = self._verdicts.since(stop)
        self._count_pairs(call, padding)

    def _settle(self, stop: int, padding: Tensor | None) -> None:
        """Of the tokens up to ``stop``, those that stay move up behind what their head keeps; the others are freed.

        Costs a copy of these tokens and of those after them, not of what is kept.
        """
        assert self._store is not None and self._verdicts is not None
        store, start = self._store, self._tail_start
        kept = self._kept
        if kept is None:
            kept = torch.empty(store.n_rows, store.n_heads, 0, dtype=torch.int32, device=store.device)
        stays, n_kept = self._verdicts.of(start, stop), kept.shape[2]
        if padding is not None:
            stays = stays & padding[:, None, start:stop]
        n_each = (kept >= 0).sum(-1, keepdim=True)  # [B, Hkv, 1]
        n_kept_then = n_each[..., 0] + stays.sum(-1)
        longest, shortest, n_pairs = torch.stack([n_kept_then.max(), n_kept_then.min(), n_kept_then.sum()]).tolist()
        order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)  # those that stay first
        to = n_each + torch.arange(stop - start, device=order.device)  # the others land in empty slots, or go over
        at = (start + order).int().masked_fill(~stays.gather(2, order), -1)
        self._kept = pad(kept, (0, stop - start), value=-1).scatter_(2, to, at)[..., :longest].contiguous()
        if isinstance(store, RaggedStore):
            store.settle(stays)
        else:
            assert isinstance(store, DenseStore)
            store.settle(n_kept, order, to, longest)
            if self._window is None and n_pairs <= (1 - _WASTE) * self._kept.numel():
                self._store = RaggedStore(store.keys[:, :, :longest], store.values[:, :, :longest], self._kept >= 0)
                self._store.append(store.keys[:, :, longest:], store.values[:, :, longest:])
        self._tail_start, self._carry = stop, None
        self._has_gaps = shortest < longest

    def _count_pairs(self, call: LayerCall, padding: Tensor | None) -> None:
        """Count what achieved_ratio() goes by: neither padding nor what is out of a sliding window's reach."""
        assert self._store is not None
        n_batch, n_heads = self._store.n_rows, self._store.n_heads
        near = 0 if call.sliding_window is None else max(0, self._seen - max(1, call.sliding_window - 1))
        newest = max(near, self._tail_start)
        if padding is None:
            before, after = n_batch * (self._seen - near), n_batch * (self._seen - newest)
        else:
            before, after = (int(padding[:, first : self._seen].sum()) for first in (near, newest))
        self._pairs_before, self._pairs_after = before * n_heads, after * n_heads
        if self._kept is not None:
            self._pairs_after += int((self._kept >= near).sum())

    def _compress_when_due(
        self, press: Press, call: LayerCall, padding: Tensor | None, is_prefill: bool, before: Tensor | None
    ) -> None:
        """Remember the queries of this call, and compress the rows again of which enough tokens have come."""
        n, query = press.n_recent_queries, call.query
        self._recent = (self._recent or Newest.nothing(query, self._seen)).and_then(query, self._seen, n, padding)
        if is_prefill or len(self.n_new) != query.shape[0]:
            self.n_new = [0] * query.shape[0]
        if is_prefill:
            if before is not None:
                self._recent = self._moved_up(self._recent.newest(n, padding), call, padding, before)
            return
        self.n_new = [since + more for since, more in zip(self.n_new, self._count_new(query.shape[2]), strict=True)]
        if call.hidden_states is not None:
            hidden = call.hidden_states[:, None]
            unseen = self._unseen or Newest.nothing(hidden, self._seen)
            self._unseen = unseen.and_then(hidden, self._seen, max(self.n_new), padding)
        if not any(press.is_due(since) for since in self.n_new):
            return
        recent, kept_back, n_new = self._recent.newest(n, padding), self._unseen, self.n_new
        is_known = kept_back is not None and kept_back.end == self._seen
        states = kept_back.newest(max(n_new), padding) if kept_back is not None and is_known else None
        groups = RowGroup.of_text_so_far(self, call, padding, recent, n_new, states)
        views = [group.view for group in groups]
        is_due = [view.n_queries and press.is_due(view.n_new or 0) for view in views]
        kept = [
            checked_kept(press, press.compress_again(view)) if due else None
            for view, due in zip(views, is_due, strict=True)
        ]
        if any(part is not None for part in kept):
            before = self.positions()
            self._hold(self, groups, kept)
            self._recent = self._moved_up(recent, call, padding, before)
        for group in groups:
            group.view.forget()
        self.n_new = [0 if press.is_due(since) else since for since in n_new]
        self._unseen = kept_back if any(self.n_new) else None

    def _count_new(self, n_new: int) -> list[int]:
        """How many of the ``n_new`` tokens of this call are real, in each row."""
        padding = self._padding()
        if padding is None:
            assert self._store is not None
            return [n_new] * self._store.n_rows
        return self.session.count_new(n_new)

    def _moved_up(self, newest: Newest, call: LayerCall, padding: Tensor | None, before: Tensor) -> Newest:
        """The newest queries after the gaps behind them were closed, as they are for the keys.

        Args:
            before: int64 ``[B, Hkv, T]``, positions of what was held before that.
        """
        queries = newest.states
        rope = self.rope(call) if self.session.rerotates else None
        if rope is None:
            return newest
        after = self.positions()
        if padding is not None:
            is_real = padding[:, None].expand(-1, before.shape[1], -1)
            before, after = (held.masked_fill(~is_real.gather(2, held.clamp(min=0)), -1) for held in (before, after))
        at = newest.columns()
        moves = n_after(before, at) - n_after(after, at)  # [B, Hkv, Q]
        if not bool(moves.any()):
            return newest
        by_head = moves.repeat_interleave(queries.shape[1] // moves.shape[1], dim=1)
        return Newest((rope.turn(queries.float(), by_head).to(queries.dtype),), newest.end, newest.at)

    def compress_from(self, source: PressedLayer, groups: list[RowGroup]) -> bool:
        """Hold what this cache's press keeps of ``source``'s pairs (``source`` may be this layer); False if all.

        A press that fails breaks its own cache, which raises the error at its next use, and none that branches off.
        """
        press = self.session.press
        if self.session.error is not None or not groups:
            return False
        if press is None and self.session.kv_bits is not None and any(group.slots is not None for group in groups):
            self._hold(source, groups, [None] * len(groups))  # without the padding
            return True
        if press is None or press.judges_prompt:
            return False
        try:
            check_heads(press, groups[0].view.module, groups[0].view.queries.shape[1])
            kept = [checked_kept(press, press.compress(group.view)) for group in groups]
        except Exception as error:
            self.session.error = error
            if self is source:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold tensors that the other presses may need room for
            return False
        if all(part is None for part in kept) and all(group.slots is None for group in groups):
            self._pairs_before = self._pairs_after = sum(group.n_pairs for group in groups)
            return False
        self._hold(source, groups, kept)
        return True

    def _hold(
        self, source: PressedLayer, groups: list[RowGroup], kept: list[Kept | None], is_tight: bool = False
    ) -> None:
        """Hold what was kept of each group of rows of ``source``: all of it where that is None, but no padding.

        ``is_tight``: in no more memory than that takes, without the room that there was for more.
        """
        keys, values, seen = source.keys, source.values, source._seen
        assert keys is not None and values is not None
        parts = [group.all() if part is None else part for group, part in zip(groups, kept, strict=True)]
        if self.session.rerotates:
            parts = [group.view.side_by_side(part) for group, part in zip(groups, parts, strict=True)]
        longest = max(part.positions.shape[-1] for part in parts)
        n_batch, n_heads, _, dim = keys.shape
        p = torch.full((n_batch, n_heads, longest), -1, dtype=torch.int32, device=keys.device)
        is_whole = len(parts) == 1 and isinstance(groups[0].rows, slice)  # then there is nothing to put together
        is_whole = is_whole and _is_new(parts[0].keys, keys) and _is_new(parts[0].values, values)
        buffers = None
        if source is self and self.was_compressed and self._store is not None and not is_tight:
            buffers = self._store.buffers_for(longest)  # what is kept was copied out, so it may go back there
            is_whole = is_whole and buffers is None
        if is_whole:
            buffers = parts[0].keys, parts[0].values
        if buffers is None:
            buffers = keys.new_zeros(n_batch, n_heads, longest, dim), values.new_zeros(*p.shape, values.shape[-1])
        k, v = buffers
        carry = None
        if any(part.carry is not None for part in parts):
            carry = torch.full(p.shape, torch.nan, dtype=torch.float32, device=keys.device)
        for group, part in zip(groups, parts, strict=True):
            n = part.positions.shape[-1]
            if not is_whole:
                k[group.rows, :, :n], v[group.rows, :, :n] = part.keys, part.values
            p[group.rows, :, :n] = group.original(part.positions).int()
            if carry is not None and part.carry is not None:
                carry[group.rows, :, :n] = part.carry
        thin = None
        if parts[0].channels is not None:
            channels = parts[0].channels.new_zeros(n_batch, n_heads, parts[0].channels.shape[2])
            for group, part in zip(groups, parts, strict=True):
                channels[group.rows] = part.channels  # type: ignore[assignment]
            thin = ThinKeys.of(k, (p >= 0).sum(-1), channels, parts[0].n_wide)
        rounding_residual, recent = None, self._recent
        fines = [
            (group.rows, part.rounding_residual)
            for group, part in zip(groups, parts, strict=True)
            if part.rounding_residual is not None
        ]
        if fines:
            n_residual, width = max(own.shape[2] for _, own in fines), fines[0][1].shape[3]
            rounding_residual = keys.new_zeros(n_batch, n_heads, n_residual, width)
            for rows, own in fines:
                rounding_residual[rows, :, : own.shape[2]] = own
        self._clear()
        self._recent, self._carry, self._residual, self._seen = recent, carry, rounding_residual, seen
        self._pairs_before = sum(group.n_pairs for group in groups)
        self._take(k, v, p, thin)

    def _take(self, keys: Tensor, values: Tensor, positions: Tensor, thin: ThinKeys | None = None) -> None:
        """Hold the pairs of kept tokens, in tensors that are nobody else's.

        Args:
            keys: ``[B, Hkv, capacity, D]``; of no account with ``thin``.
            values: ``[B, Hkv, capacity, Dv]``.
            positions: int32 ``[B, Hkv, n]``; -1 in the last slots of heads that keep fewer.
            thin: the keys, in fewer channels.
        """
        n, is_held = positions.shape[2], positions >= 0
        self._kept, self._tail_start = positions, self._seen
        self._pairs_after = int(is_held.sum())
        self._has_gaps = self._pairs_after < positions.numel()
        # empty slots would be quantised along with the others
        is_ragged = self._has_gaps if self.session.kv_bits else self._pairs_after <= (1 - _WASTE) * positions.numel()
        if thin is not None:
            self._store = ThinStore(thin, values, keys.shape[3])
        elif self._window is None and is_ragged:
            self._store = RaggedStore(keys[:, :, :n], values[:, :, :n], is_held)
        else:
            self._store = DenseStore(keys, values)
            self._store.crop(n)

    def keep(self, slots: Tensor) -> None:
        """Keep some of the stored pairs and free the others.

        Args:
            slots: int64 ``[B, Hkv, n]``, ascending slots of the stored tensors; -1 in the last places of a head that
                keeps fewer.
        """
        assert self._store is not None
        at = slots.clamp(min=0)
        keys, values = (
            states.gather(2, at[..., None].expand(-1, -1, -1, states.shape[3]))
            for states in (self._store.keys, self._store.values)
        )
        self.hold(keys, values, self.positions().gather(2, at).masked_fill(slots < 0, -1))

    def hold(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Hold these pairs instead of those that are stored, as what the press kept of the tokens seen so far.

        Args:
            keys, values: ``[B, Hkv, n, D]``; the layer's own from now on.
            positions: int64 ``[B, Hkv, n]``, ascending; -1 in the last places of a head that holds fewer.
        """
        before, seen, recent = max(self._pairs_before, int((self.positions() >= 0).sum())), self._seen, self._recent
        self._clear()
        self._recent, self._seen, self._pairs_before = recent, seen, before
        self._take(keys, values, positions.int())

    def share(self, other: PressedLayer) -> None:
        """Hold what ``other`` holds, without copying; whichever of the two is written to first copies."""
        session, index = self.session, self.index
        self.__dict__.update(other.__dict__)
        self.session, self.index, self._offered = session, index, None
        self._store = None if other._store is None else other._store.shared()

    def _forget_unreachable(self, window: int, padding: Tensor | None) -> None:
        """Free the slots that no later token can see; some of them stay until freeing is worth the copy."""
        n_kept = 0 if self._kept is None else self._kept.shape[2]
        oldest = self._seen - (window - 1) - _SLACK_TOKENS  # position of the first slot that has to stay
        if oldest < self._tail_start or n_kept + oldest - self._tail_start < max(_FORGET_MIN_TOKENS, window // 2):
            return
        if padding is not None:  # a row with padding in its window reaches further back
            later = padding.sum(-1, keepdim=True) - padding.cumsum(-1)  # [B, seen] real tokens after each one
            oldest = int((later < window - 1 + _SLACK_TOKENS).int().argmax(-1).min())
            if oldest <= self._tail_start:
                return
        assert self._store is not None
        store = self._store
        if isinstance(store, (RaggedStore, QuantizedRaggedStore)):
            store = DenseStore(store.keys, store.values)
        n_first = store.droppable(n_kept + oldest - self._tail_start)
        if n_first < n_kept:
            return
        oldest = n_first - n_kept + self._tail_start
        self._store = store.without_first(n_first)
        self._kept, self._has_gaps, self._tail_start = None, False, oldest
        self._carry = self._residual = None

    def _index_rows(self, rows: Tensor) -> None:
        if self._shown is not None:
            self._shown = self._shown.index_select(0, rows.to(self._shown.device))
        if self._store is None:
            return
        rows = rows.to(self._store.device)
        self.session.forget_rows()
        self._store.index_rows(rows)
        self._recent, self._unseen = (
            None if newest is None else newest.index_rows(rows) for newest in (self._recent, self._unseen)
        )
        self._verdicts = None if self._verdicts is None else self._verdicts.index_rows(rows)
        if self.n_new:
            self.n_new = [self.n_new[row] for row in rows.tolist()]
        n_kept = None  # all that there are, or those of the longest head that is left
        if isinstance(self._store, (RaggedStore, QuantizedRaggedStore)):
            n_kept = self._store.n_first
            self._has_gaps = self._store.has_gaps
        if self._kept is not None:
            self._kept = self._kept.index_select(0, rows)[..., :n_kept]
        if self._carry is not None:
            self._carry = self._carry.index_select(0, rows)[..., :n_kept]
        if self._residual is not None:
            self._residual = self._residual.index_select(0, rows)


def next_layer(session: Session) -> PressedLayer:
    """The next layer of the cache that ``session`` belongs to, in order."""
    session.n_layers += 1
    return PressedLayer(session, session.n_layers - 1)


def _said(*states: Tensor) -> str:
    """Dtypes and devices of keys and values, in words."""
    words = [f"{str(part.dtype).removeprefix('torch.')} on {part.device}" for part in states]
    return " and ".join(dict.fromkeys(words))


def _is_new(tensor: Tensor, source: Tensor) -> bool:
    """Whether ``tensor`` shares no memory with ``source``, and is all that its own memory holds."""
    storage = tensor.untyped_storage()
    is_all = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
    return is_all and storage.data_ptr() != source.untyped_storage().data_ptr()
