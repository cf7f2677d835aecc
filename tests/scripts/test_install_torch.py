"""scripts/install_torch.py: which build of torch it chooses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "install_torch.py"

# requires_dist of torch 2.13.0 in the report of pip install --dry-run --no-deps --report FILE torch==2.13.0
TORCH = "2.13.0"
TORCH_NEEDS = """
filelock
typing-extensions>=4.10.0
setuptools>=77.0.3
sympy>=1.13.3
networkx>=2.5.1
jinja2
fsspec>=0.8.5
cuda-toolkit[cublas,cudart,cufft,cufile,cupti,curand,cusolver,cusparse,nvjitlink,nvrtc,nvtx]==13.0.3; platform_system == "Linux"
cuda-bindings<14,>=13.0.3; platform_system == "Linux" and python_version < "3.15"
nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"
nvidia-cusparselt-cu13==0.8.1; platform_system == "Linux"
nvidia-nccl-cu13==2.29.7; platform_system == "Linux"
nvidia-nvshmem-cu13==3.4.5; platform_system == "Linux"
triton==3.7.1; platform_system == "Linux" and python_version < "3.15"
"""  # noqa: E501


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as if torch were missing; its installers only leave a note in ``script.done``."""
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done: list[str] = []
    monkeypatch.setattr(module, "done", done, raising=False)
    monkeypatch.setattr(module, "installed", lambda: None)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module, "pip_plan", lambda requirement: plan("torch", "sympy"))
    monkeypatch.setattr(module, "install_with_pip", lambda requirement: done.append("pip"))
    monkeypatch.setattr(module, "install_cpu_build", lambda requirement: done.append("cpu"))
    return module


def plan(*names: str) -> dict:
    return {"install": [{"metadata": {"name": name}} for name in names]}


CUDA = plan("torch", "nvidia-cublas", "cuda-toolkit", "triton", "sympy")


def test_nothing_is_done_when_the_pinned_version_is_there(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "installed", lambda: script.pinned(script.CONSTRAINTS.read_text()))
    assert script.main([]) == 0
    assert script.done == []


@pytest.mark.parametrize(
    ("report", "gpu", "arguments", "chosen"),
    [
        (plan("torch", "sympy"), False, [], "pip"),
        (CUDA, True, [], "pip"),
        (CUDA, False, [], "cpu"),
        (CUDA, False, ["--build", "plain"], "pip"),
        (plan("torch"), True, ["--build", "cpu"], "cpu"),
    ],
)
def test_cuda_packages_are_installed_only_for_a_gpu_or_when_asked_for(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    report: dict,
    gpu: bool,
    arguments: list[str],
    chosen: str,
) -> None:
    monkeypatch.setattr(script, "pip_plan", lambda requirement: report)
    monkeypatch.setattr(script, "has_nvidia_gpu", lambda: gpu)
    assert script.main(arguments) == 0
    assert script.done == [chosen]


def test_cuda_packages_are_told_from_others(script: ModuleType) -> None:
    names = ["torch", "nvidia-nccl-cu13", "cuda-bindings", "pytorch-triton", "triton", "cudamite", "numpy"]
    assert script.cuda_packages(plan(*names)) == names[1:5]


def test_a_failure_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(requirement: str) -> dict:
        return script.call(["sh", "-c", "echo first >&2; echo last >&2; exit 3"], "pip finds no torch")

    monkeypatch.setattr(script, "pip_plan", fail)
    assert script.main([]) == 1
    assert capsys.readouterr().err == "setup: pip finds no torch: last\n"


def pips_torch(system: str) -> dict:
    """What pip plans for the pinned torch: its own build, since a constraint names a version and no build."""
    needs = [Requirement(line) for line in TORCH_NEEDS.split("\n") if line]
    where = {"platform_system": system, "python_version": "3.11"}
    return plan("torch", *(need.name for need in needs if need.marker is None or need.marker.evaluate(where)))


def test_the_pinned_torch_of_pip_needs_cuda_packages_on_linux(script: ModuleType) -> None:
    assert script.pinned(script.CONSTRAINTS.read_text()) == TORCH, "another torch: take its requirements anew"
    assert len(script.cuda_packages(pips_torch("Linux"))) == 7
    assert script.cuda_packages(pips_torch("Darwin")) == []
    constrained = {line.partition("=")[0] for line in script.CONSTRAINTS.read_text().splitlines()}
    assert not constrained & set(script.cuda_packages(pips_torch("Linux")))


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_what_the_readme_says_spares_the_cuda_packages(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, readme: str
) -> None:
    """Its commands, one after the other, on Linux without an NVIDIA GPU: pip never finds torch missing."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```bash\n(.+?)```", text, re.DOTALL) if "pip install -e ." in b]
    commands = [line.partition("#")[0].strip() for line in block.splitlines()]
    monkeypatch.setattr(script, "pip_plan", lambda requirement: pips_torch("Linux"))
    for command in commands:
        if command == "python scripts/install_torch.py":
            assert script.main([]) == 0
        else:
            assert command.startswith("pip install ")
            assert script.done == ["cpu"], f"{command} brings torch, and with it CUDA packages"
    assert not re.search(r"-c constraints\.txt", text)  # which does not spare them


def test_the_cpu_build_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    called: list[list[str]] = []
    monkeypatch.setattr(module, "call", lambda command, what: called.append(command))
    module.install_cpu_build("torch==2.13.0")
    assert called[-1][-3:] == ["--torch-backend", "cpu", "torch==2.13.0"]
