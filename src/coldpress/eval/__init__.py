"""Measuring quality, speed and memory under compression.

What is here is for reading the results: as a table for pandas, one row for each record, what is nested in columns of
its own. Everything else is in modules, one for each idea.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.backends import BUDGETS
from coldpress.errors import DataError, MissingDependencyError, nearest

if TYPE_CHECKING:
    import pandas

__all__ = ["load_results"]

# What tells rows apart comes first.
FIRST = ("folder", "protocol", "model", "dataset", "press", "compression_ratio", *BUDGETS, "kv_bits", "status", "error")


def load_results(folder: str | Path, explode: str | None = None) -> pandas.DataFrame:
    """The result records in ``folder`` and the folders in it, failed ones too, as a pandas DataFrame.

    A column is named as the field is; of an object, each field is a column (``kld_mean``, ``env_torch``,
    ``press_config_window_size``), and of an interval its two ends (``delta_nll_lo`` and ``delta_nll_hi`` of
    ``delta_nll_ci95``). Lists stay lists in one cell: ``kv_len_after``, ``per_window``, ``samples_ns``, ``tasks``.
    A record that failed has ``status`` "failed", the ``error``, and no numbers but those that were measured before, as
    ``before_failure_ppl``. ``folder`` is where the record lies, as seen from the folder that was asked for.

    Args:
        folder: what ``--output_dir`` was, or a folder above it.
        explode: a field that is a list of objects, such as ``per_window`` or ``tasks``: one row for each of these
            instead, with its fields as ``per_window_nll`` or ``tasks_score`` beside the columns of its record. Records
            without that field are left out, unless they failed.

    Raises:
        MissingDependencyError: pandas is not installed.
        DataError: there is no such folder, no result in it, or no such field in any of them.

    Warns:
        UserWarning: a JSON file is not a result of this version, and is skipped.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError('load_results needs pandas: pip install "coldpress[report]".') from error
    from coldpress.records.results import read_results, with_subfolders  # which the options do without

    records: list[dict[str, Any]] = [
        {"folder": str(path.relative_to(folder)), **record}
        for path in with_subfolders(Path(folder))
        for record in read_results(path)
    ]
    if not records:
        raise DataError(f"{str(folder)!r} holds no results; run coldpress ppl first, or name another folder.")
    rows = [dict(_flat(record)) for record in records]
    if explode is not None:
        rows = [part for record, row in zip(records, rows, strict=True) for part in _parts(record, row, explode)]
        if not any(_is_table(record.get(explode)) for record in records):
            lists = sorted({name for record in records for name, value in record.items() if _is_table(value)})
            raise DataError(
                f"No result has a list of objects called {explode!r}.{nearest(explode, lists)} There are: "
                f"{', '.join(lists) or 'none'}."
            )
    names = dict.fromkeys([*FIRST, *(name for row in rows for name in row)])
    return pandas.DataFrame(rows, columns=list(names))


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The columns of a record and their values."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}_")
        elif name.endswith("ci95") and (value is None or (isinstance(value, list) and len(value) == 2)):
            ends = (None, None) if value is None else value
            start = name.removesuffix("ci95")
            yield from zip((f"{start}lo", f"{start}hi"), ends, strict=True)
        else:
            yield name, value


def _parts(record: dict[str, Any], row: dict[str, Any], field: str) -> Iterator[dict[str, Any]]:
    table: Any = record.get(field)
    rest = {name: value for name, value in row.items() if name != field}
    if _is_table(table):
        for part in table:
            yield {**rest, **dict(_flat(part, f"{field}_"))}
    elif record.get("status") == "failed":
        yield rest


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)
