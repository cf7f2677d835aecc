"""Scores are those of kvpress's own scorers on made-up answers; benchmarks/parity/scorers.py has taken them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.parity.answers import BENCHMARKS, Case, cases, digest

from coldpress.eval.benchmarks import Scores, Share, benchmark_names, find_benchmark
from coldpress.eval.benchmarks.run import mean

EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "benchmark_scores.json").read_text())["benchmarks"]
CLOZE = "shortdep_cloze"


def scored(name: str) -> list[tuple[Case, Scores]]:
    benchmark = find_benchmark(name)
    made = cases(name)
    for package in {package for case in made for package in benchmark.packages(case.row)}:
        pytest.importorskip(package)
    return [(case, benchmark.score(case.answer, case.row)) for case in made]


def check(name: str, ours: dict[str, float], theirs: Any, case: Case | None) -> None:
    """``ours`` by measure beside what kvpress returns; of one case, or of a task together."""
    if name == "ruler":
        ((_, theirs),) = theirs.items()
        assert round(100 * ours["string_match"], 2) == theirs["string_match"]
    elif name == "loogle":
        ((task, theirs),) = theirs.items()
        assert set(ours) == set(theirs)
        for measure, value in theirs.items():
            own = ours[measure]
            assert (round(own, 4) if task == CLOZE else own) == pytest.approx(value, abs=1e-12)
    elif name == "infinitebench":
        assert ours["score"] == pytest.approx(theirs, abs=1e-12)
    elif name == "longbench":
        (own,) = ours.values()
        assert round(100 * own, 2) == pytest.approx(theirs, abs=0.01 if case is None else 1e-9)
    elif name == "longbench-e" and case is not None:
        (own,), ((bucket, value),) = ours.values(), theirs.items()
        assert find_benchmark(name).groups(case.row)[0].endswith(f" {bucket}")
        assert round(100 * own, 2) == pytest.approx(value, abs=1e-9)
    elif name == "longbench-v2":
        assert ours["accuracy"] == pytest.approx(theirs["average"], abs=1e-12)
    elif name == "needle_in_haystack" and case is not None:
        (theirs,) = theirs
        for measure, value in theirs.items():
            for end, number in value.items():
                assert ours[f"{measure}-{end}"] == pytest.approx(number, abs=1e-12)
    elif name in ("aime25", "math500"):
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
        n = theirs["total"]
        assert (ours["accuracy"] * n, ours["answered"] * n) == pytest.approx((theirs["correct"], theirs["answered"]))


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"zero_scrolls"}))
def test_scores_are_kvpress_s(name: str) -> None:
    found, expected = scored(name), EXPECTED[name]
    assert expected["digest"] == digest(name)
    assert len(found) == len(expected["each"]) >= 280
    beyond = 0
    for (case, scores), theirs in zip(found, expected["each"], strict=True):
        ours = {measure: share.reached / share.of for measure, share in scores.items()}
        assert all(0 <= value <= 1 for value in ours.values())
        if theirs is None:  # kvpress raises an error
            beyond += 1
            assert not any(ours.values())
        else:
            check(name, ours, theirs, case)
    assert beyond == {"infinitebench": 7, "needle_in_haystack": 31}.get(name, 0)
    positive = [scores for _, scores in found if next(iter(scores.values())).reached > 0]
    assert len(found) / 10 < len(positive) < len(found)
    by_task: dict[str, list[Scores]] = {}
    for case, scores in found:
        by_task.setdefault(case.row.get("task", name), []).append(scores)
    assert set(by_task) == set(expected["together"])
    for task, own in by_task.items():
        theirs = expected["together"][task]
        if theirs is not None:
            check(name, {measure: mean([each[measure] for each in own]) or 0.0 for measure in own[0]}, theirs, None)


def test_groups_of_a_data_set_are_kvpress_s() -> None:
    """By difficulty and length in LongBench v2, by length in words in LongBench-E."""
    for name in ("longbench-v2", "longbench-e"):
        benchmark, found = find_benchmark(name), scored(name)
        together: dict[str, list[Share]] = {}
        for case, scores in found:
            for group in benchmark.groups(case.row):
                together.setdefault(group, []).append(next(iter(scores.values())))
        means = {group: mean(own) for group, own in together.items()}
        if name == "longbench-v2":
            theirs = {
                "all" if group == "average" else group: x for group, x in EXPECTED[name]["together"][name].items()
            }
            assert means == pytest.approx(theirs)
            continue
        for task, buckets in EXPECTED[name]["together"].items():
            for bucket, value in buckets.items():
                assert 100 * (means[f"{task} {bucket}"] or 0) == pytest.approx(value, abs=0.0051)


def test_every_benchmark_of_kvpress_is_there() -> None:
    assert benchmark_names() == sorted(BENCHMARKS)
    assert find_benchmark("zero_scrolls").score("an answer", {"task": "qasper", "answer": ""}) == {}


def test_labels_of_the_data_set_that_kvpress_cannot_read_are_read() -> None:
    """InfiniteBench's labels are written as texts; kvpress's scorer raises an error, or finds no number among them."""
    score = find_benchmark("infinitebench").score

    def of(task: str, label: list[Any], answer: str) -> float:
        return score(answer, {"task": task, "answer": label})["score"].reached

    assert of("math_find", ["44"], "44.") == 1 and of("math_find", ["4.5"], "It is 4.5") == 1
    assert of("math_find", ["3"], "3.5") == 0
    assert of("code_run", ["-7"], "returns -7") == 1 and of("code_run", ["x"], "7") == 0
    assert of("code_debug", ["C"], "The correct option is: C") == 1
    assert of("math_calc", ["1", "5", "8"], "[1, 5, 9]") == pytest.approx(2 / 3)


def test_a_box_is_read_to_the_brace_that_closes_it() -> None:
    score = find_benchmark("math500").score
    right = score("So \\boxed{\\frac{1}{4}}.", {"answer": "\\frac{1}{4}"})
    assert (right["accuracy"].reached, right["accuracy_balanced"].reached) == (0, 1)  # kvpress stops at the first
    assert not score("boxed{1", {"answer": "1"})["accuracy_balanced"].reached


def test_a_model_s_answer_is_never_run() -> None:
    """LooGLE's cloze answers are dictionaries, which kvpress evaluates."""
    row = {"task": CLOZE, "answer": '{"<mask-0>": "Osric"}'}
    scores = find_benchmark("loogle").score("dict([('<mask-0>', 'Osric')])", row)
    assert [share.reached for share in scores.values()] == [0, 0]
    assert math.isclose(find_benchmark("loogle").score("{'<mask-0>': 'Osric'}", row)["exact_match"].reached, 1)
