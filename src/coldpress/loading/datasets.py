"""The texts that are evaluated: WikiText, PG-19, the shipped demo, any hub dataset, local folders and files.

    dataset=                      source                               documents
    wikitext                      Salesforce/wikitext                  one: all rows joined with a blank line
    pg19                          emozilla/pg19-test, emozilla/pg19    one per book, never joined
    demo                          a text file inside the package       one
    org/name                      that dataset of the hub              one per row with text, or as below
    a folder in the hub's layout  itself                               one per row, joined when it is WikiText
    a .parquet or .jsonl file     itself                               one per row, joined when it is WikiText
    a .txt file, or text_file=    itself                               one

The short names win over folders of the same name: write ``./wikitext`` for a folder. An existing path wins
over a hub id. The library `datasets` is imported only when it is needed, never for a single text.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coldpress.errors import DataError, nearest
from coldpress.io.files import MAX_TEXT_BYTES, is_utf8, path_of, read_bytes
from coldpress.loading.hub import load_hub, load_local

HUB_IDS = {"wikitext": ("Salesforce/wikitext",), "pg19": ("emozilla/pg19-test", "emozilla/pg19")}
SHORT_NAMES = ("wikitext", "pg19", "demo")
_SHORT = ", ".join(SHORT_NAMES)
DEMO_FOLDER = "coldpress/assets/demo/text"
WIKITEXT_SUBSET = "wikitext-2-raw-v1"
WHOLE = "all"  # the split of a source that has none: a single file
FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json"}


@dataclass(frozen=True)
class Document:
    """One text that is evaluated by itself: no context crosses into the next one.

    original: the text as it was before it was rewritten for a tokenizer; None if it was not.
    """

    doc_id: str
    text: str
    original: str | None = None


@dataclass(frozen=True)
class Corpus:
    """What was loaded, with all that a result must say about it.

    name: as asked for. source: hub id, or the path as it was given. join: how rows became one text, None when they
    did not. rows: these rows, so that they can be joined in other ways; None likewise.
    """

    name: str
    source: str
    subset: str | None
    split: str | None
    join: str | None
    documents: tuple[Document, ...]
    rows: tuple[str, ...] | None = field(default=None, repr=False)

    @property
    def text_sha256(self) -> str:
        """SHA-256 over the documents' UTF-8 text, a zero byte between documents."""
        return hashlib.sha256(b"\x00".join(d.text.encode() for d in self.documents)).hexdigest()

    @property
    def text_bytes(self) -> int:
        """Length of all documents in UTF-8 bytes, without separators."""
        return sum(len(d.text.encode()) for d in self.documents)


def load_corpus(
    dataset: str,
    *,
    subset: str | None = None,
    split: str = "test",
    sample_idx: int | None = None,
    text_file: str | None = None,
    revision: str | None = None,
    default_split: str = "test",
) -> Corpus:
    """Load the text to evaluate; the table at the top of this module says what each `dataset` gives.

    subset: the dataset's configuration; wikitext defaults to wikitext-2-raw-v1. sample_idx: take only that
    row of the split as the one document. text_file: a UTF-8 file that replaces the dataset. revision: commit,
    tag or branch of a hub dataset. Single texts and files have no subsets or splits: `split` is "all" there, or what
    the caller asks for if the user says nothing (default_split), and recorded as "all".

    Raises DataError for input that has no usable text, UnreachableError when the hub is needed and neither it
    nor a cached copy is there, MissingDependencyError when `datasets` is needed and not installed.
    """
    given = {"dataset": "" if text_file is not None or dataset.endswith(".txt") else dataset}
    for name, value in (given | {"subset": subset, "split": split, "revision": revision}).items():
        if value is not None and not is_utf8(value):
            raise DataError(f"{name} {value!r} is not UTF-8; give it another name")
    if text_file is not None:
        _check_single(text_file, split, default_split, subset=subset, revision=revision)
        return _one_text(text_file, Path(text_file), sample_idx)
    if dataset == "demo":
        _check_single(dataset, split, default_split, subset=subset, revision=revision)
        demo = _demo_file()
        return replace(_one_text(dataset, demo, sample_idx), source=f"{DEMO_FOLDER}/{demo.name}")
    path = path_of(dataset)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL; a folder that may not be read
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{dataset[:80]!r} cannot be read ({why})") from error
    if dataset in HUB_IDS:
        subset = WIKITEXT_SUBSET if dataset == "wikitext" and subset is None else subset
        source, rows = load_hub(HUB_IDS[dataset], subset, split, revision)
        joined = dataset == "wikitext"
    elif dataset.strip() and path.exists():
        _refuse(dataset, revision=revision)
        source, joined = str(path), _is_wikitext(path, subset)
        if path.is_dir():
            if joined and subset is None and (path / WIKITEXT_SUBSET).is_dir():
                subset = WIKITEXT_SUBSET
            rows = load_local(str(path.resolve()), dataset, subset, split)
        elif path.suffix == ".txt":
            _check_single(dataset, split, default_split, subset=subset)
            return _one_text(dataset, path, sample_idx)
        elif path.suffix in FILE_BUILDERS:
            _check_single(dataset, split, default_split, subset=subset)
            rows = load_local(FILE_BUILDERS[path.suffix], dataset, None, "train", data_files=str(path.resolve()))
            split = WHOLE
        else:
            raise DataError(f"{dataset!r} is not a .txt, .parquet or .jsonl file; plain text goes in text_file")
    elif _is_hub_id(dataset):
        source, rows = load_hub((dataset,), subset, split, revision)
        joined = "wikitext" in dataset.lower()
    elif "/" in dataset or path.suffix in {*FILE_BUILDERS, ".txt"}:
        raise DataError(f"no file or folder {dataset!r}: give an existing path, a hub id 'org/name', or {_SHORT}")
    else:
        raise DataError(
            f"unknown dataset {dataset!r}: allowed are {_SHORT}, a hub id 'org/name', or an existing path."
            + nearest(dataset, SHORT_NAMES)
        )
    what = dataset if source == dataset or path.exists() else f"{dataset} ({source})"
    documents, join = _documents(rows, what, joined, sample_idx)
    lines = None if join is None else tuple(text or "" for text in _column(rows, "text", what))
    return Corpus(dataset, source, subset, split, join, documents, lines)


def is_single(dataset: str, is_text: bool = False) -> bool:
    """Whether :func:`load_corpus` reads a single text that can be read twice, or refuses what is no name of a text.

    is_text: `dataset` is what text_file= is given.
    """
    path = path_of(dataset)
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            return False  # a pipe is read once
        is_there = path.exists()
    except (OSError, ValueError):
        return True
    if is_text or dataset == "demo":
        return True
    if is_there or dataset in HUB_IDS:
        return path.suffix == ".txt" and dataset not in HUB_IDS
    return not _is_hub_id(dataset)


def _is_hub_id(dataset: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset)) and path_of(dataset).suffix not in (*FILE_BUILDERS, ".txt")


def _refuse(name: str, **given: str | None) -> None:
    """Options that cannot apply are an error: ignoring them would evaluate something else than asked."""
    for option, value in given.items():
        if value is not None:
            raise DataError(f"{option}={value!r} does not apply to {name!r}: leave {option} out")


def _check_single(name: str, split: str, default: str, **given: str | None) -> None:
    """A single text has no splits, and none of what is ``given``."""
    _refuse(name, **given)
    if split not in (WHOLE, default):
        raise DataError(
            f"unknown split {split!r} of {name!r}, which is a single text: allowed is {WHOLE!r}, or leave --split out."
            f"{nearest(split, (WHOLE, default))}"
        )


def _demo_file() -> Path:
    folder = importlib.resources.files("coldpress").joinpath(*DEMO_FOLDER.split("/")[1:])
    files = sorted(f.name for f in folder.iterdir() if f.name.endswith(".txt")) if folder.is_dir() else []
    if len(files) != 1:
        raise DataError(f"the demo text is missing from {folder}: expected one .txt file; install coldpress again")
    return Path(str(folder / files[0]))


def _one_text(name: str, path: Path, sample_idx: int | None) -> Corpus:
    path = path_of(path)
    if sample_idx not in (None, 0):
        raise DataError(f"sample_idx {sample_idx} is out of range for {name!r}: it is one document, 0 is allowed")
    try:
        text = read_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig")  # line ends stay as they are
    except UnicodeDecodeError as error:
        raise DataError(f"{name!r} is not UTF-8 text (byte offset {error.start}): convert it first") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL, or too much of it
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {name[:200]!r} ({why}): give an existing UTF-8 text file") from error
    if not text.strip():
        raise DataError(f"{name!r} holds no text: give a file with some")
    return Corpus(name, str(path), None, WHOLE, None, (Document(path.name, text),))


def _is_wikitext(path: Path, subset: str | None) -> bool:
    """Rows of WikiText are lines of one stream; the name, the subset or the folder's README tell."""
    names = [path.resolve().name, path.resolve().parent.name] if path.is_file() else [path.resolve().name]
    readme = path / "README.md"
    if path.is_dir() and readme.is_file():
        names.append(read_bytes(readme).decode(errors="replace"))
    return (subset or "").startswith("wikitext") or any("wikitext" in name.lower() for name in names)


def _column(rows: Any, name: str, what: str) -> list[Any]:
    """All values of a column, which a file may hold without their being text."""
    try:
        return list(rows[name][:])
    except UnicodeDecodeError as error:
        raise DataError(f"column {name!r} of {what} is not UTF-8 text: convert its files first") from error


def _documents(rows: Any, what: str, joined: bool, sample_idx: int | None) -> tuple[tuple[Document, ...], str | None]:
    """Turn the rows of one split into documents; the second value says how they were joined."""
    if "text" not in rows.column_names:
        raise DataError(f"{what} has no column 'text', only {rows.column_names}: rename the column that holds the text")
    if getattr(rows.features["text"], "dtype", None) not in ("string", "large_string"):
        raise DataError(f"column 'text' of {what} holds {rows.features['text']}, not strings")
    texts = [text or "" for text in _column(rows, "text", what)]
    filled = [row for row, text in enumerate(texts) if text.strip()]
    if sample_idx is not None and not 0 <= sample_idx < len(texts):
        raise DataError(f"sample_idx {sample_idx} is out of range for {what}: allowed are 0 to {len(texts) - 1}")
    if not filled:
        raise DataError(f"{what} holds no text in its {len(texts)} rows: choose another split or subset")
    if sample_idx is not None and sample_idx not in filled:
        close = sorted(sorted(filled, key=lambda row: abs(row - sample_idx))[:3])
        raise DataError(f"row {sample_idx} of {what} is empty: rows with text near it are {close}")
    if joined and sample_idx is None:
        return (Document(f"rows 0-{len(texts) - 1}", "\n\n".join(texts)),), '"\\n\\n".join(all rows)'
    titled = not joined and "short_book_title" in rows.column_names
    titles = [str(title or "").strip() for title in _column(rows, "short_book_title", what)] if titled else []
    titles = titles or [""] * len(texts)
    count = Counter(titles)
    ids = [f"{t}#{row}" if count[t] > 1 and t else t or str(row) for row, t in enumerate(titles)]
    chosen = filled if sample_idx is None else [sample_idx]
    return tuple(Document(ids[row], texts[row]) for row in chosen), None


# Excerpts, spread over all of a text: as much as a measurement of a few minutes can read

SAMPLE_CHARS = 20_000  # that tell how many of them a token takes
SPARE = 1.3  # times the characters that so many tokens take on average: tokens differ from place to place
FEWEST = 8  # excerpts, where shorter ones make as many
SHORTEST = 96  # tokens of an excerpt


def source_of(data: str) -> dict[str, Any]:
    """What ``--data`` names, as other commands are given it: a text file, or a dataset."""
    is_text = data not in SHORT_NAMES and path_of(data).is_file() and not data.endswith((".parquet", ".jsonl"))
    return {"text_file": data} if is_text else {"dataset": data}


def excerpts(corpus: Corpus, tokenizer: Any, n_tokens: int, most: int, seed: int) -> tuple[Corpus, int]:
    """Up to ``most`` excerpts of ``n_tokens`` tokens or some more, which do not overlap, in random order.

    A text too short for FEWEST of them gets shorter ones; DataError where it has less than two of the shortest length.

    Returns:
        The excerpts, each a document, and how many tokens each has at least.
    """
    per_token = _chars_per_token([document.text for document in corpus.documents], tokenizer)
    while True:
        span = int(per_token * n_tokens * SPARE) + 1
        places = [(d, i) for d in corpus.documents for i in range(0, len(d.text) - span + 1, span)]
        if len(places) >= FEWEST or n_tokens <= SHORTEST:
            break
        n_tokens = max(SHORTEST, n_tokens * 3 // 4)
    if len(places) < 2:
        n_chars = max(len(document.text) for document in corpus.documents)
        raise DataError(
            f"The text has {n_chars:,} characters; at least {2 * span:,} are needed for two excerpts: take more."
        )
    chosen = random.Random(seed).sample(places, min(most, len(places)))
    documents = tuple(Document(f"{d.doc_id} at {i}", d.text[i : i + span]) for d, i in chosen)
    return replace(corpus, documents=documents, rows=None, join=None), n_tokens


def _chars_per_token(texts: Sequence[str], tokenizer: Any) -> float:
    """Of the longest text, from its middle."""
    text = max(texts, key=len)
    start = max(0, (len(text) - SAMPLE_CHARS) // 2)
    sample = text[start : start + SAMPLE_CHARS]
    return len(sample) / max(1, len(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]))
