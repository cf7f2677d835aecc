"""One text under two names, as ``--text_file`` and ``--dataset`` give it, is one text in a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from coldpress.records.schema import ENVIRONMENT, IDENTIFYING

__all__ = ["by_text"]

Record = dict[str, Any]
_NAMES = ("dataset", "dataset_source", "dataset_revision", "subset", "split", "sample_idx", "text_file")


def by_text(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """The records with one name for each text, of those that then measured the same the newest; and lines on others.

    A text is known by its hash and its length. The name of a dataset wins over that of a file, and then the first.
    """
    records = list(records)
    named: dict[tuple[Any, ...], Record] = {}
    for record in sorted(records, key=_is_of_a_file):
        named.setdefault(_text(record), record)
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(_point(record), []).append(record)
    kept, twice = {id(record) for record in records}, Counter[str]()
    for same in found.values():
        called = list(dict.fromkeys(map(_name, same)))
        if len(called) > 1:  # else the same command has measured it twice, which a report shows
            newest = max(same, key=lambda record: str(record.get("timestamp")))
            kept -= {id(record) for record in same if record is not newest}
            twice[" and ".join(called)] += 1
    shown = [_renamed(record, named[_text(record)]) for record in records if id(record) in kept]
    said = "measured more than once on one text, called"
    return shown, [f"{n} {said} {names}: the newest is shown" for names, n in twice.items()]


def _text(record: Record) -> tuple[Any, ...]:
    return record["text_sha256"], record.get("total_tokens"), record["protocol"].partition("-")[0]


def _is_of_a_file(record: Record) -> bool:
    return bool((record.get("settings") or {}).get("text_file"))


def _name(record: Record) -> str:
    subset = record.get("subset")
    return f"{record['dataset']}/{subset}" if subset else str(record["dataset"])


def _point(record: Record) -> str:
    """What was asked for and where, but for what the text is called."""
    settings = {k: v for k, v in (record.get("settings") or {}).items() if k not in _NAMES}
    asked = {k: record.get(k) for k in IDENTIFYING if k not in (*_NAMES, "settings")}
    env = {k: record["env"].get(k) for k in ENVIRONMENT}
    return json.dumps([asked, settings, env, record["status"]], sort_keys=True, default=str)


def _renamed(record: Record, first: Record) -> Record:
    """``record`` with the name of the text that ``first`` has."""
    if _name(record) == _name(first):
        return record
    return record | {name: first[name] for name in _NAMES if name in first}
