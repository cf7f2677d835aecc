"""The documents say what the code says: generated parts are fresh, links lead somewhere, READMEs have one shape."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from tests.snippets import for_installed

import coldpress
from coldpress.bases.press import BasePress
from coldpress.bases.registry import catalogue, make_press, press_names
from coldpress.cli import _parser
from coldpress.records.results import read_results

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
GUIDE = sorted(path.name for path in ROOT.glob("docs/guide/*.md"))
RUN_ELSEWHERE = {"serve.md": "tests/serving/test_guide.py", "lm-eval.md": "tests/eval/test_harness.py"}
FOLDERS = ("docs", "benchmarks", "examples")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
DEMO = str(ROOT / "src" / "coldpress" / "assets" / "demo" / "model")
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


def test_generated_parts_are_fresh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(ROOT / "scripts" / "generate_docs.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    found = runpy.run_path(script)["main"]()
    assert found == 0, f"{capsys.readouterr().err}: run python scripts/generate_docs.py"


def test_a_table_of_quality_says_what_its_records_say() -> None:
    """What was not measured has not failed, and every version that a row was measured with is named."""
    folder = ROOT / "benchmarks" / "quality"
    text = (folder / "README.md").read_text(encoding="utf-8")
    records = [r for r in read_results(folder / "results") if r["protocol"].startswith("prefix")]
    assert {r["status"] for r in records} == {"ok"} and "| failed |" not in text
    for ratio in ("0.5", "0.75"):
        part = text.partition(f"<!-- generated: quality {ratio} -->")[2].partition("<!-- end -->")[0]
        own = [r for r in records if r["compression_ratio"] == float(ratio)]
        lines = {f"torch {r['env']['torch']}, transformers {r['env']['transformers']}" for r in own}
        assert own and all(line in part for line in lines)


def links(document: Path) -> list[tuple[str, str]]:
    """Files that a document links to, as it names them, and headings in them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return LINK.findall(text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target, anchor in links(document):
        where = document.parent / target if target else document
        assert where.exists(), f"{document.name} links to {target}"
        if anchor and where.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", where.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{document.name} links to {target}#{anchor}"


def test_both_readmes_have_the_same_parts() -> None:
    def shape(name: str) -> tuple[list[str], ...]:
        text = (ROOT / name).read_text(encoding="utf-8")
        return (
            re.findall(r"^##+(?= )", text, re.M),
            re.findall(r"generated: (.+?) -->", text),
            [len(row.split("|")) for row in re.findall(r"^\|.+$", text, re.M)],
            shell_lines(name),
            [target for target, _ in links(ROOT / name) if "README" not in target],
        )

    assert shape("README.md") == shape("README.zh-CN.md")


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 160


def test_every_page_of_the_guide_is_listed() -> None:
    for index in (ROOT / "docs" / "guide" / "README.md", ROOT / "README.md", ROOT / "mkdocs.yml"):
        text = index.read_text(encoding="utf-8")
        assert [name for name in GUIDE if name != "README.md" and name not in text] == [], index.name


def test_the_site_lists_pages_that_there_are() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    assert len(pages) > 30
    for page in pages:
        assert page == "index.md" or (ROOT / "docs" / page).exists() or (ROOT / page).exists(), page


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


def test_every_public_name_is_in_the_reference() -> None:
    """In docs/api.md, by where it is defined, or a press in docs/presses.md."""
    api, presses = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "presses.md"))
    shown = []
    for path in re.findall(r"^::: (\S+)$", api, re.MULTILINE):
        module, _, name = path.rpartition(".")
        shown.append(getattr(importlib.import_module(module), name))
    for name in {*coldpress.__all__} - {"__version__", "presses"}:
        assert getattr(coldpress, name) in shown or f"\n### {name}\n" in presses, name


def test_contributing_shows_a_press_as_it_is() -> None:
    assert code_of("CONTRIBUTING.md")[0] == (ROOT / "src" / "coldpress" / "presses" / "knorm.py").read_text("utf-8")


def code_of(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines(name: str) -> list[str]:
    """Lines of the blocks for a shell, joined where they go on, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line.partition(" #")[0].strip() for line in "".join(blocks).replace("\\\n", "").splitlines()]


def test_the_code_of_both_readmes_is_one() -> None:
    """But for its comments."""
    english, chinese = ([ast.dump(ast.parse(block)) for block in code_of(name)] for name in READMES)
    assert english == chinese


def run(blocks: list[str], names: dict[str, object]) -> None:
    for block in blocks:  # one goes on from the other
        exec(for_installed(block).replace("EleutherAI/pythia-70m", DEMO).replace(', device_map="auto"', ""), names)


@pytest.fixture(scope="module")
def after_the_readme() -> dict[str, object]:
    """What the eight lines leave behind, from which the pages of the guide go on."""
    names: dict[str, object] = {}
    run(code_of("README.md"), names)
    return names


def test_the_readme_has_eight_lines() -> None:
    (block,) = code_of("README.md")
    assert len([line for line in block.splitlines() if line and "import" not in line]) <= 8


def test_the_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run(code_of("README.md"), {})
    out, said = capsys.readouterr()
    assert "olives" in out and "deprecated" not in said


@pytest.mark.parametrize("name", READMES)
def test_the_readme_names_the_embedded_model_wherever_it_is_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (line,) = re.findall(r"`name = (\S+)`", (ROOT / name).read_text(encoding="utf-8"))
    assert (Path(eval(line, {"coldpress": coldpress})) / "config.json").is_file()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "compile.md" else ())  # half a minute
        for name in GUIDE
        if name not in RUN_ELSEWHERE and code_of(f"docs/guide/{name}")
    ],
)
def test_the_code_of_the_guide_runs(
    page: str,
    after_the_readme: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "evaluate.md":
        shutil.copytree(ROOT / "benchmarks" / "quality" / "results", tmp_path / "results" / "perplexity")
    names = dict(after_the_readme)
    run(code_of(f"docs/guide/{page}"), names)
    out, said = capsys.readouterr()
    assert "deprecated" not in said
    if page == "budgets.md":
        (tokens, n_bytes), (_, most), *_ = re.findall(r"^(\[.+\]) (\d+)$", out, re.MULTILINE)  # in tokens, in bytes
        assert tokens == str([128] * 6)
        assert int(most) <= 1 << 20 < int(most) + int(n_bytes) // 128
    if page == "decode.md":
        assert re.search(r"^4\d\d \[1[234]\d(, 1[234]\d){5}\]$", out, re.MULTILINE)  # 128 to 143 are held


@pytest.mark.parametrize("name", [*READMES, *(f"docs/guide/{name}" for name in GUIDE)])
def test_the_command_lines_of_the_documents_are_understood(name: str) -> None:
    for line in shell_lines(name):
        line = line.replace("python evaluation/perplexity.py", "coldpress ppl")
        if line.startswith("coldpress "):
            args = _parser(None).parse_args(shlex.split(line)[1:])  # exits if it does not understand
            given = getattr(args, "press", None) or []
            named = given if isinstance(given, list) else [given]
            assert all(press in ("all", "no_press", *press_names()) for press in named)


def test_the_documents_show_the_commands() -> None:
    lines = [line for name in GUIDE for line in shell_lines(f"docs/guide/{name}")]
    shown = {line.split()[1] for line in lines if line.startswith("coldpress ")}
    assert shown >= {
        "ppl",
        "sweep",
        "tasks",
        "benchmark",
        "calibrate",
        "compress",
        "ask",
        "chat",
        "serve",
        "inspect",
        "report",
    }
    assert sum(line.startswith("python evaluation/") for line in lines) >= 9


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
