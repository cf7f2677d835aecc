"""Text of tokens that come one by one: no half characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["GrowingText", "parts_of"]

_HALF = "�"  # what a tokenizer makes of the first bytes of a character


class GrowingText:
    """The text of an answer, given out as soon as nothing that follows can change it.

    Args:
        tokenizer: that the tokens are of.
        stop: texts that end the answer and are no part of it.
        skips_special: leave special tokens out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), skips_special: bool = True):
        self.tokenizer, self.stop, self.skips_special = tokenizer, [text for text in stop if text], skips_special
        self.is_stopped = False
        self._ids: list[int] = []
        self._from = self._to = 0  # tokens that the next ones are decoded with, as spaces depend on what stands before
        self._held = ""  # may become a stop text

    def add(self, token: int) -> str:
        """The text that is certain after one more token; none after a stop text."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        piece = self._decoded(is_last=False)
        return self._passed(piece, is_last=False)

    def finish(self) -> str:
        """The rest of the text."""
        return "" if self.is_stopped else self._passed(self._decoded(is_last=True), is_last=True)

    def _decoded(self, is_last: bool) -> str:
        before, now = self._text(self._ids[self._from : self._to]), self._text(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(_HALF) and not is_last):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return now[len(before) :]

    def _text(self, ids: list[int]) -> str:
        options = {"skip_special_tokens": self.skips_special, "clean_up_tokenization_spaces": False}
        text: str = self.tokenizer.decode(ids, **options)
        return text

    def _passed(self, piece: str, is_last: bool) -> str:
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return text[: min(places)]
        n_held = 0 if is_last else max((_n_begun(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def parts_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of tokens, and where the part of each one ends; tokens of one character share its end."""
    growing, text, ends, n_open = GrowingText(tokenizer, skips_special=False), "", list[int](), 0
    for token in ids:
        piece = growing.add(token)
        text += piece
        n_open += 1
        if piece:
            ends += [len(text)] * n_open
            n_open = 0
    text += growing.finish()
    return text, ends + [len(text)] * n_open


def _n_begun(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` are the beginning of ``stop``."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
