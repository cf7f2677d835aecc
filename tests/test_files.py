"""Names that are not UTF-8, paths that are too long, texts without an end, and an output that takes nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.report.records import record, write

from coldpress.cache.file import require_file
from coldpress.cli import main
from coldpress.errors import CacheError, DataError, OutputError, PressError
from coldpress.io.artefacts import read_artefact
from coldpress.io.files import read_bytes, read_text
from coldpress.io.output import check_output, check_writable
from coldpress.io.terminal import UNSAFE, printable
from coldpress.loading import datasets
from coldpress.loading.datasets import load_corpus
from coldpress.records.results import read_results

DEMO = ["--model", "demo"]
LONG = "a" * 300
NAME = os.fsdecode(b"te\xffxt")  # a file's name may hold any bytes
QUICK = ["--press", "knorm", "--ppl_apply_press", "--ppl_only", "--max_windows", "2", "--context_tokens", "48"]


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A text under a name that is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    text = "".join(f"In year {i} the farmers brought {i * 7} olives to the mill.\n" for i in range(40))
    Path(f"{NAME}.txt").write_text(text, encoding="utf-8")
    return f"{NAME}.txt"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    said.err.encode()
    return said.err


def test_a_text_under_such_a_name_is_measured_and_kept(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"out{NAME}"
    assert main(["ppl", *DEMO, *QUICK, "--target_tokens", "16", "--text_file", odd, "--output_dir", folder]) == 0
    (record,) = read_results(Path(folder))
    assert record["dataset"] == odd and record["status"] == "ok"
    assert main(["report", folder, "--table"]) == 0
    assert r"te\udcffxt.txt" in capsys.readouterr().out


def test_every_command_takes_such_a_name(odd: str) -> None:
    tasks = ["--task", "passkey", "--task_tokens", "64", "--task_examples", "1", "--press", "knorm"]
    assert main(["tasks", *DEMO, *tasks, "--text_file", odd, "--output_dir", NAME]) == 0
    page, cache = f"{NAME}.html", f"{NAME}.safetensors"
    assert main(["inspect", *DEMO, "--text_file", odd, "--limit_tokens", "64", "--output", page]) == 0
    assert r"te\udcffxt.txt" in json.dumps(Path(page).read_text(encoding="utf-8")).replace(r"\\", "\\")
    assert main(["compress", *DEMO, "--text_file", odd, "--press", "knorm", "--output", cache]) == 0
    small = ["--no_speed", "--press", "knorm", "--context_tokens", "48", "--max_windows", "2"]
    assert main(["sweep", *DEMO, *small, "--compression_ratio", "0.5", "--text_file", odd, "--output_dir", NAME]) == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["ppl", *DEMO, "--dataset", "wikitext", "--split", NAME],
        ["ppl", *DEMO, "--dataset", NAME],
        ["ppl", *DEMO, "--dataset", "demo", "--press_args", f'{{"x": "{NAME}"}}'],
        ["ppl", "--model", NAME, "--dataset", "demo"],
        ["tasks", *DEMO, "--dataset", "wikitext", "--subset", NAME],
        ["ask", *DEMO, "no.safetensors", NAME],
        ["inspect", *DEMO, "--dataset", "demo", "--press", NAME, "--output", "page.html"],
    ],
)
def test_what_is_no_file_has_to_be_utf8(argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert r"\udcff" in refused(capsys, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["ppl", *DEMO, "--text_file", LONG],
        ["ppl", *DEMO, "--dataset", LONG],
        ["ppl", "--model", LONG, "--dataset", "demo"],
        ["ppl", *DEMO, "--dataset", "demo", "--output_dir", LONG],
        ["tasks", *DEMO, "--output_dir", LONG],
        ["sweep", "--config", LONG],
        ["sweep", *DEMO, "--text_file", LONG],
        ["inspect", *DEMO, "--dataset", "demo", "--output", LONG],
        ["compress", *DEMO, "--text_file", os.devnull, "--output", LONG],
        ["calibrate", "qfilter", *DEMO, "--dataset", "demo", "--output", LONG],
        ["ask", *DEMO, LONG, "What?"],
        ["ask", *DEMO, "~nobody-of-that-name/x", "What?"],
        ["report", LONG],
        [*("ppl", *DEMO, "--dataset", "demo", "--press", "qfilter"), "--press_args", f'{{"filters": "{LONG}"}}'],
    ],
)
def test_paths_that_no_disk_can_name(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, *argv)


def test_a_folder_has_room_for_the_names_of_results(tmp_path: Path) -> None:
    """A path that is long enough to be too long with a result's name is refused before anything is measured."""
    deep = tmp_path
    while len(str(deep)) < 3900:
        deep = deep / ("d" * min(200, 4000 - len(str(deep)) - 1))
        os.mkdir(deep)
    with pytest.raises(OutputError, match="File name too long"):
        check_writable(deep)
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("output", ["", " ", ".", os.devnull, "nul\0", LONG])
def test_what_is_no_name_of_a_file_to_write(output: str) -> None:
    with pytest.raises(OutputError, match="output"):
        check_output(output, "page.html")


# Files without an end


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="has no such device")
def test_a_text_without_an_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(datasets, "MAX_TEXT_BYTES", 1 << 21)
    with pytest.raises(DataError, match="more than 2 MiB, which is the limit"):
        load_corpus("demo", text_file="/dev/zero")
    monkeypatch.setattr("coldpress.io.files.MAX_BYTES", 1 << 20)
    assert "more than" in refused(capsys, "sweep", "--config", "/dev/zero")


def test_a_pipe_is_read_to_its_end_or_to_the_limit(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write(content: bytes) -> threading.Thread:
        thread = threading.Thread(target=lambda: pipe.write_bytes(content))
        thread.start()
        return thread

    thread = write(b"a short text")
    assert load_corpus("demo", text_file=str(pipe)).documents[0].text == "a short text"
    thread.join()
    thread = write(b"x" * 100)
    with pytest.raises(ValueError, match="more than"):
        read_bytes(pipe, 99)
    thread.join()


def test_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\r\nb\xc3\xa9\n")
    assert read_text(path) == "a\nb\u00e9\n" and read_bytes(path, 7) == b"a\r\nb\xc3\xa9\n"
    with pytest.raises(ValueError, match="more than"):
        read_bytes(path, 6)
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)


# What a terminal is given


def test_printable() -> None:
    assert printable("a\x1b[31mb\x07\r\n\x9b\udcff\u202e") == r"a\x1b[31mb\x07\r\n\x9b\udcff\u202e"
    assert printable("plain Δ é 漢 \U0001f600") == "plain Δ é 漢 \U0001f600"
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


CODE = "import sys; from coldpress.cli import main; sys.exit(main(sys.argv[1:]))"


def outside(folder: Path, redirected: str, *argv: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", CODE, *argv]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *run], cwd=folder, text=True, capture_output=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no such device")
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">/dev/full 2>/dev/full", 1, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_takes_nothing_loses_no_result(tmp_path: Path, redirected: str, code: int, said: str) -> None:
    argv = ["ppl", *DEMO, *QUICK, "--target_tokens", "16", "--dataset", "demo", "--output_dir", "out"]
    done = outside(tmp_path, redirected, *argv)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    (record,) = read_results(tmp_path / "out")
    assert record["status"] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no such device")
def test_a_full_output_is_one_line(tmp_path: Path) -> None:
    done = outside(tmp_path, ">/dev/full", "presses")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: standard output cannot be written (No space left on device)")


def test_texts_of_a_record_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever sends results shall not move the cursor, change colours, or make up a line of a table."""
    evil = "\x1b]0;title\x07\x1b[2Jx\r\nfake | row\u202e"
    sent = record("knorm", 0.5) | dict.fromkeys(("model", "dataset", "protocol", "press"), evil)
    sent |= {"tasks": [{"task": evil, "length": 64, "n": 1, "score": 0.5, "score_base": 0.0}], "subset": evil}
    sent["env"] = {**sent["env"], "cpu": evil, "torch": evil}
    write(tmp_path, [record("snapkv", 0.5), sent])
    (tmp_path / "\x1b[31m.json").write_text("{}")
    assert main(["report", str(tmp_path), "--table"]) == 0
    said = capsys.readouterr()
    for text in (said.out.replace("\n", ""), said.err.replace("\n", "")):
        assert UNSAFE.search(text) is None
    assert r"\x1b[2Jx\r\nfake | row\u202e" in said.out and r"\x1b[31m.json" in said.err


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder without rights. The tests may run as root, who has them all, so what asks the system is told no."""
    monkeypatch.chdir(tmp_path)
    Path("locked", "inside").mkdir(parents=True)

    def deny(name: str, is_itself: bool) -> None:
        real = getattr(os, name)

        def asked(path: Any = ".", *args: Any, **options: Any) -> Any:
            parts = [] if isinstance(path, int) else Path(os.fspath(path)).parts
            if "locked" in parts and (is_itself or parts[-1] != "locked"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return real(path, *args, **options)

        monkeypatch.setattr(os, name, asked)

    for name in ("stat", "mkdir", "open"):
        deny(name, is_itself=False)
    for name in ("listdir", "scandir"):
        deny(name, is_itself=True)
    return "locked"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ppl", *DEMO, "--dataset", "locked"], "locked/README.md cannot be used (Permission denied)"),
        (["recommend", *DEMO, "--data", "locked"], "locked/README.md cannot be used (Permission denied)"),
        (["benchmark", "ruler", *DEMO, "--data", "locked"], "locked cannot be used (Permission denied)"),
        (["report", "locked"], "'locked' cannot be read (Permission denied)"),
        (["report", "locked/inside"], "'locked/inside' cannot be read (Permission denied)"),
        (["report", "."], ". holds no result that can be read"),
        (["ask", "locked/inside", "Who?"], "locked/inside cannot be read (Permission denied)"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_folder_without_rights(locked: str, capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    """It had a traceback, or was said to be empty or not there."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert err.count("\n") == (2 if argv[1] == "." else 1)


def test_artefacts_in_a_folder_without_rights(
    locked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLDPRESS_ARTEFACTS", "locked/art")
    said = refused(capsys, "ppl", *DEMO, *QUICK[2:], "--target_tokens", "16", "--dataset", "demo", "--press", "qfilter")
    assert "Permission denied" in said and "locked/art/qfilter" in said
    said = refused(
        capsys, "ppl", *DEMO, *QUICK[2:], "--target_tokens", "16", "--dataset", "demo", "--press", "qfilter",
        "--press_args", '{"filters": "locked/a.safetensors"}'
    )  # fmt: skip
    assert "'locked/a.safetensors' cannot be read (Permission denied)" in said


def test_what_may_not_be_read_is_not_said_to_be_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read all
    with pytest.raises(CacheError, match="cannot be read"):
        require_file(file)
    with pytest.raises(PressError, match=r"cannot be read \(Permission denied\)"):
        read_artefact(file, "qfilter", {})
