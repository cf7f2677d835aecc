"""LongBench and LongBench-E: questions, summaries, few-shot examples and code, in English and Chinese."""

from __future__ import annotations

import re
from collections.abc import Callable

import coldpress.eval.benchmarks.benchmark as texts
from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, register

_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # after examples a model goes on with examples of its own
_NO_CODE = ("`", "#", "//")
Score = Callable[[str, str, Row], float]


def score(answer: str, row: Row) -> Scores:
    """The best score among the references."""
    text = answer.lstrip()
    return _best(text.split("\n")[0] if row["task"] in _FIRST_LINE else text, row["task"], row)


def score_e(answer: str, row: Row) -> Scores:
    """The best score among the references; blanks before an answer count, but for empty lines before a first line."""
    task = _without_e(row)
    return _best(answer.lstrip("\n").split("\n")[0] if task in _FIRST_LINE else answer, task, row)


def _best(answer: str, task: str, row: Row) -> Scores:
    name, measure = _MEASURES[task]
    return {name: Share(max([0.0, *(measure(answer, reference, row) for reference in row["answers"])]))}


def _words_f1(answer: str, reference: str, row: Row) -> float:
    return texts.f1(texts.english_words(answer), texts.english_words(reference))


def _chinese_f1(answer: str, reference: str, row: Row) -> float:
    cut = [map("".join, map(texts.chinese_characters, texts.chinese_words(text))) for text in (answer, reference)]
    own, wanted = ([word for word in words if word] for words in cut)
    return texts.f1(own, wanted)


def _rouge_l(answer: str, reference: str, row: Row) -> float:
    found = texts.rouge(answer, reference)
    return 0.0 if found is None else found["rouge-l"]["f"]


def _chinese_rouge_l(answer: str, reference: str, row: Row) -> float:
    return _rouge_l(" ".join(texts.chinese_words(answer)), " ".join(texts.chinese_words(reference)), row)


def _class(answer: str, reference: str, row: Row) -> float:
    """One over the number of classes that an answer names, if the right one is among them.

    A name that is part of the right one is not counted; as LongBench has it, the one after it is not looked at.
    """
    named = [name for name in row["all_classes"] if name in answer]
    i = 0
    while i < len(named):
        if named[i] in reference and named[i] != reference:
            named.remove(named[i])
        i += 1
    return 1 / len(named) if reference in named else 0.0


def _share_of_numbers(answer: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", answer)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _count(answer: str, reference: str, row: Row) -> float:
    return _share_of_numbers(answer, str(reference))


def _paragraph(mark: str) -> Score:
    """The share of the right paragraph among the numbers of an answer."""

    def measure(answer: str, reference: str, row: Row) -> float:
        found = re.search(rf"{mark}(\d+)", reference)
        return 0.0 if found is None else _share_of_numbers(answer, found[1])

    return measure


def _code(answer: str, reference: str, row: Row) -> float:
    """How much the first line of code is like the reference."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in _NO_CODE)), "")
    return texts.edit_similarity(code, reference)


_MEASURES: dict[str, tuple[str, Score]] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), ("f1", _words_f1)
    ),
    "multifieldqa_zh": ("f1", _chinese_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), ("rouge-l", _rouge_l)),
    **dict.fromkeys(("dureader", "vcsum"), ("rouge-l", _chinese_rouge_l)),
    **dict.fromkeys(("trec", "lsht"), ("classification", _class)),
    "passage_count": ("count", _count),
    "passage_retrieval_en": ("retrieval", _paragraph("Paragraph ")),
    "passage_retrieval_zh": ("retrieval", _paragraph("段落")),
    **dict.fromkeys(("lcc", "repobench-p"), ("edit_similarity", _code)),
}
_WITH_LENGTHS = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)


def _without_e(row: Row) -> str:
    return str(row["task"]).removesuffix("-e").removesuffix("_e")


def groups_e(row: Row) -> tuple[str, ...]:
    """The task, among contexts of so many words."""
    words = row["length"]
    return (f"{_without_e(row)} {'0-4k' if words < 4000 else '4-8k' if words < 8000 else '8k+'}",)


def _packages(row: Row) -> tuple[str, ...]:
    measure = _MEASURES[_without_e(row)][1]
    needs: dict[Score, tuple[str, ...]] = {
        _chinese_f1: ("jieba",),
        _rouge_l: ("rouge",),
        _chinese_rouge_l: ("rouge", "jieba"),
    }
    return needs.get(measure, ())


def _are_references(row: Row) -> bool:
    """Whether there is a reference; an empty one among others does no harm, as no answer is like it."""
    found = row["answers"]
    return isinstance(found, list) and bool(found) and all(isinstance(text, str) for text in found)


def _are_classes(row: Row) -> bool:
    """Whether classes are named, which two tasks are scored by; the others have none."""
    found = row["all_classes"]
    if found is None:
        return _MEASURES[_without_e(row)][1] is not _class
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


_HUB = "Xnhyacinth/LongBench"
_TASK, _TASK_E = texts.one_of("task", tuple(_MEASURES)), texts.one_of("task", _WITH_LENGTHS, _without_e)
_TEXTS = "a list of texts, at least one"
_COLUMNS = (
    texts.Column("answers", _TEXTS, _are_references),
    texts.Column("all_classes", "a list of texts, or null for a task without classes", _are_classes),
)
register(Benchmark("longbench", _HUB, score, tuple(_MEASURES), columns=(_TASK, *_COLUMNS), packages=_packages))
register(
    Benchmark(
        "longbench-e",
        _HUB,
        score_e,
        tuple(f"{task}_e" for task in _WITH_LENGTHS),
        columns=(_TASK_E, *_COLUMNS, texts.Column("length", "a number", lambda row: texts.is_number(row["length"]))),
        groups=groups_e,
        packages=_packages,
    )
)
