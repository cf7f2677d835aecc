"""Write the golden files, all or those that are named: ``python -m tests.golden.make [signatures presses kept ...]``.

Only after a change that is meant: what is in them is what users have on their disks and in their programs.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.golden import record
from tests.golden.record import HERE, write


def write_signatures() -> None:
    write("signatures.json", {"names": record.signatures(), "commands": record.commands()})


def write_presses() -> None:
    write("presses.json", record.presses())


def write_kept() -> None:
    tokens = {"sha256": record.token_digest()}
    write("kept.json", {"tokens": tokens, "cases": {name: record.kept(name) for name in record.CASES}})


def write_caches() -> None:
    folder = HERE / "cache_format1"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    expected = {}
    for name in record.CACHES:
        path = folder / f"{name}.safetensors"
        record.filled(name).save(path, record.tiny())
        expected[name] = record.go_on(record.PressedCache.load(path, record.tiny()))
    write("cache_format1/expected.json", {"caches": expected})


def write_records() -> None:
    """As they are written, but for where and on what they were made."""
    for name in record.RUNS:
        folder = HERE / "records" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as made:
            found = record.run(name, Path(made))
            for file, said in found.items():
                said["command"] = said["command"].replace(made, "results")
                said["env"] |= dict.fromkeys(("platform", "cpu", "loadavg", "git_commit", "git_dirty"))
                (folder / file).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


PARTS: dict[str, Callable[[], None]] = {
    "signatures": write_signatures,
    "presses": write_presses,
    "kept": write_kept,
    "caches": write_caches,
    "records": write_records,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
