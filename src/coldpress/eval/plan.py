"""From a text and a model's positions to the tokens that will be fed in, scored and timed."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coldpress.errors import DataError, InputError
from coldpress.eval.datasets import Corpus
from coldpress.eval.settings import Settings
from coldpress.eval.windows import PrefixPlan, plan_prefix, plan_strided

__all__ = ["UNKNOWN_POSITIONS", "Plan", "make_plan", "tokenize"]

UNKNOWN_POSITIONS = 2048  # assumed where a model's configuration does not say

_Documents = list[tuple[str, Tensor]]  # id and token ids, int64 [N]


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do.

    Attributes:
        protocol: the name of the way perplexity is measured, its sizes included; ``speed`` when it is not; ends in
            ``-chunkN`` where prompts come in pieces.
        doc_ids: the documents that are scored, or timed when nothing is scored.
        documents: their token ids, int64 ``[N]`` each.
        total_tokens: of the whole text, after ``--limit_tokens``.
        tokens_sha256: of its token ids, as little-endian 64-bit integers.
        max_length, stride: of the strided windows; None without them.
        windows: of the prefix protocol, for each document; None without it.
        context_ids: what is prefilled when speed is measured, int64 ``[1, C]``; None when it is not.
        notes: what the user should know about the meaning of the numbers.
        stream_limit: of a stream, how much of each document is read at original positions; None for all.
    """

    protocol: str
    doc_ids: tuple[str, ...]
    documents: tuple[Tensor, ...]
    total_tokens: int
    tokens_sha256: str
    max_length: int | None
    stride: int | None
    windows: tuple[PrefixPlan, ...] | None
    context_ids: Tensor | None
    notes: tuple[str, ...]
    stream_limit: int | None = None


def make_plan(settings: Settings, corpus: Corpus, tokenizer: Any, max_positions: int | None) -> Plan:
    """Decide everything that can be decided before the model runs.

    Raises:
        DataError: the text has too few tokens.
        InputError: sizes that cannot work.
    """
    s = settings
    limit = _Limit(s, max_positions)
    documents = scored = tokenize(corpus, tokenizer, s.limit_tokens)
    max_length = stride = windows = context_ids = None
    protocol = "speed"
    stream_limit = None
    if s.ppl_mode == "streaming":
        protocol = f"stream-K{s.stream_chunk}"
        stream_limit = _stream_limit(s, max(len(ids) for _, ids in documents), limit)
    elif s.ppl_apply_press:
        scored, windows = _prefix_windows(s, documents, limit)
        first = windows[0]
        protocol = f"prefix-C{first.context}-T{first.target}-S{first.stride}"
    elif not s.speed_only:
        max_length = limit.within(s.max_length or limit.positions, "--max_length")
        stride = s.stride or min(512, max_length)
        protocol = f"strided-L{max_length}-S{stride}"
        for _, ids in documents:
            plan_strided(len(ids), max_length, stride)  # raises what the run would raise
    if s.chunk_tokens is not None:
        protocol += f"-chunk{s.chunk_tokens}"
    if not s.ppl_only:
        context_ids = _timed_context(s, documents, limit)
    return Plan(
        protocol=protocol,
        doc_ids=tuple(doc_id for doc_id, _ in scored),
        documents=tuple(ids for _, ids in scored),
        total_tokens=sum(len(ids) for _, ids in documents),
        tokens_sha256=hashlib.sha256(b"".join(ids.numpy().astype("<i8").tobytes() for _, ids in documents)).hexdigest(),
        max_length=max_length,
        stride=stride,
        windows=windows,
        context_ids=context_ids,
        notes=tuple(limit.notes),
        stream_limit=stream_limit,
    )


class _Limit:
    """The positions a model was trained on; none past them is used silently."""

    def __init__(self, settings: Settings, max_positions: int | None):
        self.model, self.may_pass = settings.model, settings.allow_extrapolation
        self.positions = max_positions or UNKNOWN_POSITIONS
        self.notes: list[str] = []
        if max_positions is None:
            self.notes.append(f"{self.model} does not say how many positions it has; {self.positions} are assumed.")

    def within(self, wanted: int, what: str) -> int:
        """``wanted`` tokens or, if that is more than the positions, what may be used of it; said in a note."""
        if wanted <= self.positions:
            return wanted
        past = f"{what} {wanted} is past the {self.positions} positions {self.model} was trained on"
        if self.may_pass:
            self.notes.append(f"{past}; they are used because of --allow_extrapolation.")
            return wanted
        self.notes.append(f"{past}; cut to {self.positions} (--allow_extrapolation uses all).")
        return self.positions


def tokenize(corpus: Corpus, tokenizer: Any, limit_tokens: int | None) -> _Documents:
    """Token ids of each document, without special tokens, until ``--limit_tokens`` is reached.

    Raises:
        DataError: no document has two tokens.
    """
    left = limit_tokens if limit_tokens is not None else sys.maxsize
    documents = []
    for document in corpus.documents:
        encoded = tokenizer(document.text, add_special_tokens=False, verbose=False)
        ids = torch.tensor(encoded["input_ids"][:left], dtype=torch.long)
        left -= len(ids)
        if len(ids) >= 2:  # a token is scored from the one before it
            documents.append((document.doc_id, ids))
        if left < 2:
            break
    if not documents:
        raise DataError(
            "The text has fewer than 2 tokens; a token is scored from the one before it. Use a longer text"
            f"{' or a larger --limit_tokens' if limit_tokens is not None else ''}."
        )
    return documents


def _prefix_windows(s: Settings, documents: _Documents, limit: _Limit) -> tuple[_Documents, tuple[PrefixPlan, ...]]:
    """The documents that are long enough, and their windows of a context and the targets after it."""
    base = limit.within(s.max_length, "--max_length") if s.max_length else limit.positions
    longest = max(len(ids) for _, ids in documents)
    if longest < base and s.context_tokens is None and s.target_tokens is None:
        if longest < 4:
            raise DataError(f"The text has {longest} tokens; at least 4 are needed for a context and two targets.")
        limit.notes.append(f"no document has {base} tokens; the one window is {longest} tokens long.")
        base = longest
    quarter = max(2, base // 4)
    target = s.target_tokens or quarter
    context = s.context_tokens or max(1, base - quarter)
    width = limit.within(context + target, "a context with its targets of")
    if width - target < 1:
        raise InputError(f"--target_tokens {target} leaves no room for a context in {width} positions.")
    context = width - target
    fitting = [(doc_id, ids) for doc_id, ids in documents if len(ids) >= width]
    if fitting and len(fitting) < len(documents):
        limit.notes.append(f"{len(documents) - len(fitting)} document(s) shorter than {width} tokens are left out.")
    chosen = fitting or documents[:1]  # that is too short, which plan_prefix says
    return chosen, tuple(plan_prefix(len(ids), context, target, s.stride) for _, ids in chosen)


def _stream_limit(s: Settings, longest: int, limit: _Limit) -> int | None:
    """How much of each document is read at original positions: no more than the model was trained on, unless asked."""
    assert s.stream_chunk is not None
    reach = max([*s.budget_tokens, s.stream_chunk]) + s.stream_chunk
    if s.positions == "rerotate" and reach > limit.positions and not s.allow_extrapolation:
        raise InputError(
            f"What is held and a chunk are {reach} tokens together, and {s.model} was trained on {limit.positions} "
            "positions; give less --budget_tokens or --stream_chunk, or --allow_extrapolation."
        )
    if longest <= limit.positions:
        return None
    past = f"a text of {longest} tokens is longer than the {limit.positions} positions {s.model} was trained on"
    if s.allow_extrapolation:
        limit.notes.append(f"{past}; at original positions all of it is read because of --allow_extrapolation.")
        return None
    limit.notes.append(
        f"{past}; at original positions (no_press, --positions original) no more than these are read "
        "(--allow_extrapolation reads all)."
    )
    return limit.positions


def _timed_context(s: Settings, documents: _Documents, limit: _Limit) -> Tensor:
    """The first tokens of the first document that has ``--context_limit`` of them, or else of the longest one."""
    long_enough = (ids for _, ids in documents if len(ids) >= s.context_limit)
    ids = next(long_enough, None)
    if ids is None:
        ids = max((ids for _, ids in documents), key=len)
    wanted = min(s.context_limit, len(ids))
    context = limit.within(wanted + s.max_new_tokens, "a timed context with --max_new_tokens of") - s.max_new_tokens
    if context < 1:
        raise InputError(
            f"--max_new_tokens {s.max_new_tokens} leaves no room for a context in {limit.positions} positions."
        )
    if context == len(ids) < s.context_limit:
        limit.notes.append(
            f"the timed context has {context} tokens, not --context_limit {s.context_limit}: no text is longer."
        )
    return ids[None, :context]
