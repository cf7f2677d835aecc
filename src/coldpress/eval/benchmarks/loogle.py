"""LooGLE: questions, clozes and summaries of long texts, scored by words and clozes in common."""

from __future__ import annotations

import ast
import warnings
from typing import Any

from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, register
from coldpress.eval.benchmarks.texts import bleu, rouge

__all__ = ["score"]

CLOZE = "shortdep_cloze"
TASKS = ("shortdep_qa", "longdep_qa", CLOZE, "longdep_summarization")


def score(answer: str, row: Row) -> Scores:
    """Recall of ROUGE and BLEU, or of a cloze which masks were filled in."""
    reference = row["answer"]
    if row["task"] == CLOZE:
        return {"exact_match": _exact(answer, reference), "partial_match": _partial(answer, reference)}
    found = rouge(answer, reference) or {}
    recalls = {name: Share(found.get(name, {}).get("r", 0.0)) for name in ("rouge-l", "rouge-1", "rouge-2")}
    return recalls | {f"bleu{n}": Share(bleu(answer, reference, n)) for n in (1, 4)}


def _exact(answer: str, reference: str) -> Share:
    """Masks filled in word by word; an answer that is no dictionary counts as one mask, and wrong."""
    wanted, given = _literal(reference), _literal(answer)
    if not isinstance(wanted, dict) or not isinstance(given, dict):
        return Share(0, 1)
    return Share(sum(given.get(mask) == name for mask, name in wanted.items()), len(wanted))


def _partial(answer: str, reference: str) -> Share:
    """Masks filled in with a word of the right name; an answer that cannot be read has none."""
    wanted, given = _literal(reference), _literal(answer)
    if not isinstance(wanted, dict):
        return Share(0, 1)
    if not isinstance(given, dict):
        return Share(0, len(wanted))
    filled = [(name, given[mask]) for mask, name in wanted.items() if mask in given]
    if not all(isinstance(text, str) for pair in filled for text in pair):
        return Share(0, len(wanted))
    return Share(sum(not set(name.split()).isdisjoint(text.split()) for name, text in filled), len(wanted))


def _literal(text: str) -> Any:
    """What a text says in Python's words; None if nothing. A model's answer is read, and never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes in an answer
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _packages(row: Row) -> tuple[str, ...]:
    return () if row["task"] == CLOZE else ("rouge", "nltk")


register(Benchmark("loogle", "simonjegou/loogle", score, data_dirs=TASKS, packages=_packages))
