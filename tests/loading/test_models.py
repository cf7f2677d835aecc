"""Models: where they come from, on what they run, and what a result says about them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from coldpress.errors import DeviceError, ModelError, UnreachableError
from coldpress.loading import models
from coldpress.loading.models import load_model, pick_device, pick_dtype


def test_the_demo_model_is_complete_and_ready() -> None:
    loaded = load_model("demo")
    model = loaded.model
    assert model.config._attn_implementation == "coldpress" and not model.training
    assert model.dtype == torch.float32 and loaded.device == torch.device("cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert loaded.max_positions == 1024
    facts = loaded.facts()
    assert facts["model"] == facts["model_source"] == "demo"
    assert facts["num_params"] == sum(p.numel() for p in model.parameters())
    assert facts["weights_bytes"] == 4 * facts["num_params"]
    assert loaded.tokenizer("olives")["input_ids"]


@pytest.mark.parametrize(("name", "implementation"), [("sdpa", "coldpress"), ("eager", "coldpress_eager")])
def test_the_arithmetic_is_what_was_asked_for(name: str, implementation: str) -> None:
    loaded = load_model("demo", attn_implementation=name, dtype="bfloat16")
    assert loaded.model.config._attn_implementation == implementation
    assert loaded.facts()["attn_implementation"] == name
    assert loaded.facts()["dtype"] == "bfloat16"


def test_the_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    demo = Path(load_model.__code__.co_filename).parents[1] / "assets" / "demo" / "model"
    prints = []
    for i in range(3):
        model = AutoModelForCausalLM.from_pretrained(demo)
        with torch.no_grad():
            model.get_output_embeddings().weight[0, 0] += i // 2  # the first two are alike
        model.save_pretrained(tmp_path / str(i))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, tmp_path / str(i))
        prints.append(load_model(str(tmp_path / str(i))).facts()["weights_fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "gpu", "", "meta"):
        with pytest.raises(DeviceError, match="--device"):
            pick_device(name)


def test_dtypes() -> None:
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == "auto"
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16


def test_a_model_that_needs_code_of_its_own_is_refused_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asked"))
    auto = '{"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}'
    (tmp_path / "config.json").write_text(f'{{"model_type": "x", "auto_map": {auto}}}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_slow_type_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.times_slower(torch.float32) == 1
    monkeypatch.setattr(models, "times_slower", lambda dtype: 1.0 if dtype == torch.float32 else 7.3)
    load_model("demo", device="cpu")
    assert "times slower" not in capsys.readouterr().err
    load_model("demo", device="cpu", dtype="bfloat16")
    said = capsys.readouterr().err
    assert "this CPU multiplies bfloat16 matrices 7 times slower than float32: long prompts will wait." in said


@pytest.mark.parametrize("name", ["smolm2", "dmo"])
def test_a_model_s_own_name_that_is_misspelt_is_suggested(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "hub_problem", lambda path: "no network")
    with pytest.raises(
        UnreachableError, match=rf"{name} is neither.*Did you mean '{'smollm2' if 'm2' in name else 'demo'}'"
    ):
        load_model(name)
    with pytest.raises(UnreachableError) as caught:
        load_model("somebody/model")
    assert "Did you mean" not in str(caught.value)
