"""Where a text is cut: which tokens a window feeds in, which of them it scores, and how others cut one: presets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from coldpress.errors import DataError, InputError
from coldpress.eval.options import PPL_PRESETS
from coldpress.loading.datasets import Corpus, Document


@dataclass(frozen=True)
class Window:
    """Of the tokens ``begin .. end - 1``, ``first_scored .. end - 1`` are scored and all but the last are fed in.

    A token is scored from the logits of the token before it, so ``first_scored > begin``.
    """

    begin: int
    end: int
    first_scored: int

    @property
    def n_scored(self) -> int:
        return self.end - self.first_scored


def plan_strided(n_tokens: int, length: int, stride: int) -> list[Window]:
    """Overlapping windows in which every token but the first is scored exactly once.

    Each window has up to ``length`` tokens and starts ``stride`` after the one before, so a scored token has at least
    ``length - stride`` tokens of context once the text is that far in. With ``stride == length`` the first token of
    every window has no predecessor in it and is not scored.
    """
    if n_tokens < 2:
        raise DataError(
            f"The text has {n_tokens} token(s); at least 2 are needed, because each is scored from the last."
        )
    if length < 2 or not 1 <= stride <= length:
        raise InputError(f"--max_length must be >= 2 and --stride in 1..max_length; got {length} and {stride}.")
    windows, scored_to = [], 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + length, n_tokens)
        first = max(scored_to, begin + 1)
        if first < end:
            windows.append(Window(begin, end, first))
        scored_to = end
        if end == n_tokens:
            break
    return windows


def strided_scored_tokens(n_tokens: int, length: int, stride: int) -> int:
    """How many tokens :func:`plan_strided` must score, by a formula of its own."""
    return n_tokens - 1 if stride < length or n_tokens <= length else n_tokens - -(-n_tokens // length)


def plan_disjoint(n_tokens: int, length: int, _: int) -> list[Window]:
    """Chunks of exactly ``length`` tokens side by side, all but the first of each scored; a shorter rest is out."""
    if length < 2:
        raise InputError(f"--max_length must be at least 2, so that a chunk has a token to score; got {length}.")
    return [Window(i, i + length, i + 1) for i in range(0, n_tokens - length + 1, length)]


def plan_second_half(n_tokens: int, length: int, _: int) -> list[Window]:
    """Chunks as those of :func:`plan_disjoint`, of which the tokens after number ``length // 2 + 1`` are scored.

    So a scored token has at least ``length // 2 + 1`` tokens of context. A text of less than two chunks has none.
    """
    if length < 4:
        raise InputError(f"--max_length must be at least 4, so that half a chunk has a token to score; got {length}.")
    if n_tokens < 2 * length:
        return []
    return [Window(i, i + length, i + length // 2 + 1) for i in range(0, n_tokens - length + 1, length)]


def plan_rolling(n_tokens: int, length: int, _: int) -> list[Window]:
    """Windows that feed in up to ``length`` tokens and score each token but the first once.

    Full windows lie side by side: the token before is all the context of a window's first scored token. The last one,
    if fewer are left to score, reaches back until it is full, too.
    """
    if length < 1:
        raise InputError(f"--max_length must be at least 1; got {length}.")
    windows = [Window(i, i + length + 1, i + 1) for i in range(0, n_tokens - length, length)]
    scored_to = windows[-1].end if windows else 1
    if scored_to < n_tokens:
        windows.append(Window(max(0, n_tokens - length - 1), n_tokens, scored_to))
    return windows


@dataclass(frozen=True)
class PrefixPlan:
    """Windows of ``context`` tokens that are prefilled and compressed, and ``target`` tokens that follow.

    The first target's prediction comes from the prefill itself, before anything was compressed, so the
    ``target - 1`` tokens after it are scored.
    """

    starts: tuple[int, ...]
    context: int
    target: int
    stride: int
    bos: int | None = None  # the token that takes the place of each window's first one

    def windows(self, ids: Tensor) -> Iterator[Tensor]:
        """The tokens of each window, int64 ``[context + target]``, of the text ``ids [N]``."""
        for start in self.starts:
            window = ids[start : start + self.context + self.target]
            if self.bos is not None:
                window = window.clone()
                window[0] = self.bos
            yield window

    @property
    def scored_per_window(self) -> int:
        return self.target - 1


def plan_prefix(
    n_tokens: int,
    context: int,
    target: int,
    stride: int | None = None,
    *,
    max_windows: int | None = None,
    bos: int | None = None,
) -> PrefixPlan:
    """Cut a text into windows of exactly ``context + target`` tokens; a shorter rest is left out.

    Args:
        n_tokens: length of the text.
        context, target: tokens to compress, at least 2, and tokens that follow, at least 2.
        stride: tokens from one window's start to the next, at least ``target``: windows may share context, but no
            target, or they would not be the independent samples that error bars take them for. None lays them side by
            side.
        max_windows: stop after so many.
        bos: the token that takes the place of each window's first one, so that a window with it scores the same
            targets; None leaves windows as they are.
    """
    stride = context + target if stride is None else stride
    if context < 2 or target < 2 or stride < 1:
        raise InputError(
            f"a window needs a context of at least 2 tokens, at least 2 targets and a stride of at least 1; got "
            f"{context}, {target}, {stride}."
        )
    if stride < target:
        raise InputError(
            f"--stride {stride} is less than the {target} targets of a window: tokens would be scored more than once, "
            f"and the confidence interval would be too narrow. Give at least --stride {target}, or fewer "
            "--target_tokens."
        )
    if n_tokens < context + target:
        raise DataError(
            f"The text has {n_tokens} tokens, a window needs {context} + {target}. Use a longer text, or smaller "
            "--context_tokens and --target_tokens."
        )
    starts = tuple(range(0, n_tokens - (context + target) + 1, stride))
    return PrefixPlan(starts[:max_windows], context, target, stride, bos)


class Preset(NamedTuple):
    """Perplexity of an uncompressed model as other people measure it, so that numbers can be laid side by side.

        preset      text                         windows                                     scored
        hf-strided  rows joined by a blank line  2048 tokens, 512 apart                      every token but the first
        gptq        the same                     2048 tokens, side by side, rest left out    all but a window's first
        llamacpp    wiki.test.raw, as the file   512 tokens, side by side, rest left out     the second half, 255 tokens
        lm-eval     articles, detokenised        all positions, side by side, the last full  every token

    A tokenizer that puts a token before each text does so in all of them; in llamacpp that token also replaces the
    first of each window, and in lm-eval each article comes after the tokenizer's BOS token (or its EOS token if it has
    none). A protocol's name holds its sizes and a version, which changes when its numbers do.
    """

    length: int | None  # tokens of a window where the model has as many positions; None: all it has
    version: int  # of the protocol
    windows: Callable[[int, int, int], list[Window]]  # what cuts ``(tokens, length, stride)``, which some do not need
    scored: Callable[[int, int, int], int]  # how many of them it must score, by a formula of its own


STRIDED = Preset(None, 1, plan_strided, strided_scored_tokens)  # where no preset is asked for
PRESETS = {
    "hf-strided": STRIDED._replace(length=2048),
    "gptq": Preset(2048, 1, plan_disjoint, lambda n, length, _: n // length * (length - 1)),
    "llamacpp": Preset(
        *(512, 1, plan_second_half),
        lambda n, length, _: n // length * (length - 1 - length // 2) if n >= 2 * length else 0,
    ),
    "lm-eval": Preset(None, 1, plan_rolling, lambda n, length, _: n - 1),
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
