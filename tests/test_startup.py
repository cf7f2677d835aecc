"""What is imported when: help and versions without torch, and a package that defers what it can."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from tests.report.records import record, spread, write

import coldpress
from coldpress import public, registration
from coldpress.cli import main
from coldpress.commands import early

SRC = Path(__file__).parents[1] / "src"
HEAVY = {"torch", "transformers", "numpy", "safetensors", "datasets", "pandas", "pyarrow", "matplotlib", "ray", "tqdm"}
HEAVY |= {"fastapi", "uvicorn", "prometheus_client"}
COMMANDS = [
    "recommend",
    "ppl",
    "speed",
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
    "presses",
]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env)


def imported(code: str, *arguments: str) -> set[str]:
    """The modules that are there after ``code``."""
    code += "\nimport json, sys; sys.stderr.write(json.dumps([name for name in sys.modules]))"
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr))


RUN = """
import sys
from coldpress_command import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
"""


def test_help_and_versions_need_neither_torch_nor_transformers() -> None:
    asked = [[], ["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    assert not imported(RUN.format(commands=asked)) & HEAVY


REFUSED = """
import sys
from coldpress_command import main
sys.modules["fastapi"] = None
print([main(arguments) for arguments in {commands!r}])
"""


def test_what_needs_no_model_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    text = ["--text_file", str(tmp_path / "nothing.txt")]
    commands = [
        ["ppl", *text],
        ["ppl", "--text_file", str(tmp_path)],
        ["sweep", *text],
        ["compress", *text, "--output", "a"],
        ["inspect", "--dataset", str(tmp_path / "empty.txt"), "--output", "a"],
        ["recommend", "--use", "qa", "--data", text[1]],
        ["tasks", "--compression_ratio", "0.5,50"],
        ["compress", *text, "--output", "a", "--compression_ratio", "1"],
        ["ppl", "--dataset", "demo", "--subset", "nosuch"],
        ["calibrate", "qfilter", "--dataset", "wikitxt"],
        ["serve"],
    ]
    hidden = "import sys\nfor name in ('torch', 'transformers', 'datasets'): sys.modules[name] = None\n"
    done = python(hidden + REFUSED.format(commands=commands))
    assert done.stdout == f"{[2] * len(commands)}\n" and len(done.stderr.splitlines()) == len(commands), done.stderr
    assert "needs a package that is not installed (fastapi)" in done.stderr


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """What is looked at early is left in it."""
    os.mkfifo(tmp_path / "pipe")
    early.check_early({"text_file": str(tmp_path / "pipe"), "compression_ratio": 0.5})
    early.check_early({"dataset": str(tmp_path / "pipe")})


@pytest.mark.parametrize("command", ["ppl", "speed", "compress", "presses"])
def test_an_unknown_option_leads_to_the_help_of_its_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, *(["--text_file", "a", "--output", "b"] if command == "compress" else []), "--modle", "x"])
    assert capsys.readouterr().err.endswith(f"(see coldpress {command} --help)\n")


def test_an_option_that_a_name_goes_on_from_is_the_first_that_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ppl", "--press_name", "snapkv"])
    assert "--press_name snapkv. Did you mean '--press' or " in capsys.readouterr().err


def test_a_warning_is_one_line() -> None:
    code = f"import warnings\n{RUN.format(commands=[['presses', 'knorm']])}\nwarnings.warn('said\\x1b so')"
    assert python(code).stderr == "warning: said\\x1b so\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_a_help_fits_into_eighty_columns(
    command: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*([] if command is None else [command]), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and [line for line in lines if len(line) > 80] == []


def test_a_report_only_reads_and_a_brief_one_says_what_presses_do(tmp_path: Path) -> None:
    write(tmp_path, [record("no_press"), record("knorm", 0.5, spread(0.1, 0.01))])
    commands = [["report", str(tmp_path), "--table"], ["report", str(tmp_path)]]
    assert not imported(RUN.format(commands=commands)) & {"torch", "transformers"}
    assert "arXiv:2406.11430" in python(RUN.format(commands=[["report", str(tmp_path), "--brief"]])).stdout


def test_the_help_of_every_command_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert listed == COMMANDS


def test_a_bare_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.out.startswith("usage: coldpress") and shown.err == ""
    assert main([]) == 2
    assert capsys.readouterr() == shown


def test_versions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"coldpress": "1.2", "torch": "3.4+cpu"}

    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == "coldpress 1.2\ntorch 3.4+cpu\ntransformers is not installed\n"


def test_an_option_without_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--verson"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: unrecognized arguments: --verson. Did you mean '--version'? (see coldpress --help)"
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = imported("import coldpress; dir(coldpress); coldpress.__version__; hasattr(coldpress, 'no_such_name')")
    assert not found & HEAVY
    assert {name for name in found if name.startswith("coldpress")} == {
        "coldpress",
        "coldpress.backends",
        "coldpress.registration",
        "coldpress.version",
    }


AFTERWARDS = """
import coldpress, json, sys
assert "torch" not in sys.modules
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, pipeline
config = GPTNeoXConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
model = AutoModelForCausalLM.from_config(config, attn_implementation="coldpress").eval()
ids, mask = torch.arange(12)[None], torch.tensor([[0] * 3 + [1] * 9])
ours = model(ids, attention_mask=mask).logits
model.set_attn_implementation("sdpa")
assert torch.allclose(ours, model(ids, attention_mask=mask).logits, atol=1e-5)
from transformers.pipelines import PIPELINE_REGISTRY
tasks = [PIPELINE_REGISTRY.check_task(name)[1] for name in ("kv-press-text-generation", "coldpress-text-generation")]
assert all(task["impl"] is coldpress.KVPressTextGenerationPipeline for task in tasks)
import transformers.modeling_utils, transformers.pipelines
for module in (transformers.modeling_utils, transformers.pipelines):
    assert type(module.__loader__) is type(module.__spec__.loader) is type(torch.__loader__)
"""


def test_transformers_knows_the_backend_and_the_task_after_a_mere_import() -> None:
    done = python(AFTERWARDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", ["transformers.pipelines", "coldpress; import transformers.masking_utils", "coldpress.models.pipeline"]
)
def test_it_knows_them_whatever_was_imported_first(before: str) -> None:
    code = AFTERWARDS.replace('assert "torch" not in sys.modules', "")
    done = python(f"import {before}\n{code}")
    assert done.returncode == 0, done.stderr


# Public names


def test_every_public_name_is_where_the_package_takes_it_from() -> None:
    tree = ast.parse(Path(public.__file__).read_text())
    names = [alias.asname or alias.name for node in tree.body if hasattr(node, "names") for alias in node.names]
    assert sorted({*names, "__version__"} - {"annotations"}) == sorted(coldpress.__all__)
    for name in coldpress.__all__:
        assert name in dir(coldpress) and getattr(coldpress, name) is not None


def test_names_come_in_every_way() -> None:
    everything: dict[str, object] = {}
    exec("from coldpress import *", everything)
    assert everything.keys() >= set(coldpress.__all__)
    press = coldpress.SnapKVPress(0.25)
    assert pickle.loads(pickle.dumps(press)) == press
    assert coldpress.cache.layer is importlib.import_module("coldpress.cache.layer")
    with pytest.raises(AttributeError, match=r"^module 'coldpress' has no attribute 'SnapKVPres'$"):
        coldpress.SnapKVPres  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SnapKVPres'"):
        exec("from coldpress import SnapKVPres")


# What is done after somebody else's import


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, with a package ``made_up`` in the place of transformers."""
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "__init__.py").write_text("")
    (tmp_path / "made_up" / "part.py").write_text("import made_up.other\nDONE = True\n")
    (tmp_path / "made_up" / "other.py").write_text("")
    (tmp_path / "made_up" / "broken.py").write_text("raise ValueError('broken')\n")
    said: list[str] = []

    def tell(name: str) -> Callable[[], None]:
        return lambda: said.append(f"{name} {getattr(sys.modules[name], 'DONE', None)}")

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registration, "_PARTS", {n: tell(n) for n in ("made_up.part", "made_up.broken", "made_up.not")})
    yield said
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]


def test_it_is_done_when_the_module_has_run(told: list[str]) -> None:
    registration.register()
    importlib.import_module("made_up.other")
    assert told == []
    assert importlib.util.find_spec("made_up.part") is not None  # whoever only looks has imported nothing
    assert importlib.util.find_spec("made_up.not") is None
    assert told == []
    module = importlib.import_module("made_up.part")
    assert told == ["made_up.part True"]
    assert module.__spec__ is not None and module.__loader__ is module.__spec__.loader
    assert type(module.__loader__) is type(importlib.import_module("made_up.other").__loader__)
    importlib.reload(module)
    assert len(told) == 2


def test_it_is_done_at_once_where_the_module_is_there(told: list[str]) -> None:
    importlib.import_module("made_up.part")
    told.clear()
    registration.register()
    assert told == ["made_up.part True"]
    assert sum(isinstance(finder, registration._Finder) for finder in sys.meta_path) == 1


def test_a_module_that_fails_fails_as_before(told: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^broken$"):
        importlib.import_module("made_up.broken")
    with pytest.raises(ModuleNotFoundError, match=r"made_up\.not"):
        importlib.import_module("made_up.not")
    assert told == []
