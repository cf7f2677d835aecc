"""From rows to token ids: each context once, with all questions that are asked about it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coldpress.errors import InputError
from coldpress.eval.benchmarks.benchmark import Row
from coldpress.eval.benchmarks.rows import LIMIT
from coldpress.models.chat import prompt_parts

__all__ = ["AskedContext", "Question", "make_contexts"]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes:
        ids: of the question, what the chat template puts after it, and the beginning of the answer.
        limit: tokens of the answer at most.
        row: its other columns, by which it is scored.
    """

    ids: Ids
    limit: int
    row: Row


@dataclass(frozen=True)
class AskedContext:
    """One context, which is compressed once, and the questions about it.

    Attributes:
        context_ids: read and compressed.
        questions: each asked of what is left of the context, and of no other question.
        n_whole: tokens before the context was cut to its length.
        n_pinned: tokens at the beginning that nothing may evict.
    """

    context_ids: Ids
    questions: tuple[Question, ...]
    n_whole: int
    n_pinned: int

    @property
    def length(self) -> int:
        return len(self.context_ids)

    @property
    def fingerprint(self) -> str:
        """The same for contexts of the same tokens and questions: 16 hex digits."""
        parts = (self.context_ids, self.n_pinned, [(question.ids, question.limit) for question in self.questions])
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def make_contexts(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_positions: int,
    max_context_length: int | None = None,
    max_new_tokens: int | None = None,
    is_query_aware: bool = False,
    system: str | None = None,
) -> list[AskedContext]:
    """The contexts in the order of their first questions.

    Prompts are those of the pipeline "kv-press-text-generation": with a chat template a context is the user's turn up
    to the question, without one it stands as it is after the beginning-of-text token, and a line ends after a question.

    Args:
        rows: with the columns context, question, answer_prefix and max_new_tokens.
        tokenizer: of the model.
        max_positions: of the model; a context is cut where it would leave no room for its longest question and answer.
        max_context_length: tokens after which a context is cut; None for as many as there is room for.
        max_new_tokens: of an answer at most, instead of what the row says.
        is_query_aware: put each question into its context, where a press sees it.
        system: a system prompt that every context begins with, and that nothing may evict; None for none.

    Raises:
        InputError: there is no room for a context, or none for what is asked after it.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["context"] + (row["question"] if is_query_aware else ""), []).append(row)

    def encode(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    contexts = []
    for text, own in groups.items():
        pinned, before, after = prompt_parts(tokenizer, text, system)
        head, ids, questions = encode(pinned), encode(pinned) + encode(before), []
        for row in own:
            asked = ("" if is_query_aware else row["question"]) + after + row["answer_prefix"]
            rest = {name: value for name, value in row.items() if name != "context"}
            questions.append(Question(encode(asked), max_new_tokens or row[LIMIT], rest))
        end = encode(own[0]["question"]) if is_query_aware else ()  # a press shall see it where a context is cut
        needed = max(len(question.ids) + question.limit for question in questions)
        room = max_positions - needed
        length = min(len(ids), room if max_context_length is None else max_context_length)
        if length > room or length <= min(len(head) + len(end), len(ids) - 1):
            raise InputError(
                f"A context of {len(ids):,} tokens, a question and an answer of up to {needed:,} need more than the "
                f"{max_positions if max_context_length is None else min(max_positions, max_context_length):,} tokens "
                "that there are: give other --max_context_length or less --max_new_tokens, or --allow_extrapolation."
            )
        cut = ids if length == len(ids) else ids[: length - len(end)] + end
        contexts.append(AskedContext(cut, tuple(questions), len(ids), len(head)))
    return contexts
