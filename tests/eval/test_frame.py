"""Results as a table: a row for each record, nothing that is nested, nothing lost."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import coldpress.eval
from coldpress.errors import DataError, MissingDependencyError
from coldpress.records.results import SCHEMA_VERSION, collect, write_result

pandas = pytest.importorskip("pandas")

OK: dict[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "protocol": "prefix-C96-T32-S128",
    "status": "ok",
    "error": None,
    "model": "demo",
    "press": "snapkv",
    "press_config": {"window_size": 16},
    "compression_ratio": 0.5,
    "ppl": 12.5,
    "delta_nll": 0.25,
    "delta_nll_ci95": [0.125, 0.375],
    "ppl_ratio_ci95": None,
    "kld": {"mean": 0.5, "p90": 1.5},
    "delta_by_distance": {"1-16": {"delta": 0.5, "ci95": [0.25, 0.75]}},
    "kv_len_after": [48, 48],
    "per_window": [{"id": 0, "n": 31, "nll": 3.0, "nll_base": 2.0}, {"id": 1, "n": 31, "nll": 5.0, "nll_base": 4.0}],
}
FAILED = {
    **dict.fromkeys(OK),
    **{"schema_version": SCHEMA_VERSION, "protocol": "tasks-1", "status": "failed", "error": "PressError: no"},
    **{"model": "demo", "press": "finch"},
}
TASKS = {
    **{"schema_version": SCHEMA_VERSION, "protocol": "tasks-1", "status": "ok", "model": "demo", "press": "knorm"},
    "tasks": [
        {"task": "needle", "length": 512, "n": 4, "score": 0.5, "delta_score_ci95": [-0.25, 0.0]},
        {"task": "needle", "length": 1024, "n": 4, "score": None, "by_depth": [{"depth": 0.5, "n": 4}]},
    ],
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_result(tmp_path, OK)
    write_result(tmp_path / "later" / "tasks", TASKS)
    write_result(tmp_path / "later", FAILED)
    return tmp_path


def test_one_row_for_each_record(results: Path) -> None:
    frame = coldpress.eval.load_results(results)
    assert list(frame.columns[:5]) == ["folder", "protocol", "model", "dataset", "press"]
    assert list(zip(frame.folder, frame.press, frame.status, strict=True)) == [
        (".", "snapkv", "ok"),
        ("later", "finch", "failed"),
        (str(Path("later/tasks")), "knorm", "ok"),
    ]
    row, failed, _ = (frame.iloc[i] for i in range(3))
    assert (row.kld_mean, row.kld_p90, row.press_config_window_size) == (0.5, 1.5, 16)
    assert (row.delta_nll, row.delta_nll_lo, row.delta_nll_hi) == (0.25, 0.125, 0.375)
    assert pandas.isna(row.ppl_ratio_lo) and pandas.isna(row.ppl_ratio_hi)
    assert row["delta_by_distance_1-16_delta"] == 0.5 and row["delta_by_distance_1-16_lo"] == 0.25
    assert row.kv_len_after == [48, 48] and row.per_window == OK["per_window"]
    assert failed.error == "PressError: no" and pandas.isna(failed.ppl) and pandas.isna(failed.kld_mean)
    assert frame.ppl.dtype == frame.delta_nll_lo.dtype == float  # columns to compute with
    assert not any(isinstance(value, dict) for column in frame for value in frame[column])


def test_one_row_for_each_window_or_task(results: Path) -> None:
    windows = coldpress.eval.load_results(str(results), explode="per_window")
    ok = windows[windows.status == "ok"]
    assert ok.per_window_nll.tolist() == [3.0, 5.0] and ok.ppl.tolist() == [12.5, 12.5]
    assert windows.press.tolist() == ["snapkv", "snapkv", "finch"]  # that it failed is to be seen
    tasks = coldpress.eval.load_results(results, explode="tasks")
    scores = tasks[tasks.status == "ok"]
    assert scores.tasks_length.tolist() == [512, 1024] and scores.tasks_delta_score_lo.tolist()[0] == -0.25
    assert scores.tasks_score.isna().tolist() == [False, True]
    assert "tasks" not in tasks.columns


def test_what_is_no_result_is_skipped(results: Path) -> None:
    (results / "foreign.json").write_text("[1, 2]")
    (results / "later" / "damaged.json").write_text('{"schema_version": 1, "ppl":')
    hidden = results / ".hidden"
    hidden.mkdir()
    (hidden / "foreign.json").write_text("[1, 2]")
    with pytest.warns(UserWarning) as said:
        assert len(coldpress.eval.load_results(results)) == 3
    assert [Path(str(w.message).split(": ")[0]).name for w in said] == ["foreign.json", "damaged.json"]


def test_nothing_to_read(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match="holds no results"):
        coldpress.eval.load_results(empty)
    with pytest.raises(DataError, match="no folder"):
        coldpress.eval.load_results(empty / "nowhere")
    with pytest.raises(DataError, match=r"Did you mean 'per_window'\? There are: per_window, tasks\."):
        coldpress.eval.load_results(results, explode="per_windows")
    with pytest.raises(DataError, match="called 'kv_len_after'"):
        coldpress.eval.load_results(results, explode="kv_len_after")


def test_without_pandas(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "coldpress\[report\]"'):
        coldpress.eval.load_results(results)


def test_committed_results() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "smollm2_pg19" / "results"
    frame = coldpress.eval.load_results(folder)
    assert len(frame) == len(list(folder.glob("*.json")))
    record = json.loads(next(folder.glob("*__snapkv__*.json")).read_text(encoding="utf-8"))
    row = frame[frame.press == "snapkv"].iloc[0]
    assert [row.delta_nll_lo, row.delta_nll_hi] == record["delta_nll_ci95"]
    assert row.kld_p99 == record["kld"]["p99"]
    windows = coldpress.eval.load_results(folder, explode="per_window")
    own = windows[windows.press == "snapkv"]
    assert own.per_window_nll.sum() / own.per_window_n.sum() == pytest.approx(record["loss"])


def test_importing_the_package_needs_no_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    importlib.reload(coldpress.eval)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_folder_that_no_disk_can_name(name: str) -> None:
    with pytest.raises(DataError, match="no folder"):
        coldpress.eval.load_results(name)
    with pytest.raises(DataError, match="no folder"):
        collect([name])
