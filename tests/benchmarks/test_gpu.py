"""The benchmark of a GPU, on the CPU with a tiny model: it runs to its end, and a part that fails or is cut says so."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.record import Record, read
from benchmarks.gpu.report import report
from benchmarks.gpu.shapes import TINY

COMPILE = torch.compile
CACHES = {"DynamicCache", "no press", "SnapKV 0.5", "AdaKV 0.5", "k8v4", "SnapKV 0.5, k4v4"}


def run(part: str, folder: Path, seconds: float = 60.0) -> dict[str, Any]:
    """The record of a part, which this process runs."""
    PARTS[part](Record(folder / f"{part}.json", part, seconds, {"tiny": True}), TINY, "cpu")
    said = read(folder / f"{part}.json")
    assert said is not None
    return said


def test_parts_that_decode(tmp_path: Path) -> None:
    """Every cache at every context in every round; what does not fit into the bytes of a batch is said."""
    assert run("environment", tmp_path)["status"] == "done"
    ways = {s["name"] for s in run("attention", tmp_path)["samples"]}
    assert ways == {"sdpa", "sdpa, mask", "two products", "blocks"}
    decode = run("decode", tmp_path)
    points = {(s["tokens"], s["name"], s["round"]) for s in decode["samples"]}
    assert points == {(n, name, turn) for n in TINY.contexts for name in CACHES for turn in range(TINY.rounds)}
    assert all(len(s["ms"]) == TINY.new_tokens and min(s["ms"]) > 0 for s in decode["samples"])
    held = decode["kv_bytes"][str(TINY.contexts[1])]
    assert held["SnapKV 0.5, k4v4"] < held["k8v4"] < held["SnapKV 0.5"] * 1.5 < held["DynamicCache"] == held["no press"]
    rows = run("batch", tmp_path)
    assert set(rows["failed"]) == {"3 rows, DynamicCache", "3 rows, no press"}
    assert {(s["rows"], s["name"]) for s in rows["samples"]} == (
        {(1, name) for name in CACHES} | {(3, name) for name in CACHES - {"DynamicCache", "no press"}}
    )
    said = report(tmp_path)
    assert "| kvpress | not run |" in said and "256 tokens: 2 of 2" in said and "| 3 | AdaKV 0.5 |" in said


@pytest.mark.slow
def test_parts_that_read_prompts_and_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = run("prefill", tmp_path)
    assert {s["name"] for s in prompt["samples"]} >= {"SnapKV, a quarter, pieces", "no press", "DynamicCache"}
    assert all(s["peak_bytes"] is not None and s["seconds"] > 0 for s in prompt["samples"]) and not prompt["failed"]
    monkeypatch.setattr(torch, "compile", lambda step, **options: COMPILE(step, backend="eager", fullgraph=True))
    step = run("compiled", tmp_path, 600.0)
    assert len(step["samples"]) == 2 * 4 * 2 * TINY.rounds and not step["failed"]
    assert len(step["differences"]) == 8 and max(step["differences"].values()) < 1e-4
    assert "SnapKV 0.5, compiled" in report(tmp_path)


def test_rounds_shrink_and_the_record_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.gpu.record.time.monotonic", lambda: now[0])
    record = Record(tmp_path / "part.json", "part", 100.0, {})
    for turn in record.rounds("short", 5):
        now[0] += (10.0, 40.0)[turn]  # 50 s are left, and another 40 s with some to spare do not fit
        record.add(round=turn)
    record.end()
    said = read(tmp_path / "part.json")
    assert said is not None
    assert said["rounds"] == {"short": {"planned": 5, "done": 2}} and said["status"] == "fewer rounds"
    assert len(said["samples"]) == 2


def test_what_fails_and_what_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is in the record, and so is what had been measured."""
    args = argparse.Namespace(device="cpu", tiny=True, output=tmp_path)
    own = gpu.run

    def instead(code: str) -> None:
        monkeypatch.setattr(gpu, "run", lambda command, limit, log: own([sys.executable, "-c", code], limit, log))

    instead("raise MemoryError('no room on the device')")
    assert gpu.measure("decode", args, 20.0).startswith("failed")
    said = read(tmp_path / "decode.json")
    assert said is not None and said["failed"] == {"decode": "MemoryError: no room on the device"}
    written = {"part": "decode", "status": "running", "samples": [{"round": 0}], "failed": {}, "rounds": {}}
    (tmp_path / "decode.json").write_text(json.dumps(written))
    instead("print('begun', flush=True); import time; time.sleep(60)")
    assert gpu.measure("decode", args, 0.6).startswith("cut off after")
    said = read(tmp_path / "decode.json")
    assert said is not None and said["samples"] == [{"round": 0}] and said["failed"] == {"decode": "begun"}


def test_kvpress_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "python_with_kvpress", lambda: None)
    args = argparse.Namespace(device="cpu", tiny=True, output=tmp_path)
    assert gpu.measure("kvpress", args, 20.0).startswith("not installed")
    said = read(tmp_path / "kvpress.json")
    assert said is not None and said["status"] == "not installed"


def test_every_test_for_a_gpu_is_run(request: pytest.FixtureRequest) -> None:
    """No file has a test for a GPU that the benchmark does not name."""
    root = gpu.ROOT
    marked = {
        path.relative_to(root).as_posix()
        for path in (root / "tests").rglob("test_*.py")
        if "@pytest.mark.gpu" in path.read_text(encoding="utf-8")
        or (path.parent.name == "devices" and "device: Device" in path.read_text(encoding="utf-8"))
    }
    assert marked == set(gpu.TESTS) | {"tests/benchmarks/test_gpu.py"}


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    """As `make gpu` runs it where no GPU is."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "12", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    ends = {name: said["status"] for name in gpu.SHARES if (said := read(tmp_path / f"{name}.json"))}
    assert set(ends) == set(gpu.SHARES) and ends.pop("kvpress") in ("done", "not installed")
    assert set(ends.values()) <= {"done", "fewer rounds"}
    assert "A TINY model on cpu" in (tmp_path / "report.md").read_text(encoding="utf-8")
