"""A tokenizer for the tiny models, and what presses that replay a text say with it."""

from __future__ import annotations


class Words:
    """A tokenizer for the tiny models: every word is a token, and so is a line break."""

    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [sum(map(ord, word)) % 90 + 3 for word in text.replace("\n", " \n ").split(" ") if word]


FIRST = Words().encode("\n\nRepeat the previous context exactly.", add_special_tokens=False)
LATER = Words().encode("\n\nRepeat the part of the previous context exactly, starting with", add_special_tokens=False)
BREAK = Words().encode("\n", add_special_tokens=False)
