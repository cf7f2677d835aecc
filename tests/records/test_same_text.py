"""One text under two names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.records import record, spread, write

from coldpress.cli import main
from coldpress.records.results import collect
from coldpress.report.sections import sections, text_name

FILE = {"dataset": "book.txt", "subset": None, "settings": {"text_file": "book.txt"}, "timestamp": "2026-01-02"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two points of WikiText, the same two of a file that holds it, and one more of that."""
    points = [("no_press", 0.0, spread(0.0, 0.0)), ("snapkv", 0.5, spread(0.2, 0.01))]
    write(tmp_path / "a", [record(*point) for point in points])
    write(tmp_path / "b", [record(*point, **FILE) for point in [*points, ("knorm", 0.5, spread(0.3, 0.01))]])
    return tmp_path


def test_what_was_measured_twice_is_one_measurement(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a press of one name stands beside the uncompressed cache of the other."""
    found = collect([str(folder)])
    assert sorted(r["press"] for r in found.records) == ["knorm", "no_press", "snapkv"]
    assert {r["timestamp"] for r in found.records} == {"2026-01-02"}
    (section,) = sections(found.records)
    assert text_name(section.first) == "WikiText-103" and len(section.entries) == 3
    line = (
        "2 measured more than once on one text, called wikitext/wikitext-103-raw-v1 and book.txt: the newest is shown"
    )
    assert found.twice == (line,)
    assert main(["report", str(folder), "--output", str(folder / "report")]) == 0
    out, err = capsys.readouterr()
    assert out.count("| snapkv") == 1 and f"note: {line}\n" in err
    assert line in (folder / "report" / "report.md").read_text()


def test_other_texts_and_other_versions_are_measurements_of_their_own(folder: Path) -> None:
    newer = {**record("snapkv", 0.5)["env"], "torch": "9.0"}
    write(
        folder / "c", [record("snapkv", 0.5, text_sha256="cd" * 32, **FILE), record("snapkv", 0.5, env=newer, **FILE)]
    )
    found = collect([str(folder)])
    assert len(found.records) == 5 and len(found.twice) == 1
    assert sum(r["dataset"] == "book.txt" for r in found.records) == 1


def test_what_one_command_measured_twice_is_shown(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [record("snapkv", 0.5)])
    found = collect([str(tmp_path)])
    assert len(found.records) == 2 and not found.twice
