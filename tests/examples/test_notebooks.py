"""The notebook runs from top to bottom, offline, and its outputs are those of its cells."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from tests.snippets import for_installed

pandas, matplotlib = pytest.importorskip("pandas"), pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "measure_a_press.ipynb"


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*non-interactive")  # plt.show() without a screen
def test_the_cells_run(
    cells: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = for_installed("".join(cell["source"])).replace('"6144"', '"2048"')  # fewer windows
            ast.parse(code)
            exec(compile(code, NOTEBOOK.name, "exec"), names)
    out = capsys.readouterr().out
    assert "largest difference of the logits: 0.0" in out and "ΔNLL" in out
    frame, windows = names["frame"], names["windows"]
    assert len(frame) == 1 + 4 * 3 and (frame.status == "ok").all()
    assert set(windows.press) == set(frame.press) and windows.delta.notna().all()
    assert len(names["figure"].axes[0].containers) == 4  # a line with its error bars for each press
    matplotlib.pyplot.close("all")


def test_it_was_run_from_top_to_bottom(cells: list[dict[str, Any]]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    assert len(NOTEBOOK.read_bytes()) < 120_000
