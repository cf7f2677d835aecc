"""From a text to its tokens, and how many bytes of the text each of them stands for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coldpress.errors import DataError
from coldpress.eval.datasets import Corpus

__all__ = ["Tokens", "adds_bos", "encode", "prefixed", "tokenize"]


class Tokens(NamedTuple):
    """One document: its token ids, int64 ``[N]``, and the bytes of text they stand for, int64 ``[N]``, if known."""

    doc_id: str
    ids: Tensor
    n_bytes: Tensor | None


def tokenize(
    corpus: Corpus,
    tokenizer: Any,
    limit_tokens: int | None,
    *,
    special_tokens: bool = False,
    at_least: int = 2,
) -> list[Tokens]:
    """The documents as tokens until ``--limit_tokens`` is reached; what has fewer than ``at_least`` is left out.

    Args:
        corpus, tokenizer: the texts and what cuts them up.
        limit_tokens: of all documents together; None takes all.
        special_tokens: whether the tokenizer adds what it adds by itself, such as a token for the beginning of a text.
        at_least: 2, because a token is scored from the one before it; 1 where something else comes before the first.

    Raises:
        DataError: no document has as many tokens.
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


def prefixed(tokens: Tokens, token: int) -> Tokens:
    """The same text after a token that stands for no bytes."""

    def before(column: Tensor, value: int) -> Tensor:
        return torch.cat([torch.tensor([value]), column])

    n_bytes = None if tokens.n_bytes is None else before(tokens.n_bytes, 0)
    return Tokens(tokens.doc_id, before(tokens.ids, token), n_bytes)
