"""A sweep that is stopped, killed or given more to do goes on from what is finished."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from coldpress.errors import DataError, InputError, OutputError, SelfCheckError
from coldpress.eval import prefix, speed, task_run
from coldpress.eval.jobs import BASELINE
from coldpress.eval.ledger import UNFINISHED, Ledger, Measured, checksum_of
from coldpress.eval.losses import Scores
from coldpress.eval.sweep import Outcome, summary, sweep
from coldpress.eval.sweep_plan import SweepPlan
from coldpress.presses.knorm import KnormPress
from coldpress.records.results import read_results

CONFIG: dict[str, Any] = {
    "models": ["demo"],
    "texts": ["demo"],
    "press": ["random", "knorm"],
    "compression_ratio": [0.25, 0.5],
    "perplexity": {"context_tokens": 48, "target_tokens": 16, "max_windows": 24},
}
VARYING = ("run_id", "timestamp", "seconds", "env", "command")


def config(folder: Path, **more: Any) -> dict[str, Any]:
    return {**CONFIG, "output_dir": str(folder), **more}


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Every record by its file name, without what no two runs share."""
    records = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: {k: v for k, v in record.items() if k not in VARYING} for name, record in records.items()}


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The index of every batch of windows that is measured inside, and how many points on it."""
    seen: list[tuple[int, int]] = []
    real = prefix.WindowWork.__call__

    def spied(self: Any, model: Any, batch: Any) -> Any:
        seen.append((batch.index, len(batch.points)))
        return real(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(prefix.WindowWork, "__call__", spied)
        yield seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the sweep gives that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = sweep(SweepPlan.of(config(folder)), "the command")
    assert (outcome.n_measured, outcome.n_found, outcome.n_failed, outcome.problems) == (5, 0, 0, [])
    assert not (folder / UNFINISHED).exists()
    records = measured(folder)
    assert len(records) == 5 and all(record["status"] == "ok" for record in records.values())
    return records


def test_what_is_finished_is_not_measured_again(
    tmp_path: Path, whole: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, locks = SweepPlan.of(config(tmp_path, compression_ratio=[0.25])), []
    held = Ledger.held
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "held", lambda self: (locks.append(self.folder.with_suffix(".lock")), held(self))[1])
        sweep(plan, "")
    (tmp_path / UNFINISHED).mkdir()
    for lock in locks:  # as if it had been killed when the results were written
        lock.touch()
    with counted(monkeypatch) as seen:
        again = sweep(plan, "")
        assert (again.n_measured, again.n_found, seen) == (0, 3, []) and not (tmp_path / UNFINISHED).exists()
        more = sweep(SweepPlan.of(config(tmp_path)), "")
    assert (more.n_measured, more.n_found) == (2, 3)
    assert seen == [(index, 2) for index in range(24)]  # the new ratio of both presses, and nothing else
    assert measured(tmp_path) == whole


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(
    tmp_path: Path, whole: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "results", tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config(folder)))
    slow = "import time, coldpress.eval.prefix as p; f = p.WindowWork.__call__\n"
    slow += "p.WindowWork.__call__ = lambda self, *a: (time.sleep(0.1), f(self, *a))[1]\n"
    run = f"{slow}from coldpress.cli import main; main(['sweep', '--config', {str(file)!r}])"
    process = subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 300
        while len(list(folder.glob(f"{UNFINISHED}/*/batch-*"))) < 6:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert list(folder.glob("*.json")) == []
    n_done = len(list(folder.glob(f"{UNFINISHED}/*/batch-*")))
    assert 6 <= n_done < 24
    (folder / UNFINISHED / "left-over").mkdir()
    with counted(monkeypatch) as seen:
        outcome = sweep(SweepPlan.of(config(folder)), "")
    assert [index for index, _ in seen] == list(range(n_done, 24))
    assert outcome.n_measured == 5 and measured(folder) == whole
    assert os.listdir(folder / UNFINISHED) == ["left-over"]


@pytest.mark.slow
def test_stopped_while_timing_it_keeps_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {"context_limit": [32], "max_new_tokens": 4, "repetitions": 4, "warmup": 1, "press": ["knorm"]}
    plan = SweepPlan.of(config(tmp_path, perplexity=False, speed=timed))
    real, n = speed.prefilling, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal n
        n += 1
        if n == 12:  # in the third timed round of three points, after an untimed one
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(speed, "WARMUP_TOKENS", 2)
        patch.setattr(speed, "prefilling", interrupted)
        stopped = sweep(plan, "")
    assert stopped.is_interrupted and n == 12
    saved = json.loads(next(tmp_path.glob(f"{UNFINISHED}/*/rounds.json")).read_text())["points"]
    assert [len(point["samples"]) for point in saved] == [2, 2, 2]
    n = 100
    with monkeypatch.context() as patch:
        patch.setattr(speed, "WARMUP_TOKENS", 2)
        patch.setattr(speed, "prefilling", interrupted)
        assert sweep(plan, "").n_measured == 3
    assert n == 100 + 3 + 2 * 3 + 3  # an untimed round, the other two, and one for the memory
    records = measured(tmp_path)
    assert len(records) == 3 and all(record["repetitions"] == 4 for record in records.values())
    samples = {point["key"]: point["samples"] for point in saved}
    assert sorted(map(str, samples.values())) == sorted(str(record["samples"][:2]) for record in records.values())
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.slow
def test_a_press_that_failed_is_tried_again_and_the_others_are_not(
    tmp_path: Path, whole: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SweepPlan.of(config(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(KnormPress, "score", lambda self, view: 1 / 0)
        broken = sweep(plan, "")
    assert (broken.n_measured, broken.n_failed) == (5, 2)
    assert sum(name.endswith(".failed.json") for name in measured(tmp_path)) == 2
    with counted(monkeypatch) as seen:
        mended = sweep(plan, "")
    assert (mended.n_measured, mended.n_found, mended.n_failed) == (2, 3, 0)
    assert {n for _, n in seen} == {2}
    assert measured(tmp_path) == whole


@pytest.mark.slow
def test_what_was_finished_before_the_model_failed_is_kept(
    tmp_path: Path, whole: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, real = SweepPlan.of(config(tmp_path)), prefix.WindowWork.__call__

    def fails(self: Any, model: Any, batch: Any) -> Any:
        if batch.index == 5:
            raise RuntimeError("all workers are lost")
        return real(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(prefix.WindowWork, "__call__", fails)
        assert sweep(plan, "").n_failed == 5
    with counted(monkeypatch) as seen:
        sweep(plan, "")
    assert [index for index, _ in seen] == list(range(5, 24))
    assert measured(tmp_path) == whole


@pytest.mark.slow
def test_what_cannot_be_measured_stops_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["no/such-folder/here", {"model": "demo"}]
    text = tmp_path / "short.txt"
    text.write_text("too short")
    plan = SweepPlan.of(config(tmp_path / "results", models=models, texts=[{"text_file": str(text)}, "demo"]))
    outcome = sweep(plan, "")
    assert outcome.n_measured == 5 and len(outcome.problems) == 2
    assert "no/such-folder/here" in outcome.problems[0] and "a window needs" in outcome.problems[1]
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 2


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Nothing could be measured. no/such-folder/here"):
        sweep(SweepPlan.of(config(tmp_path, models=["no/such-folder/here"])), "")


def test_nothing_at_all_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no/such-folder/here") as caught:
        sweep(SweepPlan.of(config(tmp_path, models=["no/such-folder/here"])), "")
    assert capsys.readouterr().err == "" and str(caught.value).count("no such folder") == 1


@pytest.mark.slow
def test_what_is_given_twice_is_measured_once(tmp_path: Path) -> None:
    twice = {"models": ["demo", "demo"], "texts": ["demo", "demo"], "perplexity": [CONFIG["perplexity"]] * 2}
    outcome = sweep(SweepPlan.of(config(tmp_path, **twice)), "")
    assert (outcome.n_measured, outcome.n_found) == (5, 0)
    again = sweep(SweepPlan.of(config(tmp_path, **twice)), "")
    assert (again.n_measured, again.n_found) == (0, 5)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_folder_that_no_disk_can_name(name: str) -> None:
    with pytest.raises(OutputError, match="cannot write into folder"):
        sweep(SweepPlan.of(config(Path(name))), "")


@pytest.mark.parametrize("text", [{"dataset": "a\0b"}, {"text_file": "a\0b"}])
def test_a_text_that_no_disk_can_name(tmp_path: Path, text: dict[str, str]) -> None:
    with pytest.raises(DataError, match="read"):
        sweep(SweepPlan.of(config(tmp_path, texts=[text])), "")


@pytest.mark.parametrize(
    "section",
    [
        {"perplexity": {"greedy_tokens": 1000, "context_tokens": 48, "target_tokens": 16}},
        {"tasks": {"task": "passkey", "task_tokens": 10**12}},
    ],
)
def test_more_than_the_positions_is_refused_before_any_work(tmp_path: Path, section: dict[str, Any]) -> None:
    plan = SweepPlan.of({"models": "demo", "texts": "demo", "output_dir": str(tmp_path), **section})
    with pytest.raises(InputError, match="past the 1024 positions"):
        sweep(plan, "")


@pytest.mark.parametrize("damage", ["scores", "facts", "depth"])
def test_a_damaged_ledger_is_as_good_as_none(tmp_path: Path, damage: str) -> None:
    scores = Scores(*torch.rand(5, 2, 7))
    ledger = Ledger(tmp_path)
    ledger.save(0, {"a": Measured(scores=scores, kv_bytes=10, kv_lengths=[4, 4], achieved_ratio=0.5, agreement=[1, 2])})
    path = tmp_path / "batch-000000.safetensors"
    assert torch.equal(ledger.load(Measured, 0)["a"].scores.rows(), scores.rows())
    if damage == "scores":
        content = bytearray(path.read_bytes())
        content[-3] ^= 255
        path.write_bytes(bytes(content))
    elif damage == "facts":
        content = bytearray(path.read_bytes())
        path.write_bytes(bytes(content).replace(b"0.5", b"0.7"))
    else:
        save_file({"a": scores.rows()}, path, metadata={"a": "[" * 90_000})
    assert ledger.load(Measured, 0) == {}


@pytest.mark.parametrize("text", ["[" * 90_000, '{"prefill_ns": "x", "decode_ns": 1, "n_tokens": 2}'])
def test_damaged_rounds_are_timed_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rounds.json"
    run = speed.SpeedRun(None, torch.zeros(1, 8), [BASELINE], max_new_tokens=4)  # type: ignore[arg-type]
    (point,) = run.points
    whole = f'[{{"key": {json.dumps(point.key)}, "samples": [{text}], "error": null}}]'
    if not text.startswith("["):
        checksum = json.dumps(checksum_of(tmp_path, json.loads(whole)))
        text = f'{{"checksum": {checksum}, "points": {whole}}}'
    path.write_text(text)
    assert run._restore(Ledger(tmp_path)) == 0
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        run._save(Ledger(tmp_path))


def test_a_text_that_is_not_there_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    plan = SweepPlan.of(config(tmp_path / "results", models=["no/such-folder/here"], texts=["no/such.txt"]))
    with pytest.raises(InputError, match=r"no/such\.txt"):
        sweep(plan, "")
    assert not (tmp_path / "results").exists()


def test_a_self_check_of_the_model_fails_its_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> None:
        raise SelfCheckError("the baseline is wrong")

    monkeypatch.setattr(prefix, "check_baseline", wrong)
    outcome = sweep(SweepPlan.of(config(tmp_path, baselines=["gptq"], limit_tokens=2000)), "")
    assert isinstance(outcome, Outcome) and outcome.n_failed == 5 and outcome.n_measured == 6
    statuses = {record["protocol"]: record["status"] for record in read_results(tmp_path)}
    assert statuses == {"prefix-C48-T16-S64": "failed", "gptq-L1024-v1": "ok"}


def test_what_is_written_counts_though_its_table_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The points were on disk, and the last line said that none was measured."""

    def interrupted(records: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("coldpress.eval.run.show", interrupted)
    tasks = {"task": ["passkey"], "task_tokens": [64], "task_examples": 1, "press": ["knorm"]}
    stopped = sweep(SweepPlan.of(config(tmp_path, perplexity=False, tasks=tasks)), "")
    assert stopped.is_interrupted and (stopped.n_measured, stopped.n_begun) == (3, 0) == (len(measured(tmp_path)), 0)


def test_tasks_are_part_of_a_sweep_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"task": ["passkey", "repeat_text"], "task_tokens": [64], "task_examples": 3, "press": ["knorm"]}
    plan = SweepPlan.of(config(tmp_path, perplexity=False, tasks=tasks))
    real, n = task_run.ExampleWork.__call__, 0

    def interrupted(self: Any, model: Any, item: Any) -> Any:
        nonlocal n
        n += 1
        if n == 5:
            raise KeyboardInterrupt
        return real(self, model, item)

    monkeypatch.setattr(task_run.ExampleWork, "__call__", interrupted)
    stopped = sweep(plan, "")
    assert stopped.is_interrupted and len(list(tmp_path.glob(f"{UNFINISHED}/*/example-*"))) == 4
    assert f"3 result(s) in {tmp_path}/, 3 of them unfinished\n" in capsys.readouterr().out
    assert summary(stopped, "out") == "0 point(s) measured, 3 begun; results in out/"
    outcome = sweep(plan, "")
    assert (n, outcome.n_measured, outcome.n_failed) == (5 + 2, 3, 0)
    assert not (tmp_path / UNFINISHED).exists()
    again = sweep(plan, "")
    assert (again.n_measured, again.n_found, n) == (0, 3, 7)
    records = measured(tmp_path).values()
    assert [[entry["n"] for entry in record["tasks"]] for record in records] == [[3, 3]] * 3
