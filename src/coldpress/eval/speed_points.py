"""What is timed of a press: its samples, one for each round, and the memory and the cache of a run of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from coldpress.bases.press import BasePress
from coldpress.eval.jobs import Point
from coldpress.eval.memory import MemoryReading
from coldpress.stores.codec import Codec

__all__ = ["Sample", "SpeedPoint"]


@dataclass(frozen=True)
class Sample:
    """One repetition. ``prefill_ns`` (start to first token) is None when only decoding was timed."""

    prefill_ns: int | None
    decode_ns: int
    n_tokens: int  # generated ids

    @property
    def timed_tokens(self) -> int:
        """Ids that were generated within the time: the first one comes from the prefill."""
        return self.n_tokens if self.prefill_ns is not None else self.n_tokens - 1

    @property
    def total_ns(self) -> int:
        """What was timed of it."""
        return (self.prefill_ns or 0) + self.decode_ns

    @property
    def is_timed(self) -> bool:
        """Whether it may be one that was measured; it may come from a disk."""
        times = [self.decode_ns, self.n_tokens, *([] if self.prefill_ns is None else [self.prefill_ns])]
        return all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**63 for n in times)

    @property
    def tokens_per_s(self) -> float:
        return self.timed_tokens * 1e9 / self.total_ns

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None if no more than one was generated."""
        return self.decode_ns / (self.n_tokens - 1) / 1e6 if self.n_tokens > 1 else None


@dataclass
class SpeedPoint:
    """One press (None: no press), in so many bits, and its measurements."""

    press: BasePress | None
    kv_bits: Codec | None = None
    samples: list[Sample] = field(default_factory=list)
    memory: MemoryReading | None = None
    kv_bytes: int | None = None
    kv_lengths: list[int] = field(default_factory=list)
    achieved_ratio: float = 0.0
    kv_bytes_at_end: int | None = None  # after generation: of the baseline, where a press goes on while decoding
    error: Exception | None = None

    @property
    def key(self) -> str:
        """The same for points that measure the same, in this process or another."""
        return Point(self.press, self.kv_bits).key

    @property
    def is_baseline(self) -> bool:
        """Whether there is neither a press nor few bits."""
        return self.press is None and self.kv_bits is None

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether the press goes on while decoding: then its cache is that of the end of generation."""
        return self.press is not None and self.press.evicts_while_decoding

    @property
    def tpot_ms(self) -> list[float]:
        """Time per output token after the first, of each repetition that generated more than one."""
        return [s.tpot_ms for s in self.samples if s.tpot_ms is not None]

    def speedups(self, baseline: SpeedPoint) -> dict[int, float]:
        """By round: the baseline's time per output token over this one's, where both generated more than one."""
        pairs = enumerate(zip(self.samples, baseline.samples, strict=False))
        return {i: b.tpot_ms / own.tpot_ms for i, (own, b) in pairs if own.tpot_ms and b.tpot_ms}
