"""coldpress inspect: what the page shows is what the caches hold, and no text can be anything but text in it."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.architectures import VERSION, tiny, tokens
from tests.presses.words import Words
from tests.tiny_folder import folder as folder
from torch import Tensor

import coldpress
from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    KVzipPress,
    MergingPress,
    PressedCache,
    PyramidKVPress,
    RestoreKVPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cli import main
from coldpress.errors import DataError, ModelError, OutputError, PressError
from coldpress.loading.models import LoadedModel, load_model
from coldpress.models.inspection import Inspection

N = 60
SNAP = SnapKVPress(0.5, window_size=8)
ODD = (
    "<script>alert(1)</script></SCRIPT ><!-- <b>bold</b> --><![CDATA[ ]]> &amp; &lt; {{data}} {{title}} \\u003c \"'`\n"
    "a\tb 😀 👨‍👩‍👧 é 漢字 עברית\r\n\x00\x01\x1b[31m\x7f\x85 \u202eabc\u202c\u200f\u2028\u2029\ufeff\U000e0041 end"
)


class Letters(Words):
    """A fast tokenizer of one token for each character."""

    is_fast = True

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        assert not options["add_special_tokens"]
        ids = tokens(len(text)).tolist()
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}


def look(name: str, presses: Any, **options: Any) -> Inspection:
    return coldpress.inspect(tiny(name), Letters(), "x" * N, presses, **options)


def in_page(page: str) -> dict[str, Any]:
    """What the page's script is given."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL | re.IGNORECASE)
    assert len(found) == 1
    data: dict[str, Any] = json.loads(found[0])
    return data


def numbers(text: str) -> list[int]:
    found: list[int] = np.frombuffer(base64.b64decode(text), dtype="<u4").tolist()
    return found


def masks(data: dict[str, Any]) -> list[Tensor]:
    """The bits of each press, one by one: bool [layers, heads, tokens]."""
    n, shape = len(numbers(data["ids"])), (len(data["heads"]), max(data["heads"]))
    found = []
    for press in data["presses"]:
        raw = base64.b64decode(press["kept"])
        width = (n + 7) // 8
        assert len(raw) == shape[0] * shape[1] * width
        rows = [raw[i : i + width] for i in range(0, len(raw), width)]
        bits = [[bool(row[t // 8] >> (t % 8) & 1) for t in range(n)] for row in rows]
        found.append(torch.tensor(bits).view(*shape, n))
    return found


@pytest.mark.parametrize(
    "press",
    [
        SNAP,
        AdaKVPress(SNAP),
        PyramidKVPress(0.5, window_size=8),
        KnormPress(budget_tokens=7),
        MergingPress(press=SNAP),
        ThinKPress(0.5),
        KVzipPress(0.5),
    ],
    ids=lambda press: type(press).__name__,
)
def test_masks_are_the_positions_of_a_cache(press: BasePress) -> None:
    model = tiny("llama")
    found = look("llama", press)
    cache = PressedCache()
    with press.prepared(model, Letters())(model), torch.no_grad():
        model(tokens(1, N), **cache_argument(cache))
    kept = found.kept(press)
    assert kept.shape == (2, 2, N) and kept.dtype == torch.bool
    for layer in range(2):
        for head, positions in enumerate(cache.positions(layer)[0].tolist()):
            held = sorted(set(positions) - {-1})
            assert kept[layer, head].nonzero().flatten().tolist() == held
            assert int(found.pairs()[layer, head]) == len([p for p in positions if p >= 0])
    assert found.achieved_ratio() == cache.achieved_ratio()
    assert found.heads == (2, 2) and found.kinds == ("", "")
    assert torch.equal(masks(in_page(found.to_html()))[0], kept)


def test_two_presses_and_their_overlap() -> None:
    presses = [SNAP, StreamingLLMPress(0.5)]
    found = look("llama", presses, names=["one", "two"])
    alone = [look("llama", press).kept() for press in presses]
    for i, press in enumerate(presses):
        assert torch.equal(found.kept(i), alone[i]) and torch.equal(found.kept(press), alone[i])
    common = [0, 0]
    for layer in range(2):
        sets = [{(h, t) for h in range(2) for t in range(N) if kept[layer, h, t]} for kept in alone]
        both, either = len(sets[0] & sets[1]), len(sets[0] | sets[1])
        assert 0 < both < either
        assert float(found.overlap()[layer]) == both / either
        common = [common[0] + both, common[1] + either]
    assert found.total_overlap() == common[0] / common[1]
    data = in_page(found.to_html())
    assert all(torch.equal(a, b) for a, b in zip(masks(data), alone, strict=True))
    assert [press["name"] for press in data["presses"]] == ["one", "two"]
    names = look("llama", [KnormPress(0.25), KnormPress(budget_tokens=9)]).names
    assert names == ("KnormPress 0.25", "KnormPress, 9 tokens")
    lines = found.summary().splitlines()
    assert lines[1].split() == ["one", "120", "240", "0.5000"]
    assert f"{found.total_overlap():.3f}" in lines[3]
    with pytest.raises(PressError, match="was not inspected"):
        found.kept(KnormPress(0.5))
    with pytest.raises(PressError, match="one was inspected"):
        look("llama", SNAP).overlap()


def test_in_pieces_each_press_reads_for_itself() -> None:
    presses = [SNAP, AdaKVPress(KnormPress(0.5))]
    found = look("llama", presses, chunk_tokens=16)
    for i, press in enumerate(presses):
        cache = PressedCache(press, chunk_tokens=16)
        coldpress.prefill(tiny("llama"), tokens(1, N), cache)
        for layer in range(2):
            held = [sorted(set(own) - {-1}) for own in cache.positions(layer)[0].tolist()]
            assert [own.nonzero().flatten().tolist() for own in found.kept(i)[layer]] == held
    assert not torch.equal(found.kept(0), look("llama", SNAP).kept())


@pytest.mark.parametrize(
    "name", ["gemma3", pytest.param("lfm2", marks=pytest.mark.skipif(VERSION < (5, 23), reason="5.23"))]
)
@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_layers_without_pairs_to_choose_among_are_said_to_be_such(name: str, chunk_tokens: int | None) -> None:
    found = look(name, SNAP, chunk_tokens=chunk_tokens)
    assert found.heads == (0, 2, 0, 2)
    assert all(word in found.kinds[0] for word in (["window"] if name == "gemma3" else ["state"]))
    assert not found.kept()[0].any() and int(found.kept()[1].sum()) == N
    assert "layers that no press is shown: 0, 2" in found.summary()
    data = in_page(found.to_html())
    assert data["kinds"] == list(found.kinds) and data["presses"][0]["before"] == 4 * N


@pytest.mark.usefixtures("given_weights")
def test_restored_pairs_are_counted_and_are_no_tokens() -> None:
    found = look("llama", RestoreKVPress(0.5))
    data = in_page(found.to_html())["presses"][0]
    assert data["of_no_token"] > 0
    assert data["pairs"] == int(found.pairs().sum()) == int(found.kept().sum()) + data["of_no_token"]


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu")


class Elements(html.parser.HTMLParser):
    """The elements of a page, and the texts of its title and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {"title": [], "script": []}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not {"src", "href", "onerror"} & {name for name, _ in attrs}
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in self.texts:
            self.texts[self.tags[-1]][-1] += data


@pytest.fixture(scope="module")
def odd(demo: LoadedModel) -> Inspection:
    return coldpress.inspect(demo.model, demo.tokenizer, ODD, SnapKVPress(0.5))


def test_a_text_full_of_tags_is_a_text(odd: Inspection) -> None:
    plain, full = Elements(), Elements()
    plain.feed(odd.to_html("a", ["b"]))
    page = odd.to_html(ODD, [ODD])
    full.feed(page)
    assert full.tags == plain.tags and len(full.texts["script"]) == 2
    assert full.texts["script"][1] == plain.texts["script"][1]
    data = json.loads(full.texts["script"][0])
    assert data["text"] == data["title"] == ODD and data["facts"] == [ODD]
    assert re.search(r'id="data">([ -~]*?)</script>', page)  # plain ASCII between them
    assert not re.search(r"https?://", page)
    assert not re.findall("[^\n -~↵·×–−─]", re.sub(r"<title>.*?</title>", "", page, flags=re.DOTALL))


def test_tokens_are_parts_of_the_text(demo: LoadedModel, odd: Inspection) -> None:
    assert odd.text == ODD and len(odd.ids) == len(odd.ends)
    starts = [0, *odd.ends]
    parts = [ODD[a:b] for a, b in zip(starts, odd.ends, strict=False)]
    assert "".join(parts) == ODD
    decode = demo.tokenizer.decode
    for i, (part, token) in enumerate(zip(parts, odd.ids, strict=True)):
        if part and (i + 1 == len(parts) or parts[i + 1]):  # one token for the whole part
            assert decode([token]) == part
    at = ODD.index("😀")
    shared = [token for end, token in zip(odd.ends, odd.ids, strict=True) if end == at + 1]
    assert len(shared) > 1 and decode(shared).strip() == "😀"
    data = in_page(odd.to_html())
    utf16 = ODD.encode("utf-16-le")
    assert numbers(data["ids"]) == list(odd.ids)
    for end, units in zip(odd.ends, numbers(data["ends"]), strict=True):
        assert utf16[: 2 * units].decode("utf-16-le") == ODD[:end]


def test_what_a_tokenizer_leaves_out_belongs_to_the_next_token() -> None:
    class Trimmed(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, Any]:  # "" "a" " b" "\n\n" "c", as some give them
            return {"input_ids": [3, 4, 5, 6, 7], "offset_mapping": [(0, 0), (0, 1), (2, 3), (5, 5), (5, 6)]}

    found = coldpress.inspect(tiny("llama"), Trimmed(), "a b\n\nc  ", KnormPress(0.2))
    assert found.ends == (1, 1, 3, 5, 6) and found.text == "a b\n\nc"
    assert coldpress.inspect(tiny("llama"), Trimmed(), "a b\n\nc", KnormPress(0.2), limit_tokens=3).text == "a b"


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = "x" * N
    for presses, message in (
        ([], "got 0"),
        ([SNAP, SNAP, SNAP], "got 3"),
        (["snapkv"], "presses must be presses"),
        (DecodingPress(KnormPress()), "nothing of a prompt"),
    ):
        with pytest.raises(PressError, match=message):
            look("llama", presses)
    with pytest.raises(PressError, match="1 presses and 2 names"):
        look("llama", SNAP, names=["a", "b"])
    for empty in ("", " \n"):
        with pytest.raises(DataError, match="no tokens"):
            coldpress.inspect(tiny("llama"), Letters(), empty, SNAP)
    with pytest.raises(DataError, match="half a character stands at 1"):
        coldpress.inspect(tiny("llama"), Letters(), "a\ud83d", SNAP)
    slow = Letters()
    slow.is_fast = False
    with pytest.raises(ModelError, match="fast one is needed"):
        coldpress.inspect(tiny("llama"), slow, text, SNAP)
    with pytest.raises(OutputError, match="cannot be written"):
        look("llama", SNAP).save_html(tmp_path / "file" / "page.html")


# -- the command ---------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Anna lives in Rome. " * 20)
    (tmp_path / "empty.txt").write_text(" \n")

    def call(arguments: str) -> tuple[int, str, str]:
        try:
            code = main(["inspect", *arguments.split(), "--model", str(folder), "--device", "cpu"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def test_the_command_writes_a_page(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--text-file text.txt --press snapkv streaming_llm --compression_ratio 0.25 --output a/p.html")
    assert code == 0 and "compressing by snapkv 0.25 and streaming_llm 0.25\nreading: " in err
    page = (tmp_path / "a/p.html").read_text(encoding="utf-8")
    data = in_page(page)
    n = len(numbers(data["ids"]))
    assert [press["name"] for press in data["presses"]] == ["snapkv 0.25", "streaming_llm 0.25"]
    assert data["title"] == "text.txt" and "--output a/p.html" in data["facts"][1]
    assert out.splitlines()[-1] == f"a/p.html: {n} tokens, {len(page.encode()):,} bytes"
    assert "snapkv 0.25" in out and "overlap (Jaccard): 0." in out
    for mask, press in zip(masks(data), data["presses"], strict=True):
        assert int(mask.sum()) == press["pairs"] and press["ratio"] == pytest.approx(0.25, abs=0.01)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["p.html"]


@pytest.mark.parametrize(
    ("arguments", "names", "n_tokens"),
    [
        ("--compression_ratio 0.2 0.6", ["sampled_defensive 0.2", "sampled_defensive 0.6"], None),
        ("--chunk_tokens 16", ["snapkv 0.5"], None),
        ("--press knorm snapkv --budget_tokens 5 9 --limit_tokens 20", ["knorm, 5 tokens", "snapkv, 9 tokens"], 20),
        ('--press snapkv --press_args {"window_size":4} --chunk_tokens 16', ["snapkv 0.5"], None),
        ('--press simlayerkv --press_args {"n_recent":4}', ["simlayerkv"], None),
    ],
)
def test_sizes_and_parameters(run: Run, tmp_path: Path, arguments: str, names: list[str], n_tokens: int | None) -> None:
    code, _, err = run(f"--text_file text.txt --output p.html {arguments}")
    assert code == 0 and err.startswith("note: reading ")
    data = in_page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert [press["name"] for press in data["presses"]] == names
    assert n_tokens is None or len(numbers(data["ids"])) == n_tokens
    if "budget" in arguments:
        assert [set(mask.sum(-1).flatten().tolist()) for mask in masks(data)] == [{5}, {9}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--text_file text.txt", "the following arguments are required: --output"),
        ("--text_file empty.txt --output p.html", "holds no text"),
        ("--text_file nothing.txt --output p.html", "No such file"),
        ("--text_file text.txt --dataset demo --output p.html", "give one of them"),
        ("--text_file text.txt --output .", "'.' is no name of a file"),
        ("--text_file text.txt --output pipe", "'pipe' is no name of a file"),
        ("--text_file text.txt --output a\0b", "is no name of a file"),
        ("--text_file text.txt --output text.txt/p.html", "is a file: give a folder"),
        ("--text_file text.txt --output p.html --press snapvk", "Unknown press 'snapvk'. Did you mean 'snapkv'"),
        ("--text_file text.txt --output p.html --press no_press", "nothing to see"),
        ("--text_file text.txt --output p.html --press knorm tova snapkv", "one press or two side by side; 3"),
        ("--text_file text.txt --output p.html --compression_ratio 0.1 0.2 0.3", "one press or two side by side; 3"),
        ("--text_file text.txt --output p.html --compression_ratio 1", r"number in \[0, 1\)"),
        ("--text_file text.txt --output p.html --compression_ratio 0.5 --budget_tokens 9", "both say how much"),
        ("--text_file text.txt --output p.html --press simlayerkv --budget_tokens 9", "has no budget"),
        ("--text_file text.txt --output p.html --press decoding_knorm", "nothing of a prompt"),
        ('--text_file text.txt --output p.html --press knorm tova --press_args {"a":1}', "belongs to one press"),
        ('--text_file text.txt --output p.html --press_args {"compression_ratio":0.1}', "use --compression_ratio"),
        ('--text_file text.txt --output p.html --press_args {"window_size":"4"}', "window_size must be int"),
    ],
)
def test_bad_input_is_one_line(run: Run, tmp_path: Path, arguments: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # stands for a device, which a page must not take the place of
    code, out, err = run(arguments)
    assert code == 2 and out == ""
    assert (tmp_path / "pipe").is_fifo()
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


def test_a_text_that_is_cut_is_said_to_be(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Anna lives in Rome. " * 500)
    code, _, err = run("--text_file text.txt --output p.html")
    n = len(numbers(in_page((tmp_path / "p.html").read_text(encoding="utf-8"))["ids"]))
    assert code == 0 and f"only the first {n:,} tokens are shown" in err
    code, _, err = run("--text_file text.txt --output p.html --limit_tokens 100000")
    assert code == 0 and f"cut to {n}" in err
