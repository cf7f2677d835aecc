"""The timed rounds of a run on disk, beside the ledger of its windows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from coldpress.eval.ledger import checksum_of, replace_in_ledger
from coldpress.eval.speed_points import Sample, SpeedPoint
from coldpress.io.files import read_text

__all__ = ["RoundLog"]


class RoundLog:
    """The timed rounds of a run on disk, each with all its presses, so that one that was killed goes on where it was.

    Args:
        path: of a JSON file in the folder of the run's ledger.
    """

    def __init__(self, path: Path):
        self.path = path

    def restore(self, points: Sequence[SpeedPoint]) -> int:
        """Give ``points`` the samples that were saved of them; how many rounds these are, 0 if it was not of them."""
        try:
            whole = json.loads(read_text(self.path))
            saved = whole["points"]
            if whole["checksum"] != checksum_of(self.path.parent, saved):
                return 0
            samples = {point["key"]: [Sample(**sample) for sample in point["samples"]] for point in saved}
            failed = {point["key"]: point["error"] for point in saved if point["error"] is not None}
            if not all(_is_timed(sample) for taken in samples.values() for sample in taken):
                return 0
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            RecursionError,
        ):  # not there, or damaged: they are timed again
            return 0
        lengths = {len(taken) for key, taken in samples.items() if key not in failed}
        if set(samples) != {point.key for point in points} or len(lengths) > 1:
            return 0
        for point in points:
            point.samples = samples[point.key]
            if point.key in failed:
                point.error = RuntimeError(failed[point.key])
        return max(lengths, default=0)

    def save(self, points: Sequence[SpeedPoint]) -> None:
        """Write down the samples of all rounds until now."""
        errors = {point.key: None if point.error is None else str(point.error) for point in points}
        saved = [
            {"key": point.key, "samples": [vars(sample) for sample in point.samples], "error": errors[point.key]}
            for point in points
        ]
        whole = {"checksum": checksum_of(self.path.parent, saved), "points": saved}
        replace_in_ledger(self.path, lambda path: path.write_text(json.dumps(whole), encoding="utf-8"))


def _is_timed(sample: Sample) -> bool:
    """Whether a sample that was read from the disk may be one that was measured."""
    times = [sample.decode_ns, sample.n_tokens, *([] if sample.prefill_ns is None else [sample.prefill_ns])]
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**63 for n in times)
