"""From a text and a model's positions to the tokens that will be fed in, scored and timed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from coldpress.errors import DataError, InputError
from coldpress.eval.settings import Settings
from coldpress.eval.windows import PRESETS, PrefixPlan, Preset, plan_prefix, plan_strided
from coldpress.loading.datasets import Corpus
from coldpress.loading.tokens import Tokens, adds_bos, check_readable, prefixed, tokenize

UNKNOWN_POSITIONS = 2048  # assumed where a model's configuration does not say
STRIDE = 512  # where nothing else is asked for


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do."""

    # The name of the way perplexity is measured, its sizes included; ``speed`` when it is not; ends in ``-bos`` where
    # windows or texts begin with the BOS token, then ``-chunkN`` where prompts come in pieces
    protocol: str
    doc_ids: tuple[str, ...]  # of the documents that are scored, or timed when nothing is scored
    documents: tuple[Tensor, ...]  # their token ids, int64 ``[N]`` each
    total_tokens: int  # of the whole text, after ``--limit_tokens``
    tokens_sha256: str  # of its token ids, as little-endian 64-bit integers
    max_length: int | None  # of the strided windows, as is the stride; None without them
    stride: int | None
    windows: tuple[PrefixPlan, ...] | None  # of the prefix protocol, for each document; None without it
    context_ids: Tensor | None  # what is prefilled when speed is measured, int64 ``[1, C]``; None when it is not
    notes: tuple[str, ...]  # what the user should know about the meaning of the numbers
    stream_limit: int | None = None  # how much of each document is read at original positions; None for all
    # UTF-8 bytes that each token stands for, int64 ``[N]`` each; None where the tokenizer does not say
    token_bytes: tuple[Tensor | None, ...] = ()
    preset: str | None = None  # the name of the preset (:class:`coldpress.eval.windows.Preset`) that cuts the documents
    add_bos: bool = False  # whether the tokenizer's BOS token begins them, or each of the windows
    units: tuple[tuple[int, int], ...] | None = None  # words and bytes of each, as lm-eval counts them; None elsewhere


def make_plan(settings: Settings, corpus: Corpus, tokenizer: Any, max_positions: int | None) -> Plan:
    """Decide everything that can be decided before the model runs; InputError where text or sizes cannot work.

    The text for a preset is as :func:`coldpress.eval.windows.laid_out` has it.
    """
    s = settings
    limit = _Limit(s, max_positions)
    limit.notes += check_readable(tokenizer, (document.text for document in corpus.documents), s.model)
    if s.ppl_preset is not None:
        return _plan_preset(s, s.ppl_preset, corpus, tokenizer, limit)
    documents = scored = tokenize(corpus, tokenizer, s.limit_tokens)
    bos = _bos(s, tokenizer, limit)
    max_length = stride = windows = context_ids = None
    protocol = "speed"
    stream_limit = None
    if s.ppl_mode == "streaming":
        protocol = f"stream-K{s.stream_chunk}"
        documents = documents[: s.max_documents]
        scored = [prefixed(tokens, bos) for tokens in documents]
        stream_limit = _stream_limit(s, max(len(tokens.ids) for tokens in scored), limit)
    elif s.ppl_apply_press:
        scored, windows = _prefix_windows(s, documents, limit, bos)
        first = windows[0]
        protocol = f"prefix-C{first.context}-T{first.target}-S{first.stride}"
    elif not s.speed_only:
        max_length = limit.within(s.max_length or limit.positions, "--max_length")
        stride = s.stride or min(STRIDE, max_length)
        protocol = f"strided-L{max_length}-S{stride}"
        scored = [prefixed(tokens, bos) for tokens in documents]
        for tokens in scored:
            plan_strided(len(tokens.ids), max_length, stride)  # raises what the run would raise
    protocol += "-bos" if bos is not None else ""
    if s.chunk_tokens is not None:
        protocol += f"-chunk{s.chunk_tokens}"
        if windows is not None and s.chunk_tokens >= windows[0].context:
            limit.notes.append(
                f"--chunk_tokens {s.chunk_tokens} is no less than the context of {windows[0].context}: it is read in "
                "one piece."
            )
    if not s.ppl_only:
        context_ids = _timed_context(s, documents, limit)
    if not s.speed_only:
        _note_bytes(scored, limit)
    return Plan(
        protocol=protocol,
        **_about(scored, documents),
        total_tokens=sum(len(tokens.ids) for tokens in documents),
        max_length=max_length,
        stride=stride,
        windows=windows,
        context_ids=context_ids,
        notes=tuple(limit.notes),
        stream_limit=stream_limit,
        add_bos=bos is not None,
    )


def _bos(s: Settings, tokenizer: Any, limit: _Limit) -> int | None:
    """The token that windows and texts begin with: if nothing else is asked for, the one the tokenizer begins with."""
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    if s.speed_only or s.add_bos is False:
        return None
    if s.add_bos is None:
        if not adds_bos(tokenizer):
            return None
        limit.notes.append(
            "the tokenizer begins texts with its BOS token, and so does each window or text that is scored "
            "(--add_bos no leaves it out)."
        )
    elif bos is None:
        raise InputError(f"--add_bos needs a BOS token, and the tokenizer of {s.model} has none; leave --add_bos out.")
    return bos


def _plan_preset(s: Settings, name: str, corpus: Corpus, tokenizer: Any, limit: _Limit) -> Plan:
    """The plan of ``--ppl_preset``, here ``name``."""
    preset = PRESETS[name]
    length = _length(s, preset, limit)
    if corpus.rows is None:
        limit.notes.append(
            f"the text did not come as rows of WikiText; {name} takes it as it is, each document by itself"
            f"{', and does not detokenise it' if name == 'lm-eval' else ''}."
        )
    units, add_bos = None, adds_bos(tokenizer)
    if name == "lm-eval":
        documents, units = _after_a_prefix(s, corpus, tokenizer)
    elif name == "llamacpp":
        documents = tokenize(corpus, tokenizer, s.limit_tokens)
        if add_bos:
            documents = [_with_bos(tokens, tokenizer.bos_token_id, length) for tokens in documents]
    else:
        documents = tokenize(corpus, tokenizer, s.limit_tokens, special_tokens=True)
    stride, sizes = length, f"L{length}"
    if name == "hf-strided":
        stride = STRIDE if length > STRIDE else max(1, length // 4)
        sizes += f"-S{stride}"
    elif name == "llamacpp":
        sizes = f"n{length}"
    fitting = [tokens for tokens in documents if preset.windows(len(tokens.ids), length, stride)]
    if not fitting:
        longest, needed = max(len(tokens.ids) for tokens in documents), length * (2 if name == "llamacpp" else 1)
        raise DataError(
            f"The text has {longest} tokens, and --ppl_preset {name} needs {needed}. Use a longer text, or a smaller "
            "--max_length."
        )
    if len(fitting) < len(documents):
        limit.notes.append(f"{len(documents) - len(fitting)} document(s) too short for a window are left out.")
    if units is None:
        _note_bytes(fitting, limit)
    return Plan(
        protocol=f"{name}-{sizes}-v{preset.version}",
        **_about(fitting, fitting),
        total_tokens=sum(len(tokens.ids) - (name == "lm-eval") for tokens in documents),
        max_length=length,
        stride=stride,
        windows=None,
        context_ids=None,
        notes=tuple(limit.notes),
        preset=name,
        add_bos=add_bos,
        units=units,
    )


def _length(s: Settings, preset: Preset, limit: _Limit) -> int:
    """Tokens of a window: the preset's own, or --max_length, and no more than the positions."""
    own = preset.length or limit.positions
    if s.max_length is None:
        length = limit.within(own, f"the window of --ppl_preset {s.ppl_preset},")
    else:
        length = limit.within(s.max_length, "--max_length")
    if preset.length not in (None, length):
        limit.notes.append(
            f"--ppl_preset {s.ppl_preset} usually has windows of {own} tokens; here they have {length}, which the "
            "protocol's name says. Compare the number with those of such windows only."
        )
    return length


def _with_bos(tokens: Tokens, bos: int, length: int) -> Tokens:
    """``bos`` before the text and, afterwards, in the place of the first token of each window, which is not scored."""
    tokens = prefixed(tokens, bos)
    ids = tokens.ids.clone()
    ids[::length] = bos
    return tokens._replace(ids=ids)


def _after_a_prefix(s: Settings, corpus: Corpus, tokenizer: Any) -> tuple[list[Tokens], tuple[tuple[int, int], ...]]:
    """Whole documents after the token that lm-eval begins with, and their words and bytes."""
    first = getattr(tokenizer, "bos_token_id", None)
    first = getattr(tokenizer, "eos_token_id", None) if first is None else first
    if first is None:
        raise InputError("--ppl_preset lm-eval begins each text with the tokenizer's BOS or EOS token; it has neither.")
    every = tokenize(corpus, tokenizer, None, special_tokens=True, at_least=1)
    kept, left = [], s.limit_tokens
    for tokens in every:
        if left is not None and len(tokens.ids) > left:
            break
        left = None if left is None else left - len(tokens.ids)
        kept.append(prefixed(tokens, first))
    if not kept:
        raise DataError(
            f"--ppl_preset lm-eval scores whole documents, and the first has {len(every[0].ids)} tokens; give a larger "
            "--limit_tokens."
        )
    texts = {document.doc_id: document.original or document.text for document in corpus.documents}
    counts = [(len(re.split(r"\s+", texts[t.doc_id])), len(texts[t.doc_id].encode())) for t in kept]
    return kept, tuple(counts)


def _about(scored: list[Tokens], every: list[Tokens]) -> dict[str, Any]:
    """The fields of a plan that say which tokens there are."""
    fed = b"".join(tokens.ids.numpy().astype("<i8").tobytes() for tokens in every)
    return {
        "doc_ids": tuple(tokens.doc_id for tokens in scored),
        "documents": tuple(tokens.ids for tokens in scored),
        "token_bytes": tuple(tokens.n_bytes for tokens in scored),
        "tokens_sha256": hashlib.sha256(fed).hexdigest(),
    }


def _note_bytes(documents: list[Tokens], limit: _Limit) -> None:
    if any(tokens.n_bytes is None for tokens in documents):
        limit.notes.append("the tokenizer does not say where its tokens stand in the text: no bits per byte.")


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


def _prefix_windows(
    s: Settings, documents: list[Tokens], limit: _Limit, bos: int | None
) -> tuple[list[Tokens], tuple[PrefixPlan, ...]]:
    """The documents that are long enough, and their windows of a context and the targets after it."""
    base = limit.within(s.max_length, "--max_length") if s.max_length else limit.positions
    longest = max(len(tokens.ids) for tokens in documents)
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
    if s.context_tokens is not None and s.target_tokens is None and target > context:
        limit.notes.append(
            f"each window scores {target} tokens behind its context of {context}: --target_tokens says how many."
        )
    if context + s.greedy_tokens > limit.positions and not s.allow_extrapolation:
        raise InputError(
            f"--greedy_tokens {s.greedy_tokens} after a context of {context} go past the {limit.positions} positions "
            f"{s.model} was trained on; give less of either, or --allow_extrapolation."
        )
    fitting = [tokens for tokens in documents if len(tokens.ids) >= width]
    if fitting and len(fitting) < len(documents):
        limit.notes.append(f"{len(documents) - len(fitting)} document(s) shorter than {width} tokens are left out.")
    chosen = fitting[: s.max_documents] or documents[:1]  # that is too short, which plan_prefix says
    sizes = context, target, s.stride
    plans = (plan_prefix(len(tokens.ids), *sizes, max_windows=s.max_windows, bos=bos) for tokens in chosen)
    return chosen, tuple(plans)


def _stream_limit(s: Settings, longest: int, limit: _Limit) -> int | None:
    """How much of each document is read at original positions: no more than the model was trained on, unless asked."""
    assert s.stream_chunk is not None
    reach = max([*s.budget_tokens, s.stream_chunk]) + s.stream_chunk
    if s.positions == "rerotate" and reach > limit.positions and not s.allow_extrapolation:
        raise InputError(
            f"What is stored and a chunk are {reach} tokens together, and {s.model} was trained on {limit.positions} "
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


def _timed_context(s: Settings, documents: list[Tokens], limit: _Limit) -> Tensor:
    """The first tokens of the first document that has ``--context_limit`` of them, or else of the longest one."""
    long_enough = (tokens.ids for tokens in documents if len(tokens.ids) >= s.context_limit)
    ids = next(long_enough, None)
    if ids is None:
        ids = max((tokens.ids for tokens in documents), key=len)
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
