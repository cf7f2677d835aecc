"""Rows of a dataset from files of this machine, from the Hugging Face hub, or from a cache filled earlier.

The library `datasets` retries an unreachable hub for 23 s, prints progress and log lines on stderr, and
raises plain ValueErrors. Here the hub is asked once, stderr stays clean, and each failure is one clear line.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coldpress.errors import DataError, MissingDependencyError, UnreachableError, nearest
from coldpress.io.network import hub_problem, network_problem, one_line

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
TEXT = "text"  # the column of a text to read


def _expected(column: str) -> str:
    return f"Expected are .parquet or .jsonl files with equal columns, among them {column!r} with a string in each row."


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs the package 'datasets' ({error}): pip install datasets, or give a plain text with "
            "--text_file PATH"
        ) from error
    return datasets


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of `datasets` and `huggingface_hub` on stderr."""
    import datasets
    from huggingface_hub import utils as hub

    levels = [(log, log.get_verbosity()) for log in (datasets.logging, hub.logging)]
    bars = [lib for lib in (datasets, hub) if not lib.are_progress_bars_disabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for log, _ in levels:
                log.set_verbosity(datasets.logging.CRITICAL)
            for lib in bars:
                lib.disable_progress_bars()
            yield
        finally:
            for log, level in levels:
                log.set_verbosity(level)
            for lib in bars:
                lib.enable_progress_bars()


def load_local(path: str, what: str, subset: str | None, split: str, *, column: str = TEXT, **options: Any) -> Any:
    """`datasets.load_dataset` on files of this machine, its failures told as DataError.

    column: that each row must have. options: of load_dataset, such as data_files or data_dir.
    """
    datasets = _datasets()
    with _quiet():
        try:
            rows = datasets.load_dataset(path, subset, split=split, **options)
            if rows.builder_name == "text":  # a folder of .txt files: one row per file, not per line
                rows = datasets.load_dataset(path, subset, split=split, sample_by="document", **options)
            return rows
        except Exception as error:
            files = options.get("data_files", path)
            source = Path(files if isinstance(files, str) else os.path.commonpath(files), options.get("data_dir") or "")
            said = _of_copies(error, source) or _explained(error, what, subset, split)
            if said is None:
                damage = _damage(datasets, source, what, column)
                said = DataError(f"{damage or _unread(what, error)}. {_expected(column)}")
            raise said from error


def _damage(datasets: Any, source: Path, what: str, column: str) -> str | None:
    """Which file of a folder, or that file itself, cannot be read, and why; None if each can be read alone."""
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    columns: dict[str, list[str]] = {}
    for file in files:
        builder, name = BUILDERS.get(file.suffix), what if file == source else f"{what}/{file.relative_to(source)}"
        if builder is None:
            continue
        if not file.stat().st_size:
            return f"{name} is empty"
        try:
            rows = datasets.load_dataset(builder, data_files=str(file.resolve()), split="train")
        except Exception as error:
            return f"{name} holds no rows" if "corresponds to no data" in str(error) else _unread(name, error)
        columns[name] = rows.column_names
        if column not in rows.column_names:
            return f"{name} has no column {column!r}, only {rows.column_names}"
    kinds = list({tuple(names): name for name, names in columns.items()}.items())
    if len(kinds) > 1:
        (first, one), (second, other) = kinds[:2]
        return f"{one} has the columns {list(first)} and {other} has {list(second)}"
    return None


def _unread(name: str, error: BaseException) -> str:
    return f"{name} cannot be read ({' '.join(str(_root(error)).split())[:300]})"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _of_copies(error: BaseException, source: Path | None = None) -> DataError | None:
    """That `datasets` cannot write its copies of what it reads; None if it is something else.

    source: the files that are read.
    """
    error = _root(error)
    if not isinstance(error, OSError) or error.errno not in _UNWRITABLE or not isinstance(error.filename, str | Path):
        return None
    if source is not None and Path(error.filename).resolve().is_relative_to(source.resolve()):
        return None
    return DataError(
        f"{error.filename} cannot be written ({error.strerror}), where the library datasets keeps copies of what it "
        "reads: set HF_HOME to a folder that you may write to"
    )


def _explained(error: BaseException, what: str, subset: str | None, split: str) -> DataError | None:
    """`datasets` raises plain ValueErrors that list what there is; tell it in our words, in one line.

    None where it is about something else: files that are damaged, or are not there.
    """
    error = _root(error)
    message = " ".join(str(error).split())
    listed = re.search(r"\[.*?\]", message)
    names = re.findall(r"'([^']*)'", listed[0]) if listed else []
    if "Config name is missing" in message:
        return DataError(f"{what} has several subsets, give one of {names}")
    if names and "BuilderConfig" in message:
        return DataError(f"unknown subset {subset!r} of {what}: allowed are {names}.{nearest(str(subset), names)}")
    if names and "Unknown split" in message:
        return DataError(
            f"unknown split {split!r} of {what}: allowed are {names}.{nearest(split, names)} Name one: --split."
        )
    if "Unrecognized instruction" in message or "Split name" in message:
        return DataError(f"split {split!r} cannot be read: write a name like 'test', or a slice like 'test[:10]'")
    return None


def _of_hub(error: BaseException, what: str, subset: str | None, split: str, column: str) -> DataError:
    return (
        _of_copies(error)
        or _explained(error, what, subset, split)
        or DataError(f"{_unread(what, error)}. {_expected(column)}")
    )


INSTEAD = (
    "give a local folder or file (--dataset PATH or --text_file PATH)",
    "or run the demo that is shipped (--model demo --dataset demo)",
)


def load_hub(
    repos: tuple[str, ...],
    subset: str | None,
    split: str,
    revision: str | None,
    *,
    data_dir: str | None = None,
    column: str = TEXT,
    instead: tuple[str, ...] = INSTEAD,
) -> tuple[str, Any]:
    """The first of `repos` that the hub has or, when it cannot be asked, that is cached; with its id.

    data_dir: the folder of the dataset to read. column: that each row must have. instead: what else can be given where
    there is no hub.
    """
    datasets = _datasets()
    missing, part = "", {} if data_dir is None else {"data_dir": data_dir}
    with _quiet():
        problem = _hub_problem(repos[0])
        for repo in repos:
            if problem is None:
                try:
                    return repo, datasets.load_dataset(repo, subset, split=split, revision=revision, **part)
                except datasets.exceptions.DatasetNotFoundError as error:
                    missing = one_line(error)
                    continue
                except Exception as error:
                    problem = network_problem(error)
                    if problem is None:
                        raise _of_hub(error, repo, subset, split, column) from error
            rows = _load_cached(datasets, repo, subset, split, revision, part, column)
            if rows is not None:
                return repo, rows
    if problem is None:
        raise DataError(f"{missing} Give an existing path, another hub id, or a short name (wikitext, pg19, demo)")
    options = {"subset": subset, "data_dir": data_dir, "revision": revision}
    first, *rest = instead
    wanted = " or ".join(repos) + "".join(f", {key} {value!r}," for key, value in options.items() if value)
    raise UnreachableError(
        f"dataset {wanted} is neither a folder here nor in the hub's cache, and the Hugging Face hub could "
        f"not be reached ({problem}): {first}, fill the cache where there is a network (hf download --repo-type "
        f"dataset {repos[0]}){', '.join(['', *rest])}"
    )


def _hub_problem(repo: str) -> str | None:
    """Why the hub cannot be asked for this dataset, or None."""
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode, HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    return hub_problem(f"datasets/{repo}/resolve/main/README.md")


def _load_cached(
    datasets: Any, repo: str, subset: str | None, split: str, revision: str | None, part: dict[str, str], column: str
) -> Any | None:
    """A copy on this machine: a snapshot of the hub (`hf download`), or what `datasets` prepared before."""
    from huggingface_hub import snapshot_download

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = True  # no retries; load_dataset then looks in its own cache at once
        try:
            folder = snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
            return datasets.load_dataset(folder, subset, split=split, **part)
        except FileNotFoundError:  # no snapshot, or one without these files
            if revision is not None:  # the prepared copies do not tell their revision
                return None
        return datasets.load_dataset(repo, subset, split=split, **part)
    except Exception as error:
        if isinstance(error, ConnectionError) or "Couldn't find cache" in str(error):
            return None
        raise _of_hub(error, repo, subset, split, column) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
