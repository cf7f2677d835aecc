"""What a cache may be for, and how long it takes to measure that: a guess from a timed prefill, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coldpress.bases.registry import find_press, press_names
from coldpress.cache.pressed import PressedCache
from coldpress.eval.glance import FEWEST_WINDOWS
from coldpress.eval.jobs import Job
from coldpress.eval.losses import forward
from coldpress.eval.models import LoadedModel, input_device
from coldpress.eval.progress import progress
from coldpress.eval.run import Run
from coldpress.eval.settings import STREAM_CHUNK
from coldpress.eval.speed import now_ns

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
    # until which part of the time windows, timed rounds and questions are measured
    shares: tuple[float, float, float] = (0.4, 0.55, 1.0)


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
        shares=(0.35, 0.5, 0.8),
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


def _reads_again(job: Job) -> int:
    """What a press takes beside the prefill, in prefills, about: those inside a block run the model once more."""
    if job.press is None or job.name not in press_names():
        return 0
    return 4 * job.name.startswith("attention_matching") + 2 * find_press(job.name).in_block


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

    def minutes(self, use: Use, jobs: Sequence[Job], context: int, n: float, n_questions: float | None = None) -> float:
        """What ``n`` windows and so many questions (None: as many) take, about, with all that is timed."""
        n_questions = n if n_questions is None else n_questions
        again = sum(map(_reads_again, jobs))
        read = context * ((len(jobs) if use.chunk_tokens else 1) + again)
        window = read + target_of(context) * len(jobs)
        question = read + QUESTION_TOKENS * len(jobs)
        timed = (ROUNDS + 2) * context * (len(jobs) + again)
        steps = n_questions * ANSWER_STEPS * len(jobs) + (ROUNDS + 1) * NEW_TOKENS * len(jobs)
        return (self.read_s * (n * window + n_questions * question + timed) + self.step_s * steps) / 60

    def fitting(self, use: Use, jobs: Sequence[Job], context: int, minutes: float) -> float:
        """How many windows and questions there is time for."""
        timed = self.minutes(use, jobs, context, 0)
        return max(0.0, minutes - timed) / (self.minutes(use, jobs, context, 1) - timed)

    def context(self, use: Use, jobs: Sequence[Job], minutes: float) -> int:
        """Tokens of a context that leaves time for twice as many windows as have to be there."""
        fits = (c for c in CONTEXTS if self.fitting(use, jobs, c, minutes) >= 2 * FEWEST_WINDOWS)
        return next(fits, CONTEXTS[-1])

    def words(self, use: Use, jobs: Sequence[Job], context: int, n: int, n_questions: int, limit: float) -> list[str]:
        """What to tell before ``n`` windows and so many questions are measured in ``limit`` minutes at most."""
        needed = self.minutes(use, jobs, context, n, n_questions)
        fitting = int(self.fitting(use, jobs, context, limit))
        what = f"{len(jobs) - 1} presses on {n} windows and {n_questions} questions of {context:,} tokens"
        whole = f"{what} take about {needed:.1f} min"
        if needed <= limit:
            return [f"{whole} (at most {limit:g}, --budget_minutes)."]
        said = [f"{whole}; in --budget_minutes {limit:g} there may be time for about {max(2, fitting)} of each."]
        if fitting < FEWEST_WINDOWS:
            few = f"if it comes to fewer than {FEWEST_WINDOWS} windows and questions, nothing is named"
            said.append(f"{few}; then run the same command again, or name fewer presses with --press.")
        return said


class Clock:
    """The time that there is."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds
        self.is_up = False

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def hook(self, run: Run, ends: dict[str, float]) -> Callable[..., Iterator[Any]]:
        """A progress for ``run`` that ends each part of it when its share of the time is up, and not before two items.

        Timed rounds go on until each press was timed once.
        """

        def show(items: Any, name: str) -> Iterator[Any]:
            least = 2 if name != "speed" else 2 * len(run.jobs)  # an untimed round, and a timed one
            for n, item in enumerate(progress(items, PARTS[name], self._left), start=1):
                yield item
                if least <= n < len(items) and self.spent > ends[name] * self.seconds:
                    run.is_cut = self.is_up = True
                    return

        return show

    def _left(self) -> str:
        return f"{max(0, self.seconds - self.spent) / 60:.1f} min left at most"
