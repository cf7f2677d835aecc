r"""AIME 2025 and MATH-500: problems whose result stands in ``\boxed{...}``."""

from __future__ import annotations

from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, register

__all__ = ["score_aime", "score_math"]

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


register(Benchmark("aime25", "alessiodevoto/aime25", score_aime, columns=("answer",), groups=lambda row: ("aime25",)))
register(
    Benchmark("math500", "alessiodevoto/math500", score_math, columns=("answer",), groups=lambda row: ("math500",))
)
