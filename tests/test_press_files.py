"""``--press file.py:MyPress``: a press outside of the package is measured as one of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from coldpress import PressedCache, make_press, press_names
from coldpress.bases.press_files import file_digest, is_press_file, load_press_files
from coldpress.bases.registry import parameters_of, takes_ratio
from coldpress.cli import main
from coldpress.errors import PressError
from coldpress.eval.jobs import Point, config_of, make_jobs
from coldpress.eval.settings import Settings
from coldpress.eval.task_run import TaskSettings

PRESS = '''
from __future__ import annotations
from dataclasses import dataclass
from torch import Tensor
from coldpress import KnormPress, LayerView, ScorerPress, register

@register("mine")
@dataclass(frozen=True)
class MyPress(ScorerPress):
    """Keep small keys, as knorm does.

    Source: none. Needs: keys. Cost: O(T * D).
    """

    power: int = 1

    def score(self, view: LayerView) -> Tensor:
        return -view.keys.float().norm(dim=-1) ** self.power
'''
ANOTHER = '''
@dataclass(frozen=True)
class Another(MyPress):
    """As MyPress."""
'''


def test_a_press_without_a_docstring_has_no_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What dataclass() writes there is none."""
    before, _, after = PRESS.replace('@register("mine")\n', "").split('"""')
    path = tmp_path / "silent.py"
    path.write_text(before + after)
    assert main(["presses", f"{path}:MyPress"]) == 0
    out = capsys.readouterr().out
    assert "no description" in out and "MyPress(compression_ratio:" not in out


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PRESS)
    return path


def test_an_integer_is_a_float_whether_annotations_are_texts_or_classes(tmp_path: Path) -> None:
    texts = PRESS.replace("power: int = 1", "power: float = 1.0\n    root: float | None = None")
    classes = texts.replace("from __future__ import annotations\n", "").replace("keys, as", "keys as")
    for name, code in (("texts.py", texts), ("classes.py", classes)):
        path = tmp_path / name
        path.write_text(code)
        for args in ({"power": 2}, {"power": 2.5}, {"root": 2}, {"root": None}):
            make_jobs(Settings(press=(str(path),), press_args=tuple(args.items())))
        for wrong in (True, "2", None):
            with pytest.raises(PressError, match="power must be int or float, got"):
                make_jobs(Settings(press=(str(path),), press_args=(("power", wrong),)))


def test_it_is_made_by_the_name_of_its_file_and_is_none_of_the_catalogue(file: Path) -> None:
    name = f"{file}:MyPress"
    assert is_press_file(name) and is_press_file(str(file)) and not is_press_file("knorm")
    with pytest.raises(PressError, match="Unknown press"):  # nothing is run before it is asked for
        make_press(name, 0.5)
    load_press_files([name, "knorm"])
    press = make_press(name, 0.5, power=2)
    assert type(press).__name__ == "MyPress" and takes_ratio(name) and "power" in parameters_of(name)
    assert name not in press_names() and "mine" not in press_names()
    load_press_files([name])  # again: the same class
    assert type(make_press(name, 0.5)) is type(press)


def test_another_content_is_another_point(file: Path) -> None:
    def point() -> Point:
        return Point(make_jobs(Settings(press=(str(file),), ppl_apply_press=True, ppl_only=True))[0].press)

    one = point()
    assert config_of(one.press) == {"compression_ratio": 0.5, "power": 1, "file_sha256": file_digest(one.press)}
    file.write_text(PRESS.replace("-view", "view"))
    other = point()
    assert file_digest(one.press) != file_digest(other.press) and one.key != other.key
    assert file_digest(make_press("knorm", 0.5)) is None and "file_sha256" not in (
        config_of(make_press("knorm", 0)) or {}
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit('bye')", r"MyPress\.score ends the process \(SystemExit: bye\)"),
        ("return None", r"MyPress\.score returned NoneType, and has to return a number for each KV head and token"),
        ("return view.keys.norm(dim=-1).long()", r"returned \[1, \d+, 64\] of torch\.int64, and has to"),
        ("return view.keys.norm(dim=-1) * float('nan')", "A score is NaN: the press made it so, or"),
    ],
)
def test_what_goes_wrong_in_it_costs_itself_alone(file: Path, body: str, said: str, tmp_path: Path) -> None:
    file.write_text(PRESS.replace("return -view.keys.float().norm(dim=-1) ** self.power", body))
    how = ["--context_tokens", "64", "--target_tokens", "32", "--max_windows", "1", "--output_dir", str(tmp_path / "o")]
    asked = ["--model", "demo", "--dataset", "demo", "--press", "knorm", f"{file}:MyPress", *how]
    assert main(["ppl", "--ppl_apply_press", "--ppl_only", *asked]) == 1
    found = [json.loads(path.read_text()) for path in (tmp_path / "o").glob("*.json")]
    errors = {record["press"]: record["error"] for record in found}
    assert errors["knorm"] is None and re.search(said, errors[f"{file}:MyPress"])


def test_presses_tells_about_one_in_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presses", f"{file}:MyPress"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{file}:MyPress: ") and "power=1" in out
    assert main(["presses", f"{file}:YourPress"]) == 2
    assert "Did you mean 'MyPress'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "ending", "said"),
    [
        (PRESS, ":YourPress", r"has no press YourPress\. Did you mean 'MyPress'\? It has MyPress\."),
        (PRESS + ANOTHER, "", r"defines Another, MyPress; say which, as .*mine\.py:Another"),
        ("x = 1", ":MyPress", "defines no press, a class such as"),
        ("import nowhere_at_all", ":MyPress", r"cannot be run \(ModuleNotFoundError: No module named"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['book.txt'])", "", r"cannot be run \(SystemExit: 2\)"),
        (PRESS.replace("(frozen=True)", ""), ":MyPress", "write @dataclass"),
        (
            "from dataclasses import dataclass\nfrom coldpress import AdaKVPress\n@dataclass(frozen=True)\n"
            "class Wrap(AdaKVPress):\n    pass\n",
            ":Wrap",
            "Wrap is made around another press",
        ),
    ],
)
def test_what_cannot_be_is_said(file: Path, text: str, ending: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(PressError, match=said):
        load_press_files([f"{file}{ending}"])
    load_press_files(["knorm"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PressError, match=r"no\.py cannot be read \(No such file"):
        load_press_files([f"{tmp_path}/no.py:MyPress"])


def test_workers_do_not_have_it(file: Path) -> None:
    with pytest.raises(PressError, match="--engine ray has workers that do not have"):
        make_jobs(Settings(press=(str(file),), ppl_apply_press=True, ppl_only=True, engine="ray"))
    with pytest.raises(PressError, match="--engine ray has workers that do not have"):
        make_jobs(TaskSettings(press=(str(file),), engine="ray").of_jobs())


def test_a_request_cannot_have_a_file_run(file: Path) -> None:
    from coldpress.commands.serving import press_of

    file.write_text("raise SystemExit('run')" + PRESS)
    with pytest.raises(PressError, match="Unknown press"):
        press_of({}, {"press": f"{file}:MyPress"})


def run(*argv: Any) -> int:
    from coldpress.cli import main

    return main([str(a) for a in argv])


SMALL = ["--model", "demo", "--dataset", "demo", "--context_tokens", "64", "--target_tokens", "16"]


def test_ppl_measures_it_as_the_package_s_own(file: Path, tmp_path: Path) -> None:
    name, folder = f"{file}:MyPress", tmp_path / "results"
    options = [*SMALL, "--max_windows", "1", "--limit_tokens", "200", "--ppl_apply_press", "--ppl_only"]
    assert run("ppl", *options, "--press", name, "knorm", "--output_dir", folder) == 0
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    mine, knorm = (next(r for r in records if r["press"] == press) for press in (name, "knorm"))
    assert mine["loss"] == knorm["loss"] and mine["kept_hash"] == knorm["kept_hash"]
    assert len(mine["press_config"]["file_sha256"]) == 64


def test_inspect_and_compress_take_it(file: Path, tmp_path: Path) -> None:
    name = f"{file}:MyPress"
    source = ["--model", "demo", "--dataset", "demo", "--limit_tokens", "64"]
    assert run("inspect", *source, "--press", name, "--output", tmp_path / "page.html") == 0
    assert "MyPress" in (tmp_path / "page.html").read_text()
    text, saved = tmp_path / "text.txt", tmp_path / "context.safetensors"
    text.write_text("The olives were in the kitchen, and the cat was in the garden. " * 4)
    options = ["--model", "demo", "--text_file", text, "--output", saved]
    assert run("compress", *options, "--press", name) == 0
    from coldpress.loading.models import load_model

    cache = PressedCache.load(saved, load_model("demo").model)
    assert cache.achieved_ratio() > 0.4
