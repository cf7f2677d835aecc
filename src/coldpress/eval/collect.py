"""Every result record below some folders, and what was left out of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldpress.errors import DataError
from coldpress.eval.report import check_record, is_number
from coldpress.eval.results import read_results

__all__ = ["Collection", "check_fields", "collect"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Collection:
    """The records of ``folders`` and their subfolders; ``skipped`` has a line for each file that holds none."""

    folders: tuple[str, ...]
    records: tuple[Record, ...]
    skipped: tuple[str, ...]


def collect(folders: Iterable[str]) -> Collection:
    """Read what lies in ``folders`` and below them; hidden folders are passed over, no folder is read twice.

    Raises:
        DataError: no such folder.
    """
    folders = tuple(folders)
    records: list[Record] = []
    skipped: list[str] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.strip():
            raise DataError("The folder's name is empty; give the folder that a run wrote its results to.")
        if not os.path.isdir(folder):
            raise DataError(f"no folder {folder!r}: give the folder that a run wrote its results to")
        for path in [Path(folder), *_below(Path(folder))]:
            real = path.resolve()
            if real in seen:
                continue
            seen.add(real)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                records += read_results(path, check_fields)
            skipped += [str(warning.message) for warning in caught]
    return Collection(folders, tuple(records), tuple(skipped))


def _below(folder: Path) -> list[Path]:
    """Its subfolders, in the order of their names."""
    found = []
    for path, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith(".") and not name.endswith(".json"))
        found += [Path(path) / name for name in names]
    return sorted(found)


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _is_table(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """An object, each of whose values fits."""
    return lambda value: isinstance(value, dict) and len(value) < 1000 and all(map(fits, value.values()))


def _has(needed: dict[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """An object with these fields, which fit."""
    return lambda value: isinstance(value, dict) and all(fits(value.get(name)) for name, fits in needed.items())


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int)


_number, _interval = _maybe(is_number), _maybe(_is_pair)
_numbers = _is_table(_number)
_CELL = {"n": _number, "score": _number, "answer_nll": _number, "answer_nll_base": _number}
_TASK = {
    **_CELL,
    **{"task": _is_text, "length": _number, "score_base": _number, "delta_score_ci95": _interval},
    **{"delta_answer_nll": _number, "delta_answer_nll_ci95": _interval},
    "by_depth": _maybe(_list_of(_has({**_CELL, "depth": is_number}))),
}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("ppl_ratio_ci95", "ppl_ci95"), (_is_pair, "two numbers")),
    **dict.fromkeys(
        ("bits_per_byte", "top1_acc", "decode_tokens_per_s", "peak_mem_baseline_bytes", "total_s", "timed_round"),
        (is_number, "a number"),
    ),
    **dict.fromkeys(("error", "command", "timestamp", "kept_hash", "ppl_preset"), (_is_text, "a text")),
    **dict.fromkeys(("nll_by_distance", "delta_p"), (_numbers, "an object of numbers")),
    **dict.fromkeys(
        ("decode_speedup_spread", "tpot_ms_spread", "ttft_s_spread"),
        (_has({"min": is_number, "max": is_number}), "an object with min and max"),
    ),
    "greedy_agreement": (
        _has({"mean": _number, "median": _number, "n_tokens": _number, "windows": _number}),
        "an object of numbers",
    ),
    "delta_by_distance": (
        _is_table(_has({"delta": is_number, "ci95": _interval})),
        "an object of differences with their intervals",
    ),
    "per_window": (
        _list_of(_has({"id": _is_id, "n": _is_count, "nll": is_number, "nll_base": _number})),
        "a list of windows with id, n and nll",
    ),
    "per_document": (_list_of(_has({"id": _is_id, "n": _is_count, "nll": is_number})), "a list of documents"),
    "press_config": (lambda value: isinstance(value, dict), "an object of parameters"),
    "tasks": (_list_of(_has(_TASK)), "a list of tasks with their scores"),
}


def check_fields(record: Record) -> None:
    """Raise ValueError, with the field's name, where a report could not show what a file holds."""
    check_record(record)
    for name, (fits, wanted) in _FIELDS.items():
        value = record.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {repr(value)[:40]}")
