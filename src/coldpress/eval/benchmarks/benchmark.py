"""What a benchmark is: where its rows are, what they hold, how an answer is scored; measures of texts to score by."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from coldpress.errors import InputError, MissingDependencyError, nearest

# Chinese marks beside those of ASCII, as the benchmarks list them
_CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)
_NO_MARKS = str.maketrans("", "", string.punctuation)
_NO_CHINESE_MARKS = str.maketrans("", "", string.punctuation + _CHINESE_MARKS)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def require(packages: Iterable[str], what: str) -> None:
    """Raise :class:`MissingDependencyError` if one of the packages that ``what`` imports is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f'{what} needs {" and ".join(missing)}: pip install "coldpress[benchmarks]".')


def english_words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_MARKS)).split()


def words_between(text: str, marks: str) -> list[str]:
    """The words of a text, where ``marks`` are blanks."""
    return text.translate(str.maketrans(marks, " " * len(marks))).split()


def chinese_characters(text: str) -> list[str]:
    """The characters of a text in small letters, without blanks and punctuation."""
    return list("".join(text.lower().translate(_NO_CHINESE_MARKS).split()))


def chinese_words(text: str) -> list[str]:
    """The words of a text as jieba cuts them."""
    return list(_jieba().cut(text, cut_all=False))


def f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the tokens of an answer, each counted as often as it is there."""
    common = sum((Counter(answer) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def rouge(hypothesis: str, reference: str) -> dict[str, dict[str, float]] | None:
    """``r``, ``p`` and ``f`` of ``rouge-1``, ``rouge-2`` and ``rouge-l``; None where a text is empty or too long."""
    try:
        scores: dict[str, dict[str, float]] = _rouge().get_scores(hypothesis, reference)[0]
    except (ValueError, RecursionError):
        return None
    return scores


def bleu(answer: str, reference: str, n: int) -> float:
    """The BLEU of n-grams of one length alone, in words between blanks."""
    weights = tuple(float(i == n) for i in range(1, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a text without a common n-gram is no surprise
        from nltk.translate.bleu_score import sentence_bleu

        return float(sentence_bleu([reference.split()], answer.split(), weights=weights))


def edit_similarity(answer: str, reference: str) -> float:
    """How much of two lines is alike, in whole hundredths: fuzzywuzzy's ratio, which is difflib's."""
    if answer == reference:
        return 1.0
    if not answer or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, answer, reference).ratio()) / 100


@functools.cache
def _rouge() -> Any:
    return importlib.import_module("rouge").Rouge()


@functools.cache
def _jieba() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own syntax, on newer Pythons
        jieba: Any = importlib.import_module("jieba")
    jieba.setLogLevel(logging.WARNING)
    return jieba


Row = Mapping[str, Any]  # a line of a data set, by the names of its columns


class Share(NamedTuple):
    """What an answer reached, out of how much: 1 but where an answer has parts that count one by one."""

    reached: float
    of: float = 1


Scores = dict[str, Share]  # by the measure's name; the first one is compared with the uncompressed cache's


def task_of(row: Row) -> tuple[str, ...]:
    """The group of a row where its column ``task`` says it."""
    return (str(row["task"]),)


@dataclass(frozen=True)
class Column:
    """What a row must hold under a name: :attr:`fits` is asked with the whole row, which has it."""

    name: str
    what: str  # as a message says it
    fits: Callable[[Row], bool]
    allowed: tuple[str, ...] = ()  # the names that it may hold; empty where it may be anything that fits


def is_text(value: Any) -> bool:
    """Whether a value is a text with something in it."""
    return isinstance(value, str) and bool(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(name: str) -> Column:
    """A text that is not empty."""
    return Column(name, "a text that is not empty", lambda row: is_text(row[name]))


def texts(name: str) -> Column:
    """A list of texts, none of which is empty: an empty one would be in every answer."""
    return Column(
        name,
        "a list of texts, at least one and none of them empty",
        lambda row: isinstance(row[name], list) and bool(row[name]) and all(map(is_text, row[name])),
    )


def one_of(name: str, allowed: Sequence[str], plain: Callable[[Row], Any] | None = None) -> Column:
    """One of some names; ``plain`` reads it from the row where it may be written in other ways too."""
    read = plain or (lambda row: row[name])
    return Column(name, f"one of {', '.join(allowed)}", lambda row: read(row) in tuple(allowed), tuple(allowed))


@dataclass(frozen=True)
class Benchmark:
    """Questions about contexts."""

    name: str  # it is asked for by
    hub_id: str  # of its data set
    score: Callable[[str, Row], Scores]  # of an answer and its row
    data_dirs: tuple[str, ...] = ()  # folders of the data set, of which one is read; empty where it is not divided
    data_dir: str | None = None  # the folder that is read where none is named
    # that a row must have beside the context, the question and what is put before the answer
    columns: tuple[Column, ...] = (text("answer"), text("task"))
    groups: Callable[[Row], tuple[str, ...]] = task_of  # names under which a row's scores are averaged
    is_haystack: bool = False  # whether the rows are texts in which a needle is put
    packages: Callable[[Row], tuple[str, ...]] = lambda row: ()  # that scoring a row needs beside coldpress itself


_BENCHMARKS: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known by its name."""
    if benchmark.name in _BENCHMARKS:
        raise ValueError(f"There are two benchmarks {benchmark.name!r}.")
    _BENCHMARKS[benchmark.name] = benchmark
    return benchmark


def benchmark_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_BENCHMARKS)


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name; :class:`InputError` if there is none of that name."""
    if name not in _BENCHMARKS:
        known = benchmark_names()
        raise InputError(f"Unknown benchmark {name!r}; allowed: {', '.join(known)}.{nearest(name, known)}")
    return _BENCHMARKS[name]
