"""scripts/install_torch.py: which build of torch it chooses."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "install_torch.py"


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
