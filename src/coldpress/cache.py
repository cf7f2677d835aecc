"""PressedCache: a cache that a press compresses after the prefill.

Without a press it is a DynamicCache that writes new tokens into a buffer with room to grow instead of concatenating.
What happens to the pairs of a layer is in ``layer.py``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from coldpress.errors import CacheError, PressError
from coldpress.layer import PressedLayer
from coldpress.quantised import KVBits, check_quantisable
from coldpress.session import Session

if TYPE_CHECKING:
    from coldpress.presses.base import BasePress

__all__ = ["PressedCache"]


class PressedCache(Cache):
    """A key-value cache that a press compresses: right after the prefill, and while decoding if that is its schedule.

    Pass it as ``past_key_values`` to a model that runs on coldpress's attention::

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="coldpress")
        cache = PressedCache(SnapKVPress(compression_ratio=0.5))
        model.generate(**inputs, past_key_values=cache, max_new_tokens=50)

    The first forward (the prefill) sees every pair; then each layer keeps what the press selects and frees the rest.
    Later tokens, of an answer or of further turns, are stored whole, at the positions they have in the text, unless the
    press goes on while decoding (:class:`coldpress.DecodingPress` and its relatives, :class:`coldpress.DMSPress` with
    ``decoding=True``); so are all chunks but the first where ``generate(prefill_chunk_size=...)`` cuts the prompt up.
    Without a press the cache computes what a DynamicCache does and writes new tokens into a buffer with room to grow.

    With ``kv_bits`` what is left is held in few bits: the press scores pairs as they are, its survivors are quantised
    once, and attention sees them in their own type again, one layer at a time. Each head's newest pairs stay as they
    are (:class:`KVBits`).

    Args:
        press: what compresses the cache, or None.
        kv_bits: 8, 4 or 2 bits for each number of the older pairs, or a KVBits; None holds all as they are.

    Raises:
        PressError: ``press`` is not a press.
        CacheError: ``kv_bits`` is none of these, or the press keeps what cannot be held so.
        ModelError: at the next call, when the model runs another attention backend.
    """

    def __init__(self, press: BasePress | None = None, kv_bits: int | KVBits | None = None):
        from coldpress.presses.base import BasePress

        if press is not None and not isinstance(press, BasePress):
            raise PressError(f"press must be a press such as coldpress.SnapKVPress(0.5), got {press!r}.")
        self.session = Session(press, KVBits.of(kv_bits))
        check_quantisable(press, self.kv_bits)
        super().__init__(layer_class_to_replicate=self.session.new_layer)

    @classmethod
    def around(cls, session: Session, layers: list[Any]) -> PressedCache:
        """Another handle on ``layers`` that are in a cache of another class already."""
        cache = cls(session.press)
        cache.session, cache.layers = session, layers
        return cache

    def __repr__(self) -> str:
        bits = "" if self.kv_bits is None else f"kv_bits={self.kv_bits!r}, "
        return f"PressedCache(press={self.press!r}, {bits}seen={self.seen_tokens}, stored={self.stored_lengths()})"

    @property
    def press(self) -> BasePress | None:
        """The press that compresses this cache."""
        return self.session.press

    @property
    def kv_bits(self) -> KVBits | None:
        """How the older pairs are held; None: as they are."""
        return self.session.kv_bits

    @property
    def seen_tokens(self) -> int:
        """The logical length: tokens the model has seen, padding included."""
        return max((layer._seen for layer in self.pressed_layers()), default=0)

    def layer(self, layer_idx: int) -> PressedLayer:
        """The attention layer ``layer_idx`` of the cache, made if it is not there yet."""
        self._grow(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, PressedLayer):
            raise CacheError(
                f"Layer {layer_idx} is a {type(layer).__name__} and holds no keys and values; layers that keep a state "
                "beside their pairs are not supported."
            )
        return layer

    def pressed_layers(self) -> list[PressedLayer]:
        """The layers that hold keys and values, in order."""
        return [layer for layer in self.layers if isinstance(layer, PressedLayer)]

    def positions(self, layer_idx: int = 0) -> Tensor:
        """Original positions of the pairs stored in one layer.

        Returns:
            int64 ``[B, Hkv, T]``: indices into the tokens that were fed in, ascending; -1 where a head stores fewer
            than the longest one of its layer.
        """
        return self.layer(layer_idx).positions()

    def stored_lengths(self) -> list[int]:
        """Stored length of each layer that holds keys and values, in tokens."""
        return [layer.stored_length for layer in self.pressed_layers() if layer.is_initialized]

    def kv_bytes(self) -> int:
        """Bytes of the distinct storages that hold keys and values, room to grow included."""
        storages = {}
        for layer in self.pressed_layers():
            for tensor in layer.tensors():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def achieved_ratio(self) -> float:
        """Fraction of the pairs (row, head, token) that the press removed, of all layers that it was shown.

        Neither padding nor what a sliding window has left behind is counted.
        """
        before = sum(layer._pairs_before for layer in self.pressed_layers())
        after = sum(layer._pairs_after for layer in self.pressed_layers())
        return 1 - after / before if before else 0.0

    def fork(self) -> PressedCache:
        """A cache that holds the same pairs and goes its own way from here.

        Nothing is copied until one of the two is written to; neither ever sees the other's later tokens.
        """
        self.session.check_claimed()
        other = PressedCache(self.press, self.kv_bits)
        other.session.follow(self.session)
        for layer in self.layers:
            if isinstance(layer, PressedLayer):
                other.layers.append(other.session.new_layer())
                other.layer(layer.index).share(layer)
            else:
                other.layers.append(copy.deepcopy(layer))
                other.session.new_layer()
        return other

    __copy__ = fork  # a copy that shared its layers would go wrong as soon as one of the two is used

    def branches(
        self, presses: Sequence[BasePress | None], kv_bits: Sequence[int | KVBits | None] | None = None
    ) -> list[PressedCache]:
        """One cache for each press, all filled from this cache's own prefill: one prefill serves them all.

        Call it on an empty cache without a press, then run the prefill with this cache; it keeps every pair itself. The
        presses see the same views, so what one of them computed (scores at another ratio, attention of the last
        queries) the others get for nothing.

        Args:
            presses: one for each cache; None keeps all.
            kv_bits: how each of them holds its pairs; None: all as they are.

        Raises:
            CacheError: this cache has a press or kv_bits, or is not empty.
        """
        if self.press is not None or self.kv_bits is not None or self.seen_tokens:
            raise CacheError("branches() needs an empty cache without a press; start from PressedCache().")
        kv_bits = [None] * len(presses) if kv_bits is None else kv_bits
        branches = [PressedCache(press, bits) for press, bits in zip(presses, kv_bits, strict=True)]
        self.session.branches = [weakref.ref(branch) for branch in branches]
        return branches

    def reset(self) -> None:
        """Forget all tokens; the next call is a prefill again."""
        super().reset()
        self.session.reset()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What attention calls for one layer: append its pairs, return all that are stored."""
        return self.layer(layer_idx).update(key_states, value_states)

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens: keep ``max_length`` of the tokens seen, or drop ``-max_length`` if negative.

        Raises:
            CacheError: tokens would have to go that the press has compressed; then nothing changes.
        """
        for layer in self.pressed_layers():
            layer.cropped_length(max_length)
        super().crop(max_length)

    def activate_past_recording(self) -> None:
        """What assisted generation asks for before its first forward, which feeds its guesses with the prompt.

        Raises:
            CacheError: the press would compress the guesses along with the prompt.
        """
        if self.press is not None and not self.seen_tokens:
            raise CacheError(
                "Assisted generation feeds guesses together with the prompt, and the press would compress both. Use a "
                "PressedCache without a press, or generate without guesses."
            )
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, PressedLayer):
            layer = next(iter(self.pressed_layers()), None) or self.layer(len(self.layers))
        return layer.get_mask_sizes(query)

    # -- layers that keep a state instead of keys and values (models that mix both kinds, transformers 5) ----------

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if all(isinstance(layer, PressedLayer) for layer in self.layers):
            return False
        if layer_idx is not None and isinstance(self.layers[layer_idx], PressedLayer):
            return False
        return super().has_previous_state(layer_idx, state_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return super().get_conv_state(self._state_layer(layer_idx), state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        states = super().update_conv_state(conv_states, self._state_layer(layer_idx), state_idx, **kwargs)
        self._copy_state(layer_idx)
        return states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return super().get_recurrent_state(self._state_layer(layer_idx), state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        states = super().update_recurrent_state(recurrent_states, self._state_layer(layer_idx), state_idx, **kwargs)
        self._copy_state(layer_idx)
        return states

    def _state_layer(self, layer_idx: int) -> int:
        """Make sure that layer ``layer_idx`` holds a state; it was made to hold pairs because nobody said otherwise."""
        from transformers.cache_utils import LinearAttentionLayer

        self._grow(layer_idx)
        layer = self.layers[layer_idx]
        if isinstance(layer, PressedLayer) and not layer.is_initialized:
            self.layers[layer_idx] = LinearAttentionLayer()
        return layer_idx

    def _copy_state(self, layer_idx: int) -> None:
        """A state of the prefill belongs to the branches too."""
        for branch in self.session.live_branches():
            branch._grow(layer_idx)
            branch.layers[layer_idx] = copy.deepcopy(self.layers[layer_idx])

    def _grow(self, layer_idx: int) -> None:
        while len(self.layers) <= layer_idx:
            self.layers.append(self.session.new_layer())
