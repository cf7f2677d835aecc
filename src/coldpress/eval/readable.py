"""Whether a tokenizer can read a text: what comes back of it, and how much of it is tokens for what is not known.

A tokenizer that drops or replaces what it does not know gives a loss all the same, of another text: one that came out
of a GGUF file and was saved again may read every space as ``<|endoftext|>``. So texts are tokenised and put together
again before anything is measured. What cannot be right is an error, what may be meant is a note.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from coldpress.errors import DataError
from coldpress.eval.progress import note

__all__ = ["check_readable", "note_unreadable"]

SAMPLE_CHARS = 10_000  # of each text that is looked at, from its middle
SAMPLE_TEXTS = 8
MOST_UNKNOWN = 0.1, 0.01  # share of all tokens: of what is refused, and of what is said
MOST_LOST = 0.1, 0.01  # share of all words, likewise
_WORD = re.compile(
    r"[\u3040-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+"
)  # a character where none is a space


def check_readable(tokenizer: Any, texts: Iterable[str], model: str) -> list[str]:
    """What a user should know of ``texts`` as ``tokenizer`` reads them; nothing where they come back as they are.

    Looks at up to SAMPLE_CHARS of up to SAMPLE_TEXTS texts.

    Args:
        model: whose tokenizer it is, for the sentences.

    Raises:
        DataError: more than a tenth of the tokens are the unknown token, or of the words do not come back, letters
            without case and accents counted as the same.
    """
    samples = [_middle(text) for text in list(texts)[:SAMPLE_TEXTS]]
    read = [_ids(tokenizer, sample) for sample in samples]
    notes = []
    unknown = _share_unknown(tokenizer, samples, read)
    if unknown > MOST_UNKNOWN[1]:
        said = f"the tokenizer of {model} does not know {unknown:.1%} of the text's tokens"
        if unknown > MOST_UNKNOWN[0]:
            raise DataError(f"{said[0].upper()}{said[1:]}{_remedy(tokenizer)}")
        notes.append(f"{said}.")
    back = [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in read]
    lost, example = _share_lost(map(_words, samples), map(_words, back))
    if lost > MOST_LOST[1]:
        folded, other = _share_lost(map(_folded, samples), map(_folded, back))
        if folded > MOST_LOST[0]:
            raise DataError(
                f"The tokenizer of {model} does not give the text back: {folded:.1%} of its words are lost, {other!r} "
                f"among them{_remedy(tokenizer)}"
            )
        what = "changes case or accents of" if folded <= MOST_LOST[1] else "does not give back"
        notes.append(f"the tokenizer of {model} {what} {lost:.1%} of the text's words, such as {example!r}.")
    return notes


def note_unreadable(tokenizer: Any, texts: Iterable[str], model: str) -> None:
    """Say what :func:`check_readable` finds, a line each. Raises as that does."""
    for line in check_readable(tokenizer, texts, model):
        note(line)


def _remedy(tokenizer: Any) -> str:
    """How a sentence about a text that cannot be read ends."""
    files = "; take the tokenizer's files from where the model was published, or a text that the model was made for."
    unknown = getattr(tokenizer, "unk_token", None)
    return f" (its unknown token is {unknown!r}){files}" if unknown else files


def _middle(text: str) -> str:
    start = max(0, (len(text) - SAMPLE_CHARS) // 2)
    return text[start : start + SAMPLE_CHARS]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _share_unknown(tokenizer: Any, samples: Sequence[str], read: Sequence[Sequence[int]]) -> float:
    """The unknown token among all tokens, but for where the text itself says so, as WikiText's ``<unk>`` does."""
    unknown, n_tokens = getattr(tokenizer, "unk_token_id", None), sum(map(len, read))
    if unknown is None or not n_tokens:
        return 0.0
    found = sum(list(ids).count(unknown) for ids in read)
    written = sum(sample.count(tokenizer.unk_token) for sample in samples)
    return max(0, found - written) / n_tokens


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text))


def _folded(text: str) -> list[str]:
    """Words without case and accents."""
    bare = unicodedata.normalize("NFKD", text.casefold())
    return _WORD.findall(unicodedata.normalize("NFKC", "".join(c for c in bare if not unicodedata.combining(c))))


def _share_lost(texts: Iterable[list[str]], back: Iterable[list[str]]) -> tuple[float, str]:
    """Words that are in the texts more often than in what came back, as a share of all; and one of them."""
    n_words, lost = 0, Counter[str]()
    for text, found in zip(texts, back, strict=True):
        n_words += len(text)
        lost += Counter(text) - Counter(found)
    return (sum(lost.values()) / n_words, max(lost, key=lost.__getitem__)) if lost else (0.0, "")
