"""evaluation/smoke_pythia70m.py, the first thing that a newcomer runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import huggingface_hub
import pytest

SCRIPT = Path(__file__).parents[1] / "evaluation" / "smoke_pythia70m.py"


def smoke(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str, str]:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_it_prints_a_short_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = smoke(monkeypatch, capsys, "--model", "demo")
    assert code == 0, err
    lines = dict(line.split(":", 1) for line in out.splitlines())
    assert list(lines) == ["model", "press", "context", "achieved", "answer"]
    assert lines["press"].strip() == "KnormPress(compression_ratio=0.5)"
    assert "500 tokens, 250 stored per layer" in lines["context"]
    assert lines["achieved"].startswith(" 0.500")
    assert len(lines["answer"]) > 20


def test_without_a_network_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    code, out, err = smoke(monkeypatch, capsys)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and "EleutherAI/pythia-70m" in err and "--model demo" in err


def test_a_ratio_that_cannot_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = smoke(monkeypatch, capsys, "--model", "demo", "--compression_ratio", "1")
    assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1
