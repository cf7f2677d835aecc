"""RULER: needles, tracking, counting and questions, scored by whether an answer holds the references."""

from __future__ import annotations

import re

from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, register

__all__ = ["score"]

_CONTROL = re.compile(r"[\x00-\x1f]")


def score(answer: str, row: Row) -> Scores:
    """The fraction of the references that an answer holds; of a question (``qa_1``), whether it holds one of them.

    Capitals do not matter, and control characters are taken out first.
    """
    text = _CONTROL.sub("", answer.strip()).strip().lower()
    found = [reference.lower() in text for reference in row["answer"]]
    if row["task"].split("_")[0] == "qa":
        return {"string_match": Share(float(any(found)))}
    return {"string_match": Share(sum(found) / len(found))}


register(Benchmark("ruler", "simonjegou/ruler", score, data_dirs=("4096", "8192", "16384")))
