"""What a run over tasks has finished, on disk, so that one that was killed goes on where it was.

A ledger is a folder with one file for each example. A file is there whole or not at all, and tells of each point what
it made of the example; one that is damaged, or lies in another's place, is as good as none. When all results are
written the ledger has done its work and is removed.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from coldpress.eval.ledger import LedgerFolder, checksum_of, replace_in_ledger
from coldpress.io.files import read_text

__all__ = ["Answered", "ExampleLedger", "TaskLedger"]


class Finished(Protocol):
    """What a ledger notes of one point and one example: it can be saved as JSON, and made of that again."""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Any: ...

    def to_save(self) -> dict[str, Any]: ...


_Finished = TypeVar("_Finished", bound=Finished)


@dataclass(frozen=True)
class Answered:
    """What one point made of one example.

    Attributes:
        losses: nats of each token of the answer, as float32 has them.
        answer_ids: greedy tokens, up to the end of the answer; None where nothing was generated.
        kv_bytes: of the cache, right after the prefill.
        kv_lengths: stored tokens of each of its layers.
        achieved_ratio: fraction of its pairs that were removed.
        kept_hash: a fingerprint of which pairs it keeps; None for the baseline.
    """

    losses: list[float]
    answer_ids: list[int] | None
    kv_bytes: int
    kv_lengths: list[int]
    achieved_ratio: float
    kept_hash: str | None = None

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Answered:
        """What was saved, or ValueError or TypeError where it cannot be."""
        answered = cls(**saved)
        numbers = [*answered.losses, answered.kv_bytes, answered.achieved_ratio]
        numbers += [*(answered.answer_ids or ()), *answered.kv_lengths]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError("not a number")
        return answered

    def to_save(self) -> dict[str, Any]:
        """What :meth:`of` takes."""
        return asdict(self)


class ExampleLedger(LedgerFolder, Generic[_Finished]):
    """The finished examples of one run.

    Attributes:
        kind: what is noted of each point.
    """

    kind: type[_Finished]

    def load(self, index: int, fingerprint: str) -> dict[str, _Finished]:
        """What each point made of an example, by the point's key; empty where nothing was saved or can be read.

        Args:
            index: of the example in the run.
            fingerprint: of the example, and of how it is measured.
        """
        try:
            saved = json.loads(read_text(self._path(index)))
            if saved["checksum"] != checksum_of(self.folder, [index, fingerprint, saved["found"]]):
                return {}
            return {str(key): self.kind.of(each) for key, each in saved["found"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # it is measured again
            return {}

    def save(self, index: int, fingerprint: str, found: dict[str, _Finished]) -> None:
        """Replace what is known of an example.

        Raises:
            OutputError: the file cannot be written.
        """
        saved = {key: answered.to_save() for key, answered in found.items()}
        whole = {"checksum": checksum_of(self.folder, [index, fingerprint, saved]), "found": saved}
        replace_in_ledger(self._path(index), lambda path: path.write_text(json.dumps(whole), encoding="utf-8"))

    def _path(self, index: int) -> Path:
        return self.folder / f"example-{index:06d}.json"


class TaskLedger(ExampleLedger[Answered]):
    """The finished examples of a run over tasks."""

    kind = Answered
