"""The documents say what the code says: generated parts are fresh, links lead somewhere, READMEs have one shape."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from tests.snippets import for_installed

import coldpress
from coldpress.bases.press import BasePress
from coldpress.bases.registry import catalogue, make_press, press_names
from coldpress.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
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
    def shape(name: str) -> tuple[list[str], list[str], list[str]]:
        text = (ROOT / name).read_text(encoding="utf-8")
        return (
            re.findall(r"^##+(?= )", text, re.M),
            re.findall(r"generated: (.+?) -->", text),
            re.findall(r"^python .+$", text, re.M),
        )

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


def code_of(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_code_of_both_readmes_is_one() -> None:
    """But for its comments."""
    english, chinese = ([ast.dump(ast.parse(block)) for block in code_of(name)] for name in READMES)
    assert english == chinese


def test_the_code_of_the_readmes_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_of(READMES[0])
    assert len(blocks) > 5
    demo = str(ROOT / "src" / "coldpress" / "assets" / "demo" / "model")
    names: dict[str, object] = {}
    for block in blocks:  # one goes on from the other
        exec(for_installed(block).replace("EleutherAI/pythia-70m", demo).replace(', device_map="auto"', ""), names)
    out, said = capsys.readouterr()
    assert "olives" in out and "deprecated" not in said
    (tokens, n_bytes), (_, most) = re.findall(r"^(\[.+\]) (\d+)$", out, re.MULTILINE)  # budgets in tokens, in bytes
    assert tokens == str([128] * 6)
    assert int(most) <= 1 << 20 < int(most) + int(n_bytes) // 128
    assert re.search(r"^4\d\d \[1[234]\d(, 1[234]\d){5}\]$", out, re.MULTILINE)  # while decoding: 128 to 143 are held


@pytest.mark.parametrize("name", READMES)
def test_the_command_lines_of_the_readmes_are_understood(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = re.findall(r"^(?:coldpress |python evaluation/perplexity.py ).+$", text, re.MULTILINE)
    assert len(lines) >= 9
    for line in lines:
        words = shlex.split(line.replace("python evaluation/perplexity.py", "coldpress ppl"))
        args = _parser(None).parse_args(words[1:])  # exits if it does not understand
        given = getattr(args, "press", None) or []
        named = given if isinstance(given, list) else [given]
        assert all(press in ("all", "no_press", *press_names()) for press in named)


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md", "docs/presses.md"])
def test_rows_of_a_table_have_its_columns(document: str) -> None:
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|[-:| ]+\|", line):
            n_columns = len(re.findall(r"(?<!\\)\|", line))
            rows = [lines[i - 1], *itertools.takewhile(lambda row: row.startswith("|"), lines[i + 1 :])]
            assert len(rows) > 1
            for row in rows:
                assert len(re.findall(r"(?<!\\)\|", row)) == n_columns, row


def test_links_within_the_documents_lead_to_headings() -> None:
    for name in ("README.md", "README.zh-CN.md", "docs/presses.md"):
        for target, anchor in re.findall(
            r"\]\(((?!https?:)[^)#]*)#([^)]+)\)", (ROOT / name).read_text(encoding="utf-8")
        ):
            where = (ROOT / name).parent / target if target else ROOT / name
            headings = re.findall(r"^#+ (.+)$", where.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{name} links to #{anchor}"
