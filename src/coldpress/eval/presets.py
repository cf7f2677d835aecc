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
from dataclasses import replace
from typing import NamedTuple

from coldpress.eval.datasets import Corpus, Document
from coldpress.eval.options import PPL_PRESETS
from coldpress.eval.windows import (
    Window,
    plan_disjoint,
    plan_rolling,
    plan_second_half,
    plan_strided,
    strided_scored_tokens,
)

__all__ = ["PRESETS", "STRIDED", "Preset", "detokenised", "laid_out", "pages", "wiki_raw"]


class Preset(NamedTuple):
    """length: tokens of a window where the model has as many positions; None: all it has. version: of the protocol.

    windows: what cuts ``(tokens, length, stride)``. scored: how many of them it must score, by a formula of its own.
    """

    length: int | None
    version: int
    windows: Callable[[int, int, int], list[Window]]
    scored: Callable[[int, int, int], int]


STRIDED = Preset(None, 1, plan_strided, strided_scored_tokens)  # where no preset is asked for
PRESETS = {
    "hf-strided": STRIDED._replace(length=2048),
    "gptq": Preset(
        2048,
        1,
        lambda n, length, stride: plan_disjoint(n, length),
        lambda n, length, stride: n // length * (length - 1),
    ),
    "llamacpp": Preset(
        512,
        1,
        lambda n, length, stride: plan_second_half(n, length),
        lambda n, length, stride: n // length * (length - 1 - length // 2) if n >= 2 * length else 0,
    ),
    "lm-eval": Preset(None, 1, lambda n, length, stride: plan_rolling(n, length), lambda n, length, stride: n - 1),
}
assert tuple(PRESETS) == PPL_PRESETS


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
