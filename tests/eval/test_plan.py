"""What is fed in, scored and timed; and what the user is told about it."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from coldpress.errors import DataError, InputError
from coldpress.eval.plan import Plan, make_plan
from coldpress.eval.settings import Settings
from coldpress.loading.datasets import Corpus, Document


class Characters:
    """A fast tokenizer whose tokens are the characters of a text; it may put one before each text."""

    is_fast = True
    eos_token_id = 3

    def __init__(self, bos_token_id: int | None = None):
        self.bos_token_id = bos_token_id

    def __call__(
        self, text: str, add_special_tokens: bool, verbose: bool, return_offsets_mapping: bool = False
    ) -> dict[str, list[Any]]:
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        ids = [*first, *(ord(character) for character in text)]
        offsets = [*((0, 0) for _ in first), *((i, i + 1) for i in range(len(text)))]
        return {"input_ids": ids, "offset_mapping": offsets}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(map(chr, ids))


def plan(*texts: str, positions: int | None = 64, tokenizer: Any = None, **settings: Any) -> Plan:
    documents = tuple(Document(f"doc {i}", text) for i, text in enumerate(texts))
    corpus = Corpus("c", "c", None, "test", None, documents)
    asked = Settings(model="m", **{"max_new_tokens": 8, **settings})
    return make_plan(asked, corpus, tokenizer or Characters(), positions)


TEXT = "abcdefghij" * 20


def test_the_windows_have_the_models_positions() -> None:
    made = plan(TEXT, ppl_only=True)
    assert (made.max_length, made.stride, made.protocol) == (64, 64, "strided-L64-S64")
    assert plan(TEXT * 9, positions=1024, ppl_only=True).protocol == "strided-L1024-S512"
    assert plan(TEXT, max_length=32, stride=8, ppl_only=True).protocol == "strided-L32-S8"
    assert made.windows is made.context_ids is None
    assert made.notes == ()


def test_the_context_is_three_quarters_of_the_positions_and_the_targets_are_one() -> None:
    made = plan(TEXT, ppl_apply_press=True, ppl_only=True)
    assert made.protocol == "prefix-C48-T16-S64"
    assert made.windows is not None and made.windows[0].starts == (0, 64, 128)
    assert made.notes == ()
    assert plan(TEXT, ppl_apply_press=True, max_length=32).protocol == "prefix-C24-T8-S32"
    assert plan(TEXT, ppl_apply_press=True, target_tokens=4).protocol == "prefix-C48-T4-S52"
    assert plan(TEXT, ppl_apply_press=True, context_tokens=20).protocol == "prefix-C20-T16-S36"
    assert plan(TEXT, ppl_apply_press=True, context_tokens=20, target_tokens=4, stride=4).protocol == "prefix-C20-T4-S4"


@pytest.mark.parametrize(
    ("settings", "cut", "whole"),
    [
        ({"max_length": 100, "ppl_only": True}, "strided-L64-S64", "strided-L100-S100"),
        ({"max_length": 100, "ppl_only": True, "ppl_apply_press": True}, "prefix-C48-T16-S64", "prefix-C75-T25-S100"),
        (
            {"context_tokens": 90, "ppl_only": True, "ppl_apply_press": True},
            "prefix-C48-T16-S64",
            "prefix-C90-T16-S106",
        ),
        ({"target_tokens": 40, "ppl_only": True, "ppl_apply_press": True}, "prefix-C24-T40-S64", "prefix-C48-T40-S88"),
    ],
)
def test_past_the_positions_only_on_demand(settings: dict[str, Any], cut: str, whole: str) -> None:
    made = plan(TEXT, **settings)
    assert made.protocol == cut
    assert len(made.notes) == 1
    assert "past the 64 positions m was trained on; cut to 64 (--allow_extrapolation uses all)" in made.notes[0]
    made = plan(TEXT, **settings, allow_extrapolation=True)
    assert made.protocol == whole
    assert made.notes and all("because of --allow_extrapolation" in line for line in made.notes)


def test_a_timed_context_past_the_positions_is_cut_with_a_note() -> None:
    made = plan(TEXT, speed_only=True, max_new_tokens=10)
    assert made.protocol == "speed"
    assert made.context_ids is not None and made.context_ids.shape == (1, 54)
    assert made.notes == (
        "a timed context with --max_new_tokens of 210 is past the 64 positions m was trained on; cut to 64 "
        "(--allow_extrapolation uses all).",
    )
    made = plan(TEXT, speed_only=True, max_new_tokens=10, allow_extrapolation=True)
    assert made.context_ids is not None and made.context_ids.shape == (1, 200)
    assert "they are used" in made.notes[0]


def test_a_text_shorter_than_the_timed_context_is_said_and_not_called_cut() -> None:
    made = plan("abc", TEXT[:30], "ab", speed_only=True)
    assert made.context_ids is not None and made.context_ids.tolist() == [[ord(c) for c in TEXT[:30]]]
    assert made.notes == ("the timed context has 30 tokens, not --context_limit 4096: no text is longer.",)
    made = plan("abc", TEXT[:30], "ab", speed_only=True, context_limit=20)
    assert made.context_ids is not None and made.context_ids.shape == (1, 20)
    assert made.notes == ()


def test_unknown_positions_are_assumed_and_said() -> None:
    made = plan(TEXT, positions=None, ppl_only=True)
    assert made.max_length == 2048
    assert made.notes == ("m does not say how many positions it has; 2048 are assumed.",)


def test_documents_are_named_and_counted_as_they_are_used() -> None:
    made = plan("abc", "x", TEXT, ppl_only=True)
    assert made.doc_ids == ("doc 0", "doc 2")  # one token cannot be scored
    assert [len(ids) for ids in made.documents] == [3, 200]
    assert made.total_tokens == 203
    made = plan("abc", "x", TEXT, ppl_only=True, ppl_apply_press=True)
    assert made.doc_ids == ("doc 2",)
    assert made.notes == ("1 document(s) shorter than 64 tokens are left out.",)
    assert made.windows is not None and len(made.windows) == len(made.documents) == 1


def test_limit_tokens_counts_over_all_documents() -> None:
    made = plan("abc", TEXT, TEXT, ppl_only=True, limit_tokens=10)
    assert [len(ids) for ids in made.documents] == [3, 7]
    assert made.total_tokens == 10
    ids = [ord(c) for c in "abc" + TEXT[:7]]
    assert made.tokens_sha256 == hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in ids)).hexdigest()
    assert plan(TEXT, ppl_only=True, limit_tokens=10**9).total_tokens == 200


def test_a_short_text_becomes_one_window() -> None:
    made = plan(TEXT[:20], ppl_apply_press=True, ppl_only=True)
    assert made.protocol == "prefix-C15-T5-S20"
    assert made.notes == ("no document has 64 tokens; the one window is 20 tokens long.",)
    assert plan("abcd", ppl_apply_press=True, ppl_only=True).protocol == "prefix-C2-T2-S4"


@pytest.mark.parametrize(
    ("text", "settings", "error", "message"),
    [
        ("a", {}, DataError, "fewer than 2 tokens"),
        ("", {}, DataError, "fewer than 2 tokens"),
        (TEXT, {"limit_tokens": 1}, DataError, "larger --limit_tokens"),
        ("abc", {"ppl_apply_press": True}, DataError, "at least 4"),
        (TEXT[:30], {"ppl_apply_press": True, "context_tokens": 40}, DataError, "30 tokens, a window needs 40 \\+ 16"),
        (TEXT, {"ppl_apply_press": True, "target_tokens": 64}, InputError, "leaves no room for a context"),
        (TEXT, {"ppl_apply_press": True, "target_tokens": 1}, InputError, "at least 2 targets"),
        (TEXT, {"stride": 65}, InputError, "--stride in 1..max_length"),
        (TEXT, {"max_length": 1}, InputError, "--max_length must be >= 2"),
        (TEXT, {"max_new_tokens": 64, "speed_only": True}, InputError, "leaves no room for a context"),
    ],
)
def test_what_cannot_work(text: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(text, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_only": True, "ppl_apply_press": True}, "--speed_only measures no perplexity"),
        ({"speed_only": True, "ppl_only": True}, "--speed_only measures no perplexity"),
        ({"ppl_only": True, "speed_decode_only": True}, "--ppl_only measures no speed"),
        ({"ppl_only": True, "compile": True}, "--compile is for decoding"),
        ({"context_tokens": 8}, "--context_tokens is for perplexity under presses"),
        ({"target_tokens": 8, "speed_only": True}, "--target_tokens is for perplexity under presses"),
        ({"max_length": 8, "speed_only": True}, "--max_length is for perplexity, and --speed_only measures none"),
        ({"stride": 8, "speed_only": True}, "--stride is for perplexity, and --speed_only measures none"),
        ({"batch_size": 2, "speed_only": True}, "--batch_size is for perplexity, and --speed_only measures none"),
        ({"kv_group_size": 32}, "--kv_group_size says how pairs are stored in few bits; add --kv_bits"),
        ({"kv_residual_tokens": 0}, "--kv_residual_tokens says how pairs are stored in few bits; add --kv_bits"),
        ({"compile": True, "warmup": 0}, "--compile compiles in the untimed rounds"),
        ({"max_new_tokens": 1}, "at least 2"),
        ({"min_new_tokens": 300}, "more than --max_new_tokens 200"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**settings)


class Slow(Characters):
    """Does not say where its tokens stand."""

    is_fast = False


def test_a_plan_knows_the_bytes_of_its_tokens() -> None:
    made = plan("né", "x", TEXT, ppl_only=True)
    assert [n_bytes.tolist() for n_bytes in made.token_bytes if n_bytes is not None] == [[1, 2], [1] * 200]
    made = plan("né", TEXT, ppl_only=True, ppl_apply_press=True)
    (n_bytes,) = made.token_bytes
    assert n_bytes is not None and len(n_bytes) == len(made.documents[0]) == 200
    assert [len(n) for n in plan(TEXT, ppl_only=True, limit_tokens=9).token_bytes if n is not None] == [9]


def test_unknown_bytes_are_said() -> None:
    made = plan(TEXT, ppl_only=True, tokenizer=Slow())
    assert made.token_bytes == (None,)
    assert made.notes == ("the tokenizer does not say where its tokens stand in the text: no bits per byte.",)
    assert plan(TEXT, speed_only=True, tokenizer=Slow()).notes[-1].startswith("a timed context")


class Silent(Characters):
    """Has a BOS token, and begins no text with it."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool, **options: Any) -> dict[str, list[Any]]:
        return super().__call__(text, False, verbose, **options)


SHORT = TEXT[:60]
SCORED = [
    {"ppl_apply_press": True, "ppl_only": True},
    {"ppl_only": True},
    {"ppl_mode": "streaming", "stream_chunk": 16},
]


@pytest.mark.parametrize("settings", SCORED)
def test_what_is_scored_begins_as_the_tokenizer_begins_a_text(settings: dict[str, Any]) -> None:
    plain, made = plan(SHORT, **settings), plan(SHORT, tokenizer=Characters(7), **settings)
    assert made.protocol == f"{plain.protocol}-bos" and made.add_bos and not plain.add_bos
    assert made.notes[0].startswith("the tokenizer begins texts with its BOS token") and plain.notes == made.notes[1:]
    assert made.total_tokens == plain.total_tokens == len(SHORT)
    for same in (
        plan(SHORT, tokenizer=Silent(7), **settings),
        plan(SHORT, tokenizer=Characters(7), add_bos=False, **settings),
    ):
        assert (same.protocol, same.add_bos, same.notes) == (plain.protocol, False, plain.notes)
    asked = plan(SHORT, tokenizer=Silent(7), add_bos=True, **settings)
    assert (asked.protocol, asked.add_bos, asked.notes) == (made.protocol, True, plain.notes)
    with pytest.raises(InputError, match=r"--add_bos needs a BOS token, and the tokenizer of m has none; leave"):
        plan(SHORT, add_bos=True, **settings)


def test_the_bos_token_takes_the_place_of_each_windows_first_token() -> None:
    sizes = {"ppl_apply_press": True, "ppl_only": True, "context_tokens": 20, "target_tokens": 8, "stride": 9}
    plain, made = plan(TEXT, **sizes), plan(TEXT, tokenizer=Characters(7), **sizes)
    assert plain.windows is not None and made.windows is not None
    without, with_bos = (
        [window.tolist() for window in one.windows[0].windows(one.documents[0])]  # type: ignore[index]
        for one in (plain, made)
    )
    assert len(without) == 20
    assert with_bos == [[7, *window[1:]] for window in without]  # windows share context, and no BOS token
    assert made.documents[0].tolist() == plain.documents[0].tolist()


@pytest.mark.parametrize("settings", SCORED[1:])
def test_a_text_that_is_read_from_its_beginning_has_the_bos_token_before_it(settings: dict[str, Any]) -> None:
    made = plan(SHORT, tokenizer=Characters(7), **settings)
    assert made.documents[0].tolist() == [7, *map(ord, SHORT)]
    assert made.token_bytes[0] is not None and made.token_bytes[0][:2].tolist() == [0, 1]


def test_presets_say_how_texts_begin() -> None:
    made = plan(TEXT, ppl_preset="gptq", tokenizer=Characters(7))
    assert made.documents[0][:2].tolist() == [7, ord("a")] and made.add_bos
    assert not plan(TEXT, ppl_preset="gptq").add_bos
    with pytest.raises(InputError, match="--ppl_preset gptq says how texts begin; leave --add_bos out"):
        plan(TEXT, ppl_preset="gptq", add_bos=True)
    with pytest.raises(InputError, match="--speed_only measures none"):
        plan(TEXT, speed_only=True, add_bos=True)


def test_pieces_that_are_no_shorter_than_the_context_are_said() -> None:
    settings = {"ppl_apply_press": True, "ppl_only": True, "context_tokens": 20, "target_tokens": 4}
    assert any("read in one piece" in note for note in plan(TEXT, **settings, chunk_tokens=20).notes)
    assert plan(TEXT, **settings, chunk_tokens=19).notes == ()


def test_more_targets_than_context_that_nobody_asked_for_are_said() -> None:
    settings = {"ppl_apply_press": True, "ppl_only": True, "context_tokens": 8}
    assert any("scores 16 tokens behind its context of 8" in note for note in plan(TEXT, **settings).notes)
    assert plan(TEXT, **settings, target_tokens=16).notes == ()
