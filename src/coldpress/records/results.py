"""Results on disk: one JSON file per setting, named by the setting, complete or not there at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldpress.backends import BUDGETS
from coldpress.errors import DataError, OutputError, SelfCheckError
from coldpress.io.files import forbidden, read_text, replace_file
from coldpress.io.output import check_writable
from coldpress.records.same_text import by_text
from coldpress.records.schema import IDENTIFYING, check_record

SCHEMA_VERSION = 1
PACKAGE_DIR = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """What a number depends on besides its settings; unknown values are None, nothing here raises.

    git_commit, git_dirty: of the checkout this package is part of (not of the folder the user stands in);
    dirty looks at the package's own files. loadavg: over 1, 5 and 15 minutes.
    """
    import torch  # which reading records does without

    commit, dirty = _git()
    names, driver = _gpu()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "datasets": _version("datasets"),
        "coldpress": _version("coldpress") or getattr(sys.modules.get("coldpress"), "__version__", None),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "loadavg": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "git_commit": commit,
        "git_dirty": dirty,
        "gpu": names,
        "driver": driver,
    }


def result_path(output_dir: Path, record: dict[str, Any]) -> Path:
    """Where `record` belongs: ``{protocol}__{model}__{dataset}__{press}__r0.50__{10 hex}.json`` in
    `output_dir`; ``t512`` instead of the ratio for a budget in tokens, ``b1048576`` for one in bytes; then ``q4`` where
    pairs are stored in 4 bits, ``k8v4`` where they are in RotatedBits(8, 4).

    The hex digits are a hash over IDENTIFYING, where an absent field is as one that is None: equal
    settings share a name, others do not. A record that failed (status "failed" or "error", or an error in it) ends in
    ``.failed.json``, one of an interrupted run in ``.interrupted.json``.
    """
    identity = {key: record[key] for key in IDENTIFYING if record.get(key) is not None}
    settings = record.get("settings")
    if isinstance(settings, dict) and "repetitions" in settings:  # as asked: there are fewer, or none, of a part of it
        identity.pop("repetitions", None)
        identity |= {} if settings.get("ppl_only") else {"repetitions": settings["repetitions"]}
    ratio = record.get("compression_ratio")
    if ratio is not None:
        identity["compression_ratio"] = ratio = float(ratio)  # 0 and 0.0 are one setting
    digest = hashlib.sha256(_dumps(identity, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()[:10]
    protocol = record.get("protocol") or record.get("mode") or "run"
    parts = [protocol, record.get("model"), record.get("dataset"), record.get("press") or "no_press"]
    shown = [] if ratio is None else [f"r{ratio:.2f}" if round(ratio, 2) == ratio else f"r{ratio:g}"]
    shown += [f"{name.removeprefix('budget_')[0]}{record[name]}" for name in BUDGETS if record.get(name) is not None]
    bits = record.get("kv_bits")
    shown += [] if bits is None else [bits if isinstance(bits, str) else f"q{bits}"]
    return Path(output_dir) / ("__".join([*map(_slug, parts), *shown, digest]) + _suffix(record))


def write_result(output_dir: Path, record: dict[str, Any]) -> Path:
    """Write `record` as JSON, whole or not at all, and return its path; adds `schema_version` when missing.

    An older file of the same settings is replaced; a failed or interrupted record never replaces a finished one, and a
    finished one removes those. Raises SelfCheckError for NaN, infinity or a value JSON cannot hold
    (the message names the field), OutputError when the file cannot be written.
    """
    record = {"schema_version": SCHEMA_VERSION, **record}
    text = _dumps(record, indent=2) + "\n"
    path = result_path(output_dir, record)
    check_writable(path.parent)
    try:
        replace_file(path, lambda part: part.write_bytes(text.encode("utf-8", "backslashreplace")))
        if _suffix(record) == ".json":
            for status in ("failed", "interrupted"):
                result_path(output_dir, {**record, "status": status}).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r} ({error.strerror}): choose another folder") from error
    return path


def write_results(output_dir: Path, records: Iterable[dict[str, Any]]) -> set[Path]:
    """Write all records and return their paths; one that cannot be written keeps no other from being written.

    Raises SelfCheckError or OutputError afterwards, the first that :func:`write_result` has raised.
    """
    paths, errors = set(), []
    for record in records:
        try:
            paths.add(write_result(output_dir, record))
        except (SelfCheckError, OutputError) as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return paths


def read_results(
    output_dir: Path, check: Callable[[dict[str, Any]], None] = lambda record: None
) -> list[dict[str, Any]]:
    """All records in `output_dir`, failed ones too, in the order of their file names.

    A file that is not a record of this schema, or at which `check` raises ValueError, is skipped with a warning. Raises
    DataError without a folder.
    """
    _check_folder(output_dir)
    records = []
    for path in sorted(Path(output_dir).glob("*.json")):
        try:
            record = read_result(path)
            check(record)
        except (OSError, ValueError, RecursionError) as error:
            warnings.warn(f"skipped {path}: {' '.join(str(error).split())}", stacklevel=2)
        else:
            records.append(record)
    return records


def _check_folder(folder: str | Path) -> None:
    why = forbidden(folder)
    if why is not None:
        raise DataError(f"{str(folder)!r} cannot be read ({why}): name a folder that you may read")
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise DataError(f"no folder {str(folder)!r}: give the folder that a run wrote its results to")


def read_result(path: Path) -> dict[str, Any]:
    """The record in one file; raises OSError or ValueError where there is none of this schema."""
    record = json.loads(read_text(path), parse_constant=_refuse_constant)
    if not isinstance(record, dict):
        raise ValueError("it holds no object, so no result")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, this version reads {SCHEMA_VERSION}")
    return record


@dataclass(frozen=True)
class Collection:
    """The records of some folders and their subfolders; ``skipped`` has a line for each file that holds none."""

    records: tuple[dict[str, Any], ...]
    skipped: tuple[str, ...]
    twice: tuple[str, ...] = ()  # on measurements of one text under several names


def collect(folders: Iterable[str]) -> Collection:
    """Read what lies in ``folders`` and below them; hidden folders are passed over, no folder is read twice.

    A text has one name in what is found; of the same measured under two names of a text the newest.
    """
    records: list[dict[str, Any]] = []
    skipped: list[str] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.strip():
            raise DataError("The folder's name is empty; give the folder that a run wrote its results to.")
        _check_folder(folder)
        for path in with_subfolders(Path(folder)):
            real = path.resolve()
            if real in seen:
                continue
            seen.add(real)
            if (why := forbidden(path)) is not None:
                skipped.append(f"skipped {path}: {why}")
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                records += read_results(path, check_record)
            skipped += [str(warning.message) for warning in caught]
    records, twice = by_text(records)
    return Collection(tuple(records), tuple(skipped), tuple(twice))


def with_subfolders(folder: Path) -> list[Path]:
    """A folder and, in the order of their names, those in it that are not hidden."""
    found = []
    for path, names, _ in os.walk(folder) if os.path.isdir(folder) else ():  # a name with a NUL ends os.walk
        names[:] = sorted(name for name in names if not name.startswith(".") and not name.endswith(".json"))
        found += [Path(path) / name for name in names]
    return [folder, *sorted(found)]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C does nothing inside; outside the main thread, which alone hears of it, there is nothing to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _suffix(record: dict[str, Any]) -> str:
    if record.get("status") in ("failed", "error") or record.get("error"):
        return ".failed.json"
    return ".interrupted.json" if record.get("status") == "interrupted" else ".json"


def _slug(value: Any) -> str:
    """Letters, digits, dots, dashes; of a longer name, such as a path, the end tells most."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", str(value or "none")).strip("_.")[-40:].lstrip("_.") or "none"


def _dumps(value: Any, **options: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, **options)
    except (TypeError, ValueError, RecursionError) as error:
        fields = ", ".join(_unfit(value)) or "the record"
        raise SelfCheckError(f"the result cannot be JSON at {fields} ({error}): not written") from error


def _unfit(value: Any, field: str = "", depth: int = 0) -> Iterator[str]:
    """The fields whose values JSON cannot hold, written as ``per_window[3].nll``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{field}={value}"
    elif isinstance(value, dict) and depth < 20:
        for key, inner in value.items():
            yield from _unfit(inner, f"{field}.{key}" if field else str(key), depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 20:
        for index, inner in enumerate(value):
            yield from _unfit(inner, f"{field}[{index}]", depth + 1)
    elif not isinstance(value, (str, int, float, bool, type(None), dict, list, tuple)):
        yield f"{field} of type {type(value).__name__}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _cpu_model() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def _output(*command: str) -> str | None:
    """What a command prints, None when it is not there, fails or takes more than 5 s."""
    # A GIT_DIR of the caller (a hook, say) would point git at another repository.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, env=env, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


@functools.cache
def _git() -> tuple[str | None, bool | None]:
    """Commit and dirtiness; (None, None) unless git tracks this file: site-packages may lie in a checkout."""
    here = ("git", "-C", str(PACKAGE_DIR))
    if _output(*here, "ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return None, None
    commit, changes = _output(*here, "rev-parse", "HEAD"), _output(*here, "status", "--porcelain", "--", ".")
    return commit, None if changes is None else bool(changes)


@functools.cache
def _gpu() -> tuple[list[str] | None, str | None]:
    import torch

    if not torch.cuda.is_available():
        return None, None
    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return names, drivers.splitlines()[0].strip() if drivers else None


def is_finished(path: Path) -> bool:
    """Whether a point has its result there, and not another's under its name."""
    try:
        record = read_result(path)
        return bool(record["status"] == "ok") and result_path(path.parent, record) == path
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SelfCheckError):
        return False
