"""Record: what a part has measured so far, in a file from the first sample on, so that a cut run keeps it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Record", "read", "write"]

ENOUGH = 1.3  # a round is begun if the slowest so far, times this, fits into what is left


def read(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or a broken one."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def write(path: Path, said: dict[str, Any]) -> None:
    """All at once: who reads it, or is cut off, never has half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


class Record:
    """A part's record, written anew with everything that is added.

    Attributes:
        said: what is in the file: ``settings``, ``samples``, ``rounds`` by name (those that were planned and those that
            there was time for) and ``failed`` by name, with the reason.
    """

    def __init__(self, path: Path, part: str, seconds: float, settings: dict[str, Any]):
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.said: dict[str, Any] = {
            "part": part, "status": "running", "limit_s": round(seconds, 1), "settings": settings, "rounds": {},
            "failed": {}, "samples": [],
        }  # fmt: skip
        self.write()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.start)

    def write(self) -> None:
        self.said["seconds"] = round(time.monotonic() - self.start, 1)
        write(self.path, self.said)

    def note(self, **more: Any) -> None:
        """Something beside the samples."""
        self.said |= more
        self.write()

    def add(self, **sample: Any) -> None:
        self.said["samples"].append(sample)
        self.write()

    def fail(self, name: str, error: BaseException) -> None:
        """Something that could not be measured, and why; the others go on."""
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        self.said["failed"][name] = f"{type(error).__name__}: {reason}"
        print(f"    {name}: {self.said['failed'][name]}", flush=True)
        self.write()

    def rounds(self, name: str, planned: int, until: float = 0.0) -> Iterator[int]:
        """As many rounds as are planned, or as there is time for; the record says how many.

        Args:
            name: of what is measured.
            until: seconds to leave for what comes after it.
        """
        longest = 0.0
        self.said["rounds"][name] = {"planned": planned, "done": 0}
        for turn in range(planned):
            if self.left - until < longest * ENOUGH:
                break
            before = time.monotonic()
            yield turn
            longest = max(longest, time.monotonic() - before)
            self.said["rounds"][name]["done"] = turn + 1
            self.write()

    def end(self) -> None:
        """What was planned is done, or is said to be missing."""
        short = [name for name, n in self.said["rounds"].items() if n["done"] < n["planned"]]
        self.note(status="fewer rounds" if short else "done")
