"""Sections of one text and model: what their headlines and titles say to tell them apart."""

from __future__ import annotations

from typing import Any

import pytest
from tests.report.records import COMMON, ENV, Record, record, spread, timed

from coldpress.records.results import Collection
from coldpress.report.page import Report, make_report

pytest.importorskip("matplotlib")


def two(**more: Any) -> list[Record]:
    return [record("no_press", **more), record("snapkv", 0.5, spread(0.1, 0.01), **more)]


def made(*records: Record) -> Report:
    return make_report(Collection(records, ()))


def brackets(*records: Record) -> list[str]:
    """What stands in brackets behind the text and the model, in each headline."""
    leads = [part.headline.partition(": ")[0] for part in made(*records).parts]
    assert len(set(leads)) == len(leads)
    return [lead.partition(" (")[2].removesuffix(")") for lead in leads]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"env": {**ENV, "transformers": "9.9"}}, ("transformers 5.0", "transformers 9.9")),
        ({"env": {**ENV, "threads": 1}}, ("threads 2", "threads 1")),
        ({"env": {**ENV, "cpu": "another"}}, ("a CPU", "another")),
        ({"text_sha256": "cd" * 32}, ("text sha256 abababababab", "text sha256 cdcdcdcdcdcd")),
        ({"subset": "wikitext-103-v1"}, ("subset wikitext-103-raw-v1", "subset wikitext-103-v1")),
        ({"dtype": "bfloat16"}, ("float32", "bfloat16")),
        ({"device": "cuda"}, ("cpu", "cuda")),
        ({"attn_implementation": "eager"}, ("attention sdpa", "attention eager")),
        ({"num_params": 9e6}, ("7.0 M parameters", "9.0 M parameters")),
        ({"total_tokens": 99}, ("1,234 tokens of text", "99 tokens of text")),
        ({"settings": {"repetitions": 3}}, ("", "repetitions 3")),
        ({"settings": {"compile": True}}, ("", "compile")),
        ({"protocol": "prefix-C8"}, ("protocol prefix-C768-T256-S1024", "protocol prefix-C8")),
    ],
)
def test_what_differs_is_said_and_nothing_else(more: Record, words: tuple[str, str]) -> None:
    assert sorted(brackets(*two(), *two(**more))) == sorted(words)


def test_models_of_one_name_are_told_apart_by_their_folders() -> None:
    a, b = two(model="/a/x/tiny"), two(model="/b/x/tiny")
    assert brackets(*a, *b) == ["model /a/x/tiny", "model /b/x/tiny"]


def test_one_fact_that_tells_all_apart_is_enough_and_several_are_taken_where_none_does() -> None:
    newer = {"env": {**ENV, "transformers": "9.9"}}
    of_one = brackets(*two(), *two(dtype="float16", **newer))
    assert sorted(of_one) == ["float16", "float32"]
    several = brackets(*two(), *two(**newer), *two(dtype="float16", **newer))
    assert set(several) == {"float32, transformers 5.0", "float32, transformers 9.9", "float16, transformers 9.9"}


def test_groups_that_differ_in_nothing_that_is_recorded_are_numbered() -> None:
    shorter = [record("snapkv", 0.5, spread(0.1, 0.01, n=8), subset=name) for name in (None, None)]
    shorter[1] |= {"model": "models/tiny", "text_sha256": COMMON["text_sha256"][:12] + "f" * 52}
    assert brackets(*shorter) == ["part 1", "part 2"]


def test_windows_tell_runs_of_one_text_apart() -> None:
    few = [record("snapkv", 0.5, spread(0.1, 0.01, n=4)), record("knorm", 0.5, spread(0.1, 0.01, n=8))]
    assert sorted(brackets(*few)) == ["4 windows", "8 windows"]


def test_a_section_alone_and_one_of_another_kind_have_no_brackets() -> None:
    assert brackets(*two()) == [""]
    leads = [part.headline.partition(": ")[0] for part in made(*two(), timed("snapkv", 0.5, 256, 1.1)).parts]
    assert leads == ["On WikiText-103 with models/tiny"] * 2


def test_contexts_of_a_timing_are_not_what_tells_it_apart() -> None:
    newer = {"env": {**ENV, "torch": "9.9"}}
    runs = [timed("snapkv", 0.5, 256, 1.1), timed("snapkv", 0.5, 512, 1.1) | newer]
    assert brackets(*runs) == ["torch 2.0", "torch 9.9"]


def test_titles_say_the_protocol_anyway_and_add_what_else_differs() -> None:
    titles = [part.title for part in made(*two(), *two(protocol="prefix-C8"), *two(dtype="float16")).parts]
    assert len(set(titles)) == 3 and sum(title.endswith(("float32", "float16")) for title in titles) == 2
    assert any(title.endswith(", prefix-C8") for title in titles)
