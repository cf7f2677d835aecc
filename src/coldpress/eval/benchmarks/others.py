"""Benchmarks of few lines: RULER, ZeroSCROLLS, LongBench v2, LooGLE, needle in a haystack, AIME 2025, MATH-500."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from typing import Any

from coldpress.errors import InputError
from coldpress.eval.benchmarks.benchmark import (
    Benchmark,
    Column,
    Row,
    Scores,
    Share,
    bleu,
    is_number,
    is_text,
    one_of,
    register,
    rouge,
    text,
    texts,
)

# RULER: needles, tracking, counting and questions, scored by whether an answer holds the references

_CONTROL = re.compile(r"[\x00-\x1f]")
_RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)


def score_ruler(answer: str, row: Row) -> Scores:
    """The fraction of the references that an answer holds; of a question (``qa_1``), whether it holds one of them.

    Capitals do not matter, and control characters are taken out first.
    """
    said = _CONTROL.sub("", answer.strip()).strip().lower()
    found = [reference.lower() in said for reference in row["answer"]]
    if row["task"].split("_")[0] == "qa":
        return {"string_match": Share(float(any(found)))}
    return {"string_match": Share(sum(found) / len(found))}


register(
    Benchmark(
        "ruler",
        "simonjegou/ruler",
        score_ruler,
        data_dirs=("4096", "8192", "16384"),
        columns=(texts("answer"), one_of("task", _RULER)),
    )
)


# ZeroSCROLLS: ten tasks whose answers are not published; they are recorded, to be handed in to its web page


def score_zero_scrolls(answer: str, row: Row) -> Scores:
    """Nothing: nobody but the benchmark's makers knows the references."""
    return {}


register(Benchmark("zero_scrolls", "simonjegou/zero_scrolls", score_zero_scrolls, columns=(text("task"),)))


# LongBench v2: multiple choice about long texts, by difficulty and by length


def score_longbench_v2(answer: str, row: Row) -> Scores:
    """Whether an answer says which choice is correct, in the words that it was asked to use."""
    said, choice = answer.replace("*", ""), row["answer"]
    is_said = any(f"The correct answer is {form}" in said for form in (f"({choice})", choice))
    return {"accuracy": Share(float(is_said))}


register(
    Benchmark(
        "longbench-v2",
        "simonjegou/LongBench-v2",
        score_longbench_v2,
        data_dirs=("0shot",),
        data_dir="0shot",
        columns=(text("answer"), text("difficulty"), text("length")),
        groups=lambda row: ("all", str(row["difficulty"]), str(row["length"])),
    )
)


# LooGLE: questions, clozes and summaries of long texts, scored by words and clozes in common

CLOZE = "shortdep_cloze"
TASKS = ("shortdep_qa", "longdep_qa", CLOZE, "longdep_summarization")


def score_loogle(answer: str, row: Row) -> Scores:
    """Recall of ROUGE and BLEU, or of a cloze which masks were filled in."""
    reference = row["answer"]
    if row["task"] == CLOZE:
        exact, partial = _cloze(answer, reference)
        return {"exact_match": exact, "partial_match": partial}
    found = rouge(answer, reference) or {}
    recalls = {name: Share(found.get(name, {}).get("r", 0.0)) for name in ("rouge-l", "rouge-1", "rouge-2")}
    return recalls | {f"bleu{n}": Share(bleu(answer, reference, n)) for n in (1, 4)}


def _cloze(answer: str, reference: str) -> tuple[Share, Share]:
    """Masks filled in word by word, and those with a word of the right name.

    An answer that is no dictionary counts as one mask to the first, and wrong; to the second it has none.
    """
    wanted, given = _literal(reference), _literal(answer)
    if not isinstance(wanted, dict):
        return Share(0, 1), Share(0, 1)
    n = len(wanted)
    if not isinstance(given, dict):
        return Share(0, 1), Share(0, n)
    exact = Share(sum(given.get(mask) == name for mask, name in wanted.items()), n)
    filled = [(name, given[mask]) for mask, name in wanted.items() if mask in given]
    if not all(isinstance(text, str) for pair in filled for text in pair):
        return exact, Share(0, n)
    return exact, Share(sum(not set(name.split()).isdisjoint(text.split()) for name, text in filled), n)


def _literal(text: str) -> Any:
    """What a text says in Python's words; None if nothing. A model's answer is read, and never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes in an answer
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


register(
    Benchmark(
        "loogle",
        "simonjegou/loogle",
        score_loogle,
        data_dirs=TASKS,
        columns=(text("answer"), one_of("task", TASKS)),
        packages=lambda row: () if row["task"] == CLOZE else ("rouge", "nltk"),
    )
)


# Needle in a haystack: a sentence put into essays at a depth, and a question that it answers

ROOM = 150  # tokens left free for what stands around the text, as kvpress leaves them
AROUND = "This is a very long story book: <book> {} </book>."


def score_needle(answer: str, row: Row) -> Scores:
    """ROUGE of the needle as hypothesis and the answer as reference, in this order, as kvpress gives them.

    So ``p`` is what LooGLE calls recall. An empty answer has 0.
    """
    found = rouge(row["needle"].strip(), answer.strip()) or {}
    names = [("rouge-l", "f"), ("rouge-1", "f"), ("rouge-2", "f")]
    names += [(name, end) for name, _ in names for end in "rp"]
    return {f"{name}-{end}": Share(found.get(name, {}).get(end, 0.0)) for name, end in names}


def hide(rows: Sequence[Row], tokenizer: Any, max_context_length: int, depths: Sequence[int]) -> list[Row]:
    """The first row's text with its needle at each depth, in so many tokens; InputError if there is no room for a text.

    Args:
        max_context_length: tokens of the context at most; 150 and those of the needle are left free.
        depths: per cent of the text that stand before the needle.
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
        score_needle,
        columns=(text("needle"),),
        groups=lambda row: ("needle",),
        is_haystack=True,
        packages=lambda row: ("rouge",),
    )
)


# AIME 2025 and MATH-500: problems whose result stands in ``\boxed{...}``

_BOX = "boxed{"


def score_aime(answer: str, row: Row) -> Scores:
    """Whether the last box holds the result, up to its first closing brace; without a box, the answer itself."""
    return _scores(answer, answer.split(_BOX)[-1].split("}")[0], row)


def score_math(answer: str, row: Row) -> Scores:
    r"""Whether the first box holds the result, up to its first closing brace.

    So a result with braces of its own, such as ``\frac{1}{2}``, is never found; ``accuracy_balanced`` reads the box to
    the brace that closes it.
    """
    boxes = answer.split(_BOX)[1:]
    return _scores(answer, boxes[0].split("}")[0] if boxes else None, row)


def _scores(answer: str, boxed: str | None, row: Row) -> Scores:
    wanted = str(row["answer"])
    balanced = [box for box in map(_inside, answer.split(_BOX)[1:]) if box is not None]
    return {
        "accuracy": Share(float(boxed == wanted)),
        "accuracy_balanced": Share(float(bool(balanced) and balanced[-1].strip() == wanted.strip())),
        "answered": Share(float(_BOX in answer)),
    }


def _inside(text: str) -> str | None:
    """``text`` up to the brace that closes one which stands before it; None if there is none."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:i]
    return None


_RESULT = (
    Column(
        "answer",
        "a text that is not empty, or a number",
        lambda row: is_text(row["answer"]) or is_number(row["answer"]),
    ),
)

register(Benchmark("aime25", "alessiodevoto/aime25", score_aime, columns=_RESULT, groups=lambda row: ("aime25",)))
register(Benchmark("math500", "alessiodevoto/math500", score_math, columns=_RESULT, groups=lambda row: ("math500",)))
