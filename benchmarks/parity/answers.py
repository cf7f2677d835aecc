"""Made-up answers to made-up rows of each benchmark, the same every time: what scorers are compared on.

An answer is the reference, a part of it, another one's, noise, or a sentence around any of these, with the blanks,
marks, line ends and boxes that scorers look at.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["BENCHMARKS", "Case", "cases", "digest"]

# fmt: off
WORDS = (
    "the", "a", "an", "river", "stone", "tower", "of", "Lindow", "harbour,", "baker's", "ledger;", "crosses",
    "four", "times", "in", "winter", "and", "Paris", "London", "(north)", "seven", "7", "12", "lantern", "dusk.",
    "school", "row", "quietly", "blue-green", "Mabel", "Osric", "Venn!", "surveyor:", "built", "never", "wall",
)
CHINESE = (
    "今天", "天气", "很好", "，", "我们", "去", "公园", "散步", "。", "北京", "大学",
    "图书馆", "的", "学生", "研究", "历史", "问题", "段落3", "段落12", "、", "会议", "总结",
)
# fmt: on
CODE = ("return x + 1", "    print(value)", "# note", "def f(a, b):", "x = [i for i in y]", "// done", "`code`", "")
PER_TASK = 40


class Case(NamedTuple):
    """A row and an answer to it."""

    row: dict[str, Any]
    answer: str


def _words(rng: random.Random, low: int = 1, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def _chinese(rng: random.Random) -> str:
    return "".join(rng.choice(CHINESE) for _ in range(rng.randint(2, 12)))


def _around(rng: random.Random, text: str) -> str:
    """``text`` as a model may say it."""
    return rng.choice(
        (
            text,
            text.upper(),
            f" {text}.",
            f"\n{text}\n{_words(rng)}",
            f"{_words(rng)} {text} {_words(rng)}",
            f'The answer is: "{text}"',
            f"answer is {text}, {_words(rng)}",
            text[: max(1, len(text) // 2)],
            f"**{text}**\n\n",
            _words(rng),
            _words(rng, 20, 60),
            "",
            "\x07 \t",
        )
    )


def _ruler(rng: random.Random) -> Iterator[Case]:
    for task in ("niah_single_1", "niah_multivalue", "vt", "cwe", "fwe", "qa_1", "qa_2"):
        for _ in range(PER_TASK):
            answer = [_words(rng, 1, 2) for _ in range(rng.randint(1, 5))]
            said = " ".join(_around(rng, rng.choice(answer)) for _ in range(rng.randint(1, 3)))
            yield Case({"task": task, "answer": answer}, said)


def _loogle(rng: random.Random) -> Iterator[Case]:
    for task in ("shortdep_qa", "longdep_qa", "longdep_summarization"):
        for _ in range(PER_TASK * 2):
            answer = _words(rng, 3, 30)
            yield Case({"task": task, "answer": answer}, _around(rng, answer))
    names = [name for name in WORDS if name.isalpha()]
    for _ in range(PER_TASK * 3):
        wanted = {f"<mask-{i}>": f"{rng.choice(names)} {rng.choice(names)}" for i in range(rng.randint(1, 4))}
        said: dict[str, Any] = {
            key: rng.choice((name, name.split()[0], rng.choice(names), name)) for key, name in wanted.items()
        }
        if rng.random() < 0.2:
            said[rng.choice(list(said))] = rng.choice((3, None, ["a"]))
        if rng.random() < 0.2:
            said["<mask-9>"] = "nobody"
        text = json.dumps(said) if rng.random() < 0.3 else repr(said)
        answer = rng.choice((text, f" {text}", f"{text}\n", text[:-1], f"Answer: {text}", "[1, 2]", "", _words(rng)))
        yield Case({"task": "shortdep_cloze", "answer": json.dumps(wanted)}, rng.choice((text, answer)))


def _zero_scrolls(rng: random.Random) -> Iterator[Case]:
    for _ in range(3):
        yield Case({"task": "qasper", "answer": ""}, _words(rng))


def _infinitebench(rng: random.Random) -> Iterator[Case]:
    for task in ("passkey", "number_string", "kv_retrieval"):
        for _ in range(PER_TASK):
            digits = str(rng.randrange(10**5))
            said = rng.choice((digits, digits[1:], f"{rng.randrange(99)} {digits}", f"-{digits}.5"))
            yield Case({"task": task, "answer": [digits]}, _around(rng, said))
    for _ in range(PER_TASK):
        number = rng.randint(-50, 50)
        said = rng.choice(
            (f"{number}", f"It returns {number}", f"{number}.", f"{number} yes", f"`{number + 1}`", "none")
        )
        yield Case({"task": "code_run", "answer": [number]}, rng.choice((said, _around(rng, said))))
    for _ in range(PER_TASK):
        letter, name = rng.choice("ABCD"), f"run_{rng.choice(WORDS).strip('.,;:!()')}"
        said = rng.choice(
            (letter, name, rng.choice("ABCDJ"), f"Option {letter}", f"correct option is: {letter}", "is:")
        )
        yield Case({"task": "code_debug", "answer": [name, letter]}, _around(rng, said))
    for _ in range(PER_TASK):
        wanted: int | float = rng.choice((rng.randrange(100), rng.randrange(100) / 4 + 0.25))
        said = rng.choice((f"{wanted}", f"{wanted} and 5", f"{rng.randrange(100)}", f"x {wanted}.0", f"{wanted}."))
        yield Case({"task": "math_find", "answer": [wanted]}, said)
    for _ in range(PER_TASK):
        values = [rng.randrange(50) for _ in range(rng.randint(2, 8))]
        said_values = [value if rng.random() < 0.85 else value + 1 for value in values][: rng.randint(1, 9)]
        yield Case(
            {"task": "math_calc", "answer": values},
            rng.choice((f"{said_values}", f"Values: {said_values}", f"{said_values}", "none")),
        )
    for _ in range(PER_TASK):
        names = [_words(rng, 1, 2), _words(rng, 1, 1)]
        yield Case({"task": "longdialogue_qa_eng", "answer": names}, _around(rng, rng.choice(names).lower()))
    for _ in range(PER_TASK):
        label = [rng.choice("ABCD")]
        said = rng.choice(
            (label[0], rng.choice("ABCD"), f"option is {label[0]}", f"{label[0]}. tower", "answer:", "AB x")
        )
        yield Case({"task": "longbook_choice_eng", "answer": label}, _around(rng, said))
    for _ in range(PER_TASK):
        references = [_words(rng, 1, 5) for _ in range(rng.randint(1, 3))]
        yield Case({"task": "longbook_qa_eng", "answer": references}, _around(rng, rng.choice(references)))
    for _ in range(PER_TASK):
        references = [_chinese(rng) for _ in range(rng.randint(1, 2))]
        said = rng.choice((references[0], references[0][2:], _chinese(rng), f" {references[-1]}！", ""))
        yield Case({"task": "longbook_qa_chn", "answer": references}, said)


CLASSES = (
    "Animal",
    "Abbreviation",
    "City",
    "Country",
    "Country, city",
    "Other entity",
    "entity",
    "Date",
    "Date of birth",
)


def _longbench(rng: random.Random, per_task: int = PER_TASK) -> Iterator[Case]:
    def row(task: str, answers: list[str]) -> dict[str, Any]:
        return {"task": task, "answers": answers, "all_classes": list(CLASSES), "length": rng.randrange(12_000)}

    english = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa")
    for task in (*english, "gov_report", "qmsum", "multi_news", "samsum"):
        for _ in range(per_task):
            answers = [_words(rng, 1, 15) for _ in range(rng.randint(1, 3))]
            yield Case(row(task, answers), _around(rng, rng.choice(answers)))
    for task in ("multifieldqa_zh", "dureader", "vcsum"):
        for _ in range(per_task):
            answers = [_chinese(rng) for _ in range(rng.randint(1, 2))]
            said = rng.choice((answers[0], answers[0][3:], _chinese(rng), f"\n{answers[-1]}。", ""))
            yield Case(row(task, answers), said)
    for task in ("trec", "lsht"):
        for _ in range(per_task):
            wanted = rng.choice(CLASSES)
            said = rng.choice((wanted, f"{wanted} {rng.choice(CLASSES)}", rng.choice(CLASSES), ", ".join(CLASSES)))
            yield Case(row(task, [wanted]), rng.choice((said, _around(rng, said))))
    numbered = {"passage_count": "{}", "passage_retrieval_en": "Paragraph {}", "passage_retrieval_zh": "段落{}"}
    for task, form in numbered.items():
        for _ in range(per_task):
            number = rng.randint(1, 30)
            said = rng.choice(
                (f"{number}", f"Paragraph {number}", f"段落{number}", f"{number} or 3", "3", f"{number} {number}")
            )
            yield Case(row(task, [form.format(number)]), _around(rng, said))
    for task in ("lcc", "repobench-p"):
        for _ in range(per_task):
            line = rng.choice(CODE[:5])
            said = "\n".join(rng.choice((line, rng.choice(CODE), line[2:])) for _ in range(rng.randint(1, 4)))
            yield Case(row(task, [line]), rng.choice((said, f"\n\n{said}")))


def _longbench_e(rng: random.Random) -> Iterator[Case]:
    for case in _longbench(rng, PER_TASK // 2):
        if not case.row["task"].endswith("_zh"):
            yield case


def _longbench_v2(rng: random.Random) -> Iterator[Case]:
    for _ in range(300):
        wanted = rng.choice("ABCD")
        said = rng.choice((wanted, wanted, rng.choice("ABCD")))
        row = {"answer": wanted, "difficulty": rng.choice(("easy", "hard")), "length": rng.choice(("short", "long"))}
        form = rng.choice(("({})", "{}", "**({})**", " ({})", "{})", "({}"))
        sentence = f"The correct answer is {form.format(said)}."
        yield Case(
            row, rng.choice((sentence, sentence, f"{_words(rng)} {sentence}", f"The correct answer: {said}", said))
        )


def _needle(rng: random.Random) -> Iterator[Case]:
    for _ in range(300):
        needle = f"\n{_words(rng, 5, 20)}\n"
        yield Case({"needle": needle}, _around(rng, needle.strip()))


def _boxed(rng: random.Random) -> Iterator[Case]:
    for _ in range(300):
        wanted = rng.choice((str(rng.randrange(1000)), "\\frac{1}{2}", "x + 1", "\\text{Monday}"))
        other = str(rng.randrange(100))
        said = rng.choice(
            (
                *(
                    f"So \\boxed{{{wanted}}}.",
                    f"\\boxed{{{other}}}, no, \\boxed{{{wanted}}}",
                    wanted,
                    f"boxed{{{wanted}",
                ),
                *(f"\\boxed{{{wanted}}} \\boxed{{{other}}}", f"{wanted}}} and", "boxed{", "", f"\\boxed{{ {wanted} }}"),
            )
        )
        yield Case({"answer": wanted}, said)


BENCHMARKS: dict[str, Callable[[random.Random], Iterator[Case]]] = {
    "ruler": _ruler,
    "loogle": _loogle,
    "zero_scrolls": _zero_scrolls,
    "infinitebench": _infinitebench,
    "longbench": _longbench,
    "longbench-e": _longbench_e,
    "longbench-v2": _longbench_v2,
    "needle_in_haystack": _needle,
    "aime25": _boxed,
    "math500": _boxed,
}


def cases(name: str) -> list[Case]:
    """The rows and answers of a benchmark."""
    return list(BENCHMARKS[name](random.Random(f"answers to {name}")))


def digest(name: str) -> str:
    """The same for the same rows and answers: 16 hex digits."""
    return hashlib.sha256(json.dumps(cases(name), sort_keys=True).encode()).hexdigest()[:16]
