"""coldpress chat: turns are compressed as they age, the system prompt is not, and commands do what they say."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_folder import CONTEXT, QUESTIONS
from tests.tiny_folder import folder as folder

from coldpress import DecodingPress, KnormPress, SnapKVPress, Snapshots
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cli import main
from coldpress.errors import CacheError, InputError, PressError
from coldpress.loading.models import LoadedModel, load_model
from coldpress.serving.conversation import Conversation
from coldpress.serving.wording import chat_ids, prefix_ids

SYSTEM = "You are a miller. Be brief."


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu")


def said(conversation: Conversation, question: str, n: int = 8) -> str:
    return "".join(conversation.ask(question, max_new_tokens=n))


def generated(loaded: LoadedModel, ids: list[int], n: int = 8, **options: Any) -> str:
    given = torch.tensor([ids])
    output = loaded.model.generate(given, **options, max_new_tokens=n, do_sample=False, pad_token_id=1)
    return str(loaded.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def test_turns_are_those_of_the_whole_text(loaded: LoadedModel) -> None:
    conversation = Conversation(loaded.model, loaded.tokenizer, system=SYSTEM)
    for question in QUESTIONS:
        messages = [*conversation.messages, {"role": "user", "content": question}]
        assert said(conversation, question) == generated(loaded, chat_ids(loaded.tokenizer, messages))
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 3]
    assert conversation.held_pairs == conversation.seen_tokens and conversation.tokens_per_s is not None


def test_earlier_turns_are_compressed_and_the_system_prompt_is_not(loaded: LoadedModel) -> None:
    press = KnormPress(0.5)
    conversation = Conversation(loaded.model, loaded.tokenizer, press, SYSTEM, recent_tokens=30)
    system = prefix_ids(loaded.tokenizer, [{"role": "system", "content": SYSTEM}])
    for _ in range(3):
        for question in QUESTIONS:
            said(conversation, question, 4)
    assert conversation.held_pairs < 0.75 * conversation.seen_tokens
    assert conversation.seen_tokens - conversation._compressed <= 30 + 30
    for layer in range(2):
        kept = conversation._cache.positions(layer)
        assert kept[..., : len(system)].tolist() == [[list(range(len(system)))] * 4]
    held = conversation.held_pairs
    conversation.change_press(None)
    assert conversation.held_pairs == conversation.seen_tokens > held


def test_a_text_is_compressed_before_it_is_asked(loaded: LoadedModel) -> None:
    conversation = Conversation(loaded.model, loaded.tokenizer, SnapKVPress(0.5, window_size=8), kv_bits=8)
    conversation.show(CONTEXT)
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5, window_size=8), kv_bits=8)
    snapshot = snapshots.add([{"role": "user", "content": CONTEXT}])
    assert conversation.seen_tokens == snapshot.n_tokens
    ids = chat_ids(loaded.tokenizer, [{"role": "user", "content": f"{CONTEXT}\n\n{QUESTIONS[0]}"}])
    expected = generated(loaded, ids, **cache_argument(snapshots.fork(ids)))
    assert said(conversation, QUESTIONS[0]) == expected
    assert conversation.messages[0]["content"].startswith(CONTEXT)


def test_an_answer_that_is_left_is_part_of_the_turn(loaded: LoadedModel) -> None:
    conversation = Conversation(loaded.model, loaded.tokenizer)
    pieces = conversation.ask(QUESTIONS[0], max_new_tokens=50)
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": first}
    messages = [*conversation.messages, {"role": "user", "content": QUESTIONS[1]}]
    assert said(conversation, QUESTIONS[1]) == generated(loaded, chat_ids(loaded.tokenizer, messages))


def test_saved_and_loaded(loaded: LoadedModel, tmp_path: Path) -> None:
    conversation = Conversation(loaded.model, loaded.tokenizer, KnormPress(0.5), SYSTEM, recent_tokens=10)
    with pytest.raises(InputError, match="Nothing was said yet"):
        conversation.save(str(tmp_path / "a"))
    for question in QUESTIONS:
        said(conversation, question)
    conversation.save(str(tmp_path / "a"))
    other = Conversation(loaded.model, loaded.tokenizer, KnormPress(0.5), recent_tokens=10)
    other.load(str(tmp_path / "a"))
    assert other.messages == conversation.messages and other.kv_bytes <= conversation.kv_bytes
    assert said(other, QUESTIONS[0]) == said(conversation, QUESTIONS[0])
    for damaged in ("", "{", "[]", '{"messages": 3}', '{"messages": [3], "open": "", "ids": [], "compressed": 0}'):
        (tmp_path / "a.json").write_text(damaged)
        with pytest.raises(InputError, match=r"a\.json is no conversation that was saved"):
            other.load(str(tmp_path / "a"))
    with pytest.raises(InputError, match="no conversation"):
        other.load(str(tmp_path / "b"))
    other.save(str(tmp_path / "b"))
    (tmp_path / "a.json").write_bytes((tmp_path / "b.json").read_bytes())
    with pytest.raises(CacheError, match="holds another conversation"):
        other.load(str(tmp_path / "a"))


def test_what_cannot_be_said(loaded: LoadedModel) -> None:
    with pytest.raises(PressError, match="goes on while decoding"):
        Conversation(loaded.model, loaded.tokenizer, DecodingPress(KnormPress()))
    conversation = Conversation(loaded.model, loaded.tokenizer)
    with pytest.raises(InputError, match="The text is empty"):
        conversation.show(" ")
    for say in (conversation.show, lambda text: said(conversation, text)):
        with pytest.raises(InputError, match="and the model has 256 positions"):
            say(CONTEXT * 3)
    assert conversation.messages == [] and conversation.seen_tokens == 0


# In the terminal

Talk = Callable[..., tuple[int, str]]


@pytest.fixture
def talk(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    monkeypatch.chdir(tmp_path)

    def call(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", "--model", str(folder), "--device", "cpu", "--max_new_tokens", "6", *options])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return call


def test_commands(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(CONTEXT)
    given = [
        "/file a.txt",
        QUESTIONS[0],
        "/save b",
        "/press knorm 0.75",
        "/load b",
        "/clear",
        "",
        "Who?",
        "/quit",
        "No.",
    ]
    code, out = talk(*given, options=("--compression_ratio", "0.25", "--press_args", '{"window_size": 8}'))
    assert code == 0
    lines = out.splitlines()
    assert lines[0].endswith(
        "SampledDefensiveKVPress(compression_ratio=0.25, window_size=8); /help lists what else can be said"
    )
    sizes = [line for line in lines if line.startswith("[")]
    held = [int(line.split()[3]) for line in sizes]
    seen = [int(line.split()[0][1:]) for line in sizes]
    assert len(sizes) == 5 and held[0] == pytest.approx(0.75 * seen[0], abs=1)
    assert held[2] == pytest.approx(0.25 * seen[2], abs=1) and (seen[3], held[3]) == (seen[1], held[1])
    assert seen[4] < 20
    assert "written: b.json, b.safetensors" in lines and {"b.json", "b.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/fil a.txt", "error: There is no command /fil. Did you mean 'file'? /help lists them."),
        ("/file", "error: /file needs a name after it"),
        ("/file nowhere", "error: nowhere cannot be read (No such file or directory)."),
        ("/press snapkw 0.5", "error: Unknown press 'snapkw'."),
        ("/press snapkv half", "error: A ratio is a number in [0, 1), got 'half'."),
        ("/press decoding_knorm 0.5", "goes on while decoding"),
        ("/load nowhere", "error: nowhere.json is no conversation that was saved"),
        ("/help", "/press NAME RATIO  compress by another press"),
    ],
)
def test_what_is_said_of_commands(talk: Talk, line: str, message: str) -> None:
    code, out = talk(line, "Who?")
    assert code == 0 and message in out and out.splitlines()[-1].startswith("[")


def test_a_line_that_is_not_utf_8_ends_nothing(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a TypeError, and the conversation was gone."""
    given = io.TextIOWrapper(io.BytesIO(b"Who?\n\xff\xfe\nWho?\n"), "utf-8")
    monkeypatch.setattr(io, "StringIO", lambda text: given)
    code, out = talk()
    assert code == 0 and out.count("error: This line is not UTF-8, so nothing was asked; write it in UTF-8.\n") == 1
    sizes = [line for line in out.splitlines() if line.startswith("[")]
    assert len(sizes) == 2 and int(sizes[1].split()[0][1:]) > int(sizes[0].split()[0][1:])  # it goes on


def test_ctrl_c_ends_an_answer(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Conversation.ask

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        for n, piece in enumerate(real(self, *args, **kwargs)):
            yield piece
            if n == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    code, out = talk("Who?", "/quit")
    assert code == 0 and " ...\n[" in out


@pytest.mark.parametrize(
    "options, name", [((), "SampledDefensiveKVPress"), (("--chunk_tokens", "16"), "SnapKVPress")], ids=str
)
def test_the_press_where_none_is_named(talk: Talk, options: tuple[str, ...], name: str) -> None:
    code, out = talk("/quit", options=options)
    assert code == 0 and f", {name}(compression_ratio=0.5); " in out
    say = ["Who wrote it?", "What was it that she wrote to him?", "And when did he read it?"] * 2
    code, out = talk(*say, "/quit", options=("--recent_tokens", "30", *options))
    sizes = re.findall(r"\[(\d+) tokens seen, (\d+) held", out)
    assert code == 0 and len(sizes) == 6 and int(sizes[-1][1]) < int(sizes[-1][0]), out  # what is older is compressed


def test_options_that_cannot_work(talk: Talk) -> None:
    code, out = talk(options=("--temperature", "3"))
    assert code == 2 and "--temperature must be in [0, 2]" in out
