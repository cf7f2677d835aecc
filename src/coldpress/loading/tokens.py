"""From a text to its tokens, how many bytes of the text each of them stands for, and whether they say it all.

A tokenizer that drops or replaces what it does not know gives a loss all the same, of another text: one that came out
of a GGUF file and was saved again may read every space as ``<|endoftext|>``. So texts are tokenised and put together
again before anything is measured. What cannot be right is an error, what may be meant is a note.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coldpress.errors import DataError
from coldpress.io.progress import note
from coldpress.loading.datasets import Corpus


class Tokens(NamedTuple):
    """One document: its token ids, int64 ``[N]``, and the bytes of text they stand for, int64 ``[N]``, if known."""

    doc_id: str
    ids: Tensor
    n_bytes: Tensor | None


def tokenize(
    corpus: Corpus, tokenizer: Any, limit_tokens: int | None, *, special_tokens: bool = False, at_least: int = 2
) -> list[Tokens]:
    """The documents as tokens until ``--limit_tokens`` is reached; what has fewer than ``at_least`` is left out.

    Args:
        limit_tokens: of all documents together; None takes all.
        special_tokens: whether the tokenizer adds what it adds by itself, such as a token for the beginning of a text.
        at_least: 2, because a token is scored from the one before it; 1 where something else comes before the first.
            DataError where no document has as many.
    """
    left = limit_tokens if limit_tokens is not None else sys.maxsize
    documents = []
    for document in corpus.documents:
        ids, n_bytes = encode(tokenizer, document.text, special_tokens=special_tokens)
        ids, n_bytes = ids[:left], None if n_bytes is None else n_bytes[:left]
        left -= len(ids)
        if len(ids) >= at_least:
            documents.append(Tokens(document.doc_id, ids, n_bytes))
        if left < at_least:
            break
    if not documents:
        raise DataError(
            "The text has fewer than 2 tokens; a token is scored from the one before it. Use a longer text"
            f"{' or a larger --limit_tokens' if limit_tokens is not None else ''}."
        )
    return documents


def encode(tokenizer: Any, text: str, *, special_tokens: bool = False) -> tuple[Tensor, Tensor | None]:
    """Token ids of ``text``, int64 ``[N]``, and how many of its UTF-8 bytes each stands for, int64 ``[N]``.

    Every byte belongs to one token. Where several tokens share a character, the first of them takes it whole and the
    others stand for 0 bytes. What lies between two tokens, such as a blank that the tokenizer drops, belongs to the
    later one, and what lies after the last to the last. Special tokens stand for 0 bytes. The bytes are None if the
    tokenizer is a slow one, or its offsets say nothing.
    """
    options = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    encoded = tokenizer(text, add_special_tokens=special_tokens, verbose=False, **options)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    return ids, _bytes(text, encoded["offset_mapping"]) if options else None


def _bytes(text: str, offsets: Sequence[tuple[int, int]]) -> Tensor | None:
    """Bytes of the tokens that stand at ``offsets``, in characters of ``text``; None if they stand nowhere."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32) if text else torch.zeros(0)
    length = 1 + (points >= 0x80).long() + (points >= 0x800).long() + (points >= 0x10000).long()  # of each character
    before = torch.nn.functional.pad(length.cumsum(0), (1, 0))  # bytes before each character, and all
    ends = torch.tensor([end for _, end in offsets], dtype=torch.long)
    if not len(ends):
        return ends
    reached = before[ends].cummax(0).values
    counts = reached.diff(prepend=torch.zeros(1, dtype=torch.long))
    last = counts.nonzero()
    if not len(last) and text.strip():
        return None
    counts[last[-1] if len(last) else -1] += before[-1] - reached[-1]  # of blanks alone, some say nothing
    return counts


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the token for the beginning of a text before each text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    alone, with_special = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)
    )
    return len(with_special) > len(alone) and with_special[0] == bos


def prefixed(tokens: Tokens, token: int | None) -> Tokens:
    """The same text after a token that stands for no bytes, if there is one."""
    if token is None:
        return tokens

    def before(column: Tensor, value: int) -> Tensor:
        return torch.cat([torch.tensor([value]), column])

    n_bytes = None if tokens.n_bytes is None else before(tokens.n_bytes, 0)
    return Tokens(tokens.doc_id, before(tokens.ids, token), n_bytes)


SAMPLE_CHARS = 10_000  # of each text that is looked at, from its middle
SAMPLE_TEXTS = 8
MOST_UNKNOWN = 0.1, 0.01  # share of all tokens: of what is refused, and of what is said
MOST_CHANGED = 0.1, 0.01  # share of all words, likewise
_WORD = re.compile(
    r"[\u3040-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+"
)  # a character where none is a space


def check_readable(tokenizer: Any, texts: Iterable[str], model: str) -> list[str]:
    """What a user should know of ``texts`` as ``tokenizer`` reads them; nothing where they come back as they are.

    Looks at up to SAMPLE_CHARS of up to SAMPLE_TEXTS texts.

    Raises:
        DataError: more than a tenth of the tokens are the unknown token, or another special one that the text does not
            have, or of the words are lost or added, letters without case and accents counted as the same. A text holds
            NUL characters.
    """
    looked_at = list(texts)[:SAMPLE_TEXTS]
    if any("\0" in text for text in looked_at):
        raise DataError("The text holds NUL characters, as UTF-16 does that is read as UTF-8: save it as UTF-8.")
    samples = [_middle(text) for text in looked_at]
    read = [_ids(tokenizer, sample) for sample in samples]
    notes = []
    for share, what in _strange(tokenizer, samples, read):
        if share > MOST_UNKNOWN[0]:
            raise DataError(f"The tokenizer of {model} {what}{_remedy(tokenizer)}")
        if share > MOST_UNKNOWN[1]:
            notes.append(f"the tokenizer of {model} {what}.")
    back = [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in read]
    changed, example, is_lost = _share_changed(map(_words, samples), map(_words, back))
    if changed > MOST_CHANGED[1]:
        folded, other, is_folded_lost = _share_changed(map(_folded, samples), map(_folded, back))
        if folded > MOST_CHANGED[0]:
            said = f"{folded:.1%} of its words are lost" if is_folded_lost else f"it has {folded:.1%} more words then"
            raise DataError(
                f"The tokenizer of {model} does not give the text back: {said}, {other!r} among them"
                f"{_remedy(tokenizer)}"
            )
        what = "changes case or accents of" if folded <= MOST_CHANGED[1] else "does not give back"
        what = f"{what} {changed:.1%} of the text's words" if is_lost else f"adds {changed:.1%} more words to the text"
        notes.append(f"the tokenizer of {model} {what}, such as {example!r}.")
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


def _strange(tokenizer: Any, samples: Sequence[str], read: Sequence[Sequence[int]]) -> Iterator[tuple[float, str]]:
    """Shares of all tokens, in words: of the unknown token, and of the other special one that is the most frequent.

    What the text itself says does not count, as WikiText says ``<unk>``.
    """
    unknown, found = getattr(tokenizer, "unk_token_id", None), Counter(token for ids in read for token in ids)
    special = [token for token in getattr(tokenizer, "all_special_ids", ()) if token in found]
    names = dict(zip(special, tokenizer.convert_ids_to_tokens(special), strict=True)) if special else {}
    extra = {token: found[token] - sum(text.count(name) for text in samples) for token, name in names.items()}
    if unknown in extra:
        share = extra.pop(unknown) / found.total()
        yield share, f"does not know {share:.1%} of the text's tokens"
    if extra:
        token = max(extra, key=extra.__getitem__)
        share = extra[token] / found.total()
        yield share, f"reads {share:.1%} of the text's tokens as {names[token]!r}"


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text))


def _folded(text: str) -> list[str]:
    """Words without case and accents."""
    bare = unicodedata.normalize("NFKD", text.casefold())
    return _WORD.findall(unicodedata.normalize("NFKC", "".join(c for c in bare if not unicodedata.combining(c))))


def _share_changed(texts: Iterable[list[str]], back: Iterable[list[str]]) -> tuple[float, str, bool]:
    """Words that are lost or that are added, whichever are more: as a share of all, one of them, and whether lost."""
    n_words, lost, added = 0, Counter[str](), Counter[str]()
    for text, found in zip(texts, back, strict=True):
        n_words += len(text)
        lost += Counter(text) - Counter(found)
        added += Counter(found) - Counter(text)
    most = max(lost, added, key=Counter.total)
    example = max(most, key=most.__getitem__, default="")
    return most.total() / max(1, n_words), example, most is lost
