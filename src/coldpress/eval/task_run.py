"""Tasks under compressed contexts: what is left of a context is asked a question that it was compressed without.

``TaskRun`` prefills each example's context once for all presses, then feeds the question, at the positions that follow
the context's, to what each of them has kept. The answer's tokens are scored from what stands before them; where an
answer is looked for, it is generated greedily too, and compared with the references. The uncompressed cache answers
the same questions, and a number that contradicts a check is an error instead of a result.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pressed import PressedCache
from coldpress.errors import InputError, SelfCheckError
from coldpress.eval.jobs import BASELINE, Job, Point, make_jobs
from coldpress.eval.ledger import Answered, Ledger
from coldpress.eval.losses import finite, forward, token_losses
from coldpress.eval.material import SENTENCES, Material
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.point_run import (
    Item,
    PointRun,
    check_baseline,
    check_removed,
    each_measured,
    prefilled,
    sizes_of,
)
from coldpress.eval.run import DECODE_COST, ExampleRun, carry_out, checked_folder, prepared
from coldpress.eval.settings import TaskSettings
from coldpress.eval.tasks import Example, make_examples
from coldpress.loading.datasets import Corpus, Document, load_corpus
from coldpress.loading.models import LoadedModel, input_device, load_model
from coldpress.loading.tokens import note_unreadable
from coldpress.records.metrics import paired_difference, score_difference

SHOWN = 80  # characters of an answer that a record holds


def match(answer: str, references: Sequence[str]) -> float:
    """The fraction of the references that an answer holds, in 0..1; capitals do not matter (RULER's string match)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


class TaskRun(PointRun[Answered]):
    """Answer questions about compressed contexts, one by one; :meth:`results` can be asked for at any time.

    See also :class:`coldpress.eval.point_run.PointRun`; the options are those of :class:`ExampleWork`.
    """

    kind = Answered

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        points: Sequence[Point],
        examples: Sequence[Example],
        ledger: Ledger | None = None,
        **options: Any,
    ):
        self.tokenizer = tokenizer
        newlines = _newlines(tokenizer) if any(example.references for example in examples) else frozenset()
        self.work = ExampleWork(ends_of(model, tokenizer), newlines, **options)
        super().__init__(model, points, examples, ledger)

    def _fingerprint(self, index: int) -> str:
        parts = (self.given[index].fingerprint, self.work.chunk_tokens, self.work.max_new_tokens, self.work.seed)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _result(self, point: Point) -> dict[str, Any]:
        """The part of a result record that is about tasks, over the examples measured so far."""
        measured = self.measured(point)
        rows = [self._row(*each) for each in measured]
        index, first, first_base = measured[0]
        if all(own.losses == base.losses for _, own, base in measured):
            check_removed(point, first, first_base, f"the losses of all {len(rows)} answers")
        kinds = itertools.groupby(
            sorted(rows, key=lambda row: (row["task"], row["length"])), key=lambda row: (row["task"], row["length"])
        )
        return {
            "tasks": [_task(task, length, list(own), point == BASELINE) for (task, length), own in kinds],
            "per_example": rows,
            **first.facts(first_base, self.given[index].length),
        }

    def _row(self, index: int, own: Answered, base: Answered) -> dict[str, Any]:
        """What a record says of one example; losses in nats a token."""
        example = self.given[index]
        n, answer = len(example.answer_ids), self._text(own, example)
        if len(own.losses) != n or len(base.losses) != n:
            raise SelfCheckError(f"{len(own.losses)} tokens of an answer were scored; it has {n}.")
        is_asked = bool(example.references)
        return {
            "task": example.task,
            "length": example.length,
            "depth": example.depth,
            "answer_nll": math.fsum(own.losses) / n,
            "answer_nll_base": math.fsum(base.losses) / n,
            "n_tokens": n,
            "score": match(answer, example.references) if is_asked else None,
            "score_base": match(self._text(base, example), example.references) if is_asked else None,
            "answer": answer[:SHOWN] if is_asked else None,
        }

    def _text(self, answered: Answered, example: Example) -> str:
        """What was answered; its first line that is not empty, unless it may be a list."""
        if answered.answer_ids is None:
            return ""
        text = str(self.tokenizer.decode(answered.answer_ids, skip_special_tokens=True)).strip()
        return text if len(example.references) > 1 else next(iter(text.splitlines()), "")


def _task(task: str, length: int, rows: list[dict[str, Any]], is_baseline: bool) -> dict[str, Any]:
    """One task at one length, with paired intervals over its examples."""
    found = {"task": task, "length": length} | _means(rows)
    counts = [row["n_tokens"] for row in rows]
    nll = [row["answer_nll"] * row["n_tokens"] for row in rows]
    nll_base = [row["answer_nll_base"] * row["n_tokens"] for row in rows]
    loss = paired_difference(counts, nll, nll_base)
    is_asked = not is_baseline and rows[0]["score"] is not None
    scores = [row["score"] for row in rows], [row["score_base"] for row in rows]
    found["delta_score_ci95"] = [*score_difference(*scores)] if is_asked else None
    found["delta_answer_nll"] = None if is_baseline else loss.delta
    found["delta_answer_nll_ci95"] = None if is_baseline else loss.ci95
    found["by_depth"] = by_depth(rows, _means)
    return found


def by_depth(rows: list[dict[str, Any]], means: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> list[Any]:
    """The means of what stands at each depth, the smallest first."""
    depths = sorted({row["depth"] for row in rows if row["depth"] is not None})
    return [{"depth": d} | means([row for row in rows if row["depth"] == d]) for d in depths]


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores over examples, losses over tokens."""
    n, n_tokens = len(rows), sum(row["n_tokens"] for row in rows)
    found: dict[str, Any] = {"n": n}
    for name in ("score", "score_base"):
        found[name] = None if rows[0][name] is None else math.fsum(row[name] for row in rows) / n
    for name in ("answer_nll", "answer_nll_base"):
        found[name] = math.fsum(row[name] * row["n_tokens"] for row in rows) / n_tokens
    return found


@dataclass(frozen=True)
class ExampleWork:
    """Measures one example: work for an engine."""

    ends: frozenset[int]  # tokens with which a text ends
    newlines: frozenset[int] = frozenset()  # tokens with which a line ends
    chunk_tokens: int | None = None  # tokens of a piece of the context; None for a context in one piece
    max_new_tokens: int | None = None  # of an answer at most; None for what the example says
    seed: int = 0  # with the example's index, of torch's generator: what presses draw depends on no other example

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel, item: Item) -> dict[str, Any]:
        """What each point, and the baseline, made of the example, or what went wrong with it.

        SelfCheckError where the baseline contradicts a direct forward pass, or is not finite.
        """
        torch.manual_seed(self.seed + item.index)
        example = item.given
        full, branches = prefilled(
            model, row_of(model, example.context_ids), item.points, self.chunk_tokens, example.n_pinned
        )
        base = self._ask(model, full, example)
        if item.is_checked:
            self._check(model, example, base)
        # the cache of the baseline has grown since, which the check of stored pairs does not look at
        ask = partial(self._ask, model, example=example, with_hash=True)
        return {BASELINE.key: base, **each_measured(item.points, branches, full, example.length, ask)}

    def _check(self, model: PreTrainedModel, example: Any, base: Any) -> None:
        """Raise :class:`SelfCheckError` if the baseline's losses are not those of a direct forward pass."""
        whole = row_of(model, example.context_ids, example.question_ids, example.answer_ids)
        check_baseline(model, whole, torch.tensor([base.losses]))

    def _ask(self, model: PreTrainedModel, cache: PressedCache, example: Any, with_hash: bool = False) -> Any:
        """What ``cache``, right after its prefill, makes of the example's question and answer."""
        answer, sizes = row_of(model, example.answer_ids), sizes_of(cache, with_hash)
        last = forward(model, row_of(model, example.question_ids), cache, keep=1)
        greedy = self._generate(model, cache.fork(), example, last) if example.references else None
        logits = last if answer.shape[1] == 1 else torch.cat([last, forward(model, answer[:, :-1], cache)], dim=1)
        losses = finite(token_losses(logits, answer)[0].cpu()).tolist()
        return Answered(losses=losses, answer_ids=greedy, **sizes)

    def _generate(self, model: PreTrainedModel, cache: PressedCache, example: Example, logits: Tensor) -> list[int]:
        """Greedy tokens of the answer; a list, which more than one reference asks for, may have several lines."""
        limit = self.max_new_tokens or example.answer_tokens or 1
        newlines = self.newlines if len(example.references) == 1 else frozenset()
        return greedy_tokens(model, cache, logits, limit, self.ends, newlines)


def row_of(model: PreTrainedModel, *parts: Sequence[int]) -> Tensor:
    """Token ids ``[1, n]`` of some parts, one after the other, where ``model`` expects them."""
    return torch.tensor([list(itertools.chain(*parts))], device=input_device(model))


def greedy_tokens(
    model: PreTrainedModel,
    cache: PressedCache,
    logits: Tensor,
    limit: int,
    ends: frozenset[int],
    newlines: frozenset[int] = frozenset(),
) -> list[int]:
    """The most likely tokens after ``logits [1, 1, V]``, ``limit`` at most.

    They end with one of ``ends``, or with the first line that says something, where ``newlines`` end a line.
    """
    tokens: list[int] = []
    while True:
        token = logits.argmax(-1)
        tokens.append(int(token))
        is_line = tokens[-1] in newlines and not newlines.issuperset(tokens)
        if len(tokens) == limit or is_line or tokens[-1] in ends:
            return tokens
        logits = forward(model, token, cache, keep=1)


def _newlines(tokenizer: Any) -> frozenset[int]:
    """Tokens that have the end of a line in them."""
    texts: Iterable[str] = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if "\n" in text)


def ends_of(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens with which a text ends, as the tokenizer and the model's configurations say."""
    sources = (tokenizer, model.config, getattr(model, "generation_config", None))
    found: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        found |= set(eos) if isinstance(eos, list | tuple) else {eos} if eos is not None else set()
    return frozenset(found)


# ``coldpress tasks``: one result record per press and size

# The haystack of our own sentences, where no text is given
OWN_TEXT = Corpus("filler", "filler", None, None, None, (Document("filler", "\n".join(SENTENCES)),))


def _protocol(settings: TaskSettings) -> str:
    """The name of the way tasks are measured; numbers of different names are not compared."""
    first = f"tasks-v1-C{'+'.join(map(str, settings.task_tokens))}-n{settings.task_examples}"
    return settings.protocol(first, "" if settings.template == "none" else settings.template)


def _check_positions(examples: Sequence[Example], limit: int) -> None:
    """Raise :class:`InputError` if an example with its answer is longer than the ``limit`` of trained positions."""
    needed = [len(e.question_ids) + max(len(e.answer_ids), e.answer_tokens or 0) + e.length for e in examples]
    if max(needed) > limit:
        longest = examples[needed.index(max(needed))]
        raise InputError(
            f"Task {longest.task} of {longest.length} tokens needs {max(needed)} positions with question and answer; "
            f"the model was trained on {limit}: give less --task_tokens, or --allow_extrapolation."
        )


def measure_tasks(settings: TaskSettings, command: str) -> tuple[list[dict[str, Any]], bool]:
    """Run tasks under presses, write the results, and print them; see :func:`coldpress.eval.evaluate.evaluate`.

    A run that was killed goes on where it was when it is started again with the same settings.
    """
    jobs = make_jobs(settings.of_jobs())
    folder = checked_folder(settings)
    corpus = load_corpus(**settings.reading) if settings.reading else None
    run = make_questions(settings, jobs, corpus, load_model(settings.model, **settings.loading), command)
    run.keep_in(folder)
    return carry_out(run, folder)


@dataclass
class Questions(ExampleRun):
    """A run over tasks of which everything is decided: what is asked, of which model, under which presses."""

    corpus: Corpus | None

    def point_run(self, **given: Any) -> TaskRun:
        return TaskRun(**given, examples=self.examples, max_new_tokens=self.settings.max_new_tokens)

    @property
    def asked(self) -> float:
        return sum(len(e.question_ids) + DECODE_COST * (e.answer_tokens or 1) for e in self.examples)

    def facts(self) -> dict[str, Any]:
        s, corpus = self.settings, self.corpus or OWN_TEXT
        return {
            "protocol": _protocol(s),
            "dataset": s.text_file or s.dataset or corpus.name,
            "dataset_source": corpus.source,
            "subset": corpus.subset,
            "split": corpus.split,
            "text_sha256": corpus.text_sha256,
            **super().facts(),
            "context_tokens": s.task_tokens[0] if len(s.task_tokens) == 1 else None,
        }


def make_questions(
    settings: TaskSettings, jobs: Sequence[Job], corpus: Corpus | None, loaded: LoadedModel, command: str
) -> Questions:
    """Decide everything that can be decided before the model runs; InputError where sizes or a press do not fit it."""
    jobs = prepared(jobs, loaded)
    text = None if corpus is None else "\n\n".join(document.text for document in corpus.documents)
    note_unreadable(loaded.tokenizer, [" ".join(SENTENCES) if text is None else text], loaded.name)
    material = Material(loaded.tokenizer, text, settings.template == "chat", settings.pin_system)
    longest, limit = max(settings.task_tokens, default=0), loaded.max_positions or UNKNOWN_POSITIONS
    if longest > limit and not settings.allow_extrapolation:  # before so long a text is put together
        raise InputError(
            f"--task_tokens {longest} is past the {limit} positions the model was trained on: give less, or "
            "--allow_extrapolation."
        )
    sizes = settings.task, settings.task_tokens, settings.depths, settings.task_examples
    examples = make_examples(material, *sizes, seed=settings.seed)
    if not settings.allow_extrapolation:
        _check_positions(examples, limit)
    loaded.check_ids([torch.tensor(example.context_ids) for example in examples])
    return Questions(settings, jobs, loaded, command, examples, corpus)
