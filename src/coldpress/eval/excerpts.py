"""Excerpts of a text, spread over all of it: as much as a measurement of a few minutes can read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coldpress.errors import DataError
from coldpress.eval.datasets import SHORT_NAMES, Corpus, Document
from coldpress.io.files import path_of

__all__ = ["FEWEST", "excerpts", "source_of"]

SAMPLE_CHARS = 20_000  # that tell how many of them a token takes
SPARE = 1.3  # times the characters that so many tokens take on average: tokens differ from place to place
FEWEST = 8  # excerpts, where shorter ones make as many
SHORTEST = 96  # tokens of an excerpt


def source_of(data: str) -> dict[str, Any]:
    """What ``--data`` names, as other commands are given it: a text file, or a dataset."""
    is_text = data not in SHORT_NAMES and path_of(data).is_file() and not data.endswith((".parquet", ".jsonl"))
    return {"text_file": data} if is_text else {"dataset": data}


def excerpts(corpus: Corpus, tokenizer: Any, n_tokens: int, most: int, seed: int) -> tuple[Corpus, int]:
    """Up to ``most`` excerpts of ``n_tokens`` tokens or some more, which do not overlap, in random order.

    Args:
        corpus: the texts.
        tokenizer: of the model.
        n_tokens: wanted of each; a text too short for FEWEST of them gets shorter ones.
        most: excerpts.
        seed: of which they are, and of their order.

    Returns:
        The excerpts, each a document, and how many tokens each has at least.

    Raises:
        DataError: the text has less than two excerpts of the shortest length.
    """
    per_token = _chars_per_token([document.text for document in corpus.documents], tokenizer)
    while True:
        span = int(per_token * n_tokens * SPARE) + 1
        places = [(d, i) for d in corpus.documents for i in range(0, len(d.text) - span + 1, span)]
        if len(places) >= FEWEST or n_tokens <= SHORTEST:
            break
        n_tokens = max(SHORTEST, n_tokens * 3 // 4)
    if len(places) < 2:
        n_chars = max(len(document.text) for document in corpus.documents)
        raise DataError(
            f"The text has {n_chars:,} characters; at least {2 * span:,} are needed for two excerpts: take more."
        )
    chosen = random.Random(seed).sample(places, min(most, len(places)))
    documents = tuple(Document(f"{d.doc_id} at {i}", d.text[i : i + span]) for d, i in chosen)
    return replace(corpus, documents=documents, rows=None, join=None), n_tokens


def _chars_per_token(texts: Sequence[str], tokenizer: Any) -> float:
    """Of the longest text, from its middle."""
    text = max(texts, key=len)
    start = max(0, (len(text) - SAMPLE_CHARS) // 2)
    sample = text[start : start + SAMPLE_CHARS]
    return len(sample) / max(1, len(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]))
