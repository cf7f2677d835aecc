"""What the examples of one model are made of: its tokenizer, a text to hide things in, a chat template or none."""

from __future__ import annotations

import random
import re
from collections.abc import Container, Iterator
from functools import cached_property
from typing import Any

from coldpress.errors import DataError, InputError
from coldpress.models.chat import user_turn

# No two of them are the same idea, none holds a number or a word of ADJECTIVES or NOUNS, and any order will do.
SENTENCES = (
    "The ferry left the quay before the fog had gone.",
    "Nobody in the village remembered who had planted the row of limes.",
    "She folded the letter twice and put it under the clock.",
    "Rain had softened the path that leads down to the mill.",
    "In the evening the children counted the boats as they came home.",
    "The baker opened late, because his daughter was getting married.",
    "From the hill one could see both rivers and the road between them.",
    "He said little, and what he said he had thought about.",
    "The old school now belongs to a man who repairs pianos.",
    "When the bells were taken away, people learnt to look at the sun.",
    "There was always somebody at the window of the corner house.",
    "The harvest was poor that year, and the winter was long.",
    "A train went by, and for a moment all of them stopped talking.",
    "They had painted the door green, then blue, then green again.",
    "The doctor came on foot, since the horse was lame.",
    "Some of the books had been read so often that they fell apart.",
    "On market days the square smelt of apples and wet wool.",
    "Her brother wrote seldom, but he never forgot a birthday.",
    "The path to the lake was shorter than it looked on the map.",
    "After supper they moved the chairs outside and waited for the stars.",
    "The judge listened with closed eyes, as he did every Tuesday.",
    "It was too warm for a coat and too cold to go without one.",
    "The bridge shook a little whenever a cart went over it.",
    "No one could say why the fountain had stopped.",
    "The teacher kept a jar of pebbles on the desk.",
    "Snow lay on the roofs long after it had melted in the fields.",
    "The tailor measured everything by eye and was hardly ever wrong.",
    "In spring the river carried branches from places they had never seen.",
    "A dog slept in the middle of the street, and the carts went round it.",
    "They sang the same songs as their grandparents, only faster.",
    "The inn had many rooms, but the guests all wanted the same one.",
    "Towards noon the wind turned, and the smoke went out to sea.",
)

ADJECTIVES = (
    *("amber", "brisk", "clever", "dusty", "eager", "fancy", "gentle", "hollow", "icy", "jolly", "keen", "lively"),
    *("mellow", "noble", "odd", "polite", "quiet", "rapid", "silent", "tender", "urgent", "vivid", "witty", "young"),
    *("bitter", "calm", "dizzy", "famous", "golden", "humble", "proud", "rough", "shiny", "tiny", "velvet", "wild"),
)

NOUNS = (
    *("anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "hammer", "island", "jacket", "kettle"),
    *("lantern", "mirror", "needle", "orange", "pencil", "quilt", "rabbit", "saddle", "turtle", "umbrella", "violin"),
    *("walnut", "zebra", "arrow", "button", "camel", "desert", "eagle", "feather", "giant", "helmet", "insect"),
    *("jungle", "kitten", "ladder", "magnet", "napkin", "ocean", "parrot", "queen", "ribbon", "spider", "temple"),
    *("uncle", "valley", "whistle", "yogurt", "acorn", "barrel", "castle", "dolphin", "elbow", "forest", "guitar"),
    *("hotel", "iron", "jewel", "knife", "lemon", "monkey", "nest", "onion", "pillow", "rocket", "sugar", "tunnel"),
    *("vase", "wagon", "bread", "cloud", "drum", "flag", "glove", "honey", "ink", "lamp", "moon", "pepper", "ring"),
)


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

        Those in ``without`` are left out; DataError where none is left.
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
