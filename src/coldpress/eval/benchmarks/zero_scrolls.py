"""ZeroSCROLLS: ten tasks whose answers are not published. Answers are recorded, to be handed in to its web page."""

from __future__ import annotations

from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, register

__all__ = ["score"]


def score(answer: str, row: Row) -> Scores:
    """Nothing: nobody but the benchmark's makers knows the references."""
    return {}


register(Benchmark("zero_scrolls", "simonjegou/zero_scrolls", score, columns=("task",)))
