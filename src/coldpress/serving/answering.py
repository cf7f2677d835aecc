"""An answer: what the model makes of a prompt, token by token, on a fork of a snapshot."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pressed import PressedCache
from coldpress.errors import CacheError, RequestError
from coldpress.models.prompts import pieces
from coldpress.serving.aside import Aside, Task
from coldpress.serving.batch import Batch
from coldpress.serving.reading import run
from coldpress.serving.snapshot import Snapshot
from coldpress.serving.snapshots import Snapshots
from coldpress.serving.streaming import GrowingText

__all__ = ["Answer", "End", "Failure", "Likely", "Piece", "Wanted", "end_tokens", "picked"]


@dataclass(frozen=True)
class Wanted:
    """What a request wants of the model.

    Attributes:
        ids: of the prompt, with those of its snapshot.
        snapshot: that the request has named; None to look for one.
        max_new_tokens: of each choice.
        temperature: 0: the most likely token.
        top_p: share of the probability that tokens are drawn from, in [0, 1].
        seed: of what is drawn; None: another one each time.
        n: choices.
        stop: texts that end a choice.
        n_likely: how many of the most likely tokens are told beside each; None: no probabilities.
        echo: tell the prompt's tokens too.
        user: who asks; users have equal shares of the queue.
    """

    ids: list[int]
    snapshot: Snapshot | None = None
    max_new_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    n_likely: int | None = None
    echo: bool = False
    user: str = ""


@dataclass(frozen=True)
class Likely:
    """A token with the natural logarithm of its probability, None for a first one, and those of the most likely."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """More text of a choice, and the tokens that have come since the last piece where probabilities are wanted."""

    index: int
    text: str
    tokens: tuple[Likely, ...] = ()
    finish_reason: str | None = None  # stop or length, of the last piece of a choice


@dataclass(frozen=True)
class End:
    """The answer is whole: tokens of the prompt, those among them that a snapshot had, and tokens that were made."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """There will be no more of the answer."""

    error: Exception


class _Choice:
    """One of the answers to a prompt: a row of the batch while the model makes its next token."""

    def __init__(self, answer: Answer, index: int, cache: PressedCache, logits: Tensor, text: GrowingText):
        self.answer, self.index, self.cache, self.text = answer, index, cache, text
        self.logits: Tensor | Exception = logits
        given = answer.wanted.seed
        seed = secrets.randbits(62) if given is None else (given * 1_000_003 + index) % 2**63
        self.generator = torch.Generator().manual_seed(seed)
        self.n_tokens, self.is_done = 0, False

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for the answer."""
        return not self.answer.is_cancelled

    def take(self, logits: Tensor | Exception) -> None:
        """Take float32 logits ``[V]`` after the newest token, or what went wrong."""
        self.logits = logits


class Answer:
    """A job for the desk: reads what a snapshot lacks of a prompt, then makes a token of every choice in each step.

    Args:
        snapshots: where the beginning of the prompt is looked for, of the model that answers.
        batch: where its tokens wait for the model.
        aside: where a snapshot is made or read that is not in memory.
        wanted: of the request.
        tell: is called with each :class:`Piece`, and then with an :class:`End` or a :class:`Failure`, in the thread of
            the desk.
        client: who asks.
        time_s: after which it is given up.
        read_tokens: that are read in one step at most, so that other answers go on meanwhile.
    """

    is_aside = False

    def __init__(
        self,
        snapshots: Snapshots,
        batch: Batch,
        aside: Aside,
        wanted: Wanted,
        tell: Callable[[Any], None],
        client: str = "",
        time_s: float = 3600.0,
        read_tokens: int = 512,
    ):
        self.snapshots, self.batch, self.aside = snapshots, batch, aside
        self.wanted, self.tell, self.client = wanted, tell, client
        self.ends_at, self.is_cancelled = time.monotonic() + time_s, False
        self._read_tokens = read_tokens
        self._ends = end_tokens(snapshots.model, snapshots.tokenizer)
        self._task: Task | None = None
        self._cache: PressedCache | None = None
        self._left: list[tuple[int, int]] = []  # pieces of the prompt to be read
        self._choices: list[_Choice] = []
        self._n_cached, self._n_made = 0, 0
        self._prompt: list[Likely] = []

    @property
    def is_reading(self) -> bool:
        """Whether the next step reads a piece of the prompt, which takes longer than a token."""
        return bool(self._left)

    @torch.no_grad()
    def step(self) -> bool:
        """Read a piece of the prompt, or choose a token of every choice; whether the answer is whole."""
        if self._cache is None:
            self._begin()
        elif self._left:
            self._read(*self._left.pop(0))
        else:
            for choice in self._choices:
                if not choice.is_done:
                    self._go_on(choice)
        if self._left or not self._choices or not all(choice.is_done for choice in self._choices):
            return False
        self.tell(End(len(self.wanted.ids), self._n_cached, self._n_made))
        return True

    def fail(self, error: Exception) -> None:
        """Tell that there will be no more of it."""
        self.tell(Failure(error))

    def end(self) -> None:
        """Let go of the caches at once: whoever waits may hold the answer for long."""
        if self._task is not None:
            self.aside.drop(self._task)
        self._task = None
        self._cache, self._choices, self._prompt = None, [], []

    def _begin(self) -> None:
        """Fork the snapshot that the prompt begins with; one that is not in memory is made or read aside first."""
        wanted, was_read = self.wanted, False
        found = wanted.snapshot
        if self._task is not None:
            if not self._task.is_done:
                return
            self._cache, was_read = self._task.taken()
        elif wanted.echo:  # every token of the prompt is told, so the model has to read it
            self._cache = PressedCache()
        else:
            found = self.snapshots.find(wanted.ids) if found is None else found
            if found is None:
                self._cache = self.snapshots.fork(wanted.ids)
            elif found.tier == "memory":
                self._cache, _ = self._forked(found)
            else:
                self._task = self.aside.submit(lambda: self._forked(found))
                return
        n_there = self._cache.seen_tokens
        self._n_cached = 0 if was_read else n_there  # it may have had to be read once more
        n_new = len(wanted.ids) - n_there
        self._left = [(n_there + a, n_there + b) for a, b in pieces(n_new, self._read_tokens)]

    def _forked(self, snapshot: Snapshot) -> tuple[PressedCache, bool]:
        """A fork of a snapshot, and whether the model had to read it."""
        try:
            return self.snapshots.forked(snapshot)
        except CacheError as error:
            if not snapshot.is_removed:
                raise
            raise RequestError(str(error), 404, "snapshot_not_found", "snapshot") from error

    def _read(self, start: int, stop: int) -> None:
        """Read the tokens from ``start`` to ``stop``; the choices begin after the last ones."""
        assert self._cache is not None
        wanted = self.wanted
        has_all = wanted.echo and wanted.n_likely is not None
        logits = run(self.snapshots.model, self._cache, wanted.ids[start:stop], has_all)
        if has_all:
            self._prompt += [] if start else [Likely(wanted.ids[0], None)]
            for row, token in zip(logits, wanted.ids[start + 1 : stop + 1], strict=False):
                self._prompt.append(_likely(row, token, wanted.n_likely or 0))
        if self._left:
            return
        tokenizer = self.snapshots.tokenizer
        for index in range(wanted.n):
            cache = self._cache if index == wanted.n - 1 else self._cache.fork()
            choice = _Choice(self, index, cache, logits[-1], GrowingText(tokenizer, wanted.stop))
            self._choices.append(choice)
            if wanted.echo:
                text = tokenizer.decode(wanted.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                choice.is_done = wanted.max_new_tokens == 0
                self.tell(Piece(index, text, tuple(self._prompt), "length" if choice.is_done else None))

    def _go_on(self, choice: _Choice) -> None:
        """Choose a token of a choice, tell what is certain of its text, and have the token read with the others."""
        wanted, logits = self.wanted, choice.logits
        if isinstance(logits, Exception):
            raise logits
        token = picked(logits, wanted.temperature, wanted.top_p, choice.generator)
        choice.n_tokens += 1
        self._n_made += 1
        tokens: tuple[Likely, ...] = ()
        if token in self._ends:
            text, reason = choice.text.finish(), "stop"
        else:
            text, reason = choice.text.add(token), None
            if wanted.n_likely is not None:
                tokens = (_likely(logits, token, wanted.n_likely),)
            if choice.text.is_stopped:
                reason = "stop"
            elif choice.n_tokens >= wanted.max_new_tokens:
                text, reason = text + choice.text.finish(), "stop" if choice.text.is_stopped else "length"
        choice.is_done = reason is not None
        if text or tokens or reason:
            self.tell(Piece(choice.index, text, tokens, reason))
        if not choice.is_done:
            self.batch.add(choice, token)


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's generation_config says, or else its tokenizer."""
    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def picked(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token: the most likely one, or one drawn on the CPU, the same on every device.

    Args:
        logits: float32 ``[V]``.
        temperature: that logits are divided by; 0 for the most likely token.
        top_p: the least number of most likely tokens that have this probability together are drawn from.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.cpu().double()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        ordered[1:][(ordered.cumsum(0) >= top_p)[:-1]] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _likely(logits: Tensor, token: int, n_top: int) -> Likely:
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(n_top)
    return Likely(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
