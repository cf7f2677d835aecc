"""The documents say what the code says: generated parts are fresh, links lead somewhere, READMEs have one shape."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import coldpress
from coldpress.presses.base import BasePress
from coldpress.presses.registry import catalogue, make_press, press_names

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def test_generated_parts_are_fresh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(ROOT / "scripts" / "generate_docs.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    found = runpy.run_path(script)["main"]()
    assert found == 0, f"{capsys.readouterr().err}: run python scripts/generate_docs.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_both_readmes_have_the_same_parts() -> None:
    def shape(name: str) -> tuple[int, list[str], list[str]]:
        text = (ROOT / name).read_text(encoding="utf-8")
        return text.count("\n## "), re.findall(r"generated: (.+?) -->", text), re.findall(r"^python .+$", text, re.M)

    assert shape("README.md") == shape("README.zh-CN.md")


def test_every_registered_press_is_exported_and_described() -> None:
    exported = {getattr(coldpress, name) for name in coldpress.__all__}
    for info in catalogue():
        press = make_press(info.name, 0.5 if info.has_ratio else 0.0)
        assert isinstance(press, BasePress)
        assert type(press) in exported, f"coldpress/__init__.py does not export {info.class_name}"
        assert info.summary and info.source and info.needs, f"{info.class_name}'s docstring misses a part"
    assert press_names() == [info.name for info in catalogue()]


def test_the_public_names_are_there_once() -> None:
    assert len(coldpress.__all__) == len(set(coldpress.__all__))
    for name in coldpress.__all__:
        assert hasattr(coldpress, name)


def test_the_readme_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"## In eight lines\n+```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    demo = str(ROOT / "src" / "coldpress" / "assets" / "demo" / "model")
    kvpress = re.search(r"Coming from kvpress.*?```python\n(.*?)```", text, re.DOTALL)
    assert kvpress is not None
    names: dict[str, object] = {}
    exec(example[1].replace("EleutherAI/pythia-70m", demo), names)
    assert "olives" in capsys.readouterr().out
    exec(kvpress[1].replace(', device_map="auto"', ""), names)
