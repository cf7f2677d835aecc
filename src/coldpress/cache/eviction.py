"""EvictingLayer: compress, judge, observe and forget the pairs of a layer after its attention."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from coldpress.architecture.generating import switching_point
from coldpress.architecture.rope import Rope
from coldpress.cache.gather import gathered
from coldpress.cache.masks import leaving
from coldpress.cache.newest import Newest, Pending, newest_from
from coldpress.cache.observation import carrying, declared, kept_by, note, observed, to_choose_from
from coldpress.cache.phase import Phase
from coldpress.cache.rows import Known, RowGroup, moved_up, view_of_newest
from coldpress.cache.session import Session
from coldpress.cache.slots import RESIDUAL, STAYS, WASTE, Slots
from coldpress.core.call import LayerCall
from coldpress.core.kept import Kept
from coldpress.core.press import Press
from coldpress.core.requirements import check_heads
from coldpress.core.view import LayerView
from coldpress.stores.codec import Codec
from coldpress.stores.encoded import encoded

__all__ = ["EvictingLayer"]


class EvictingLayer(CacheLayerMixin):
    """The life of a layer's pairs; :class:`~coldpress.cache.layer.PressedLayer` is what transformers sees of it.

    Attributes:
        session: what the layers of the cache share.
        index: in ``cache.layers``.
        slots: the pairs.
        phase: what the latest call was to the layer.
        window: sliding window of a layer that forgets what is out of its reach, or None.
        shown: bool ``[B, seen]`` after the latest call, False for padding; None: there is none.
        pending: what a press that evicts while decoding has not been shown yet.
        n_pairs: (row, head, token) triples before and after compression.
        taken: which codec of the session's storage holds the pairs.
        references: until pairs of all layers are chosen, for each group of rows: which, where its tokens are (int64
            ``[b, 1, T]``; None without padding), and what :class:`Kept` calls references.
        n_read, n_readable: pairs that decoding queries have read, and that were stored then, where a press chooses.
    """

    def __init__(self, session: Session, index: int):
        self.session, self.index = session, index
        self.window: int | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything but the session and the place."""
        self.slots, self.phase, self.pending = Slots(), Phase.EMPTY, Pending()
        self.shown: Tensor | None = None
        self.n_pairs, self.taken = (0, 0), 0
        self.references: list[tuple[slice | Tensor, Tensor | None, Sequence[LayerView]]] = []
        self.n_read: int | Tensor = 0
        self.n_readable = 0
        self._offered: tuple[Tensor, Tensor] | None = None  # given to the model, to recognise the call it comes back in

    @property
    def was_compressed(self) -> bool:
        """Whether a press has evicted pairs of this layer."""
        before, after = self.n_pairs
        return after < before

    @property
    def codec(self) -> Codec | None:
        """What the older pairs are encoded by; None: they are as they are."""
        return None if self.session.storage is None else self.session.storage.codecs[self.taken]

    def padding(self) -> Tensor | None:
        """Which of the tokens seen some call was shown, bool ``[B, seen]``; None if all were."""
        call = self.session.call
        return None if call is None or call.shown is None else call.shown.to(self.slots.filled.device)

    def after_attention(self, call: LayerCall) -> None:
        """Compress after the prefill, or each piece of it, or when the press says so; free what no token will see.

        To a press, padding is what no call was shown. A token that only this call hides is none, and may be kept.

        Args:
            call: what the attention function knows of this layer.
        """
        session, phase, n_new = self.session, self.phase, call.query.shape[2]
        padding = self.padding()
        session.unclaimed = self._offered = None
        is_first = self.slots.seen == n_new
        live = session.live_branches() if is_first else []
        for own in (session, *(branch.session for branch in live)):
            if own.joins_calls or own.on_attention is not None or (is_first and own.press is not None):
                own.note_steps(call, self.slots.seen, padding)
        if session.on_attention is not None:
            session.on_attention(self, call)
        session.was_asked = session.was_asked or (session.press is not None and not call.is_local)
        self.window = call.sliding_window
        if is_first:
            session.switch_at = switching_point(call.module.config)
            if session.rerotates and not call.is_local:
                Rope.to_move(call.module, session.rope(call.module, call.query.device))
        before = self.slots.positions() if session.rerotates and phase.is_prefill else None
        branches: list[EvictingLayer] = [branch.layer(self.index) for branch in live]
        sharing = self._compress_first(call, padding, branches) if is_first else []
        if not is_first and phase.is_prefill and not call.is_local and session.press is not None:
            self._compress_piece(session.press, call, padding)
        if call.sliding_window is not None:
            self.slots.forget_unreachable(call.sliding_window, padding)
        if is_first and self.slots.store is not None:
            self.slots.store.own()
        for branch in sharing:
            n_pairs, _ = branch.n_pairs
            branch.share(self)
            branch.n_pairs = n_pairs, n_pairs
        for layer in (self, *branches):
            layer.shown, layer.phase = padding, phase
            try:
                layer._go_on(call, padding, before)
            except Exception as error:
                if layer is self:
                    raise
                layer.session.error = error
                traceback.clear_frames(error.__traceback__)
            press = layer.session.press
            if not phase.is_prefill or press is None or (phase.is_whole and not layer.session.is_to_finish):
                layer.encode()  # else when the press has chosen

    def _known(self, call: LayerCall) -> Known:
        session = self.session
        return Known(lambda: self.rope(call), lambda: session.seed, session.token_ids, session.pins, session.rerotates)

    def rope(self, call: LayerCall) -> Rope | None:
        """The rotary embedding of this layer, for what undoes its rotation or moves its keys; None without one.

        Raises:
            ModelError: it cannot be undone, or tokens of the text are not at consecutive positions.
        """
        rope = self.session.rope(call.module, call.query.device)
        if rope is not None:
            rope.n_seen = self.slots.seen
            self.session.steps(call.module).check(type(call.module).__name__, rope.turn_by)
        return rope

    def encode(self) -> None:
        """Store all but the newest pairs by the cache's codec, if it has one; encoded pairs are not encoded again."""
        store = self.slots.store
        if self.session.storage is None or store is None:
            return
        self.slots.put(RESIDUAL, None)  # nothing moves any more
        if store.takes_codec:
            assert self.codec is not None
            self.slots.store = encoded(store, self.codec, self.slots.kept)
        else:
            store.encode()

    # -- the prompt -----------------------------------------------------------------------------------------------

    def _compress_first(
        self, call: LayerCall, padding: Tensor | None, branches: list[EvictingLayer]
    ) -> list[EvictingLayer]:
        """Compress the first call's pairs, for the branches too; returns those that keep everything."""
        groups: list[RowGroup] = []
        has_padding = padding is not None and self.session.storage is not None  # it is not encoded along with the rest
        if not call.is_local and (self.session.press is not None or branches or has_padding):
            groups = RowGroup.of_prefill(self.slots, call, padding, self._known(call))
            self._count_for_budgets(groups)
        for branch in branches:
            branch.window = call.sliding_window
        sharing = [branch for branch in branches if not branch._compress_from(self.slots, groups)]
        self._compress_from(self.slots, groups)
        for group in groups:
            group.view.forget()
        return sharing

    def _compress_from(self, source: Slots, groups: list[RowGroup]) -> bool:
        """Store what this cache's press keeps of ``source`` (which may be this layer's); False if all.

        A press that fails breaks its own cache, which raises the error at its next use, and no other one.
        """
        press, session = self.session.press, self.session
        if session.error is not None or not groups:
            return False
        if press is None and session.storage is not None and any(group.slots is not None for group in groups):
            self._store(source, groups, [None] * len(groups))  # without the padding
            return True
        if press is None or press.judges_prompt:
            return False
        try:
            check_heads(press, groups[0].view.module, groups[0].view.queries.shape[1])
            groups, said = observed(press, groups)
            return self._keep_of(press, source, groups, any(said))
        except Exception as error:
            session.error = error
            if source is self.slots:
                raise
            traceback.clear_frames(error.__traceback__)  # their tensors fill memory that the other presses need
            return False

    def _keep_of(self, press: Press, source: Slots, groups: list[RowGroup], has_said: bool) -> bool:
        """Store what ``press`` keeps of ``source``; False if all, and nothing is said of it either (``has_said``)."""
        groups = to_choose_from(press, groups, self.codec)
        kept = [kept_by(press, group, press.compress(group.view)) for group in groups]
        if not has_said and all(part is None for part in kept) and all(group.slots is None for group in groups):
            n_pairs = sum(group.n_pairs for group in groups)
            self.n_pairs = n_pairs, n_pairs
            return False
        self._store(source, groups, kept)
        asked = zip(groups, kept, strict=True)
        self.references = [(g.rows, g.slots, part.references) for g, part in asked if part and part.references]
        return True

    def _count_for_budgets(self, groups: list[RowGroup]) -> None:
        """Note in the views of a prompt in pieces what their budgets are of; the one place that says it.

        A ratio is a fraction of the text so far, and a budget is what it is; both hold for each row by itself. As long
        as more is to come, a text shorter than ``chunk_tokens`` is given the budget of a text of that length: else a
        first piece of three tokens would lose its attention sinks to a ratio.
        """
        chunk = self.session.chunk_tokens
        if chunk is None:
            return
        for view in (group.view for group in groups):
            n = view.end if self.phase.is_whole else max(view.end, chunk)
            view.n_counted = n if view.sliding_window is None else min(n, max(1, view.sliding_window - 1))

    def _compress_piece(self, press: Press, call: LayerCall, padding: Tensor | None) -> None:
        """Cut back to the budget after a later piece of the prompt: what was kept and the piece are chosen from."""
        groups = self._groups_of_call(call, padding, borrows=False)
        self._count_for_budgets(groups)
        try:
            groups, said = observed(press, groups)
            kept = [  # nothing where a row has no new token
                kept_by(press, group, press.compress(group.view)) if group.view.n_queries else None
                for group in to_choose_from(press, groups, self.codec)
            ]
        except Exception as error:
            self.session.error = error
            raise
        is_less = any(group.view.n_tokens < self.slots.n for group in groups)  # without padding, within the window
        if is_less or any(part is not None for part in kept):
            self._store(self.slots, groups, kept, is_tight=True)
        else:
            note(self.slots, press, groups, said)
            self._count_pairs(call, padding)
        for group in groups:
            group.view.forget()

    def _store(
        self, source: Slots, groups: list[RowGroup], kept: Sequence[Kept | None], is_tight: bool = False
    ) -> None:
        """Store what was kept of each group of rows of ``source``: all of it where that is None, but no padding.

        Args:
            is_tight: in no more memory than that takes, without the room that there was for more.
        """
        parts = [group.all() if part is None else part for group, part in zip(groups, kept, strict=True)]
        if self.session.rerotates:
            parts = [group.view.side_by_side(part) for group, part in zip(groups, parts, strict=True)]
        buffers = None
        if source is self.slots and self.was_compressed and not is_tight:  # what is kept was copied out
            buffers = source.filled.buffers_for(max(part.positions.shape[-1] for part in parts))
        self.slots = gathered(source, groups, parts, buffers, self._padding_allowed(), declared(self.session.press))
        self.pending = Pending(self.pending.queries)
        self.n_pairs = sum(group.n_pairs for group in groups), self.slots.n_kept_pairs

    def _padding_allowed(self) -> float | None:
        """The share of slots that may be padding; None: any, where slots have to be those of a sliding window."""
        if self.window is not None:
            return None
        return WASTE if self.session.storage is None else 0.0  # empty slots would be encoded along with the others

    # -- later ----------------------------------------------------------------------------------------------------

    def _go_on(self, call: LayerCall, padding: Tensor | None, before: Tensor | None) -> None:
        """Let a press that observes, judges or evicts while decoding do so after a call.

        Args:
            before: int64 ``[B, Hkv, T]``, positions of what a prefill was cut back from, where keys then move up.
        """
        press = self.session.press
        if press is None or call.is_local or self.session.error is not None:
            return
        if press.evicts_while_decoding:
            check_heads(press, call.module, call.query.shape[1])
        if not self.phase.is_prefill and self.session.roles.observers:
            self._observe(press, call, padding)
        if press.n_waiting and (press.judges_prompt or not self.phase.is_prefill):
            self._judge(press, call, padding)
        if press.n_recent_queries:
            self._compress_when_due(press, call, padding, before)

    def _observe(self, press: Press, call: LayerCall, padding: Tensor | None) -> None:
        """Show a press all that is stored and the queries of the call, and note what it says of each pair."""
        groups, said = observed(press, self._groups_of_call(call, padding))
        note(self.slots, press, groups, said)
        for group in groups:
            group.view.forget()

    def _groups_of_call(self, call: LayerCall, padding: Tensor | None, borrows: bool = True) -> list[RowGroup]:
        """All that is stored, with the queries and hidden states of this call alone."""
        n, hidden, seen = call.query.shape[2], call.hidden_states, self.slots.seen
        queries = Newest((call.query,), seen).newest(n, padding)
        states = None if hidden is None else Newest((hidden[:, None],), seen).newest(n, padding)
        pending = Pending(queries, states, queries.counts())
        groups = RowGroup.of_text_so_far(self.slots, call, padding, pending, self._known(call), borrows)
        return carrying(self.session.press, groups)

    def _judge(self, press: Press, call: LayerCall, padding: Tensor | None) -> None:
        """Have the press say which of the new tokens are kept, and free the others once they are not the newest."""
        slots = self.slots
        stays = press.judge(view_of_newest(slots, call, padding, self._known(call)))
        older = slots.column(STAYS.name)
        if older is None:
            older = stays.new_ones(*stays.shape[:2], slots.n)
        slots.put(STAYS, torch.cat([older[:, :, : slots.n - stays.shape[2]], stays], dim=2))
        stop = slots.seen - press.n_waiting
        if padding is not None:  # a row with padding among its newest tokens reaches further back
            stop = min(stop, int(newest_from(padding, press.n_waiting).min()))
        if stop > slots.tail_start:
            start, n_kept = slots.tail_start, slots.n_kept
            judged = slots.column(STAYS.name)
            assert judged is not None
            stays = judged[:, :, n_kept : n_kept + stop - start]
            if padding is not None:
                stays = stays & padding[:, None, start:stop]
            slots.settle(stop, stays, self._padding_allowed())
        self._count_pairs(call, padding)

    def _leaving(self, n_new: int) -> Tensor | None:
        """As :func:`leaving`, before the newest ``n_new`` tokens."""
        press = self.session.press
        if press is None or not press.n_waiting:
            return None
        return leaving(self.slots, self.shown, press.n_waiting, n_new)

    def _count_pairs(self, call: LayerCall, padding: Tensor | None) -> None:
        self.n_pairs = self.slots.n_pairs(call.sliding_window, padding)

    def _compress_when_due(self, press: Press, call: LayerCall, padding: Tensor | None, before: Tensor | None) -> None:
        """Remember the queries of this call, and compress the rows again of which enough tokens have come."""
        n, query, seen = press.n_recent_queries, call.query, self.slots.seen
        pending = self.pending
        recent = (pending.queries or Newest.nothing(query, seen)).and_then(query, seen, n, padding)
        n_new = [0] * query.shape[0] if self.phase.is_prefill or len(pending.n_new) != query.shape[0] else pending.n_new
        if self.phase.is_prefill:
            if before is not None:
                recent = self._moved_up(recent.newest(n, padding), call, padding, before)
            self.pending = Pending(recent, pending.hidden_states, n_new)
            return
        n_new = [since + more for since, more in zip(n_new, self.session.n_real(*query.shape[::2]), strict=True)]
        unseen = pending.hidden_states
        if call.hidden_states is not None:
            hidden = call.hidden_states[:, None]
            unseen = (unseen or Newest.nothing(hidden, seen)).and_then(hidden, seen, max(n_new), padding)
        self.pending = Pending(recent, unseen, n_new)
        if not any(press.is_due(since) for since in n_new):
            return
        recent = recent.newest(n, padding)
        states = unseen.newest(max(n_new), padding) if unseen is not None and unseen.end == seen else None
        due = Pending(recent, states, n_new)
        groups = RowGroup.of_text_so_far(self.slots, call, padding, due, self._known(call))
        groups = to_choose_from(press, carrying(press, groups), self.codec)
        due_now = [bool(group.view.n_queries) and press.is_due(group.view.n_new or 0) for group in groups]
        kept = [
            kept_by(press, group, press.compress_again(group.view)) if is_due else None
            for group, is_due in zip(groups, due_now, strict=True)
        ]
        if any(part is not None for part in kept):
            before = self.slots.positions()
            self._store(self.slots, groups, kept)
            recent = self._moved_up(recent, call, padding, before)
        for group in groups:
            group.view.forget()
        n_new = [0 if press.is_due(since) else since for since in n_new]
        self.pending = Pending(recent, unseen if any(n_new) else None, n_new)

    def _moved_up(self, newest: Newest, call: LayerCall, padding: Tensor | None, before: Tensor) -> Newest:
        """The newest queries after the gaps behind them were closed, as they are for the keys.

        Args:
            before: int64 ``[B, Hkv, T]``, positions of what was stored before that.
        """
        rope = self.rope(call) if self.session.rerotates else None
        return newest if rope is None else moved_up(newest, rope.turn, padding, before, self.slots.positions())

    # -- what is left ---------------------------------------------------------------------------------------------

    def share(self, other: EvictingLayer) -> None:
        """Store what ``other`` stores, without copying; whichever of the two is written to first copies."""
        self.window, self.phase, self.shown, self.taken = other.window, other.phase, other.shown, other.taken
        self.slots, self.n_pairs, self._offered = other.slots.shared(), other.n_pairs, None
        self.pending = Pending(*(vars(other.pending).values()))
