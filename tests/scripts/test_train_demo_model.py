"""scripts/train_demo_model.py: a few steps on a synthetic text."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo_model.py"
SIZE = ["--layers", "1", "--hidden", "32", "--heads", "2", "--positions", "64", "--rotary_pct", "0.5"]
RUN = [*SIZE, "--vocab_size", "300", "--batch_tokens", "512", "--lr", "0.01", "--log_every", "100"]
STEPS = ["--steps", "12", "--save_every", "4"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write(path: Path, rows: list[str | None], column: str = "text") -> Path:
    parquet.write_table(pyarrow.table({column: pyarrow.array(rows, pyarrow.string())}), path)
    return path


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = random.Random(0)
    sentence = "the cold {} presses the {} oil"
    nouns = ["green", "winter", "stone", "old", "mill"]
    rows = [" ".join(sentence.format(words.choice(nouns), words.choice(nouns)) for _ in range(150)) for _ in "ab"]
    return write(tmp_path_factory.mktemp("data") / "books.parquet", [*rows, None])


@pytest.fixture(scope="module")
def trained(script: ModuleType, books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    assert script.main(["--data", str(books), "--out", str(out), *RUN, *STEPS]) == 0
    return out


def test_the_held_out_loss_falls(trained: Path) -> None:
    losses = [loss for _, loss in json.loads((trained / "training.json").read_text())["held_out_losses"]]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]


def test_the_result_loads_with_the_settings_given(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.dtype == torch.float16
    assert model.gpt_neox.layers[0].attention.head_size == 16
    assert len(model.gpt_neox.rotary_emb.inv_freq) == 4  # half of the 8 rotated dimensions
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 0)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 1, 64)
    inputs = tokenizer("the cold stone\npresses é", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(inputs["input_ids"][0]) == "the cold stone\npresses é"
    assert model(**inputs).logits.isfinite().all()


def test_a_resumed_run_computes_what_an_uninterrupted_one_does(
    script: ModuleType, books: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--data", str(books), "--out", str(tmp_path), *RUN, *STEPS]
    batch = script.training_batch

    def interrupted(*args):
        if args[-1] == 6:  # between two checkpoints
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(script, "training_batch", interrupted)
    assert script.main(run) == 130
    assert not (tmp_path / "model.safetensors").exists()
    assert script.main(run) == 2  # not without --resume
    monkeypatch.setattr(script, "training_batch", batch)
    assert script.main([*run, "--resume", "--lr", "0.1"]) == 2
    assert script.main([*run, "--resume"]) == 0
    for name, weight in AutoModelForCausalLM.from_pretrained(trained).state_dict().items():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[name], weight)


def test_a_given_tokenizer_is_used(script: ModuleType, books: Path, trained: Path, tmp_path: Path) -> None:
    run = ["--data", str(books), "--out", str(tmp_path), *RUN, "--steps", "1", "--tokenizer", str(trained)]
    assert script.main(run) == 0
    assert (tmp_path / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()


def test_rows_are_documents_or_the_lines_of_articles(script: ModuleType, tmp_path: Path) -> None:
    book = "a book\n" * 500
    books = write(tmp_path / "books.parquet", [book, None, book])
    lines = ["", " = One = \n", "", " text \n", " = = Part = = \n", " more \n", " = Two = \n", " end \n"]
    wiki = write(tmp_path / "wiki.parquet", lines)
    assert list(script.documents([books])) == [book, book]
    assert list(script.documents([wiki])) == [
        "\n",
        " = One = \n\n text \n = = Part = = \n more \n",
        " = Two = \n end \n",
    ]


@pytest.mark.parametrize("length", [8, 64, 1024])
def test_repeated_spans_come_from_earlier_in_the_window(script: ModuleType, length: int) -> None:
    changed = 0
    for seed in range(50):
        window = torch.arange(length)
        script.repeat_spans(window, torch.Generator().manual_seed(seed))
        assert (window <= torch.arange(length)).all()  # whatever is new stood further left
        changed += int((window != torch.arange(length)).any())
    assert changed == 50


def test_a_third_of_the_windows_repeats_something(script: ModuleType) -> None:
    tokens = torch.arange(10_000)
    batch = script.training_batch(tokens, 64, 64 * 600, 0, 0)
    assert batch.shape == (600, 64)
    assert torch.equal(batch, script.training_batch(tokens, 64, 64 * 600, 0, 0))
    assert not torch.equal(batch, script.training_batch(tokens, 64, 64 * 600, 0, 1))
    repeating = (batch != batch[:, :1] + torch.arange(64)).any(1).float().mean()
    assert 0.25 < repeating < 0.42


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--data", "{tmp}/none.parquet"], "does not exist"),
        (["--data", "{tmp}/empty"], "holds no .parquet files"),
        (["--data", "{tmp}/other.parquet"], "no column 'text', only words"),
        (["--data", "{tmp}/broken.parquet"], "not a readable parquet file"),
        (["--data", "{tmp}/short.parquet"], "too little text"),
        (["--tokenizer", "{tmp}/empty"], "holds no tokenizer.json"),
        (["--heads", "3"], "not a multiple of --heads 3"),
        (["--rotary_pct", "0.1"], "gives 1 rotary dimensions"),
        (["--vocab_size", "100"], "256 bytes and 2 special tokens"),
        (["--resume"], "holds no checkpoint.pt"),
        (["--out", "{tmp}/broken.parquet"], "is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    script: ModuleType,
    books: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    complaint: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    write(tmp_path / "other.parquet", ["a"], column="words")
    write(tmp_path / "short.parquet", ["a"])
    run = ["--data", str(books), "--out", str(tmp_path / "out"), *RUN, *STEPS]
    assert script.main([*run, *(part.format(tmp=tmp_path) for part in change)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
