"""The rows of a benchmark, checked before a model is loaded, and the contexts and questions that they become."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from coldpress.errors import DataError, InputError, nearest
from coldpress.eval.benchmarks.benchmark import Benchmark, Row, require
from coldpress.io.files import path_of
from coldpress.io.progress import note
from coldpress.loading.hub import BUILDERS, load_hub, load_local
from coldpress.models.chat import prompt_parts
from coldpress.records.wording import listed

SPLIT = "test"
# names of its files, as the library datasets has it
_OF_SPLIT = re.compile(r"(^|[-._ 0-9])(test|testing|eval|evaluation)[-._ 0-9]")
PROMPT = ("context", "question", "answer_prefix")
LIMIT = "max_new_tokens"
INSTEAD = ("give a local folder of the same layout (--data FOLDER)",)


class Rows(NamedTuple):
    """What was loaded, and from where.

    source: hub id, or the folder as it was given. data_dir: of it that was read; None for all. file: the only one that
    holds rows, as a path from the source; None where there are several, or the hub knows.
    """

    source: str
    data_dir: str | None
    rows: list[Row]
    file: str | None = None

    @property
    def name(self) -> str:
        return self.source if self.data_dir is None else f"{self.source}/{self.data_dir}"

    @property
    def place(self) -> str:
        """Where a row is to be looked for: the file, if it is known."""
        return self.name if self.file is None else f"{self.source}/{self.file}"


def load_rows(benchmark: Benchmark, data: str | None, data_dir: str | None) -> Rows:
    """All rows of the split ``test``; :class:`InputError` where they cannot be had.

    Args:
        benchmark: whose data set is read.
        data: a folder of the same layout; None for the hub, or its cache.
        data_dir: the folder of the data set to read; None for the benchmark's own, or all of one that is not divided.
    """
    require(("datasets",), f"coldpress benchmark {benchmark.name}")
    if data is not None:
        return _local(data, data_dir, benchmark.data_dir)
    data_dir = benchmark.data_dir if data_dir is None else data_dir
    known = ", ".join(benchmark.data_dirs)
    if data_dir is None and benchmark.data_dirs:
        raise InputError(f"{benchmark.name} is divided: say which part is read with --data_dir, such as {known}.")
    if data_dir is not None and not benchmark.data_dirs:
        raise InputError(f"{benchmark.name} is not divided; leave --data_dir out.")
    source, rows = load_hub(
        (benchmark.hub_id,), None, SPLIT, None, data_dir=data_dir, column=PROMPT[0], instead=INSTEAD
    )
    return Rows(source, data_dir, _told(rows))


def _local(data: str, data_dir: str | None, own_dir: str | None) -> Rows:
    folder = path_of(data)
    if not folder.is_dir():
        raise DataError(f"--data {data!r} is not a folder; give one that holds .parquet or .jsonl files.")
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if data_dir is None and own_dir in parts:  # what is read of the hub's data set, too
        data_dir = own_dir
    if data_dir is not None and not (folder / data_dir).is_dir():
        there = (
            f"there are {', '.join(parts)}.{nearest(data_dir, parts)}" if parts else "it is not divided; leave it out."
        )
        raise DataError(f"--data {data} has no folder {data_dir!r}: {there}")
    base = folder / (data_dir or "")
    direct = sorted(path for path in base.iterdir() if path.suffix in BUILDERS and _OF_SPLIT.search(path.name.lower()))
    if direct:
        rest = base.glob("[!.]*/**/*")
        below = sorted({path.relative_to(base).parts[0] for path in rest if path.suffix in BUILDERS})
        if below:
            note(
                f"of --data {Path(data, data_dir or '')} only {listed([path.name for path in direct])} "
                f"{'is' if len(direct) == 1 else 'are'} read; name a folder in it with --data_dir ({listed(below)})."
            )
        return Rows(data, data_dir, _told(_of_files(direct, data, folder)), _only(direct, folder))
    if data_dir is None and parts and parts != ["data"]:
        raise DataError(f"--data {data} is divided: say which part is read with --data_dir: {', '.join(parts)}.")
    rows = load_local(str(Path(folder).resolve()), data, None, SPLIT, data_dir=data_dir, column=PROMPT[0])
    own = [path for path in base.rglob("*") if path.suffix in BUILDERS]
    return Rows(data, data_dir, _told(rows), _only(own, folder))


def _of_files(files: Sequence[Path], data: str, folder: Path) -> Any:
    """The rows of files that lie in one folder, which are all of the split."""
    first = files[0]
    if any(path.suffix != first.suffix for path in files):
        raise DataError(f"--data {data} holds {listed([path.name for path in files])}: leave those of one kind there.")
    what = data if len(files) > 1 else str(Path(data, first.relative_to(folder)))
    given = [str(path.resolve()) for path in files]
    return load_local(BUILDERS[first.suffix], what, None, "train", data_files=given, column=PROMPT[0])


def _only(files: Sequence[Path], folder: Path) -> str | None:
    """The only file, as a path from the folder; None where there are several."""
    return str(files[0].relative_to(folder)) if len(files) == 1 else None


def _told(rows: Any) -> list[Row]:
    """Rows in which a question or a beginning of an answer that is not there is empty."""
    return [row | {name: "" for name in PROMPT[1:] if row.get(name, "") is None} for row in rows.to_list()]


def choose(rows: Sequence[Row], fraction: float, limit: int | None, seed: int) -> list[Row]:
    """A part of the rows: the same that kvpress draws for the same fraction and seed, and the first of these.

    Args:
        fraction: to draw, in (0, 1]; 1 keeps their order. InputError where nothing is left.
        limit: at most so many; None for all.
        seed: of the drawing; kvpress's is 42.
    """
    chosen = list(rows)
    if fraction < 1:
        order = numpy.random.RandomState(seed).choice(len(rows), size=round(fraction * len(rows)), replace=False)
        chosen = [rows[i] for i in order]
    if not chosen:
        raise InputError(f"--fraction {fraction:.15g} of {len(rows)} questions is none; give more.")
    return chosen if limit is None else chosen[:limit]


def check_rows(benchmark: Benchmark, loaded: Rows, has_limit: bool) -> None:
    """Raise DataError where a row cannot be asked or scored, MissingDependencyError where scoring needs a package.

    ``has_limit``: whether the length of an answer is given otherwise.
    """
    if not loaded.rows:
        raise DataError(f"{loaded.name} holds no rows; name another folder.")
    needed = [*PROMPT, *([] if has_limit else [LIMIT]), *(column.name for column in benchmark.columns)]
    missing = [name for name in needed if name not in loaded.rows[0]]
    if missing:
        raise DataError(
            f"{loaded.name} has no column {missing[0]!r}, only {sorted(loaded.rows[0])}; {benchmark.name} needs "
            f"{', '.join(needed)}."
        )
    for index, row in enumerate(loaded.rows):
        where = f"Row {index} of {loaded.place}"
        if not all(isinstance(row[name], str) for name in PROMPT) or not row["context"]:
            raise DataError(f"{where}: {', '.join(PROMPT)} must be texts, and the context not empty.")
        if not has_limit and (type(row[LIMIT]) is not int or row[LIMIT] < 1):
            raise DataError(f"{where}: {LIMIT} must be an integer of at least 1, got {row[LIMIT]!r}.")
        for column in benchmark.columns:
            if not column.fits(row):
                value = row[column.name]
                close = nearest(value, column.allowed) if isinstance(value, str) else ""
                raise DataError(f"{where}: {column.name} must be {column.what}, got {_shown(value)}.{close}")
        try:
            require(benchmark.packages(row), f"Scoring {benchmark.name}")
            benchmark.groups(row)
            benchmark.score("", row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{where} cannot be scored as {benchmark.name} ({type(error).__name__}: {error}); see the columns in "
                "docs/guide/benchmarks.md."
            ) from error


def _shown(value: Any) -> str:
    """The beginning of a value."""
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


Ids = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One question about a context."""

    ids: Ids  # of the question, what the chat template puts after it, and the beginning of the answer
    limit: int  # tokens of the answer at most
    row: Row  # its other columns, by which it is scored


@dataclass(frozen=True)
class AskedContext:
    """One context, which is compressed once, and the questions about it."""

    context_ids: Ids  # read and compressed
    questions: tuple[Question, ...]  # each asked of what is left of the context, and of no other question
    n_whole: int  # tokens before the context was cut to its length
    n_pinned: int  # tokens at the beginning that nothing may evict

    @property
    def length(self) -> int:
        return len(self.context_ids)

    @property
    def fingerprint(self) -> str:
        """The same for contexts of the same tokens and questions: 16 hex digits."""
        parts = (self.context_ids, self.n_pinned, [(question.ids, question.limit) for question in self.questions])
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def make_contexts(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_positions: int | None,
    max_context_length: int | None = None,
    max_new_tokens: int | None = None,
    is_query_aware: bool = False,
    system: str | None = None,
) -> list[AskedContext]:
    """The contexts in the order of their first questions.

    Prompts are those of the pipeline "kv-press-text-generation": with a chat template a context is the user's turn up
    to the question, without one it stands as it is after the beginning-of-text token, and a line ends after a question.

    Args:
        rows: with the columns context, question, answer_prefix and max_new_tokens.
        max_positions: of the model; a context is cut where it would leave no room for its longest question and answer.
            None: there is room for all.
        max_context_length: tokens after which a context is cut; None for as many as there is room for.
        max_new_tokens: of an answer at most, instead of what the row says.
        is_query_aware: put each question into its context, where a press sees it.
        system: a system prompt that every context begins with, and that nothing may evict; None for none.

    Raises:
        InputError: there is no room for a context, or none for what is asked after it.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["context"] + (row["question"] if is_query_aware else ""), []).append(row)

    def encode(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    contexts = []
    for text, own in groups.items():
        pinned, before, after = prompt_parts(tokenizer, text, system)
        head, ids, questions = encode(pinned), encode(pinned) + encode(before), []
        for row in own:
            asked = ("" if is_query_aware else row["question"]) + after + row["answer_prefix"]
            rest = {name: value for name, value in row.items() if name != "context"}
            questions.append(Question(encode(asked), max_new_tokens or row[LIMIT], rest))
        end = encode(own[0]["question"]) if is_query_aware else ()  # a press shall see it where a context is cut
        needed = max(len(question.ids) + question.limit for question in questions)
        room = len(ids) if max_positions is None else max_positions - needed
        length = min(len(ids), room if max_context_length is None else max_context_length)
        if length > room or length <= min(len(head) + len(end), len(ids) - 1):
            raise InputError(
                f"A context of {len(ids):,} tokens, a question and an answer of up to {needed:,} need more than the "
                f"{min(most for most in (max_positions, max_context_length) if most is not None):,} tokens "
                "that there are: give other --max_context_length or less --max_new_tokens, or --allow_extrapolation."
            )
        cut = ids if length == len(ids) else ids[: length - len(end)] + end
        contexts.append(AskedContext(cut, tuple(questions), len(ids), len(head)))
    return contexts
