"""What a run has finished, on disk, so that one that was killed goes on where it was.

A ledger is a folder with one file for each batch of windows. A file is there whole or not at all, and tells of each
point what it made of the batch; points that come later are added to it. A checksum says for which place a file was
written and what stands in it: one that is damaged, or lies in another's place, is as good as none. When all results are
written the ledger has done its work and is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coldpress.errors import OutputError
from coldpress.eval.scores import Scores
from coldpress.io.files import replace_file

__all__ = ["UNFINISHED", "Ledger", "LedgerFolder", "Measured", "checksum_of", "replace_in_ledger", "versions"]

UNFINISHED = ".unfinished"  # folder of all ledgers, in that of the results


@dataclass(frozen=True)
class Measured:
    """What one point made of one batch of windows.

    Attributes:
        scores: of the targets of each window.
        kv_bytes: of the first window's cache, right after the prefill.
        kv_lengths: stored tokens of each of its layers.
        achieved_ratio: fraction of its pairs that were removed.
        kept_hash: a fingerprint of which pairs it keeps; None for the baseline.
        agreement: of each window, greedy tokens that are the baseline's before the first that is not; None where
            nothing was generated.
        read_ratio: fraction of the stored pairs that were read for these targets.
    """

    scores: Scores
    kv_bytes: int
    kv_lengths: list[int]
    achieved_ratio: float
    kept_hash: str | None = None
    agreement: list[int] | None = None
    read_ratio: float = 1.0


class LedgerFolder:
    """A folder of what one run has finished.

    Args:
        folder: of this ledger alone; made when something is saved first.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def clear(self) -> None:
        """Remove it from the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the last one takes the folder of all of them along
            self.folder.parent.rmdir()


class Ledger(LedgerFolder):
    """The finished batches of windows of one run."""

    def load(self, index: int) -> dict[str, Measured]:
        """What each point made of a batch, by the point's key; empty where nothing was saved or can be read."""
        found = {}
        try:
            with safe_open(self._path(index), framework="pt") as file:
                for key, text in (file.metadata() or {}).items():
                    rows, (checksum, about) = file.get_tensor(key), json.loads(text)
                    if checksum != self._checksum(index, key, rows, about):
                        return {}
                    found[key] = Measured(Scores.of_rows(rows), **about)
        except (
            OSError,
            SafetensorError,
            ValueError,
            TypeError,
            RecursionError,
        ):  # damaged, or not there
            return {}
        return found

    def save(self, index: int, found: dict[str, Measured]) -> None:
        """Replace what is known of a batch.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {key: measured.scores.rows().contiguous() for key, measured in found.items()}
        facts = {key: _without_scores(measured) for key, measured in found.items()}
        about = {key: json.dumps([self._checksum(index, key, tensors[key], fact), fact]) for key, fact in facts.items()}
        replace_in_ledger(self._path(index), lambda path: save_file(tensors, path, metadata=about))

    def _path(self, index: int) -> Path:
        return self.folder / f"batch-{index:06d}.safetensors"

    def _checksum(self, index: int, key: str, rows: Tensor, about: dict[str, Any]) -> str:
        """Of what is saved of one point."""
        said = [index, key, about, str(rows.dtype), list(rows.shape)]
        return checksum_of(self.folder, said, rows.numpy().tobytes())


def checksum_of(folder: Path, said: Any, numbers: bytes = b"") -> str:
    """Of one entry of a ledger: a disk that changes a byte shall not change a result, nor a file in a wrong place.

    Args:
        folder: of the ledger; its name tells runs apart.
        said: what is saved, with its place in the ledger; as JSON holds it.
        numbers: what is saved beside it.
    """
    return hashlib.sha256(json.dumps([folder.name, said], sort_keys=True).encode() + numbers).hexdigest()[:16]


def versions(record: Mapping[str, Any]) -> list[Any]:
    """What may compute other numbers of the same: a ledger of other versions is not gone on with."""
    return [record["env"][package] for package in ("torch", "transformers", "coldpress")]


def replace_in_ledger(path: Path, write: Callable[[Path], object]) -> None:
    """As :func:`coldpress.io.files.replace_file`.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        replace_file(path, write)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {str(path)!r} ({error}): make room, or choose another folder") from error


def _without_scores(measured: Measured) -> dict[str, Any]:
    return {key: value for key, value in vars(measured).items() if key != "scores"}
