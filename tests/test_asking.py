"""coldpress compress and coldpress ask: what is saved by one command is asked by another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_folder import CONTEXT, QUESTIONS
from tests.tiny_folder import folder as folder
from transformers import pipeline

from coldpress import AdaKVPress, PressedCache, SampledDefensiveKVPress, SnapKVPress
from coldpress.cli import main
from coldpress.commands import asking, chatting
from coldpress.io import progress
from coldpress.loading.models import LoadedModel, load_model
from coldpress.models.pipeline import TASKS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(CONTEXT)

    def call(*arguments: str) -> tuple[int, str, str]:
        given = [] if "--model" in arguments or arguments[0] == "ask" else ["--model", str(folder)]
        try:
            code = main([*arguments, *given, "--device", "cpu"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def test_what_is_compressed_is_asked(run: Run, folder: Path, tmp_path: Path) -> None:
    given = ["--text-file", "text.txt", "--output", "a.safetensors", "--press", "adakv_snapkv"]
    code, out, err = run("compress", *given, "--compression_ratio", "0.6")
    size = (tmp_path / "a.safetensors").stat().st_size
    assert code == 0 and re.match(
        r"note: reading (\d+) tokens, compressing by adakv_snapkv\nreading: \1/\1 tokens, ", err
    )
    assert re.fullmatch(rf"a.safetensors: \d+ tokens, (59|60|61)\.\d% removed, {size:,} bytes, of {folder}\n", out)
    pipe = pipeline(TASKS[0], model=str(folder), device="cpu", max_new_tokens=8)
    expected = pipe(CONTEXT, questions=QUESTIONS, press=AdaKVPress(SnapKVPress(0.6)))["answers"]
    code, out, _ = run("ask", "a.safetensors", QUESTIONS[0], "--max_new_tokens", "8")
    assert code == 0 and out == f"{expected[0].strip()}\n"
    code, out, _ = run("ask", "a.safetensors", *QUESTIONS, "--max_new_tokens", "8")
    assert out == "".join(f"{q}\n{a.strip()}\n\n" for q, a in zip(QUESTIONS, expected, strict=True))


def test_what_is_read_again_is_shown_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    given = ["--text_file", "text.txt", "--output", "a.safetensors", "--chunk_tokens", "16", "--press", "snapkv"]
    _, _, err = run("compress", *given)
    n = int(re.match(r"note: reading (\d+) tokens", err)[1])  # type: ignore[index]
    read = [int(found) for found in re.findall(rf"reading: (\d+)/{n} tokens", err)]
    assert read == sorted(read) and read[-1] == n and len(set(read)) > n // 16
    _, _, err = run("compress", *given[:4], "--press", "kvzip", "--press_args", '{"chunk_size": 32}')
    again = [int(found) for found in re.findall(r"compressing: (\d+) tokens read again, ", err)]
    assert again == sorted(again) and again[-1] > n and len(set(again)) > n // 32


def test_an_answer_is_printed_while_it_is_made(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("compress", "--text_file", "text.txt", "--output", "a.safetensors")
    printed: list[str] = []
    put = asking._Answers.put

    def watched(self: Any, value: Any) -> None:
        put(self, value)
        printed.append(capsys.readouterr().out)

    monkeypatch.setattr(asking._Answers, "put", watched)
    code, out, _ = run("ask", "a.safetensors", *QUESTIONS[:2], "--max_new_tokens", "8")
    assert code == 0 and len(printed) == 18 and printed[0] == f"{QUESTIONS[0]}\n"
    assert sum(bool(piece) for piece in printed[1:9]) > 3 and out == "\n\n"


def test_answers_of_beams_are_printed_whole(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("compress", "--text_file", "text.txt", "--output", "a.safetensors")
    loaded = load_model(str(folder), device="cpu")
    loaded.model.generation_config.num_beams = 2
    monkeypatch.setattr(asking, "load_model", lambda **_: loaded)
    code, out, _ = run("ask", "a.safetensors", *QUESTIONS[:2], "--max_new_tokens", "8")
    assert code == 0 and out.startswith(f"{QUESTIONS[0]}\n") and f"\n\n{QUESTIONS[1]}\n" in out


def test_blanks_and_halves_of_characters_wait(capsys: pytest.CaptureFixture[str]) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    shown = asking._Answers(Tokenizer(), ["Who?"])
    printed = []
    shown.put(torch.tensor([[1, 2]]))
    for byte in " né ☃\x1b  ".encode():
        shown.put(torch.tensor([byte]))
        printed.append(capsys.readouterr().out)
    shown.end()
    assert [piece for piece in printed if piece] == ["n", "é", " ☃", "\\x1b"]
    assert capsys.readouterr().out == "\n"


def test_budgets_presses_without_a_ratio_and_long_texts(run: Run, folder: Path, tmp_path: Path) -> None:
    given = ["--text_file", "text.txt", "--output", "a.safetensors"]
    model = pipeline(TASKS[0], model=str(folder), device="cpu").model
    for more, stored in (
        (["--press", "snapkv", "--budget_tokens", "20"], 20),
        (["--press", "simlayerkv", "--press_args", '{"lazy_threshold": 0.0, "n_recent": 12, "n_initial": 3}'], 15),
        (["--chunk_tokens", "16"], None),
    ):
        assert run("compress", *given, *more)[0] == 0
        cache = PressedCache.load("a.safetensors", model)
        assert cache.stored_lengths()[0] == (cache.seen_tokens // 2 if stored is None else stored)
    assert cache.press == SnapKVPress(0.5)
    assert run("compress", *given)[0] == 0
    cache = PressedCache.load("a.safetensors", model)
    assert cache.press == SampledDefensiveKVPress(0.5) and cache.achieved_ratio() == pytest.approx(0.5, abs=0.01)
    (tmp_path / "text.txt").write_text(CONTEXT * 10)
    assert run("compress", *given)[0] == 0
    code, out, _ = run("ask", "a.safetensors", "Who came in the autumn?")  # there is room for a question
    assert code == 0 and out


def test_a_text_that_is_cut_is_called_so(run: Run, folder: Path, tmp_path: Path) -> None:
    """Before it is read, in the summary, and when it is asked; one that fits is not."""
    loaded = load_model(str(folder), device="cpu")
    text, most = CONTEXT * 10, loaded.max_positions or 0
    (tmp_path / "text.txt").write_text(text)
    n = 1 + len(loaded.tokenizer(text, verbose=False)["input_ids"])  # after the token that begins a text
    fits = most - asking._ROOM_TOKENS
    code, out, err = run("compress", "--text_file", "text.txt", "--output", "a.safetensors")
    first, second, *_ = err.splitlines()
    assert code == 0 and second == f"note: reading {fits:,} tokens, compressing by sampled_defensive"
    assert first == (
        f"note: The context is cut from {n:,} to its first {fits:,} tokens ({most:,} positions of the model, "
        f"{asking._ROOM_TOKENS} left free for a question and its answer); give a shorter text, or a model with more "
        "positions."
    )
    assert out.startswith(f"a.safetensors: first {fits:,} of {n:,} tokens, 50.0% removed, ")
    code, _, err = run("ask", "a.safetensors", "Who?")
    assert code == 0 and err == (
        f"note: a.safetensors holds the first {fits:,} of {n:,} tokens of its text: the rest was cut off, and no "
        "answer can know of it.\n"
    )
    (tmp_path / "text.txt").write_text(CONTEXT)
    assert "first" not in run("compress", "--text_file", "text.txt", "--output", "a.safetensors")[1]
    assert "cut" not in run("ask", "a.safetensors", "Who?")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ask nothing.safetensors Who?", "There is no file nothing.safetensors"),
        ("ask . Who?", "^error: . is a folder; name the file in it that coldpress compress wrote"),
        ("compress --text_file . --output a", r"cannot read '\.' \(Is a directory\)"),
        ("ask text.txt Who?", "text.txt is damaged or no file of a saved cache"),
        ("ask text.txt", "the following arguments are required: question"),
        ("compress --text_file text.txt", "the following arguments are required: --output"),
        ("compress --text_file nothing.txt --output a", "No such file"),
        ("compress --text_file text.txt --output .", "'.' is no name of a file"),
        ("compress --text_file text.txt --output text.txt/a", "is a file: give a folder"),
        ("compress --text_file text.txt --output a --press snapvk", "Unknown press 'snapvk'. Did you mean 'snapkv'"),
        (
            "compress --text_file text.txt --output a --press no_press --compression_ratio 0.5",
            "no_press keeps every pair",
        ),
        (
            "compress --text_file text.txt --output a --press no_press --budget_tokens 9",
            "keeps every pair, and budget_t",
        ),
        ("compress --text_file text.txt --output a --press decoding_h2o", "goes on while decoding and compresses noth"),
        (
            "compress --text_file text.txt --output a --press finch",
            "finch chooses by the question at the end of a text",
        ),
        ("chat --press finch", "finch chooses by the question at the end of a text"),
        ("chat --press no_press --budget_tokens 9", "no_press keeps every pair"),
        ("compress --text_file text.txt --output a --compression_ratio 1", r"number in \[0, 1\)"),
        ("compress --text_file text.txt --output a --compression_ratio 0.1 --budget_tokens 9", "both say how much"),
        ('compress --text_file text.txt --output a --press_args {"budget_tokens":9}', "use --budget_tokens"),
        ('compress --text_file text.txt --output a --press_args {"window_size":"9"}', "window_size must be int"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    for module in (asking, chatting):  # a model is not loaded for it
        monkeypatch.setattr(module, "load_model", None)
    code, out, err = run(*arguments.split(" "))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and re.search(message, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.fixture
def compressed(run: Run) -> Callable[..., None]:
    """Make a.safetensors with the model of that name."""

    def compress(model: str, *more: str) -> None:
        code, out, err = run(
            "compress", "--text_file", "text.txt", "--output", "a.safetensors", "--model", model, *more
        )
        assert code == 0 and out.endswith(f", of {model}\n"), err

    return compress


def test_the_file_knows_its_model(
    run: Run, compressed: Callable[..., None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def watched(**options: Any) -> Any:
        asked.append(options)
        return load_model(**options)

    monkeypatch.setattr(asking, "load_model", watched)
    shutil.copytree(folder, tmp_path / "tiny")
    (tmp_path / "elsewhere").mkdir()
    for model, name in (("tiny", str(tmp_path / "tiny")), ("demo", "demo")):
        monkeypatch.chdir(tmp_path)
        compressed(model, "--dtype", "bfloat16")
        monkeypatch.chdir("elsewhere")
        code, out, err = run("ask", str(tmp_path / "a.safetensors"), "Who?", "--max_new_tokens", "2")
        said = [line for line in err.splitlines() if not line.startswith("note: this CPU multiplies bfloat16")]
        assert code == 0 and not said and out.strip()
        assert asked[-1] == {"name": name, "dtype": "bfloat16", "device": "cpu"}
        code, out, _ = run("ask", str(tmp_path / "a.safetensors"), "Who?", "--model", str(folder))
        assert asked[-1] == {"name": str(folder), "dtype": "bfloat16", "device": "cpu"}
        assert code == (0 if model == "tiny" else 2)  # another model is refused as before
        run("ask", str(tmp_path / "a.safetensors"), "Who?", "--dtype", "float32")
        assert asked[-1] == {"name": name, "dtype": "float32", "device": "cpu"}


def test_a_commit_of_the_hub_is_asked_for_again(
    run: Run, compressed: Callable[..., None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(folder), device="cpu")
    asked: list[dict[str, Any]] = []

    def from_the_hub(**options: Any) -> LoadedModel:
        asked.append(options)
        loaded.model.config._commit_hash = "c0ffee"
        return replace(loaded, name=options["name"])

    monkeypatch.setattr(asking, "load_model", from_the_hub)
    compressed("somebody/model", "--revision", "v1")
    assert run("ask", "a.safetensors", "Who?")[0] == 0
    assert asked[-1] == {"name": "somebody/model", "revision": "c0ffee", "dtype": "float32", "device": "cpu"}
    assert run("ask", "a.safetensors", "Who?", "--revision", "v2")[0] == 0
    assert asked[-1]["revision"] == "v2"


def test_a_model_that_is_not_here_is_named(
    run: Run, compressed: Callable[..., None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "tiny")
    compressed("tiny")
    shutil.rmtree(tmp_path / "tiny")
    code, out, err = run("ask", "a.safetensors", "Who?")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"error: a.safetensors needs the model that made it, '{tmp_path / 'tiny'}', which cannot be")
    assert "say where it is with --model" in err
    loaded = load_model(str(folder), device="cpu")
    loaded.model.config._name_or_path = ""
    cache = PressedCache.load("a.safetensors", loaded.model)
    cache.save("a.safetensors", loaded.model)
    code, out, err = run("ask", "a.safetensors", "Who?")
    assert (code, out) == (2, "")
    assert err == "error: a.safetensors does not name the model that made it; say which one with --model.\n"
