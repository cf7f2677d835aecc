"""Progress on stderr: a bar for people, lines for log files."""

from __future__ import annotations

import sys

import pytest

from coldpress.io import progress as module
from coldpress.io.progress import WorkClock, note, progress


def test_in_a_log_file_it_is_a_line_at_most_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 9.0, 12.0, 13.0, 21.0, 25.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    assert list(progress(list("abcdef"), "speed")) == list("abcdef")
    assert capsys.readouterr().err == "speed: 3/6, 12 s\nspeed: 6/6, 25 s\n"


def test_the_time_left_is_that_of_all_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    clock = WorkClock(2)
    clock.plan("perplexity", 100.0)
    clock.plan("speed", 300.0)
    for part in ("perplexity", "speed"):
        for _ in clock.progress([None] * 4, part, part):
            now += 60.0
    assert capsys.readouterr().err.splitlines() == [
        "perplexity: 1/4, 60 s, about 15 min left in all",
        "perplexity: 2/4, 120 s, about 14 min left in all",
        "perplexity: 3/4, 180 s, about 13 min left in all",
        "perplexity: 4/4, 240 s, about 12 min left in all",
        "speed: 1/4, 60 s, about 6 min left in all",  # it is faster than its work had let expect
        "speed: 2/4, 120 s, about 4 min left in all",
        "speed: 3/4, 180 s, about 2 min left in all",
        "speed: 4/4, 240 s",
    ]


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(list("abc"), "speed")) == list("abc")
    err = capsys.readouterr().err
    assert "\rspeed: 100%" in err and "3/3" in err


def test_notes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    note("mind this")
    note("broken", kind="error")
    assert capsys.readouterr().err == "note: mind this\nerror: broken\n"
