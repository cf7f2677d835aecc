"""PressedCache: a cache that a press compresses after the prefill.

Without a press it is a DynamicCache that writes new tokens into a buffer with room to grow instead of concatenating.
What happens to the pairs of a layer is in ``layer.py`` and ``eviction.py``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.file import load_cache, save_cache
from coldpress.cache.layer import PressedLayer, next_layer
from coldpress.cache.mixed import MixedCache
from coldpress.cache.pins import Spans, checked_pins, of_rows, repeated
from coldpress.cache.session import Session
from coldpress.core.definition import as_given
from coldpress.core.press import Press
from coldpress.core.requirements import check_chunks, check_quantisable, require_rerotatable
from coldpress.errors import CacheError, PressError
from coldpress.stores.bits import KVBits, storage_of
from coldpress.stores.codec import Codec

__all__ = ["PressedCache"]


class PressedCache(MixedCache):
    """A key-value cache that a press compresses: right after the prefill, and while decoding if that is its schedule.

    Pass it as ``cache`` to a model that runs on coldpress's attention (before transformers 5.24 the argument is called
    ``past_key_values``)::

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="coldpress")
        cache = PressedCache(SnapKVPress(compression_ratio=0.5))
        model.generate(**inputs, cache=cache, max_new_tokens=50)

    The first forward (the prefill) sees every pair; then each layer keeps what the press selects and frees the rest.
    Later tokens, of an answer or of further turns, are stored whole, at the positions they have in the text, unless the
    press goes on while decoding (:class:`coldpress.DecodingPress` and its relatives, :class:`coldpress.DMSPress` with
    ``decoding=True``). Without a press the cache computes what a DynamicCache does and writes new tokens into a buffer
    with room to grow.

    With ``chunk_tokens`` the prompt is read in pieces, and each layer is cut back to its budget after every one, so
    that it never stores more than the budget and a piece, and under a budget the time is linear in the length::

        cache = PressedCache(SnapKVPress(budget_tokens=2048), chunk_tokens=512)
        model.generate(**inputs, cache=cache, prefill_chunk_size=512)

    :func:`coldpress.prefill` does the same for callers of the model, and alone says where the prompt ends. From
    ``generate`` a piece with fewer tokens is the last one, and a single token that is left over is stored as generated.
    Without ``chunk_tokens``, ``generate`` must not cut a prompt up; other callers' later pieces are stored whole.

    With ``kv_bits`` what is left is stored in few bits: the press scores pairs as they are, its survivors are quantised
    once, and attention sees them in their own type again, one layer at a time. Each head's newest pairs stay as they
    are (:class:`KVBits`).

    Args:
        press: what compresses the cache, or None.
        chunk_tokens: tokens of a prompt that a call brings at most, at least 1; None for a prompt in one call.
        positions: ``"original"``: keys stay at the positions that they have in the text. ``"rerotate"``: whenever pairs
            are evicted, the kept keys are rotated so that they stand side by side before the next token. Then no
            distance is longer than what is stored, and with a decoding schedule a model reads on beyond the positions
            it was trained on, in constant memory.
        kv_bits: how the older pairs are stored: 8, 4 or 2 bits for each number, in groups (KVBits), or a name such as
            ``"k8v4"``, keys in 8 bits and values in 4, one by one (RotatedBits); None stores all as they are.
        storage: a Codec, RotatedBits(8, 4), Mixed() or one of your own; instead of ``kv_bits``.
        pin: spans of tokens that nothing may evict, ``[(0, 40)]`` for the first 40 of every row, or a list of such
            lists, one for each row. They are kept in every layer and head under every press, and count towards its
            budget; padding is not counted.

    Attributes:
        attention_mask: bool ``[B, n]``, of the tokens that a loaded cache had seen when it was saved, if there was
            padding among them: what later calls have to put before the mask of their own tokens. None otherwise.

    Raises:
        PressError: ``press`` is not a press, cannot choose among what is left of a text that goes on, or cannot go
            with ``positions="rerotate"``.
        CacheError: ``chunk_tokens`` or ``kv_bits`` is not such a number, or the press keeps what cannot be stored so;
            or, at the call, a prompt is longer than a piece, or its end is unknown: it begins with a single
            token, or several come right after a first call that was shorter than a piece, and it is not
            :func:`coldpress.prefill` that feeds them.
        ModelError: at the next call, when the model runs another attention backend, or its keys cannot be moved.
    """

    attention_mask: Tensor | None = None

    def __init__(
        self,
        press: Press | None = None,
        *,
        chunk_tokens: int | None = None,
        positions: Literal["original", "rerotate"] = "original",
        kv_bits: int | str | Codec | None = None,
        storage: Codec | None = None,
        pin: Spans | Sequence[Spans] | None = None,
    ):
        if press is not None and not isinstance(press, Press):
            raise PressError(f"press must be a press such as coldpress.SnapKVPress(0.5), got {as_given(press)}.")
        check_chunks(press, chunk_tokens)
        if positions not in ("original", "rerotate"):
            raise PressError(f"positions must be 'original' or 'rerotate', got {positions!r}.")
        if positions == "rerotate" and press is not None:
            require_rerotatable(press)
        self.session = Session(press, positions == "rerotate", storage_of(kv_bits, storage), checked_pins(pin))
        self.session.chunk_tokens = chunk_tokens
        self._tokens: list[Tensor] = []  # [B, n] each, as far as they are known
        check_quantisable(press, self.session.storage, self.session.rerotates, chunk_tokens)
        super().__init__(layer_class_to_replicate=partial(next_layer, self.session))

    @classmethod
    def around(cls, session: Session, layers: list[Any]) -> PressedCache:
        """A cache around ``layers`` that are in a cache of another class already."""
        cache = cls()
        cache.session, cache.layers = session, layers
        return cache

    def __repr__(self) -> str:
        said = "" if self.chunk_tokens is None else f"chunk_tokens={self.chunk_tokens}, "
        said += 'positions="rerotate", ' if self.session.rerotates else ""
        said += "" if self.kv_bits is None else f"kv_bits={self.kv_bits!r}, "
        return f"PressedCache(press={self.press!r}, {said}seen={self.seen_tokens}, stored={self.stored_lengths()})"

    def __bool__(self) -> bool:
        """Whether it stores tokens; a model that drops the cache of too short a text asks this first."""
        for layer in self.pressed_layers():
            layer.refuse_dropping()
        return self.seen_tokens > 0

    @property
    def press(self) -> Press | None:
        """The press that compresses this cache."""
        return self.session.press

    @property
    def token_ids(self) -> Tensor | None:
        """The tokens seen, int64 ``[B, seen]``; None if not all of them are known.

        :func:`coldpress.prefill`, ``with press(model):`` and the pipeline tell them; a bare call of a model does not.
        """
        if not self._tokens or sum(part.shape[1] for part in self._tokens) != self.seen_tokens:
            return None
        self._tokens = [torch.cat(self._tokens, dim=1)]
        return self._tokens[0]

    def remember(self, token_ids: Tensor) -> None:
        """Note that the newest tokens seen are ``token_ids``, int64 ``[B, n]``; in vain if earlier ones are unknown."""
        known = sum(part.shape[1] for part in self._tokens)
        earlier = self.seen_tokens - token_ids.shape[1]
        if known <= earlier:
            self._tokens = [*self._tokens, token_ids] if known == earlier else []

    @property
    def _places(self) -> Literal["original", "rerotate"]:
        return "rerotate" if self.session.rerotates else "original"

    @property
    def chunk_tokens(self) -> int | None:
        """How many tokens of a prompt come at once at most; None where it comes whole."""
        return self.session.chunk_tokens

    @property
    def kv_bits(self) -> KVBits | None:
        """In how few bits the older pairs are stored; None: as they are, or as :attr:`storage` says."""
        return self.session.storage if isinstance(self.session.storage, KVBits) else None

    @property
    def storage(self) -> Codec | None:
        """How the older pairs are stored; None: as they are."""
        return self.session.storage

    def codecs(self) -> list[Codec | None]:
        """How the older pairs of each layer with keys and values are stored; None: as they are."""
        return [layer.codec for layer in self.pressed_layers() if layer.is_initialized]

    @property
    def seen_tokens(self) -> int:
        """The logical length: tokens the model has seen, padding included."""
        return max((layer.slots.seen for layer in self.pressed_layers()), default=0)

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
        """The layers that store keys and values, in order."""
        return [layer for layer in self.layers if isinstance(layer, PressedLayer)]

    def positions(self, layer_idx: int = 0) -> Tensor:
        """Original positions of the pairs stored in one layer.

        Returns:
            int64 ``[B, Hkv, T]``: indices into the tokens that were fed in, ascending; -1 where a head stores fewer
            than the longest one of its layer.
        """
        return self.layer(layer_idx).positions()

    def stored_lengths(self) -> list[int]:
        """Stored length of each layer with keys and values, in tokens."""
        return [layer.stored_length for layer in self.pressed_layers() if layer.is_initialized]

    def kv_bytes(self) -> int:
        """Bytes of the distinct storages of keys and values, room to grow included."""
        storages = (tensor.untyped_storage() for layer in self.pressed_layers() for tensor in layer.tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def achieved_ratio(self) -> float:
        """Fraction of the pairs (row, head, token) that the press removed, of those that it was shown in all layers.

        Later tokens, padding and what a sliding window has left behind are not counted.
        """
        before, after = (sum(layer.n_pairs[i] for layer in self.pressed_layers()) for i in (0, 1))
        return 1 - after / before if before else 0.0

    @property
    def reads_part(self) -> bool:
        """Whether the press chooses which of the stored pairs a decoding query reads."""
        return bool(self.session.roles.readers)

    def read_ratio(self) -> float:
        """Fraction of the stored pairs that decoding queries have read; 1 unless the press reads part of them."""
        stored = sum(layer.n_readable for layer in self.pressed_layers())
        return float(sum(int(layer.n_read) for layer in self.pressed_layers()) / stored) if stored else 1.0

    def save(self, path: str | Path, model: PreTrainedModel, attention_mask: Tensor | None = None) -> None:
        """Write all that is needed to go on from here to a file; :meth:`load` reads it.

        The file is as large as what the cache stores, without room to grow. It is there whole or not at all. Beside the
        tensors it says which model and press made them. The tokens are in it where the cache knows them
        (:attr:`token_ids`), so the file contains the text.

        Args:
            path: the file; one that is there is replaced.
            model: what filled the cache.
            attention_mask: ``[B, seen]``, of all tokens seen; must be given if some of them are padding.

        Raises:
            CacheError: the cache is empty or has failed, has the states of a recurrent model, or has a press that
                goes on while decoding and has parameters that JSON has no type for.
            OutputError: the file cannot be written.
        """
        save_cache(self, path, model, attention_mask)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, check_model: bool = True) -> PressedCache:
        """The cache in a file that :meth:`save` wrote, on the model's devices; it goes on exactly as the saved one.

        A press that goes on while decoding does so. One that has done its work is there as :attr:`press`, or None if
        it is a class of your own that is not imported. Nothing in a file is run. (A model with "dynamic" rotary
        scaling goes on with the frequencies of the longest text that it has read: have it read none before.)

        Args:
            path: the file.
            model: what the cache is used with.
            check_model: refuse another model of the same sizes: other weights (a checksum over the first numbers of
                all of them), rotary parameters or vocabulary. Other sizes and dtypes are refused in any case.

        Raises:
            CacheError: there is no such file, it is damaged, of a newer format, or of another model.
            PressError: its press goes on and lacks what it needs of the model.
        """
        return load_cache(cls, path, model, check_model)

    def fork(self) -> PressedCache:
        """A cache of the same pairs that goes its own way from here.

        Nothing is copied until one of the two is written to; neither ever sees the other's later tokens.
        """
        self.session.check_claimed()
        storage, pins = self.session.storage, self.session.pins
        other = PressedCache(
            self.press, chunk_tokens=self.chunk_tokens, positions=self._places, storage=storage, pin=pins or None
        )
        other.session.follow(self.session)
        other.attention_mask, other._tokens = self.attention_mask, list(self._tokens)
        for layer in self.layers:
            if isinstance(layer, PressedLayer):
                other.layers.append(next_layer(other.session))
                other.layer(layer.index).share(layer)
            else:
                other.layers.append(copy.deepcopy(layer))
                next_layer(other.session)
        return other

    __copy__ = fork  # a copy that shared its layers would go wrong as soon as one of the two is used

    def branches(
        self, presses: Sequence[Press | None], kv_bits: Sequence[int | Codec | None] | None = None
    ) -> list[PressedCache]:
        """One cache for each press, all filled from this cache's own prefill: one prefill serves them all.

        Call it on an empty cache without a press, then run the prefill with this cache; it keeps every pair itself. The
        presses see the same views, so what one of them computed (scores at another ratio, attention of the last
        queries) the others get for nothing.

        Args:
            presses: one for each cache; None keeps all.
            kv_bits: how each of them stores its pairs, in bits or by a Codec; None: all as they are.

        Raises:
            CacheError: this cache has a press or kv_bits, is not empty, or is filled in pieces: what the model
                computes of the second piece depends on what each press has kept of the first.
        """
        if self.chunk_tokens is not None:
            raise CacheError("branches() needs a prefill in one piece; leave chunk_tokens out, or prefill each cache.")
        if self.press is not None or self.storage is not None or self.seen_tokens:
            raise CacheError("branches() needs an empty cache without a press; start from PressedCache().")
        kv_bits = [None] * len(presses) if kv_bits is None else kv_bits
        pairs = zip(presses, map(storage_of, kv_bits), strict=True)
        pins = self.session.pins or None
        branches = [PressedCache(press, positions=self._places, storage=how, pin=pins) for press, how in pairs]
        self.session.branches = [weakref.ref(branch) for branch in branches]
        return branches

    def reset(self) -> None:
        """Forget all tokens; the next call is a prefill again."""
        super().reset()
        self.session.reset()
        self.attention_mask, self._tokens = None, []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store for one layer: append its pairs, return all that are stored."""
        return self.layer(layer_idx).update(key_states, value_states)

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens: keep ``max_length`` of the tokens seen, or drop ``-max_length`` if negative.

        Raises:
            CacheError: tokens would have to go that the press has compressed; then nothing changes.
        """
        for layer in self.pressed_layers():
            layer.cropped_length(max_length)
        super().crop(max_length)
        if self._tokens:
            self._tokens = [torch.cat(self._tokens, dim=1)[:, : self.seen_tokens]]
        if not self.seen_tokens:
            self.attention_mask = None
        elif self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, : self.seen_tokens]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows ``beam_idx``, int64 ``[B']``."""
        super().reorder_cache(beam_idx)
        self._index_mask(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select the rows ``indices``, int64 ``[B']``."""
        super().batch_select_indices(indices)
        self._index_mask(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, one after the other."""
        super().batch_repeat_interleave(repeats)
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask.repeat_interleave(repeats, dim=0)
        self.session.pins = repeated(self.session.pins, repeats)
        self._tokens = [part.repeat_interleave(repeats, dim=0) for part in self._tokens]

    def _index_mask(self, rows: Tensor) -> None:
        self.session.pins = of_rows(self.session.pins, rows.tolist())
        self._tokens = [part.index_select(0, rows.to(part.device)) for part in self._tokens]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask.index_select(0, rows.to(self.attention_mask.device))

    def activate_past_recording(self) -> None:
        """Prepare for assisted generation, as some versions of transformers 5 ask before its first forward.

        Raises:
            CacheError: the cache stores tokens, which these versions then feed again.
        """
        if self.seen_tokens:
            raise CacheError(
                "This transformers feeds a prompt again to a filled cache when it decodes with guesses (an assistant "
                "model, prompt lookup). Start with an empty cache, or generate without guesses."
            )
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, PressedLayer):
            layer = next(iter(self.pressed_layers()), None) or self.layer(len(self.layers))
        return layer.get_mask_sizes(query)
