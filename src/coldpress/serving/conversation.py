"""A conversation with a model, whose earlier turns are compressed as they age."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pressed import PressedCache
from coldpress.core.press import Press
from coldpress.errors import CacheError, InputError, OutputError, PressError
from coldpress.io.files import path_of, read_text, replace_file
from coldpress.models.supported import use_coldpress
from coldpress.serving.answering import end_tokens, picked
from coldpress.serving.reading import compressed, run
from coldpress.serving.snapshot import is_wording
from coldpress.serving.streaming import GrowingText
from coldpress.serving.wording import chat_ids, prefix_ids
from coldpress.stores.bits import storage_of

__all__ = ["Conversation"]


class Conversation:
    """Turns of a user and a model, and one cache for all of them.

    The newest turns are stored whole. Once ``recent_tokens`` tokens have come since the last time, earlier turns are
    read once more and compressed by the press, the system prompt excepted: what was evicted is chosen anew, from the
    whole text.

    Args:
        model: put on coldpress's attention.
        tokenizer: the model's.
        press: that compresses earlier turns; None keeps all.
        system: the system prompt, which nothing may evict.
        recent_tokens: that are stored whole at least, before the turns before them are compressed again.
        kv_bits: 8, 4, 2, or a name such as ``"k8v4"``: how pairs are stored.
        chunk_tokens: earlier turns are read in pieces of so many tokens.

    Attributes:
        messages: all turns, the system prompt first.
        tokens_per_s: of the last answer.

    Raises:
        PressError, CacheError: as :meth:`change_press`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        press: Press | None = None,
        system: str | None = None,
        recent_tokens: int = 512,
        kv_bits: int | str | None = None,
        chunk_tokens: int | None = None,
    ):
        use_coldpress(model)
        self.model, self.tokenizer, self.recent_tokens = model, tokenizer, recent_tokens
        self.kv_bits, self.chunk_tokens = storage_of(kv_bits), chunk_tokens
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.tokens_per_s: float | None = None
        self._open = ""  # a text that the next question goes on from
        self._ids: list[int] = []  # that the cache has seen
        self._compressed = 0  # tokens that the press has been shown
        self._cache = PressedCache()
        self.change_press(press)

    @property
    def seen_tokens(self) -> int:
        """Tokens of the conversation so far."""
        return self._cache.seen_tokens

    @property
    def held_pairs(self) -> float:
        """Pairs that a head stores, on average over the layers."""
        places = [layer.positions() for layer in self._cache.pressed_layers() if layer.is_initialized]
        return sum(float((at >= 0).sum()) / at.shape[1] for at in places) / len(places) if places else 0.0

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return self._cache.kv_bytes()

    def change_press(self, press: Press | None) -> None:
        """Compress what was said so far by another press, and what will be said.

        Raises:
            PressError: the press goes on while decoding, or cannot read in pieces.
            CacheError: what it keeps cannot be stored in so few bits.
        """
        if press is not None and press.evicts_while_decoding:
            raise PressError(f"{press!r} goes on while decoding, and the newest turns stay whole; give another press.")
        PressedCache(press, chunk_tokens=self.chunk_tokens, kv_bits=self.kv_bits)  # refuses what does not go together
        self.press = press
        if self._ids:
            self._read_again(self._ids)

    def show(self, text: str) -> None:
        """Read and compress a text, which the next question goes on from.

        Raises:
            InputError: it is empty, or longer than the model's positions allow.
        """
        if not text.strip():
            raise InputError("The text is empty; name a file with a text.")
        ids = prefix_ids(self.tokenizer, [*self.messages, {"role": "user", "content": self._open + text}])
        self._check_room(len(ids))
        self._read_again(ids)
        self._open += text

    def ask(
        self,
        question: str,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """The answer to a question, piece by piece. What was said until the iterator is closed is part of the turn.

        Raises:
            InputError: the conversation is longer than the model's positions allow.
        """
        content = f"{self._open}\n\n{question}" if self._open else question
        messages = [*self.messages, {"role": "user", "content": content}]
        ids = chat_ids(self.tokenizer, messages)
        room = self._check_room(len(ids))
        logits = self._read(ids)
        self.messages, self._open = messages, ""
        generator = torch.Generator() if generator is None else generator
        growing, said, ends = GrowingText(self.tokenizer), "", end_tokens(self.model, self.tokenizer)
        begun, n_made = time.perf_counter(), 0
        try:
            while n_made < min(max_new_tokens, room):
                token = picked(logits, temperature, top_p, generator)
                n_made += 1
                self.tokens_per_s = n_made / max(time.perf_counter() - begun, 1e-9)
                if token in ends:
                    break
                piece = growing.add(token)
                said += piece
                if piece:
                    yield piece
                logits = run(self.model, self._cache, [token])[-1]
                self._note([token])
            piece = growing.finish()
            said += piece
            if piece:
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def save(self, name: str) -> list[Path]:
        """Write the turns to ``name.json`` and what is left of them to ``name.safetensors``; :meth:`load` reads them.

        Raises:
            OutputError: they cannot be written.
            InputError: nothing was said.
        """
        if not self._ids:
            raise InputError("Nothing was said yet, so there is nothing to save.")
        turns, pairs = (path_of(f"{name}.{kind}") for kind in ("json", "safetensors"))
        said = {"messages": self.messages, "open": self._open, "ids": self._ids, "compressed": self._compressed}
        self._cache.save(pairs, self.model)
        try:
            replace_file(turns, lambda part: part.write_text(json.dumps(said), encoding="utf-8"))
        except OSError as error:
            raise OutputError(f"{turns} cannot be written ({error.strerror or error}); give another name.") from error
        return [turns, pairs]

    def load(self, name: str) -> None:
        """Go on with a conversation that :meth:`save` wrote; where its pairs do not fit it is read again.

        Raises:
            InputError: there is none of this name, or it is damaged.
        """
        turns = path_of(f"{name}.json")
        try:
            said = json.loads(read_text(turns))
            messages, ids, opened, n = (said[part] for part in ("messages", "ids", "open", "compressed"))
            if (
                not is_wording(messages)
                or isinstance(messages, str)
                or not isinstance(opened, str)
                or type(n) is not int
            ):
                raise ValueError("it holds no turns")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError) as error:
            raise InputError(f"{turns} is no conversation that was saved ({error}); give another name.") from error
        cache = PressedCache.load(path_of(f"{name}.safetensors"), self.model)
        if cache.token_ids is None or cache.token_ids[0].tolist()[: len(ids)] != ids:
            raise CacheError(f"{name}.safetensors holds another conversation than {turns}; save it again.")
        self.messages, self._open, self._ids, self._compressed, self._cache = messages, opened, ids, n, cache

    def _read(self, ids: list[int]) -> torch.Tensor:
        """Logits ``[V]`` after all of ``ids``, of which as many are taken from the cache as it has."""
        n_same = next((i for i, (a, b) in enumerate(zip(self._ids, ids, strict=False)) if a != b), len(self._ids))
        n_same = min(n_same, len(ids) - 1)
        is_due = self.press is not None and n_same - self._compressed > self.recent_tokens
        if n_same < self._compressed or is_due:
            earlier = ids[:n_same] if is_due else ids[: self._compressed]
            self._read_again(earlier[: len(ids) - 1])
        elif n_same < len(self._ids):
            self._cache.crop(n_same)
            del self._ids[n_same:]
        new = ids[len(self._ids) :]
        logits = run(self.model, self._cache, new)[-1]
        self._note(new)
        return logits

    def _note(self, new: list[int]) -> None:
        """Note that the cache has seen these tokens too."""
        self._cache.remember(torch.tensor([new]))
        self._ids += new

    def _read_again(self, ids: list[int]) -> None:
        """Read ``ids`` into an empty cache, and compress them."""
        pin = None
        if self.messages and self.messages[0]["role"] == "system":
            system = prefix_ids(self.tokenizer, self.messages[:1])
            pin = [(0, len(system))] if ids[: len(system)] == system else None
        cache = PressedCache(self.press, chunk_tokens=self.chunk_tokens, kv_bits=self.kv_bits, pin=pin)
        compressed(self.model, self.tokenizer, ids, cache)
        self._cache, self._ids, self._compressed = cache, list(ids), len(ids)

    def _check_room(self, n: int) -> int:
        config = self.model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        if n >= positions:
            raise InputError(
                f"The conversation would have {n} tokens, and the model has {positions} positions; begin anew (/clear)."
            )
        return int(positions) - n
