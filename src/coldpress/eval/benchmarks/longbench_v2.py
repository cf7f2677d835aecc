"""LongBench v2: multiple choice about long texts, by difficulty and by length."""

from __future__ import annotations

from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, register

__all__ = ["groups", "score"]


def score(answer: str, row: Row) -> Scores:
    """Whether an answer says which choice is correct, in the words that it was asked to use."""
    text, choice = answer.replace("*", ""), row["answer"]
    is_said = any(f"The correct answer is {form}" in text for form in (f"({choice})", choice))
    return {"accuracy": Share(float(is_said))}


def groups(row: Row) -> tuple[str, ...]:
    """All of it, its difficulty and its length."""
    return "all", str(row["difficulty"]), str(row["length"])


register(
    Benchmark(
        "longbench-v2",
        "simonjegou/LongBench-v2",
        score,
        data_dirs=("0shot",),
        data_dir="0shot",
        columns=("answer", "difficulty", "length"),
        groups=groups,
    )
)
