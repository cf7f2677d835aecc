"""The field's benchmarks: contexts with questions about them, from the hub or a folder, scored as each of them scores.

One file for each benchmark says where its rows are and how an answer is scored; importing it here makes it known.
"""

from __future__ import annotations

from coldpress.eval.benchmarks import boxed as boxed
from coldpress.eval.benchmarks import infinitebench as infinitebench
from coldpress.eval.benchmarks import longbench as longbench
from coldpress.eval.benchmarks import longbench_v2 as longbench_v2
from coldpress.eval.benchmarks import loogle as loogle
from coldpress.eval.benchmarks import needle_in_haystack as needle_in_haystack
from coldpress.eval.benchmarks import ruler as ruler
from coldpress.eval.benchmarks import zero_scrolls as zero_scrolls
from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, benchmark_names, find_benchmark

__all__ = ["Benchmark", "Row", "Scores", "Share", "benchmark_names", "find_benchmark"]
