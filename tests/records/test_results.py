"""Result files: a name for every setting, complete JSON or none, and a finished result stays."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from coldpress.errors import DataError, OutputError, SelfCheckError
from coldpress.io.output import check_writable
from coldpress.records import results
from coldpress.records.results import (
    SCHEMA_VERSION,
    environment,
    read_result,
    read_results,
    result_path,
    write_result,
    write_results,
)
from coldpress.records.schema import IDENTIFYING

RECORD: dict[str, Any] = {
    "status": "ok",
    "protocol": "prefix",
    "model": "EleutherAI/pythia-70m",
    "dataset": "wikitext",
    "subset": "wikitext-2-raw-v1",
    "press": "knorm",
    "compression_ratio": 0.5,
    "ppl": 42.0,
}
FAILED = {"status": "failed", "error": "out of memory", "ppl": None}


def names(folder: Path) -> list[str]:
    """All files of the folder, hidden and temporary ones too."""
    return sorted(os.listdir(folder))


# Names


def test_a_name_tells_the_setting(tmp_path: Path) -> None:
    path = result_path(tmp_path, RECORD)
    assert path.parent == tmp_path
    parts = path.name.removesuffix(".json").split("__")
    assert parts[:-1] == ["prefix", "EleutherAI_pythia-70m", "wikitext", "knorm", "r0.50"]
    assert len(parts[-1]) == 10 and int(parts[-1], 16) >= 0
    for budget, shown in (("budget_tokens", "t512"), ("budget_bytes", "b512")):
        name = result_path(tmp_path, {**RECORD, "compression_ratio": None, budget: 512}).name
        assert name.split("__")[3:-1] == ["knorm", shown]
    name = result_path(tmp_path, {**RECORD, "kv_bits": 4, "kv_bits_config": {"bits": 4}}).name
    assert name.split("__")[3:-1] == ["knorm", "r0.50", "q4"]
    name = result_path(tmp_path, {**RECORD, "kv_bits": "k8v4", "kv_bits_config": {"key_bits": 8}}).name
    assert name.split("__")[3:-1] == ["knorm", "r0.50", "k8v4"]


def test_every_setting_has_its_own_name(tmp_path: Path) -> None:
    changed = [{**RECORD, field: "other"} for field in IDENTIFYING if field != "compression_ratio"]
    changed += [{**RECORD, "compression_ratio": ratio} for ratio in (0, 0.125, 0.12, 0.1251, None)]
    changed += [{**RECORD, "compression_ratio": None, "budget_tokens": n} for n in (512, 513)]
    changed += [{**RECORD, "compression_ratio": None, "budget_bytes": n} for n in (512, 513)]
    changed += [{**RECORD, "speed_only": True}, {**RECORD, "sample_idx": 0}, {**RECORD, "sample_idx": 1}]
    changed += [{**RECORD, "press_config": {"window": w}} for w in (16, 32)]
    found = {result_path(tmp_path, record).name.lower() for record in [RECORD, *changed]}
    assert len(found) == 1 + len(changed)


def test_measured_values_absent_fields_and_types_of_zero_do_not_change_the_name(tmp_path: Path) -> None:
    same = [
        {**RECORD, "ppl": 1.0, "effective_compression_ratio": 0.51, "timestamp": "now"},
        {**RECORD, "sample_idx": None},
        dict(reversed(RECORD.items())),
    ]
    assert {result_path(tmp_path, record) for record in same} == {result_path(tmp_path, RECORD)}
    zero = [result_path(tmp_path, {**RECORD, "compression_ratio": ratio}).name for ratio in (0, 0.0)]
    assert zero[0] == zero[1]
    assert "__r0.00__" in zero[0]


def test_names_are_safe_and_short_whatever_the_model_is_called(tmp_path: Path) -> None:
    record = {**RECORD, "model": "/" + "a b/" * 200 + "..", "press": "é:*?", "dataset": "../x"}
    name = result_path(tmp_path, record).name
    assert len(name) < 250
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzEA0123456789._-r")
    assert write_result(tmp_path, record).parent == tmp_path


# Writing


def test_written_is_what_was_given_with_the_schema(tmp_path: Path) -> None:
    path = write_result(tmp_path / "new" / "folder", {**RECORD, "title": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "schema_version": SCHEMA_VERSION,
        **RECORD,
        "title": "é",
    }
    assert names(path.parent) == [path.name]
    assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_same_setting_replaces_its_older_result(tmp_path: Path) -> None:
    write_result(tmp_path, RECORD)
    write_result(tmp_path, {**RECORD, "ppl": 41.0})
    assert [record["ppl"] for record in read_results(tmp_path)] == [41.0]


def test_a_failure_never_replaces_a_finished_result(tmp_path: Path) -> None:
    finished = write_result(tmp_path, RECORD)
    failed = write_result(tmp_path, {**RECORD, **FAILED})
    assert failed.name == finished.name.removesuffix(".json") + ".failed.json"
    assert json.loads(finished.read_text())["ppl"] == 42.0
    assert names(tmp_path) == sorted([finished.name, failed.name])


def test_a_finished_result_removes_the_failure_of_the_same_setting_only(tmp_path: Path) -> None:
    other = write_result(tmp_path, {**RECORD, **FAILED, "press": "snapkv"})
    write_result(tmp_path, {**RECORD, **FAILED})
    finished = write_result(tmp_path, RECORD)
    assert names(tmp_path) == sorted([finished.name, other.name])


def test_an_interrupted_result_has_a_name_of_its_own_until_it_is_finished(tmp_path: Path) -> None:
    finished = write_result(tmp_path, RECORD)
    partial = write_result(tmp_path, {**RECORD, "status": "interrupted", "ppl": 1.0})
    assert partial.name == finished.name.removesuffix(".json") + ".interrupted.json"
    assert [record["ppl"] for record in read_results(tmp_path)] == [1.0, 42.0]
    write_result(tmp_path, RECORD)
    assert names(tmp_path) == [finished.name]


def test_text_that_is_no_unicode_is_still_json(tmp_path: Path) -> None:
    path = write_result(tmp_path, {**RECORD, "command": "ppl --text_file \udcff.txt"})
    assert json.loads(path.read_text(encoding="utf-8"))["command"] == "ppl --text_file \udcff.txt"


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"ppl": float("nan")}, r"ppl=nan"),
        ({"per_window": [{"nll": 1.0}, {"nll": float("inf")}]}, r"per_window\[1\].nll=inf"),
        ({"env": {"path": Path("x")}}, r"env.path of type \w*Path"),
        ({"compression_ratio": float("nan")}, "compression_ratio"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_named(tmp_path: Path, bad: dict[str, Any], field: str) -> None:
    kept = write_result(tmp_path, RECORD)
    with pytest.raises(SelfCheckError, match=field):
        write_result(tmp_path, {**RECORD, **bad})
    assert names(tmp_path) == [kept.name]
    assert json.loads(kept.read_text())["ppl"] == 42.0


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_breaks_leaves_the_old_result_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    kept = write_result(tmp_path, RECORD)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_result(tmp_path, {**RECORD, "ppl": 1.0})
    assert names(tmp_path) == [kept.name]
    assert json.loads(kept.read_text())["ppl"] == 42.0


# The folder


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    check_writable(tmp_path / "a")
    assert names(tmp_path / "a") == []


def test_check_writable_refuses_files_and_what_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write into"):
        check_writable(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"

    def denied(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)  # tests may run as root, who may write anywhere
    with pytest.raises(OutputError, match="Permission denied") as caught:
        check_writable(tmp_path)
    assert "\n" not in str(caught.value)


# Reading


def test_read_results_returns_records_in_order_and_warns_about_the_rest(tmp_path: Path) -> None:
    for ratio in (0.75, 0.25):
        write_result(tmp_path, {**RECORD, "compression_ratio": ratio})
    write_result(tmp_path, {**RECORD, **FAILED})
    bad = {
        "cut.json": '{"schema_version": 1, "ppl":',
        "list.json": "[1, 2]",
        "nan.json": '{"schema_version": 1, "ppl": NaN}',
        "newer.json": '{"schema_version": 999}',
        "other.json": '{"name": "not ours"}',
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.txt").write_text("not looked at")
    with pytest.warns(UserWarning, match="skipped") as caught:
        records = read_results(tmp_path)
    assert [record["compression_ratio"] for record in records] == [0.25, 0.5, 0.75]
    assert [record["status"] for record in records] == ["ok", "failed", "ok"]
    skipped = {Path(str(w.message).split()[1].rstrip(":")).name for w in caught}
    assert skipped == {*bad, "bytes.json"}


def test_read_results_without_a_folder(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    with pytest.raises(DataError, match="no folder"):
        read_results(tmp_path / "nothing")


# The environment


def test_environment_is_complete_and_can_be_written(tmp_path: Path) -> None:
    env = environment()
    packages = {"python", "torch", "transformers", "datasets", "coldpress"}
    machine = {"platform", "cpu", "threads", "loadavg", "gpu", "driver"}
    assert set(env) == {*packages, *machine, "git_commit", "git_dirty"}
    assert env["threads"] >= 1
    assert env["transformers"] and env["torch"] and env["platform"]
    write_result(tmp_path, {**RECORD, "env": env})


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True, env=env
    )
    return done.stdout.strip()


def test_git_is_that_of_the_package_and_not_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "src" / "coldpress"
    module = package / "eval" / "results.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(results, "PACKAGE_DIR", package)
    monkeypatch.setattr(results, "__file__", str(module))
    look = results._git.__wrapped__  # past its cache
    assert look() == (None, None)  # no checkout at all

    git(tmp_path, "init", "-q", "checkout")
    checkout = tmp_path / "checkout"
    (checkout / "README").write_text("")
    git(checkout, "add", "README")
    git(checkout, "commit", "-q", "-m", "someone's project")
    assert look() == (
        None,
        None,
    )  # a checkout that does not track the package: site-packages inside a project

    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "ours")
    commit = git(checkout, "rev-parse", "HEAD")
    git(tmp_path, "init", "-q", "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere" / ".git"))
    assert look() == (commit, False)

    (checkout / "results.json").write_text("{}")  # outside the package: the code is still that of the commit
    assert look() == (commit, False)
    (package / "new.py").write_text("")
    assert look() == (commit, True)


def test_environment_without_git_or_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert results._git.__wrapped__() == (None, None)


def test_identifying_fields_are_named_once() -> None:
    repeated = [field for field, group in itertools.groupby(sorted(IDENTIFYING)) if len(list(group)) > 1]
    assert repeated == []


def test_a_record_that_cannot_be_written_keeps_no_other_from_it(tmp_path: Path) -> None:
    records = [{"press": "a", "ppl": math.nan}, {"press": "b", "ppl": 2.0}]
    with pytest.raises(SelfCheckError, match="ppl"):
        write_results(tmp_path, records)
    (path,) = tmp_path.iterdir()
    assert read_result(path)["press"] == "b"
