"""Speed of prefill and decoding, with the one clock of this package.

*Prefill* runs the whole context in one forward pass and compresses it, or in pieces with ``chunk_tokens``; *decode*
then feeds one token at a time. TTFT (time to first token) runs from the start to the first generated id, compression
included; TPOT (time per output token) is ``(total - TTFT) / (n - 1)``. Tokenisation and detokenisation are outside. The
same ids go in for every press, a configuration is warmed up before it counts, repetitions of different presses are
interleaved in a seeded random order, and every raw sample is kept.

TTFT and TPOT of a result are medians over the rounds, and rates and totals follow from these two, so that rows can be
compared and the numbers of a row agree. A speed-up is the median of the ratios within each round. How far the rounds
lie apart stands beside the medians.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.press import BasePress
from coldpress.cache.pressed import PressedCache
from coldpress.core.press import parts
from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import Point
from coldpress.eval.ledger import UNREADABLE, Ledger
from coldpress.eval.losses import forward
from coldpress.eval.memory import MemoryMeter, MemoryReading
from coldpress.eval.point_run import check_stored_pairs, release
from coldpress.models.block import prefilling
from coldpress.models.compiled import compiled
from coldpress.models.compiling import Compiled
from coldpress.models.prompts import prefill
from coldpress.stores.codec import Codec

WARMUP_TOKENS = 8
ROUNDS = "rounds.json"  # in the ledger


def now_ns(device: torch.device) -> int:
    """Nanoseconds of a monotonic clock, after everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter_ns()


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
    """One press (None: no press), in so many bits, and its measurements: samples of rounds, sizes of a cache."""

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

    def note(self, cache: PressedCache) -> None:
        """Note the sizes of its cache."""
        self.kv_bytes, self.kv_lengths = cache.kv_bytes(), cache.stored_lengths()
        self.achieved_ratio = cache.achieved_ratio()

    def speedups(self, baseline: SpeedPoint) -> dict[int, float]:
        """By round: the baseline's time per output token over this one's, where both generated more than one."""
        pairs = enumerate(zip(self.samples, baseline.samples, strict=False))
        return {i: b.tpot_ms / own.tpot_ms for i, (own, b) in pairs if own.tpot_ms and b.tpot_ms}


@dataclass(eq=False)
class SpeedRun:
    """Time presses side by side on the same context."""

    model: PreTrainedModel
    context_ids: Tensor  # int64 ``[1, C]``
    given: Sequence[Point]  # what to time
    _: KW_ONLY
    max_new_tokens: int  # ids to generate, at least 2
    min_new_tokens: int | None = None  # no end of text before so many ids; None: all, so that every run has as many
    eos_ids: Sequence[int] = ()  # that end a text
    decode_only: bool = False  # leave prefill and compression out of the timed part
    repetitions: int = 5  # timed rounds
    warmup: int = 1  # untimed ones, with few tokens, before them
    seed: int = 0  # of the order of the presses within a round
    chunk_tokens: int | None = None  # of a piece of the context, that without a press too; None: it is in one piece
    compile: bool = False  # decode by a compiled step (:func:`coldpress.compiled`), which the warm-up compiles

    def __post_init__(self) -> None:
        self.points = [SpeedPoint(point.press, point.kv_bits) for point in self.given]
        least = self.max_new_tokens if self.min_new_tokens is None else self.min_new_tokens
        self.least = min(least, self.max_new_tokens)
        self.order = random.Random(self.seed)
        self.compiled: Compiled | None = None

    @property
    def device(self) -> torch.device:
        return self.context_ids.device

    def point(self, press: BasePress | None, kv_bits: Codec | None = None) -> SpeedPoint:
        """The measurements of one of the presses."""
        return next(point for point in self.points if point.press is press and point.kv_bits == kv_bits)

    @torch.inference_mode()
    def run(
        self,
        progress: Callable[[Any], Any] = iter,
        on_done: Callable[[SpeedPoint], None] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Warm up, time, then measure memory in a run of its own for each press.

        Args:
            on_done: told of each press when nothing of it is left to measure; nothing is timed any more then.
            ledger: has the rounds of an earlier run that was killed, which are not timed again, and takes those of this
                one; None: nowhere.
        """
        n_done = 0 if ledger is None else min(self._restore(ledger), self.repetitions)
        timed = []
        for _ in range(self.repetitions):
            shuffled = self.points.copy()
            self.order.shuffle(shuffled)
            timed.append([("time", point) for point in shuffled])
        n_warmup = self.warmup if n_done < self.repetitions else 0
        rounds = [("warmup", point) for _ in range(n_warmup) for point in self.points]
        for whole in timed[n_done:]:
            rounds += [*whole[:-1], ("last of a round", whole[-1][1])]
        rounds += [("memory", point) for point in self.points]
        gc.collect()
        gc.freeze()  # what is here now stays: the collections between the rounds need not look at it
        block = compiled(self.model, self.max_new_tokens) if self.compile else nullcontext()
        try:
            with block as self.compiled:
                for kind, point in progress(rounds):
                    self._measure(kind, point)
                    if kind == "last of a round" and ledger is not None:
                        self._save(ledger)
                    if kind == "memory" and on_done is not None:
                        on_done(point)
        finally:
            gc.unfreeze()

    def _measure(self, kind: str, point: SpeedPoint) -> None:
        """One round of one press, unless it has failed."""
        if point.error is not None:
            return
        try:
            if kind == "memory":
                self._measure_memory(point)
            else:
                sample = self._generate(point, WARMUP_TOKENS if kind == "warmup" else self.max_new_tokens)
                if kind != "warmup":
                    point.samples.append(sample)
        except Exception as error:
            point.error = release(error)

    def _save(self, ledger: Ledger) -> None:
        """Write down the samples of all rounds until now."""
        saved = [
            {
                "key": point.key,
                "samples": [vars(sample) for sample in point.samples],
                "error": None if point.error is None else str(point.error),
            }
            for point in self.points
        ]
        ledger.write(ROUNDS, "points", saved)

    def _restore(self, ledger: Ledger) -> int:
        """Take the samples that were saved; how many rounds these are, 0 if they were not of these points."""
        try:
            saved = ledger.read(ROUNDS, "points")
            samples = {point["key"]: [Sample(**sample) for sample in point["samples"]] for point in saved}
            failed = {point["key"]: point["error"] for point in saved if point["error"] is not None}
            if not all(sample.is_timed for taken in samples.values() for sample in taken):
                return 0
        except UNREADABLE:  # not there, or damaged: they are timed again
            return 0
        lengths = {len(taken) for key, taken in samples.items() if key not in failed}
        if set(samples) != {point.key for point in self.points} or len(lengths) > 1:
            return 0
        for point in self.points:
            point.samples = samples[point.key]
            if point.key in failed:
                point.error = RuntimeError(failed[point.key])
        return max(lengths, default=0)

    def result(self, point: SpeedPoint) -> dict[str, Any]:
        """The speed part of a result record of a point that has samples: medians of rounds, spreads, and the samples.

        The speed-up is the median of that of each round over the baseline in the same round, and so need not be the
        ratio of the two medians of TPOT.
        """
        baseline = next((p for p in self.points if p.is_baseline), None)
        context_tokens = self.context_ids.shape[1]
        compared = None if baseline is None or baseline is point or baseline.error is not None else baseline
        speedups = [] if compared is None else [*point.speedups(compared).values()]
        kv_tokens = context_tokens + (self.max_new_tokens - 1 if point.evicts_while_decoding else 0)
        kv_baseline = (
            None if baseline is None else baseline.kv_bytes_at_end if point.evicts_while_decoding else baseline.kv_bytes
        )
        prefills_s = [s.prefill_ns / 1e9 for s in point.samples if s.prefill_ns is not None]
        ttft_s, tpot_ms = _median(prefills_s), _median(point.tpot_ms)
        n_tokens = statistics.median_low([s.n_tokens for s in point.samples])
        n_timed = n_tokens - 1 if ttft_s is None else n_tokens
        total_s = (ttft_s or 0.0) + (tpot_ms or 0.0) * (n_tokens - 1) / 1e3
        tokens_per_s = 1e3 / tpot_ms if tpot_ms else None
        record: dict[str, Any] = {
            "context_tokens": context_tokens,
            "repetitions": len(point.samples),
            "generated_tokens": n_tokens,
            "total_s": total_s,
            "tpot_ms": tpot_ms,
            "tpot_ms_spread": _spread(point.tpot_ms),
            "decode_tokens_per_s": tokens_per_s,
            "speed_tokens_per_s": tokens_per_s,  # the name other tools look for
            "ttft_s": ttft_s,
            "ttft_s_spread": _spread(prefills_s),
            "prefill_tokens_per_s": context_tokens / ttft_s if ttft_s else None,
            "generation_tokens_per_s": n_timed / total_s if n_timed and total_s else None,
            "samples": [vars(s) for s in point.samples],
            "kv_bytes": point.kv_bytes,
            "kv_bytes_baseline": kv_baseline,
            "kv_len_before": kv_tokens,
            "kv_len_after": point.kv_lengths,
            "effective_compression_ratio": point.achieved_ratio,
        }
        if point.memory is not None:
            record |= point.memory.facts()
        if self.compiled is not None:
            record |= {"compile_s": round(self.compiled.compile_s, 1), "compiled_forms": self.compiled.forms}
        if compared is not None:
            record |= {
                "decode_speedup": _median(speedups),
                "decode_speedup_spread": _spread(speedups),
                "tpot_ms_baseline": _median(compared.tpot_ms),
                "tpot_ms_baseline_spread": _spread(compared.tpot_ms),
                "peak_mem_bytes_uncompressed": None if compared.memory is None else compared.memory.peak_bytes,
            }
        return record

    def _generate(self, point: SpeedPoint, n_tokens: int) -> Sample:
        """Prefill, then greedy decoding of ``n_tokens`` ids; ends earlier only at an end of text that is allowed."""
        gc.collect()
        cache = PressedCache(point.press, chunk_tokens=self.chunk_tokens, kv_bits=point.kv_bits)
        may_stop = self.least < n_tokens and bool(self.eos_ids)
        start = now_ns(self.device)
        with self._prefilled(cache) as token:
            first = now_ns(self.device)
            n_generated = 1
            while n_generated < n_tokens:
                if may_stop and n_generated >= self.least and int(token) in self.eos_ids:
                    break
                token = self._next(token, cache, n_generated)
                n_generated += 1
            end = now_ns(self.device)
        if not may_stop and n_generated != n_tokens:
            raise SelfCheckError(f"{n_generated} ids were generated, {n_tokens} were asked for.")
        return Sample(None if self.decode_only else first - start, end - first, n_generated)

    @contextmanager
    def _prefilled(self, cache: PressedCache) -> Iterator[Tensor]:
        """The first token; a press that goes on while decoding is shown what follows inside."""
        with ExitStack() as stack:
            stack.enter_context(prefilling(self.model, cache))
            token = self._next(self.context_ids, cache, 0)
            press = cache.press
            if press is None or not press.evicts_while_decoding:
                stack.close()
            elif self.compile and not any(part.needs_hidden_states for part in parts(press)):
                stack.close()  # the step itself tells it what it needs
            yield token

    def _next(self, ids: Tensor, cache: PressedCache, n_generated: int) -> Tensor:
        if n_generated or self.chunk_tokens is None:
            logits = forward(self.model, ids, cache, keep=1)[:, -1]
        else:
            logits = prefill(self.model, ids, cache).logits[:, -1]
        if n_generated < self.least and self.eos_ids:
            logits[:, list(self.eos_ids)] = -torch.inf
        return logits.argmax(-1, keepdim=True)

    def _measure_memory(self, point: SpeedPoint) -> None:
        meter = MemoryMeter(self.device)
        cache = PressedCache(point.press, chunk_tokens=self.chunk_tokens, kv_bits=point.kv_bits)
        n_metered = min(self.max_new_tokens, WARMUP_TOKENS)
        with meter:
            with self._prefilled(cache) as token:
                point.note(cache)
                check_stored_pairs(point.press, cache, self.context_ids.shape[1])
                for i in range(1, self.max_new_tokens if point.evicts_while_decoding else n_metered):
                    token = self._next(token, cache, i)
            if point.evicts_while_decoding:
                point.note(cache)
        point.memory = meter.result
        if point.is_baseline and any(other.evicts_while_decoding for other in self.points):  # compared with these
            for i in range(n_metered, self.max_new_tokens):
                token = self._next(token, cache, i)
            point.kv_bytes_at_end = cache.kv_bytes()


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Smallest, largest and standard deviation of the repetitions."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"min": min(values), "max": max(values), "sd": sd}
