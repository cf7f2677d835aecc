"""Sights: what the token of a compiled step sees of each layer, found out once and kept as long as it holds."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from coldpress.cache.layer import PressedLayer
from coldpress.cache.masks import ModelCall, additive_mask, ranks
from coldpress.cache.phase import Phase
from coldpress.cache.slots import BIAS
from coldpress.core.call import LayerCall
from coldpress.stores.base import Store
from coldpress.stores.parts import Part, Sight

__all__ = ["Sights", "commit"]

_Facts = tuple[Tensor | None, ...]  # what a sight is made of, beside the store; tensors that are never written to


@dataclass
class _Held:
    """A layer's part and sight, and what they were made of."""

    store: Store
    buffer: int
    facts: _Facts
    part: Part
    sight: Sight
    ahead: Tensor | None = None  # int32 [B or 1, 1, 1]: how far each row's positions are ahead of the tokens seen


class Sights:
    """The parts and sights of the layers of caches.

    Args:
        n_more: tokens to make room for in buffers that are full.
    """

    def __init__(self, n_more: int):
        self.n_more = n_more
        self._held: WeakKeyDictionary[PressedLayer, _Held] = WeakKeyDictionary()
        # of a cache's first layer: what was shown when its sights were made, and at the latest step
        self._shown: WeakKeyDictionary[PressedLayer, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def of(self, layers: list[PressedLayer], call: ModelCall) -> tuple[list[Part], list[Sight]] | None:
        """Of the next token, which no mask hides; None where a layer's store has no part.

        Args:
            call: of this token.
        """
        known = self._same(layers[0], call)
        shown = None if call.shown is None else call.shown[:, : call.seen]
        parts, sights = [], []
        for layer in layers:
            held = self._held.get(layer)
            facts = (layer.slots.kept, layer.slots.entries(BIAS.name), known)
            if held is None or not self._holds(held, layer, facts):
                held = self._made(layer, shown, facts)
                if held is None:
                    return None
                self._held[layer] = held
            sight, window = held.sight, layer.window
            if held.ahead is not None and window is not None:
                sight = sight._replace(oldest=held.ahead + (layer.slots.seen - window))
            parts.append(held.part.going_to(layer.slots.filled.next_slots()))
            sights.append(sight)
        return parts, sights

    def _same(self, first: PressedLayer, call: ModelCall) -> Tensor | None:
        """The tensor of an earlier call, of a cache that has ``shown`` the same tokens and later ones since."""
        if call.shown is None:
            self._shown.pop(first, None)
            return None
        shown = call.shown[:, : call.seen]
        known, latest = self._shown.get(first, (shown, None))
        if not (call.is_as_before and first.shown is latest) and not _goes_on(known, shown):
            known = shown
        self._shown[first] = known, call.shown
        return known

    def _holds(self, held: _Held, layer: PressedLayer, facts: _Facts) -> bool:
        store = layer.slots.store
        if store is not held.store or store.room < 1 or store.tensors()[1].data_ptr() != held.buffer:
            return False
        return all(one is other for one, other in zip(held.facts, facts, strict=True))

    def _made(self, layer: PressedLayer, shown: Tensor | None, facts: _Facts) -> _Held | None:
        slots = layer.slots
        store = slots.filled
        part = store.part(self.n_more)
        if part is None:
            return None
        mask = shown
        if shown is not None and bool(shown[:, slots.tail_start :].all()):
            mask = None
        bias = additive_mask(slots, 1, mask, None, by_head=store.is_ragged)
        own = None if bias is None else store.part_bias(bias[:, :, 0])
        if layer.window is None:
            return _Held(store, store.tensors()[1].data_ptr(), facts, part, Sight(own))
        at, of_tokens = ranks(slots, shown)
        last = of_tokens[..., -1:].int()  # [B or 1, 1, 1]
        positions, ahead = store.part_positions(at.int(), last), last + 1 - slots.seen
        return _Held(store, store.tensors()[1].data_ptr(), facts, part, Sight(own, positions), ahead)


def _goes_on(before: Tensor, shown: Tensor) -> bool:
    """Whether ``shown`` is ``before`` with later tokens, all of them shown; looking there waits for the device."""
    n = before.shape[1]
    if n > shown.shape[1] or len(before) != len(shown):
        return False
    return bool(shown[:, n:].all()) and torch.equal(before, shown[:, :n])


def commit(layer: PressedLayer, call: LayerCall | None) -> None:
    """Count the token that a compiled step wrote in place, and do what a layer does between two tokens.

    Args:
        call: what the step knows of the layer, for what its press makes of it; None: the press leaves it alone.
    """
    layer.slots.commit(1)
    layer.phase, layer.shown = Phase.LATER, layer.padding()
    if call is not None:
        layer.after_attention(call)
        return
    if layer.window is not None:
        layer.slots.forget_unreachable(layer.window, layer.shown)
    layer.encode()
