"""What a run has finished, on disk, so that one that was killed goes on where it was.

A ledger is a folder with one file for each item: a batch of windows, an example, the timed rounds. A file is there
whole or not at all, and tells of each point what it made of the item; points that come later are added to it. A
checksum says for which place a file was written and what stands in it: one that is damaged, or lies in another's place,
is as good as none. When all results are written the ledger has done its work and is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coldpress.errors import OutputError
from coldpress.eval.losses import Scores
from coldpress.io.files import read_text, replace_file
from coldpress.io.lock import locked
from coldpress.version import source_digest

UNFINISHED = ".unfinished"  # folder of all ledgers, in that of the results
# A file that is not there, or damaged: what it would tell is measured again.
UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """What is noted of the cache that a point has made."""

    # of the first row's cache, right after the prefill; of a benchmark's press that goes on while decoding, after
    # the first answer
    kv_bytes: int
    kv_lengths: list[int]  # stored tokens of each of its layers
    achieved_ratio: float  # fraction of its pairs that were removed
    kept_hash: str | None = None  # a fingerprint of which pairs it keeps; None for the baseline

    def facts(self, base: _Cache, n_tokens: int) -> dict[str, Any]:
        """What a record says of it, beside the baseline's cache of so many tokens."""
        return {
            "kv_bytes": self.kv_bytes,
            "kv_bytes_baseline": base.kv_bytes,
            "kv_len_before": n_tokens,
            "kv_len_after": self.kv_lengths,
            "effective_compression_ratio": self.achieved_ratio,
            "kept_hash": self.kept_hash,
        }


@dataclass(frozen=True, kw_only=True)
class Measured(_Cache):
    """What one point made of one batch of windows."""

    scores: Scores  # of the targets of each window
    # of each window, greedy tokens that are the baseline's before the first that is not; None where nothing was
    # generated
    agreement: list[int] | None = None
    read_ratio: float = 1.0  # fraction of the stored pairs that were read for these targets


@dataclass(frozen=True, kw_only=True)
class Answered(_Cache):
    """What one point made of one example."""

    losses: list[float]  # nats of each token of the answer, as float32 has them
    answer_ids: list[int] | None  # greedy tokens, up to the end of the answer; None where nothing was generated


@dataclass(frozen=True, kw_only=True)
class Answers(_Cache):
    """What one point made of one context."""

    answers: list[list[int]]  # greedy tokens of each question
    seen_tokens: int  # of the cache when it was measured


class Ledger:
    """A folder of what one run has finished, of this ledger alone; made when something is saved first."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The block is the only one that works with this ledger, in any process; OutputError if another is at it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._leave)
            try:
                stack.enter_context(locked(self._lock))
            except BlockingIOError as error:
                raise OutputError(
                    f"another process is measuring the same into {str(self.folder.parents[1])!r}: wait for it, or give "
                    "another --output_dir"
                ) from error
            yield

    @property
    def is_of_other_code(self) -> bool:
        """Whether what is in it was begun by other files of coldpress than these."""
        try:
            return read_text(self._code) != source_digest()
        except (OSError, ValueError):
            return self.folder.exists()

    @property
    def _code(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.code")

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def load(self, kind: type[Any], index: int, fingerprint: str = "") -> dict[str, Any]:
        """What each point made of an item, by the point's key; empty where nothing was saved or can be read.

        ``fingerprint``: of an example, and of how it is measured.
        """
        try:
            if kind is Measured:
                return {key: Measured(scores=Scores.of_rows(rows), **about) for key, rows, about in self._rows(index)}
            saved = self.read(f"example-{index:06d}.json", "found", index, fingerprint)
            return {str(key): kind(**_numbers(about)) for key, about in saved.items()}
        except UNREADABLE:
            return {}

    def save(self, index: int, found: Mapping[str, Any], fingerprint: str = "") -> None:
        """Replace what is known of an item; OutputError where the file cannot be written."""
        if not all(isinstance(each, Measured) for each in found.values()):
            saved = {key: asdict(each) for key, each in found.items()}
            self.write(f"example-{index:06d}.json", "found", saved, index, fingerprint)
            return
        tensors, facts = {}, {}
        for key, each in found.items():
            about = {name: value for name, value in vars(each).items() if name != "scores"}
            rows = tensors[key] = each.scores.rows().contiguous()
            facts[key] = json.dumps([self._checksum(index, key, rows, about), about])
        self._replace(f"batch-{index:06d}.safetensors", lambda path: save_file(tensors, path, metadata=facts))

    def read(self, name: str, field: str, *place: Any) -> Any:
        """What :meth:`write` has written; one of several errors where that is not there, or something else is."""
        whole = json.loads(read_text(self.folder / name))
        if whole["checksum"] != checksum_of(self.folder, [*place, whole[field]] if place else whole[field]):
            raise ValueError("damaged")
        return whole[field]

    def write(self, name: str, field: str, saved: Any, *place: Any) -> None:
        """Write JSON under a name, with what tells that it belongs there; OutputError where that cannot be written."""
        checksum = checksum_of(self.folder, [*place, saved] if place else saved)
        text = json.dumps({"checksum": checksum, field: saved})
        self._replace(name, lambda path: path.write_text(text, encoding="utf-8"))

    def clear(self) -> None:
        """Remove it from the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._code.unlink(missing_ok=True)
        self._leave()

    def discard(self) -> None:
        """Remove it, and the lock of a run that was killed, unless another process is at it."""
        if self.folder.exists() or self._lock.exists():
            with contextlib.suppress(OutputError), self.held():
                self.clear()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):  # the last one takes the folder of all of them along
            self.folder.parent.rmdir()

    def _rows(self, index: int) -> Iterable[tuple[str, Tensor, dict[str, Any]]]:
        with safe_open(self.folder / f"batch-{index:06d}.safetensors", framework="pt") as file:
            for key, text in (file.metadata() or {}).items():
                rows, (checksum, about) = file.get_tensor(key), json.loads(text)
                if checksum != self._checksum(index, key, rows, about):
                    raise ValueError("damaged")
                yield key, rows, about

    def _checksum(self, index: int, key: str, rows: Tensor, about: dict[str, Any]) -> str:
        """Of what is saved of one point."""
        said = [index, key, about, str(rows.dtype), list(rows.shape)]
        return checksum_of(self.folder, said, rows.numpy().tobytes())

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        path = self.folder / name
        try:
            if not self.folder.exists():
                self._code.parent.mkdir(parents=True, exist_ok=True)
                self._code.write_text(source_digest())
            replace_file(path, write)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {str(path)!r} ({error}): make room, or choose another folder") from error


def _numbers(about: dict[str, Any]) -> dict[str, Any]:
    """What was read, or ValueError where a number is none."""
    left = [value for name, value in about.items() if name != "kept_hash"]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError("not a number")
    return about


def checksum_of(folder: Path, said: Any, numbers: bytes = b"") -> str:
    """Of one entry of a ledger: a disk that changes a byte shall not change a result, nor a file in a wrong place.

    It is of what is ``said`` as JSON, its place included, of the ``numbers`` beside it, and of the folder's name, which
    tells runs apart.
    """
    return hashlib.sha256(json.dumps([folder.name, said], sort_keys=True).encode() + numbers).hexdigest()[:16]


def versions(record: Mapping[str, Any]) -> list[Any]:
    """What may compute other numbers of the same: a ledger of other versions is not gone on with."""
    return [record["env"][package] for package in ("torch", "transformers", "coldpress")]
