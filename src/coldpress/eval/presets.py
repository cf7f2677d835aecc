"""Perplexity of an uncompressed model as other people measure it, so that numbers can be laid side by side.

    preset      text                          windows                                      scored
    hf-strided  rows joined by a blank line   2048 tokens, 512 apart                       every token but the first
    gptq        the same                      2048 tokens, side by side, rest left out     all but a window's first
    llamacpp    wiki.test.raw, as the file    512 tokens, side by side, rest left out      the second half, 255 tokens
    lm-eval     articles, detokenised         all positions, side by side, the last full   every token

A tokenizer that puts a token before each text does so in all of them; in llamacpp that token also replaces the first of
each window, and in lm-eval each article comes after the tokenizer's BOS token (or its EOS token if it has none).
A protocol's name holds its sizes and a version, which changes when its numbers do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coldpress.errors import DataError, InputError
from coldpress.eval.datasets import Corpus, Document
from coldpress.eval.options import PPL_PRESETS
from coldpress.eval.settings import Settings
from coldpress.eval.tokens import Tokens, tokenize
from coldpress.eval.windows import Window, plan_disjoint, plan_rolling, plan_second_half, plan_strided

__all__ = [
    "PRESETS",
    "Preset",
    "PresetPlan",
    "adds_bos",
    "detokenised",
    "laid_out",
    "pages",
    "plan_preset",
    "prefixed",
    "wiki_raw",
]


class Preset(NamedTuple):
    """length: tokens of a window where the model has as many positions; None: all it has. version: of the protocol.

    windows: what cuts ``(tokens, length, stride)``. scored: how many tokens it must score, by a formula of its own.
    """

    length: int | None
    version: int
    windows: Callable[[int, int, int], list[Window]]
    scored: Callable[[int, int], int]


PRESETS = {
    "hf-strided": Preset(2048, 1, plan_strided, lambda n, length: n - 1),
    "gptq": Preset(
        2048, 1, lambda n, length, stride: plan_disjoint(n, length), lambda n, length: n // length * (length - 1)
    ),
    "llamacpp": Preset(
        512,
        1,
        lambda n, length, stride: plan_second_half(n, length),
        lambda n, length: n // length * (length - 1 - length // 2) if n >= 2 * length else 0,
    ),
    "lm-eval": Preset(None, 1, lambda n, length, stride: plan_rolling(n, length), lambda n, length: n - 1),
}
assert tuple(PRESETS) == PPL_PRESETS
STRIDE = 512  # of hf-strided


@dataclass(frozen=True)
class PresetPlan:
    """What a preset makes of a text.

    protocol: its name with sizes and version. documents: with what comes before or instead of their first tokens.
    total_tokens: of the text, without such additions of lm-eval. units: words and bytes of each document, as lm-eval
    counts them; None otherwise. add_bos: whether the tokenizer's own first token is there.
    """

    protocol: str
    documents: list[Tokens]
    total_tokens: int
    max_length: int
    stride: int
    units: tuple[tuple[int, int], ...] | None
    add_bos: bool


# -- texts ----------------------------------------------------------------------------------------------------


def laid_out(corpus: Corpus, preset: str | None) -> Corpus:
    """The corpus in the documents that a preset scores; a text that did not come as rows of WikiText stays as it is."""
    if corpus.rows is None or preset in (None, "hf-strided", "gptq"):
        return corpus
    if preset == "llamacpp":
        whole = Document(corpus.documents[0].doc_id, wiki_raw(corpus.rows))
        return replace(corpus, documents=(whole,), join='"".join(all rows), an empty one as " \\n"')
    articles = tuple(
        Document(f"{i} {title}".strip(), detokenised(page), page)
        for i, (title, page) in enumerate((_title(page), page) for page in pages(wiki_raw(corpus.rows)))
    )
    return replace(corpus, documents=articles, join="articles, detokenised")


def wiki_raw(rows: tuple[str, ...]) -> str:
    """The file that the rows of WikiText come from, such as wiki.test.raw: its lines of one blank are empty rows."""
    return "".join(row or " \n" for row in rows)


def pages(text: str) -> list[str]:
    """The articles of a WikiText file: each from its heading `` = Title = `` to the line before the next.

    As EleutherAI/wikitext_document_level has them: headings of sections, with more signs, start none, what comes before
    the first heading is a page if it is not blank, and the line end before a heading belongs to no page.
    """
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _is_heading(line):
            found.append([])
        found[-1].append(line)
    joined = ["\n".join(lines) for lines in found]
    return [page for page in joined if page.strip()]


def _is_heading(line: str) -> bool:
    shown = line.replace("= = =", "===").replace("= =", "==").strip()
    return shown.startswith("= ") and shown.endswith(" =")


def _title(page: str) -> str:
    first = page.partition("\n")[0]
    return first.strip(" =") if _is_heading(first) else ""


# In this order: what is replaced, and by what. The second looks for slashes that no text has; it is kept so that texts
# are those of lm-evaluation-harness to the letter.
_WRITTEN: tuple[tuple[str, str], ...] = (
    *((r"s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", ".")),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    *(
        (rf"{a}\s*([^{b}]*?)\s*{b}", rf"{c}\1{d}")
        for a, b, c, d in ((r"\(", r"\)", "(", ")"), (r"\[", r"\]", "[", "]"))
    ),
    *((rf"{a}\s*([^{b}]*?)\s*{b}", rf"{a}\1{b}") for a, b in (("{", "}"), ('"', '"'), ("'", "'"))),
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")),
    *((r" \n", "\n"), (r"\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenised(page: str) -> str:
    """WikiText's blanks before punctuation and inside brackets taken out, as lm-evaluation-harness does it."""
    for pattern, replacement in _WRITTEN:
        page = re.sub(pattern, replacement, page)
    return page


# -- tokens and windows ---------------------------------------------------------------------------------------


def plan_preset(s: Settings, corpus: Corpus, tokenizer: Any, limit: Any) -> PresetPlan:
    """Tokens and sizes of the preset ``s.ppl_preset``.

    Args:
        s: what was asked for.
        corpus: as :func:`laid_out` has it.
        tokenizer: the model's.
        limit: the model's positions, and notes for the user; see :mod:`coldpress.eval.plan`.

    Raises:
        DataError: no text is long enough.
        InputError: sizes that cannot work, or a tokenizer without the token that lm-eval begins with.
    """
    assert s.ppl_preset is not None
    name, preset = s.ppl_preset, PRESETS[s.ppl_preset]
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
    stride = _stride(length) if name == "hf-strided" else length
    total = sum(len(tokens.ids) - (name == "lm-eval") for tokens in documents)
    fitting = [tokens for tokens in documents if preset.windows(len(tokens.ids), length, stride)]
    if not fitting:
        longest, needed = max(len(tokens.ids) for tokens in documents), length * (2 if name == "llamacpp" else 1)
        raise DataError(
            f"The text has {longest} tokens, and --ppl_preset {name} needs {needed}. Use a longer text, or a smaller "
            "--max_length."
        )
    if len(fitting) < len(documents):
        limit.notes.append(f"{len(documents) - len(fitting)} document(s) too short for a window are left out.")
    sizes = f"n{length}" if name == "llamacpp" else f"L{length}-S{stride}" if name == "hf-strided" else f"L{length}"
    return PresetPlan(f"{name}-{sizes}-v{preset.version}", fitting, total, length, stride, units, add_bos)


def _length(s: Settings, preset: Preset, limit: Any) -> int:
    """Tokens of a window: the preset's own, or --max_length, and no more than the positions."""
    own: int = preset.length or limit.positions
    if s.max_length is None:
        length: int = limit.within(own, f"the window of --ppl_preset {s.ppl_preset},")
    else:
        length = limit.within(s.max_length, "--max_length")
    if preset.length not in (None, length):
        limit.notes.append(
            f"--ppl_preset {s.ppl_preset} usually has windows of {own} tokens; here they have {length}, which the "
            "protocol's name says. Compare the number with those of such windows only."
        )
    return length


def _stride(length: int) -> int:
    return STRIDE if length > STRIDE else max(1, length // 4)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the token for the beginning of a text before each text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    alone, with_special = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)
    )
    return len(with_special) > len(alone) and with_special[0] == bos


def _with_bos(tokens: Tokens, bos: int, length: int) -> Tokens:
    """``bos`` before the text and, afterwards, in the place of the first token of each window, which is not scored."""
    tokens = prefixed(tokens, bos)
    ids = tokens.ids.clone()
    ids[::length] = bos
    return tokens._replace(ids=ids)


def prefixed(tokens: Tokens, token: int) -> Tokens:
    """The same text after a token that stands for no bytes."""

    def before(column: Tensor, value: int) -> Tensor:
        return torch.cat([torch.tensor([value]), column])

    n_bytes = None if tokens.n_bytes is None else before(tokens.n_bytes, 0)
    return Tokens(tokens.doc_id, before(tokens.ids, token), n_bytes)


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
