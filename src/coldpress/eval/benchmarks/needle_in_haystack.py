"""Needle in a haystack: a sentence put into essays at a depth, and a question that it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coldpress.errors import InputError
from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, register
from coldpress.eval.benchmarks.texts import rouge

__all__ = ["hide", "score"]

ROOM = 150  # tokens left free for what stands around the text, as kvpress leaves them
AROUND = "This is a very long story book: <book> {} </book>."


def score(answer: str, row: Row) -> Scores:
    """ROUGE of the needle as hypothesis and the answer as reference, in this order, as kvpress gives them.

    So ``p`` is what LooGLE calls recall. An empty answer has 0.
    """
    found = rouge(row["needle"].strip(), answer.strip()) or {}
    names = [("rouge-l", "f"), ("rouge-1", "f"), ("rouge-2", "f")]
    names += [(name, end) for name, _ in names for end in "rp"]
    return {f"{name}-{end}": Share(found.get(name, {}).get(end, 0.0)) for name, end in names}


def hide(rows: Sequence[Row], tokenizer: Any, max_context_length: int, depths: Sequence[int]) -> list[Row]:
    """The first row's text with its needle at each depth, in so many tokens.

    Args:
        rows: of the data set; the first one has the text, the needle and the question.
        tokenizer: of the model.
        max_context_length: tokens of the context at most; 150 and those of the needle are left free.
        depths: per cent of the text that stand before the needle.

    Raises:
        InputError: there is no room for a text.
    """
    row = rows[0]

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    needle = encode(row["needle"])
    room = max_context_length - len(needle) - ROOM
    if room < 1:
        raise InputError(
            f"--max_context_length {max_context_length} leaves no room for a text beside the needle; give at least "
            f"{len(needle) + ROOM + 1}."
        )
    text = encode(row["context"])[:room]
    found: list[Row] = []
    for depth in depths:
        at = len(text) * depth // 100
        whole = tokenizer.decode([*text[:at], *needle, *text[at:]], skip_special_tokens=True)
        found.append({**row, "context": AROUND.format(whole), "needle_depth": depth})
    return found


register(
    Benchmark(
        "needle_in_haystack",
        "alessiodevoto/paul_graham_essays",
        score,
        columns=("needle",),
        groups=lambda row: ("needle",),
        is_haystack=True,
        packages=lambda row: ("rouge",),
    )
)
