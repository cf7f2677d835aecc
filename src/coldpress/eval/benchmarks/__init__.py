"""The field's benchmarks: contexts with questions about them, from the hub or a folder, scored as each of them scores.

What registers a benchmark says where its rows are and how an answer is scored; importing it here makes it known.
"""

from __future__ import annotations

from coldpress.eval.benchmarks import infinitebench as infinitebench
from coldpress.eval.benchmarks import longbench as longbench
from coldpress.eval.benchmarks import others as others
from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, benchmark_names, find_benchmark

__all__ = ["Benchmark", "Row", "Scores", "Share", "benchmark_names", "find_benchmark"]
