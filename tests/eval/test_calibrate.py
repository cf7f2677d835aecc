"""``coldpress calibrate``: what it writes is what evaluations find, and what cannot work is one clear line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import coldpress
from coldpress import ExpectedAttentionPress, KnormPress
from coldpress.bases import registry
from coldpress.bases.registry import press_names
from coldpress.cli import main
from coldpress.commands.calibrating import pick_samples
from coldpress.errors import DataError
from coldpress.io.artefacts import artefact_path

DEMO = Path(coldpress.__file__).parent / "assets" / "demo" / "model"
FEW = ["--n_samples", "2", "--sample_tokens", "60"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-NeoX with the demo's tokenizer and 128 positions."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, rotary_pct=0.25, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command line on the tiny model and the demo text, unless it says otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path / "artefacts"))

    def call(*arguments: object) -> tuple[int, str, str]:
        given = [str(a) for a in arguments]
        for option, default in (("--model", tiny), ("--dataset", "demo")):
            if option not in given and "--text_file" not in given:
                given += [option, str(default)]
        try:
            code = main(given)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def evaluate(run: Run, press: str, *more: str) -> tuple[int, str, str]:
    how = ["--ppl_apply_press", "--ppl_only", "--limit_tokens", "300", "--output_dir", "results"]
    return run("ppl", "--press", press, *how, *more)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", press_names(kind="calibrated", at_prefill=True))
def test_what_is_calibrated_is_found(run: Run, tiny: Path, tmp_path: Path, name: str) -> None:
    given = {"duo_attention": '{"head_compression_ratio": 0.5}', "quality": '{"risk": 0.5}'}
    head = ["--press_args", given[name]] if name in given else []
    code, out, err = evaluate(run, name, *head)
    assert code == 2 and out == "" and not (tmp_path / "results").exists()  # said before any work
    own = f" --press_args '{given[name]}'" if name == "quality" else ""
    assert "error: " in err and err.endswith(
        f"Make them with coldpress calibrate {name} --model {tiny} --dataset wikitext{own}.\n"
    )
    code, out, err = run("calibrate", name, *FEW, *(head if name == "quality" else []))
    assert code == 0
    (file,) = (tmp_path / "artefacts" / name).iterdir()
    assert out == f"{name} of {tiny}, 2 sample(s), 120 tokens: {file}\n"
    assert re.fullmatch(r"calibration: 2/2, \d+ s\n", err)
    code, out, err = evaluate(run, name, *head)
    assert code == 0 and name in out
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert record["status"] == "ok" and record["ppl"] > 1


def test_a_schedule_is_calibrated_as_the_press_inside_it(run: Run, tiny: Path) -> None:
    code, out, _ = run("calibrate", "decoding_triattention", *FEW)
    file = artefact_path("triattention", str(tiny))
    assert code == 0 and file.is_file() and out.endswith(f"{file}\n")
    assert evaluate(run, "triattention")[0] == 0


def test_on_what_it_was_measured_is_in_the_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    args = '{"n_sink": 2}'
    run("calibrate", "expected_attention_with_stats", *FEW, "--output", "deep/stats.safetensors", "--press_args", args)
    assert not (tmp_path / "artefacts").exists()
    with safe_open(tmp_path / "deep" / "stats.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["coldpress"])["facts"]
        assert file.get_tensor("covariance").shape == (2, 4, 8, 8)
    expected = {"model": str(tiny), "model_type": "gpt_neox", "dtype": "float32", "n_layers": 2, "n_heads": 4}
    expected |= {"dataset": "demo", "n_samples": 2, "n_tokens": 120, "coldpress_version": coldpress.__version__}
    assert {key: facts[key] for key in expected} == expected
    assert len(facts["text_sha256"]) == len(facts["tokens_sha256"]) == 64 and "n_sink=2" in facts["parameters"]
    args = json.dumps({"stats_folder": "deep/stats.safetensors"})
    assert evaluate(run, "expected_attention_with_stats", "--press_args", args)[0] == 0


def test_a_folder_without_an_artefact(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = evaluate(run, "expected_attention_with_stats", "--press_args", json.dumps({"stats_folder": "empty"}))
    assert code == 2 and len(err.splitlines()) == 1
    assert "stats_folder='empty' is a folder with no file model.safetensors in it; name the file itself" in err


def test_calibration_repeats(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("calibrate", "qfilter", *FEW, "--output", f"{name}.safetensors")[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_press_inside_another_one_is_calibrated_for_it(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves belong to a scorer and to its parameters."""
    assert run("calibrate", "lukv", *FEW)[0] == 0
    variant = coldpress.LUKVPress(ExpectedAttentionPress(epsilon=2e-2)).variant()
    assert artefact_path("lukv", str(tiny), variant).is_file()
    monkeypatch.setitem(registry._BY_NAME, "lukv_knorm", registry._Entry(coldpress.LUKVPress, (KnormPress,)))
    code, _, err = evaluate(run, "lukv_knorm")
    assert code == 2 and "LUKVPress needs budget curves" in err
    assert run("calibrate", "lukv_knorm", *FEW)[0] == 0
    assert evaluate(run, "lukv_knorm")[0] == 0
    wrapped = registry._Entry(coldpress.ChunkKVPress, (coldpress.QFilterPress,))
    monkeypatch.setitem(registry._BY_NAME, "chunkkv_qfilter", wrapped)
    code, _, err = evaluate(run, "chunkkv_qfilter")
    assert code == 2 and "QFilterPress needs filters" in err
    assert run("calibrate", "chunkkv_qfilter", *FEW)[0] == 0
    assert artefact_path("qfilter", str(tiny)).is_file()
    assert evaluate(run, "chunkkv_qfilter")[0] == 0


def test_all_is_what_needs_no_artefact(run: Run, tmp_path: Path) -> None:
    assert evaluate(run, "all")[0] == 0
    measured = {json.loads(path.read_text())["press"] for path in (tmp_path / "results").glob("*.json")}
    assert measured == {"no_press", *press_names(kind="training-free", at_prefill=True)}
    assert measured.isdisjoint(press_names(kind="calibrated"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("calibrate snapkv", "snapkv needs no calibration. These do: duo_attention, expected_attention_with_stats, "),
        ("calibrate no_press", "no_press needs no calibration."),
        ("calibrate adakv_snapkv", "adakv_snapkv needs no calibration."),
        ("calibrate qfiltr", "Unknown press 'qfiltr'. Did you mean 'qfilter'"),
        ("calibrate", "the following arguments are required: press"),
        ("calibrate qfilter --n_samples 0", "argument --n_samples: must be an integer of at least 1"),
        ("calibrate qfilter --datset demo", "unrecognized arguments: --datset"),
        ("calibrate qfilter --dataset nowhere", "unknown dataset 'nowhere'"),
        ("calibrate qfilter --dataset demo --text_file file", "--dataset and --text_file both say which text is read"),
        ("calibrate qfilter --split validation", "unknown split 'validation' of 'demo', which is a single text"),
        ("calibrate qfilter --text_file . --model demo", "cannot read '.' (Is a directory)"),
        ("calibrate qfilter --model ./nowhere", "--model './nowhere': no such folder"),
        ("calibrate qfilter --output .", "--output '.' is no name of a file"),
        ("calibrate qfilter --output file/a.safetensors", "output folder 'file' is a file: give a folder"),
        ("calibrate qfilter --device cuda:99", "--device cuda:99"),
        ("calibrate qfilter --limit_tokens 1", "The text has fewer than 2 tokens"),
        ("calibrate qfilter --sample_tokens 1", "A sample has fewer than 2 tokens"),
        (
            'calibrate expected_attention_with_stats --press_args {"n_sink":99} --sample_tokens 60',
            "No sample is longer",
        ),
        ('calibrate qfilter --press_args {"n_sink":4}', "qfilter has no parameter 'n_sink'"),
    ],
)
def test_what_cannot_work(run: Run, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = run(*arguments.split())
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_notes(run: Run) -> None:
    _, _, err = run("calibrate", "qfilter", "--limit_tokens", "300")
    assert "note: --sample_tokens 1000 is past the 128 positions of " in err and "cut to 128." in err
    assert "note: the text has 2 sample(s) of up to 128 tokens, not --n_samples 100." in err


def test_samples_are_spread_over_the_text() -> None:
    documents = [torch.arange(25), torch.arange(100, 103), torch.arange(200, 230)]
    starts = [int(ids[0]) for ids in pick_samples(documents, 99, 10)]
    assert starts == [0, 10, 200, 210, 220]
    assert [int(ids[0]) for ids in pick_samples(documents, 2, 10)] == [0, 200]
    assert all(len(ids) == 10 for ids in pick_samples(documents, 3, 10))
    assert [len(ids) for ids in pick_samples(documents, 9, 50)] == [25, 3, 30]
    with pytest.raises(DataError, match="A sample has fewer than 2 tokens"):
        pick_samples([torch.arange(1)], 9, 50)


def test_the_demo_in_seconds(run: Run) -> None:
    code, out, _ = run("calibrate", "qfilter", "--model", "demo", "--n_samples", "2")
    assert code == 0 and out.startswith("qfilter of demo, 2 sample(s), 2,000 tokens: ")
    assert evaluate(run, "qfilter", "--model", "demo", "--context_tokens", "64", "--target_tokens", "16")[0] == 0
