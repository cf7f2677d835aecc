"""Models, tokenizers and texts that do not fit together are refused before anything is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from coldpress.cli import main
from coldpress.errors import ModelError
from coldpress.loading.models import load_model

DEMO = Path(__file__).resolve().parents[2] / "src" / "coldpress" / "assets" / "demo" / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def test_missing_weights_are_refused_and_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.5.mlp" not in k}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 4 of the weights.*layers\.5\.mlp"):
        load_model(str(folder))


def test_a_model_without_a_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises((ModelError, ImportError)):
        load_model(str(folder))


def test_ids_past_the_vocabulary_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    text = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    common = next(token for token in ("\u0120the", "e") if token in vocabulary)
    vocabulary[common] = 9_999
    (folder / "tokenizer.json").write_text(json.dumps(text))
    out = folder.parent / "out"
    code = main(["ppl", "--model", str(folder), "--dataset", "demo", "--ppl_only", "--output_dir", str(out)])
    captured = capsys.readouterr().err
    assert code == 2 and "do not belong together" in captured and not out.exists()


@pytest.mark.parametrize("option", ["--dataset", "--model"])
def test_a_name_that_is_too_long_is_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"--dataset": "--model", "--model": "--dataset"}[option]
    assert main(["ppl", option, "./" + "a" * 300, other, "demo", "--ppl_only"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", ['{"name": 1}', "[" * 100_000, '{"epsilon": 1e400}'])
def test_odd_press_arguments_are_one_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ppl", "--model", "demo", "--dataset", "demo", "--press", "expected_attention", "--press_args", value]
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_empty_output_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppl", "--model", "demo", "--dataset", "demo", "--output_dir", ""]) == 2
    assert "--output_dir is empty" in capsys.readouterr().err


def test_a_plain_perplexity_beside_a_press_says_that_it_is_the_uncompressed_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["ppl", "--model", "demo", "--dataset", "demo", "--press", "knorm", "--ppl_only", "--limit_tokens", "300"]
    assert main([*asked, "--output_dir", str(tmp_path)]) == 0
    assert "no press touches this" in capsys.readouterr().out
