"""What the examples of one model are made of: its tokenizer, a text to hide things in, a chat template or none."""

from __future__ import annotations

import random
import re
from collections.abc import Container, Iterator
from functools import cached_property
from typing import Any

from coldpress.errors import DataError, InputError
from coldpress.eval.tasks.words import SENTENCES
from coldpress.models.chat import user_turn

__all__ = ["Ids", "Material"]

Ids = tuple[int, ...]
_AFTER = "."  # a text is tokenised as what follows this, since it never stands alone
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
LONGEST = 400  # characters of a piece of a text: one that has no sentences is cut here and there all the same


class Material:
    """Texts and tokens for one model.

    Args:
        tokenizer: of the model.
        text: whose sentences are the haystack, in their order; None for sentences of our own, shuffled.
        is_chat: put prompts into the tokenizer's chat template.
        system: a system prompt that every context begins with; None for none.

    Raises:
        InputError: there is no chat template, or it does not hold the user's text once, as it is.
        DataError: the text has fewer than two sentences.
    """

    def __init__(self, tokenizer: Any, text: str | None = None, is_chat: bool = False, system: str | None = None):
        self.tokenizer, self.system = tokenizer, system
        self.sentences = list(SENTENCES) if text is None else _sentences(text)
        self.is_text = text is not None
        self.chat = _chat(tokenizer, system) if is_chat else None
        self._known: dict[str, Ids] = {}

    def ids(self, part: str | Ids) -> Ids:
        """Token ids of a text that stands after another one."""
        if not isinstance(part, str):
            return part
        if part not in self._known:
            self._known[part] = self._ids_after(part)
        return self._known[part]

    def begin(self, text: str) -> Ids:
        """Token ids of a text that the context begins with, after what the tokenizer puts before every text."""
        plain = self._encode("a")
        usual = tuple(self.tokenizer("a", verbose=False)["input_ids"])
        bos: Ids = usual[: -len(plain)] if usual[-len(plain) :] == plain else ()
        encoded = self._encode(text) if text else ()
        return encoded if encoded[: len(bos)] == bos else bos + encoded  # a chat template may have put it there

    def opening(self, text: str, in_chat: bool) -> tuple[Ids, int]:
        """Token ids of what a context begins with, up to ``text``, and how many of them the system prompt takes."""
        before = self.chat[0] if in_chat and self.chat is not None else ""
        if self.system is None:
            return self.begin(before + text), 0
        pinned = self.begin(before or f"{self.system}\n\n")
        return pinned + self.ids(text), len(pinned)

    def pieces(self, rng: random.Random, without: Container[str] = ()) -> Iterator[str]:
        """Sentences without end: of a text from anywhere on, of our own in one random order after the other.

        Args:
            rng: decides where, and in which order.
            without: pieces to leave out.

        Raises:
            DataError: none is left.
        """
        n = len(self.sentences)
        if all(f" {sentence}" in without for sentence in self.sentences):
            raise DataError("The text is too short to hide a passage of its own in it; take a longer one.")
        while True:
            start = rng.randrange(n)
            order = [(start + i) % n for i in range(n)] if self.is_text else rng.sample(range(n), n)
            pieces = (f" {self.sentences[i]}" for i in order)
            yield from (piece for piece in pieces if piece not in without)

    @cached_property
    def plain_ids(self) -> Ids:
        """Ids of tokens that stand for text, none of them special, and none of them the end of anything."""
        special = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        return tuple(i for i in range(len(self.tokenizer)) if i not in special)

    def _ids_after(self, text: str) -> Ids:
        before, both = self._encode(_AFTER), self._encode(_AFTER + text)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self._encode(text)

    def _encode(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _sentences(text: str) -> list[str]:
    found = []
    for sentence in _SENTENCE.split(text):
        words = " ".join(sentence.split())
        found += [words[i : i + LONGEST].strip() for i in range(0, len(words), LONGEST)]
    found = [sentence for sentence in found if sentence]
    if len(found) < 2:
        raise DataError(
            "The text has fewer than two sentences, so nothing can be hidden among them; take a longer one."
        )
    return found


def _chat(tokenizer: Any, system: str | None) -> tuple[str, str]:
    """What a chat template puts before and after the user's text."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("The tokenizer has no chat template; leave --template chat out.")
    return user_turn(tokenizer, "", system)
