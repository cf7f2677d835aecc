"""The rooms of the source: what import-linter relies on, and what it does not check."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

import coldpress

SOURCE = Path(coldpress.__file__).parent


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("coldpress", cache_dir=None)


def test_lazy_imports_are_seen(graph: grimp.ImportGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "coldpress.eval.evaluate" in graph.find_modules_directly_imported_by("coldpress.cli")  # inside a function
    room = tmp_path / "made_up"
    room.mkdir()
    (room / "__init__.py").touch()
    (room / "low.py").write_text("def f():\n    from made_up import high\n    return high\n")
    (room / "high.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made_up.typed import T\n"
    )
    (room / "typed.py").write_text("T = int\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made_up = grimp.build_graph("made_up", cache_dir=None)
    assert made_up.find_modules_directly_imported_by("made_up.low") == {"made_up.high"}
    assert made_up.find_modules_directly_imported_by("made_up.high") == {"made_up.typed"}


def test_no_circle_of_files(graph: grimp.ImportGraph) -> None:
    below: dict[str, set[str]] = {}  # all that a module imports, directly or not
    for module in graph.modules - {"coldpress"}:
        reached, left = set(), [module]
        while left:
            found = graph.find_modules_directly_imported_by(left.pop()) - reached - {"coldpress"}
            reached |= found
            left += found
        below[module] = reached
    assert [module for module, reached in below.items() if module in reached] == []


def test_files_hold_one_idea() -> None:
    lines = {path.relative_to(SOURCE).as_posix(): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: n for name, n in lines.items() if n > 400} == {}
    assert lines["cache/layer.py"] <= 350


def test_every_room_says_what_it_is_for() -> None:
    for path in SOURCE.rglob("__init__.py"):
        assert path.read_text().startswith('"""'), path
