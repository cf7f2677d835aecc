"""Loading texts: what becomes a document, and one clear line for everything that cannot work."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from coldpress.errors import DataError, InputError, MissingDependencyError, UnreachableError
from coldpress.loading.datasets import load_corpus

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")

WIKI_ROWS = ["", " = Title = ", "", "First line .", "Second line ."]
README = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*.parquet
- config_name: wikitext-103-v1
  data_files:
  - split: test
    path: wikitext-103-v1/test-*.parquet
---
# Rows of a known corpus
"""


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches and offline mode: no test sees this machine's caches or its network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_rows(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)


def wiki_folder(folder: Path) -> Path:
    """Two subsets of one stream, in the hub's layout."""
    write_rows(folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", text=WIKI_ROWS)
    write_rows(folder / "wikitext-103-v1" / "test-00000-of-00001.parquet", text=["other"])
    (folder / "README.md").write_text(README)
    return folder


def book_folder(folder: Path) -> Path:
    write_rows(
        folder / "data" / "test-00000-of-00001.parquet",
        short_book_title=["Emma", None, "Poems", "Void", "Poems"],
        text=["Emma Woodhouse", "Untitled", "One", " \n", "Two"],
    )
    return folder


def fails(kind: type[InputError], *parts: str, **arguments: Any) -> str:
    """`load_corpus` raises exactly `kind`, in one line that has all `parts`."""
    with pytest.raises(kind) as caught:
        load_corpus(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# WikiText: one stream


@pytest.mark.parametrize("name", ["wikitext", "a-copy"])  # known by its name, or by its subset
def test_wikitext_folder_is_one_text_joined_with_blank_lines(tmp_path: Path, name: str) -> None:
    folder = wiki_folder(tmp_path / name)
    corpus = load_corpus(str(folder), subset="wikitext-2-raw-v1")
    assert [d.text for d in corpus.documents] == ["\n\n".join(WIKI_ROWS)]
    assert corpus.documents[0].doc_id == "rows 0-4"
    assert corpus.join == '"\\n\\n".join(all rows)'
    assert (corpus.name, corpus.source) == (str(folder), str(folder))
    assert (corpus.subset, corpus.split) == ("wikitext-2-raw-v1", "test")


def test_wikitext_is_known_by_the_readme_of_its_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "copy" / "test.parquet", text=["a", "b"])
    assert len(load_corpus(str(tmp_path / "copy")).documents) == 2
    (tmp_path / "copy" / "README.md").write_text("Rows of WikiText-2.")
    assert [d.text for d in load_corpus(str(tmp_path / "copy")).documents] == ["a\n\nb"]


def test_sample_idx_of_wikitext_is_that_row(tmp_path: Path) -> None:
    folder = wiki_folder(tmp_path / "wikitext")
    corpus = load_corpus(str(folder), subset="wikitext-2-raw-v1", sample_idx=3)
    assert [(d.doc_id, d.text) for d in corpus.documents] == [("3", "First line .")]
    assert corpus.join is None


# Documents: each by itself


def test_books_are_never_joined_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    corpus = load_corpus(str(book_folder(tmp_path / "pg19")))
    assert [(d.doc_id, d.text) for d in corpus.documents] == [
        ("Emma", "Emma Woodhouse"),
        ("1", "Untitled"),  # no title: its row
        ("Poems#2", "One"),  # the same title twice: told apart
        ("Poems#4", "Two"),
    ]
    assert corpus.join is None


def test_sample_idx_counts_rows_of_the_split_empty_ones_included(tmp_path: Path) -> None:
    folder = str(book_folder(tmp_path / "pg19"))
    assert [d.text for d in load_corpus(folder, sample_idx=4).documents] == ["Two"]
    fails(DataError, "row 3", "is empty", "[1, 2, 4]", dataset=folder, sample_idx=3)
    fails(DataError, "5", "0 to 4", dataset=folder, sample_idx=5)
    fails(DataError, "-1", "0 to 4", dataset=folder, sample_idx=-1)


def test_missing_text_in_a_row_counts_as_empty(tmp_path: Path) -> None:
    write_rows(tmp_path / "docs" / "test.parquet", text=["a", None])
    assert [d.text for d in load_corpus(str(tmp_path / "docs")).documents] == ["a"]


def test_hash_and_size_are_over_utf8_with_a_zero_byte_between_documents(tmp_path: Path) -> None:
    write_rows(tmp_path / "docs" / "test.parquet", text=["é", "b"])
    corpus = load_corpus(str(tmp_path / "docs"))
    assert corpus.text_bytes == 3
    assert corpus.text_sha256 == hashlib.sha256(b"\xc3\xa9\x00b").hexdigest()


def test_single_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", text=["a", "b"])
    (tmp_path / "x.jsonl").write_text('{"text": "c"}\n{"text": "d"}\n')
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    found = {kind: load_corpus(str(tmp_path / f"x.{kind}")) for kind in ("parquet", "jsonl", "txt")}
    assert {kind: [d.text for d in corpus.documents] for kind, corpus in found.items()} == {
        "parquet": ["a", "b"],
        "jsonl": ["c", "d"],
        "txt": ["one\n\ntwo\n"],
    }
    assert {corpus.split for corpus in found.values()} == {"all"}


def test_a_folder_of_text_files_gives_one_document_per_file(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    corpus = load_corpus(str(tmp_path / "texts"), split="train")
    assert [d.text for d in corpus.documents] == ["a1\na2\n", "b1\nb2\n"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_rows(tmp_path / "docs" / "test.parquet", text=[text])
        assert [d.text for d in load_corpus(str(tmp_path / "docs")).documents] == [text]


def test_text_file_replaces_the_dataset(tmp_path: Path) -> None:
    path = tmp_path / "mine.md"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")  # a byte order mark is no text, line ends are
    corpus = load_corpus("wikitext", text_file=str(path))
    assert [(d.doc_id, d.text) for d in corpus.documents] == [("mine.md", "one\r\ntwo")]
    assert (corpus.name, corpus.source, corpus.split) == (str(path), str(path), "all")


def test_demo_needs_no_datasets_and_has_a_source_that_is_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    corpus = load_corpus("demo")
    assert len(corpus.documents) == 1
    assert corpus.text_bytes > 1000
    assert corpus.source.startswith("coldpress/assets/demo/text/")


def test_missing_demo_text_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.loading.datasets.DEMO_FOLDER", "coldpress/assets/nothing")
    fails(DataError, "demo text is missing", dataset="demo")


# What cannot work


def test_wrong_names(tmp_path: Path) -> None:
    fails(DataError, "'wikitxt'", "Did you mean 'wikitext'?", dataset="wikitxt")
    fails(DataError, "wikitext, pg19, demo", dataset="")
    fails(DataError, "no file or folder", dataset=str(tmp_path / "nothing"))
    fails(DataError, "no file or folder", dataset="data/rows.parquet")
    (tmp_path / "x.csv").write_text("text\na\n")
    fails(DataError, ".parquet", dataset=str(tmp_path / "x.csv"))


def test_wrong_subset_or_split_lists_what_there_is(tmp_path: Path) -> None:
    folder = str(wiki_folder(tmp_path / "wikitext"))
    both = ("'wikitext-2-raw-v1'", "'wikitext-103-v1'")
    wrong = "wikitext-2-rw-v1"
    fails(DataError, repr(wrong), *both, "Did you mean 'wikitext-2-raw-v1'", dataset=folder, subset=wrong)
    assert load_corpus(folder).subset == "wikitext-2-raw-v1"  # the default of wikitext on the hub, too
    fails(DataError, "'tst'", "['test']", "'test'?", dataset=folder, subset="wikitext-103-v1", split="tst")
    fails(DataError, "cannot be read", dataset=folder, subset="wikitext-103-v1", split="test[:")


def test_wrong_content(tmp_path: Path) -> None:
    write_rows(tmp_path / "pages" / "test.parquet", page=["a"], title=["b"])
    fails(DataError, "no column 'text'", "['page', 'title']", dataset=str(tmp_path / "pages"))
    write_rows(tmp_path / "numbers" / "test.parquet", text=[1, 2])
    fails(DataError, "'text'", "int64", dataset=str(tmp_path / "numbers"))
    write_rows(tmp_path / "blank" / "test.parquet", text=["", " "])
    fails(DataError, "no text in its 2 rows", dataset=str(tmp_path / "blank"))
    (tmp_path / "empty").mkdir()
    fails(DataError, "empty", dataset=str(tmp_path / "empty"))


def test_corrupt_files_are_one_line_and_leave_stderr_clean(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "test.parquet").write_bytes(b"PAR1" + b"garbage" * 50)
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    write_rows(tmp_path / "good" / "test.parquet", text=["a"])
    capfd.readouterr()
    verbosity = datasets.logging.get_verbosity()
    fails(DataError, "bad", "cannot be read", dataset=str(tmp_path / "bad"))
    fails(DataError, "cut.jsonl", "JSON", dataset=str(tmp_path / "cut.jsonl"))
    load_corpus(str(tmp_path / "good"))
    assert capfd.readouterr().err == ""
    assert datasets.logging.get_verbosity() == verbosity
    assert not datasets.are_progress_bars_disabled()


def folder_of(folder: Path, **files: str | bytes) -> str:
    folder.mkdir()
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"test1_jsonl": GOOD, "test2_jsonl": '{"body": "b"}\n'}, ["test2.jsonl has no column 'text', only ['body']"]),
        (
            {"test1_jsonl": GOOD, "test2_jsonl": '{"text": "b", "more": "c"}\n'},
            ["test1.jsonl has the columns ['text'] and ", "test2.jsonl has ['text', 'more']"],
        ),
        ({"test_jsonl": ""}, ["test.jsonl is empty"]),
        ({"test_parquet": b""}, ["test.parquet is empty"]),
        ({"test_txt": ""}, ["test.txt is empty"]),
        ({"test_jsonl": "\n\n"}, ["test.jsonl holds no rows"]),
        ({"test1_jsonl": GOOD, "test2_jsonl": '{"text": "a"\n'}, ["test2.jsonl cannot be read (JSON parse error"]),
        ({"test_parquet": b"PAR1" + b"garbage" * 50}, ["test.parquet cannot be read (Parquet magic bytes"]),
        ({"test_txt": b"\xe9"}, ["test.txt cannot be read ('utf-8' codec"]),
    ],
)
def test_a_damaged_folder_names_the_file_and_what_is_expected(
    tmp_path: Path, files: dict[str, str | bytes], parts: list[str]
) -> None:
    message = fails(DataError, *parts, dataset=folder_of(tmp_path / "rows", **files))
    assert message.endswith("with equal columns, among them 'text' with a string in each row.")
    assert "Error:" not in message


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_copies_that_cannot_be_kept_are_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The library `datasets` writes what it has read into its cache, in a home that may be none to write to."""
    good, place = folder_of(tmp_path / "good", test_jsonl=GOOD), str(tmp_path / "home" / ".cache")

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(number, os.strerror(number), place)

    monkeypatch.setattr("datasets.load_dataset", denied)
    for dataset in (good, f"{good}/test.jsonl"):
        message = fails(DataError, f"{place} cannot be written ({os.strerror(number)})", "set HF_HOME", dataset=dataset)
        assert "Expected are" not in message
    place = f"{good}/test.jsonl"
    fails(DataError, "test.jsonl cannot be read", dataset=good)


def test_columns_that_are_not_text_are_refused(tmp_path: Path) -> None:
    latin = folder_of(tmp_path / "latin", test_jsonl='{"text": "é"}'.encode("latin-1"))
    fails(DataError, "column 'text'", "is not UTF-8 text", dataset=latin)
    fails(DataError, "is not UTF-8 text", dataset=f"{latin}/test.jsonl")
    mixed = folder_of(tmp_path / "mixed", test_jsonl=GOOD + '{"text": 3}\n')
    fails(DataError, "mixed", "'text'", "string", dataset=mixed)  # where it is read at all differs by version


def test_a_single_text_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "good.jsonl").write_text(GOOD)
    for single in ({"dataset": "demo"}, *({"dataset": str(tmp_path / f"good.{kind}")} for kind in ("txt", "jsonl"))):
        fails(DataError, "unknown split 'nonsense'", "leave --split out", **single, split="nonsense")
        fails(DataError, "Did you mean 'test'?", **single, split="tests")
        fails(DataError, "unknown split 'train'", **single, split="train")
        for split in ("test", "all"):
            assert load_corpus(**single, split=split).split == "all"
        assert load_corpus(**single, split="train", default_split="train").split == "all"
    fails(DataError, "unknown split", dataset="wikitext", text_file=str(tmp_path / "good.txt"), split="nonsense")


def test_wrong_text_files(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("text")
    for name, part in {
        "nothing.txt": "No such file",
        "": "directory",
        "latin1.txt": "not UTF-8",
        "blank.txt": "no text",
    }.items():
        fails(DataError, part, dataset="wikitext", text_file=str(tmp_path / name))
    fails(DataError, "sample_idx 1", dataset="demo", text_file=str(tmp_path / "good.txt"), sample_idx=1)


def test_options_that_cannot_apply_are_refused(tmp_path: Path) -> None:
    fails(DataError, "subset='x'", dataset="demo", subset="x")
    fails(DataError, "revision='x'", dataset=str(tmp_path), revision="x")


def test_datasets_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(MissingDependencyError, "pip install datasets", dataset=str(tmp_path))
    fails(MissingDependencyError, "pip install datasets", dataset="wikitext")


# The hub


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("wikitext", "Salesforce/wikitext"),
        ("pg19", "emozilla/pg19-test or emozilla/pg19"),
        ("acme/x", "acme/x"),
    ],
)
def test_offline_without_a_cache_tells_three_ways_out(name: str, ids: str) -> None:
    ways = ("--dataset PATH", "hf download --repo-type dataset", "--model demo --dataset demo")
    fails(UnreachableError, ids, "HF_HUB_OFFLINE", *ways, dataset=name)


class OutOfService(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response_only(503)
        self.end_headers()


@pytest.mark.parametrize(("listening", "reason"), [(False, "http://127.0.0.1"), (True, "status 503")])
def test_unreachable_hub_fails_within_seconds(monkeypatch: pytest.MonkeyPatch, listening: bool, reason: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), OutOfService) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        if listening:
            threading.Thread(target=server.handle_request, daemon=True).start()
        else:
            server.server_close()
        start = time.monotonic()
        fails(UnreachableError, reason, "Salesforce/wikitext", dataset="wikitext")
        assert time.monotonic() - start < 5
    assert datasets.config.HF_HUB_OFFLINE is False  # what was switched for the search of the cache is back


def test_a_dataset_prepared_earlier_is_served_offline(tmp_path: Path) -> None:
    """What `datasets` leaves behind after load_dataset("acme/corpus", "tiny") with a network."""
    write_rows(tmp_path / "made" / "corpus" / "tiny" / "test-0.parquet", text=["cached"])
    readme = README.replace("wikitext-2-raw-v1", "tiny").split("- config_name: wikitext-103")[0] + "---\n"
    (tmp_path / "made" / "corpus" / "README.md").write_text(readme)
    builder = datasets.load_dataset_builder(str(tmp_path / "made" / "corpus"), "tiny")
    builder.download_and_prepare(str(tmp_path / "arrow" / "acme___corpus" / "tiny" / "0.0.0" / ("a" * 40)))
    corpus = load_corpus("acme/corpus", subset="tiny")
    assert [d.text for d in corpus.documents] == ["cached"]
    assert corpus.source == "acme/corpus"
    fails(DataError, "['test']", dataset="acme/corpus", subset="tiny", split="dev")
    fails(UnreachableError, "'huge'", dataset="acme/corpus", subset="huge")
    # A prepared copy does not tell its revision, so it must not stand in for one.
    fails(UnreachableError, "revision 'v1'", dataset="acme/corpus", subset="tiny", revision="v1")


def test_a_snapshot_in_the_hub_cache_is_served_offline(tmp_path: Path) -> None:
    commit = "b" * 40
    repo = tmp_path / "hub" / "datasets--Salesforce--wikitext"
    wiki_folder(repo / "snapshots" / commit)
    for ref in ("main", "v1"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    corpus = load_corpus("wikitext")
    assert [d.text for d in corpus.documents] == ["\n\n".join(WIKI_ROWS)]
    assert (corpus.source, corpus.subset) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert load_corpus("wikitext", revision="v1").documents == corpus.documents
    fails(UnreachableError, "revision 'v2'", dataset="wikitext", revision="v2")
    fails(DataError, "wikitext-103-v1", dataset="wikitext", subset="wikitext-3")


class Hub:
    """Stands in for `datasets.load_dataset` with a reachable hub that has only `repos`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **repos: Any) -> None:
        self.repos = {name.replace("__", "/").replace("_", "-"): value for name, value in repos.items()}
        self.calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr("coldpress.loading.hub._hub_problem", lambda repo: None)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, repo: str, subset: str | None, *, split: str, revision: str | None = None) -> Any:
        self.calls.append((repo, subset, split, revision))
        answer = self.repos.get(repo, datasets.exceptions.DatasetNotFoundError(f"Dataset '{repo}' doesn't exist"))
        if isinstance(answer, Exception):
            raise answer
        return datasets.Dataset.from_dict({"text": answer})


def test_what_is_asked_of_a_reachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, Salesforce__wikitext=["a", "b"], emozilla__pg19=["x", "y"], acme__docs=["p", "q"])
    assert [d.text for d in load_corpus("wikitext").documents] == ["a\n\nb"]
    corpus = load_corpus("pg19", revision="v1")
    assert ([d.text for d in corpus.documents], corpus.source) == (["x", "y"], "emozilla/pg19")
    assert len(load_corpus("acme/docs", subset="s", split="train").documents) == 2
    assert [d.text for d in load_corpus("Salesforce/wikitext").documents] == ["a\n\nb"]  # the same by its id
    assert hub.calls == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None),
        ("emozilla/pg19-test", None, "test", "v1"),  # does not exist: the next one
        ("emozilla/pg19", None, "test", "v1"),
        ("acme/docs", "s", "train", None),
        ("Salesforce/wikitext", None, "test", None),
    ]
    fails(DataError, "'acme/nothing' doesn't exist", dataset="acme/nothing")


def test_a_connection_that_breaks_later_is_unreachable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, Salesforce__wikitext=ConnectionError("Couldn't reach\nthe hub"))
    monkeypatch.setattr("coldpress.loading.hub._load_cached", lambda *arguments: None)
    fails(UnreachableError, "Couldn't reach the hub", dataset="wikitext")
    Hub(monkeypatch, Salesforce__wikitext=RuntimeError("Dataset scripts are no longer supported"))
    fails(DataError, "scripts are no longer supported", dataset="wikitext")
    Hub(monkeypatch, acme__x=huggingface_hub.errors.HFValidationError("Repo id must use alphanumeric chars"))
    fails(DataError, "Repo id must use", dataset="acme/x")


# The corpora themselves, where they are


DATA = Path(os.environ.get("COLDPRESS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.skipif(not DATA.is_dir(), reason="no evaluation data: set COLDPRESS_DATA")
def test_real_corpora() -> None:
    wiki = load_corpus(str(DATA / "wikitext"), subset="wikitext-2-raw-v1")
    assert wiki.documents[0].doc_id == "rows 0-4357"
    assert "Robert Boulter" in wiki.documents[0].text[:200]
    assert wiki.text_bytes == 1_296_370
    books = load_corpus(str(DATA / "pg19"))
    assert len(books.documents) == 6
    assert books.text_bytes == sum(len(d.text.encode()) for d in books.documents) > 2_000_000
