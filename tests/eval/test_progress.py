"""Progress on stderr: a bar for people, lines for log files."""

from __future__ import annotations

import sys

import pytest

from coldpress.eval import progress as module
from coldpress.eval.progress import note, progress


def test_in_a_log_file_it_is_a_line_at_most_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 9.0, 12.0, 13.0, 21.0, 25.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    assert list(progress(list("abcdef"), "speed")) == list("abcdef")
    assert capsys.readouterr().err == "speed: 3/6, 12 s\nspeed: 6/6, 25 s\n"


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(list("abc"), "speed")) == list("abc")
    err = capsys.readouterr().err
    assert "\rspeed: 100%" in err and "3/3" in err


def test_notes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    note("mind this")
    note("broken", kind="error")
    assert capsys.readouterr().err == "note: mind this\nerror: broken\n"
