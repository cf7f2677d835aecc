"""InfiniteBench: retrieval, code, numbers, books and dialogues, each scored in a way of its own.

Labels are lists; the data set holds texts where the benchmark has numbers, which are read as what they say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import coldpress.eval.benchmarks.benchmark as texts
from coldpress.eval.benchmarks.benchmark import Benchmark, Row, Scores, Share, register

_MARKS = "\n:\"'.,?!{}"
_NUMBER = re.compile(r"\d+\.\d+|\d+")
Label = list[Any]


def score(answer: str, row: Row) -> Scores:
    """The score of the row's task."""
    label = row["answer"]
    return {"score": Share(_MEASURES[row["task"]](answer, list(label) if isinstance(label, list | tuple) else [label]))}


def _key(answer: str, label: Label) -> float:
    """Whether the value is a word of the answer."""
    return float(label[0] in texts.words_between(answer, _MARKS))


def _first_digits(answer: str, label: Label) -> float:
    """Whether the first digits of the answer are those."""
    found = re.search("[0-9]+", answer)
    return float(str(label[0]) == (found[0] if found else ""))


def _returned(answer: str, label: Label) -> float:
    """Whether the last word is the number."""
    words = texts.words_between(answer.strip(), "\n.`'\":")
    try:
        return float(bool(words) and int(words[-1]) == _number(label[0]))
    except ValueError:
        return 0.0


def _found(answer: str, label: Label) -> float:
    """Whether the first number is that: as a whole one, if it is one."""
    found, wanted = _NUMBER.search(answer), _number(label[0])
    if found is None:
        return 0.0
    if isinstance(wanted, int):
        return float(found[0].isdecimal() and int(found[0]) == wanted)
    return float(float(found[0]) == wanted)


def _calculated(answer: str, label: Label) -> float:
    """The share of the values that are right before the first one which is not."""
    values = [_number(value) for value in (label[0] if isinstance(label[0], list | tuple) else label)]
    given = [int(digits) for digits in re.findall("[0-9]+", answer)]
    right = 0
    while right < min(len(values), len(given)) and values[right] == given[right]:
        right += 1
    return right / len(values)


def _speaker(answer: str, label: Label) -> float:
    """Whether one of the names is in the answer."""
    text = answer.strip().upper()
    return float(any(name.upper() in text for name in label))


def _faulty_function(answer: str, label: Label) -> float:
    """Whether the letter, or the function, is what the answer says: last in a line, first, or after ``is:``."""
    letter, names = label[-1], tuple(dict.fromkeys((label[-1], label[0])))
    text = answer.strip()
    if _last_letter(text, "A-J") == letter:
        return 1.0
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(mark, " ")
    text = re.sub(" +", " ", text)
    said = _said_after(text, ("answer is:", "is:", "answer:", "correct option is:"))
    return float(text.startswith(names) or (said is not None and said.startswith(names)))


def _choice(answer: str, label: Label) -> float:
    """Whether the letter is what the answer says: last in a line, first, after ``answer is``, or a word of its own."""
    text = answer.strip()
    if not text:
        return 0.0
    if _last_letter(text, "A-D") in label:
        return 1.0
    if text[0] in "ABCD":
        return float(text[0] in label)
    if text in label:
        return 1.0
    for mark in "\n\"'.,?!{}":
        text = text.replace(mark, " ")
    text = re.sub(" +", " ", text)
    said = _said_after(text, ("answer is:", "answer:", "answer is", "option is"))
    if said is not None:
        return float(said.startswith(tuple(label)))
    letters = [word for word in text.split() if word in "ABCD"]
    return float(bool(letters) and letters[0] in label)


def _book(answer: str, label: Label) -> float:
    return max(texts.f1(texts.english_words(answer), texts.english_words(reference)) for reference in label)


def _chinese_book(answer: str, label: Label) -> float:
    return max(texts.f1(texts.chinese_characters(answer), texts.chinese_characters(reference)) for reference in label)


def _last_letter(text: str, letters: str) -> str | None:
    """The last such letter, alone between blanks or marks, of the first line that has one."""
    for line in text.split("\n"):
        found = re.findall(rf"\b[{letters}]\b", line)
        if found:
            return str(found[-1])
    return None


def _said_after(text: str, beginnings: Sequence[str]) -> str | None:
    """What stands one character after the first of ``beginnings`` that is there; None if none is."""
    for beginning in beginnings:
        at = text.find(beginning)
        if at >= 0:
            return text[at + len(beginning) + 1 :]
    return None


def _number(value: Any) -> float | int:
    """A number of the label, also where the data set has it as text."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*-?\d+\s*", value) else float(value)
    return value


_MEASURES: dict[str, Callable[[str, Label], float]] = {
    **dict.fromkeys(("kv_retrieval", "kv_retrieval_prefix", "kv_retrieval_both"), _key),
    **dict.fromkeys(("passkey", "number_string"), _first_digits),
    "code_run": _returned,
    "code_debug": _faulty_function,
    "math_find": _found,
    "math_calc": _calculated,
    "longdialogue_qa_eng": _speaker,
    "longbook_qa_eng": _book,
    "longbook_qa_chn": _chinese_book,
    "longbook_choice_eng": _choice,
}
_ON_HUB = (
    *("passkey", "kv_retrieval", "number_string", "longdialogue_qa_eng", "longbook_qa_eng", "longbook_choice_eng"),
    *("code_run", "code_debug", "math_find", "math_calc", "longbook_qa_chn"),
)


def _is_label(row: Row) -> bool:
    """Whether the answer is one value or more; where the task counts or calculates, all of them numbers."""
    label = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if row["task"] == "math_calc" and len(label) == 1 and isinstance(label[0], list):
        label = label[0]
    if not label or not all(texts.is_text(value) or texts.is_number(value) for value in label):
        return False
    try:
        return row["task"] not in _COUNTED or bool([_number(value) for value in label])
    except ValueError:
        return False


_COUNTED = ("code_run", "math_find", "math_calc")
_ANSWER = "a list of texts, none of them empty, of numbers where the task has numbers"
register(
    Benchmark(
        "infinitebench",
        "MaxJeblick/InfiniteBench",
        score,
        data_dirs=_ON_HUB,
        columns=(texts.one_of("task", tuple(_MEASURES)), texts.Column("answer", _ANSWER, _is_label)),
    )
)
