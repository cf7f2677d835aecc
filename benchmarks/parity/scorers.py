"""Scores of made-up answers by kvpress's own scorers, which the tests hold coldpress's scorers to.

    git clone https://github.com/NVIDIA/kvpress
    make parity KVPRESS=kvpress

asks them again, whose code is in no package, and fails where an answer has another score than in
tests/eval/benchmark_scores.json: for each benchmark the score of every answer, as kvpress gives it to a data set of one
row, and those of each task together. null stands where kvpress raises an error. LooGLE's METEOR and BERTScore are left
out: they need data and a model from elsewhere, and METEOR changes with Python's hash seed. Without --check the file is
written, which ``python -m benchmarks.parity.scorers kvpress/evaluation`` does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.parity.answers import BENCHMARKS, Case, cases, digest

RESULT = Path(__file__).parents[2] / "tests" / "eval" / "benchmark_scores.json"
FOLDERS = {"infinitebench": "infinite_bench", "longbench-e": "longbench", "longbench-v2": "longbenchv2"}

Scorer = Callable[[list[Case]], Any]


def scorer(evaluation: Path, name: str) -> Scorer:
    """kvpress's scorer of a benchmark, for rows with their answers."""
    import pandas

    path = evaluation / "benchmarks" / FOLDERS.get(name, name) / "calculate_metrics.py"
    spec = importlib.util.spec_from_file_location(f"kvpress_{name}".replace("-", "_"), path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "loogle":
        module.nltk.download = lambda *args: True
        module.get_meteor_score = lambda reference, hypothesis: {"meteor": 0.0}
    calculate = module.calculate_metrics_e if name == "longbench-e" else module.calculate_metrics

    def score(some: list[Case]) -> Any:
        frame = pandas.DataFrame([{**case.row, "predicted_answer": case.answer} for case in some])
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plain(name, calculate(frame))

    return score


def plain(name: str, found: Any) -> Any:
    """What a scorer returns as numbers and objects of JSON."""
    if name == "loogle":
        return {
            task: {measure: float(value) for measure, value in each.items() if measure not in ("meteor", "bert")}
            for task, each in found.items()
        }
    if name == "longbench-e":  # NaN where no context is so long
        return {bucket: float(value) for bucket, value in found.items() if value == value}
    if isinstance(found, dict):
        return {str(key): plain("", value) for key, value in found.items()}
    return [plain("", each) for each in found] if isinstance(found, list) else float(found)


def by_task(name: str, some: list[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in some:
        found.setdefault(case.row.get("task", name), []).append(case)
    return found


def guarded(score: Scorer, some: list[Case]) -> Any:
    try:
        return score(some)
    except Exception:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="kvpress's folder of that name")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a score differs")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    stub: Any = types.ModuleType("bert_score")
    import torch

    stub.score = lambda answers, predictions, lang: [torch.zeros(len(answers))] * 3
    sys.modules["bert_score"] = stub
    commit = subprocess.run(
        ["git", "-C", str(args.evaluation), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result: dict[str, Any] = {"kvpress": commit or None, "benchmarks": {}}
    for name in BENCHMARKS:
        score, made = scorer(args.evaluation, name), cases(name)
        result["benchmarks"][name] = {
            "digest": digest(name),
            "each": [guarded(score, [case]) for case in made],
            "together": {task: guarded(score, own) for task, own in by_task(name, made).items()},
        }
        failed = sum(each is None for each in result["benchmarks"][name]["each"])
        print(f"{name}: {len(made)} answers, {failed} of which kvpress cannot score")
    if args.check:
        return differing(result["benchmarks"], json.loads(args.output.read_text(encoding="utf-8"))["benchmarks"])
    args.output.write_text(json.dumps(result, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def differing(found: dict[str, Any], stored: dict[str, Any]) -> int:
    """1 where a score differs from the stored one, and say so; 0 where all are equal."""
    faults = [f"{name}: {part}" for name in found for part in found[name] if found[name][part] != stored[name][part]]
    print("\n".join(f"kvpress gives other scores than are stored for {fault}" for fault in faults) or "all as stored")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
