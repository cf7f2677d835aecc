"""``coldpress tasks``: a record for each press and size, tables that say what they show, bad input refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coldpress.cli import main
from coldpress.errors import InputError
from coldpress.eval import point_run, task_run
from coldpress.eval.settings import TaskSettings
from coldpress.eval.task_run import make_questions
from coldpress.loading.models import load_model
from coldpress.records.reading import groups
from coldpress.records.results import read_results
from coldpress.records.schema import check_record
from coldpress.report.terminal import show

FEW = ("--task", "niah_single", "repeat_text", "--task_tokens", "96", "--task_examples", "2", "--depths", "0", "1")


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    monkeypatch.setattr(task_run, "load_model", lambda *args, **options: loaded)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("demo", device="cpu")


def run(folder: Path, *options: str) -> int:
    return main(["tasks", "--model", "demo", "--device", "cpu", "--output_dir", str(folder), *FEW, *options])


def test_each_press_and_size_gets_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--press", "no_press", "knorm", "--compression_ratio", "0.25", "0.5") == 0
    printed = capsys.readouterr().out
    records = read_results(tmp_path, check_record)
    assert [(r["press"], r["compression_ratio"]) for r in records] == [
        *(("knorm", 0.25), ("knorm", 0.5), ("no_press", 0.0)),
    ]
    for record in records:
        assert record["status"] == "ok"
        assert record["protocol"] == "tasks-v1-C96-n2"
        assert record["dataset"] == "filler"
        assert record["context_tokens"] == 96
        assert record["effective_compression_ratio"] == record["compression_ratio"]
        assert [(t["task"], t["length"], t["n"]) for t in record["tasks"]] == [
            *(("niah_single", 96, 2), ("repeat_text", 96, 2)),
        ]
        assert [part["depth"] for part in record["tasks"][1]["by_depth"]] == [0, 1]
        assert len(record["per_example"]) == 4
    assert "| niah_single at 96 tokens |" in printed
    assert "| niah_single at 96 tokens, nats | repeat_text at 96 tokens, nats |" in printed
    assert (
        "The uncompressed model scores 0, so these scores say nothing about a press: niah_single at 96 tokens."
        in printed
    )
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}  # nothing is left over
    assert main(["report", str(tmp_path), "--table"]) == 0
    assert capsys.readouterr().out.strip() in printed


def test_a_text_can_be_the_haystack(tmp_path: Path) -> None:
    assert run(tmp_path, "--dataset", "demo", "--press", "keydiff", "--chunk_tokens", "40") == 0
    (record,) = read_results(tmp_path)
    assert (record["dataset"], record["protocol"]) == ("demo", "tasks-v1-C96-n2-chunk40")


def test_a_disk_that_gets_full_costs_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the examples that were measured until then the table is printed, before the error."""
    real, n = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal n
        n += 1
        if n > 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run(tmp_path, "--press", "knorm") == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("error: cannot write ") and "Traceback" not in shown.err
    lines = [line for line in shown.out.splitlines() if line.startswith("| knorm ")]
    assert len(lines) == 3 and "%" in lines[1]
    assert "failed" not in shown.out and "result(s)" not in shown.out


def test_a_killed_run_goes_on_and_a_failed_press_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = task_run.ExampleWork.__call__
    done: list[int] = []

    def stopped(self: Any, model: Any, item: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(item.index)
        return whole(self, model, item)

    options = ("--press", "knorm", "adakv_snapkv", "--kv_bits", "8")
    monkeypatch.setattr(task_run.ExampleWork, "__call__", stopped)
    assert run(tmp_path, *options) == 130
    assert {r["status"] for r in read_results(tmp_path)} == {"interrupted"}
    assert list((tmp_path / ".unfinished").iterdir())
    done.clear()
    assert run(tmp_path, *options) == 0
    assert done == [3]
    resumed = {r["press"]: (r["tasks"], r["per_example"]) for r in read_results(tmp_path)}
    assert not (tmp_path / ".unfinished").exists()
    shutil.rmtree(tmp_path)
    monkeypatch.setattr(task_run.ExampleWork, "__call__", whole)
    assert run(tmp_path, *options) == 0
    assert {r["press"]: (r["tasks"], r["per_example"]) for r in read_results(tmp_path)} == resumed

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(point_run, "check_stored_pairs", broken)
    assert run(tmp_path / "failed", "--press", "no_press", "knorm") == 1
    assert "knorm at 0.5 failed: RuntimeError: out of luck" in capsys.readouterr().err
    assert [(r["press"], r["status"]) for r in read_results(tmp_path / "failed")] == [
        *(("knorm", "failed"), ("no_press", "ok")),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "needles"), "Unknown task 'needles'; allowed: cwe,"),
        (("--depths", "2"), "--depths must be numbers from 0"),
        (("--template", "chat"), "no chat template"),
        (("--task_tokens", "1020"), "the model was trained on 1024"),
        (("--task_tokens", "12"), "--task_tokens 12 is too short"),
        (("--press", "knrm"), "knrm"),
        (("--dataset", "demo", "--text_file", "x.txt"), "give one of them"),
    ],
)
def test_what_cannot_work_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert run(tmp_path / "new", *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_longer_than_the_model_s_positions_is_possible_if_asked_for(loaded: Any) -> None:
    asked = TaskSettings(task=("niah_single",), task_tokens=(loaded.max_positions - 4,), task_examples=1)
    with pytest.raises(InputError, match=r"positions with question and answer.*--allow_extrapolation"):
        make_questions(asked, [], None, loaded, "")
    (example,) = make_questions(replace(asked, allow_extrapolation=True), [], None, loaded, "").examples
    assert example.length == loaded.max_positions - 4


def test_a_damaged_record_is_refused_and_tables_do_not_mix(tmp_path: Path) -> None:
    assert run(tmp_path, "--press", "knorm") == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    for tasks in ("none", [1], [{"task": 3, "length": 5}], [record["tasks"][0] | {"score": "1"}]):
        with pytest.raises(ValueError, match="tasks must be a list of tasks"):
            check_record(record | {"tasks": tasks})
    other = record | {"protocol": "tasks-v1-C96-n3"}
    assert len(groups([record, other])) == 2
    assert "±" not in show([record])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--split", "nonsense"), "--split belongs to a text; name one with --dataset, or leave it out."),
        (("--sample_idx", "1"), "--sample_idx belongs to a text"),
        (("--dataset", "demo", "--split", "nonsense"), "unknown split 'nonsense' of 'demo'"),
    ],
)
def test_options_of_a_text_without_one_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert run(tmp_path, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
