"""What a cache may be for, and how long it takes to measure that: a guess from a timed prefill, and a clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coldpress.cache.pressed import PressedCache
from coldpress.eval.jobs import Job
from coldpress.eval.losses import forward
from coldpress.eval.run import Run, reads_again
from coldpress.eval.settings import STREAM_CHUNK
from coldpress.eval.speed import now_ns
from coldpress.io.progress import progress
from coldpress.loading.models import LoadedModel, input_device
from coldpress.records.metrics import FEWEST_QUESTIONS
from coldpress.report.glance import FEWEST_WINDOWS

ROUNDS, NEW_TOKENS = 3, 24  # timed


def target_of(context: int) -> int:
    """Tokens that are scored after so many."""
    return max(NEW_TOKENS, context // 8)


@dataclass(frozen=True)
class Use:
    """What a cache is for, and how that is measured."""

    about: str  # the use, in a few words
    presses: tuple[str, ...]  # measured where none is named
    chunk_tokens: int | None = None  # the context comes in pieces of so many tokens, and is compressed after each
    kv_bits: tuple[int | str, ...] = ()  # also measured, without a press
    in_tokens: bool = False  # a budget in tokens instead of a ratio: constant memory
    by_time: bool = False  # time is the first cost, bytes the second
    # until which part of the time windows, questions and what is read on are measured; then rounds are timed
    shares: tuple[float, float, float] = (0.45, 0.85, 0.85)


_DECODING = ("h2o", "tova", "morphkv", "keydiff", "snapkv", "streaming_llm")
USES = {
    "qa": Use(
        "a text is compressed once, without its questions, and asked many times",
        (
            *("kvzip", "attention_matching_kvzip", "sampled_defensive", "adakv_snapkv", "snapkv"),
            *("expected_attention", "keydiff", "streaming_llm"),
        ),
    ),
    "chat": Use("a text grows in turns of 128 tokens, and is cut back after each of them", _DECODING, chunk_tokens=128),
    "streaming": Use(
        f"a text comes {STREAM_CHUNK} tokens at a time, and is cut back to constant memory after each",
        _DECODING,
        chunk_tokens=STREAM_CHUNK,
        in_tokens=True,
        shares=(0.35, 0.7, 0.85),
    ),
    "throughput": Use(
        "one pass over a prompt, then fast decoding",
        ("snapkv", "expected_attention", "keydiff", "knorm", "streaming_llm"),
        kv_bits=("k8v4",),
        by_time=True,
    ),
}


CONTEXTS = (1024, 768, 512, 384, 256)  # tokens: the largest that leaves time for enough windows
PACE_TOKENS, PACE_STEPS = 256, 4  # that are timed
QUESTION_TOKENS, ANSWER_STEPS = 50, 12  # of a question, about: fed together, and one by one
PARTS = {"perplexity": "windows", "speed": "rounds", "tasks": "questions"}  # what a part of a run is said to measure


@dataclass(frozen=True)
class Pace:
    """How fast a model is: seconds for each token of a prefill, and for one that is fed alone."""

    read_s: float
    step_s: float

    @classmethod
    @torch.inference_mode()
    def of(cls, loaded: LoadedModel) -> Pace:
        device = input_device(loaded.model)
        ids, cache = torch.arange(PACE_TOKENS, device=device)[None] % len(loaded.tokenizer), PressedCache()
        forward(loaded.model, ids[:, :8], PressedCache(), keep=1)
        start = now_ns(device)
        forward(loaded.model, ids, cache, keep=1)
        read = now_ns(device)
        for _ in range(PACE_STEPS):
            forward(loaded.model, ids[:, :1], cache, keep=1)
        return cls((read - start) / 1e9 / PACE_TOKENS, (now_ns(device) - read) / 1e9 / PACE_STEPS)

    def seconds(self, use: Use, jobs: Sequence[Job], context: int) -> tuple[float, float, float]:
        """What a window, a question and all that is timed take, about."""
        n, again = len(jobs), sum(map(reads_again, jobs))
        read = self.read_s * context * ((n if use.chunk_tokens else 1) + again)
        window = read + self.read_s * target_of(context) * n
        question = read + (self.read_s * QUESTION_TOKENS + self.step_s * ANSWER_STEPS) * n
        timed = self.read_s * (ROUNDS + 2) * context * (n + again) + self.step_s * (ROUNDS + 1) * NEW_TOKENS * n
        return window, question, timed

    def minutes(self, use: Use, jobs: Sequence[Job], context: int, n: float, n_questions: float) -> float:
        """What ``n`` windows and so many questions take, about, with all that is timed."""
        window, question, timed = self.seconds(use, jobs, context)
        return (n * window + n_questions * question + timed) / 60

    def fitting(self, use: Use, jobs: Sequence[Job], context: int, minutes: float) -> float:
        """How many windows and questions there is time for."""
        return minutes / limit_for(use, 1, 1, self.seconds(use, jobs, context))

    def context(self, use: Use, jobs: Sequence[Job], minutes: float) -> int:
        """Tokens of a context that leaves time for twice as many windows as have to be there."""
        fits = (c for c in CONTEXTS if self.fitting(use, jobs, c, minutes) >= 2 * FEWEST_WINDOWS)
        return next(fits, CONTEXTS[-1])

    def words(self, use: Use, jobs: Sequence[Job], context: int, n: int, n_questions: int, limit: float) -> list[str]:
        """What to tell before ``n`` windows and so many questions are measured in ``limit`` minutes at most."""
        needed = self.minutes(use, jobs, context, n, n_questions)
        fitting = int(self.fitting(use, jobs, context, limit))
        presses = f"{len(jobs) - 1} press takes" if len(jobs) == 2 else f"{len(jobs) - 1} presses take"
        what = f"{n} windows and {n_questions} questions of {context:,} tokens"
        whole = f"{presses} about {needed:.1f} min for {what}"
        if needed <= limit:
            return [f"{whole} (at most {limit:g}, --budget_minutes)."]
        said = [f"{whole}; in --budget_minutes {limit:g} there may be time for about {max(2, fitting)} of each."]
        if fitting < FEWEST_WINDOWS <= min(n, n_questions):
            enough = limit_for(use, FEWEST_WINDOWS, FEWEST_QUESTIONS, self.seconds(use, jobs, context))
            said.append(
                f"that is too little to name a press, which takes {FEWEST_WINDOWS} windows and {FEWEST_QUESTIONS} "
                f"questions, in about {math.ceil(enough)} min: give --budget_minutes {math.ceil(enough)}, or fewer "
                "presses with --press."
            )
        return said


def limit_for(use: Use, n: float, n_questions: float, seconds: Sequence[float]) -> float:
    """Minutes of a budget whose shares leave room for ``n`` windows and so many questions of so many seconds each."""
    of_windows, of_questions, _ = use.shares
    return max(n * seconds[0] / of_windows, n_questions * seconds[1] / (of_questions - of_windows)) / 60


class Clock:
    """The time that there is."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds
        self.is_up = False
        self.took: dict[str, float] = {}  # seconds of one item of each part that was measured

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def hook(self, run: Run, ends: dict[str, float]) -> Callable[..., Iterator[Any]]:
        """A progress for ``run`` that ends each part of it when its share of the time is up.

        Two windows, and two questions, are measured in any case; rounds are timed only while there is time for them.
        """

        def show(items: Any, name: str) -> Iterator[Any]:
            least, begin = 0 if name == "speed" else 2, self.spent

            def is_over(n: int) -> bool:
                is_cut = least <= n < len(items) and self.spent > ends[name] * self.seconds
                run.is_cut, self.is_up = run.is_cut or is_cut, self.is_up or is_cut
                return is_cut

            if is_over(0):
                return
            for n, item in enumerate(progress(items, PARTS[name], self._left), start=1):
                yield item
                self.took[name] = (self.spent - begin) / n
                if is_over(n):
                    return

        return show

    def _left(self) -> str:
        return f"{max(0, self.seconds - self.spent) / 60:.1f} min left at most"
