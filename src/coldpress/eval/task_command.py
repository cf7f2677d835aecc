"""``coldpress tasks``: questions about compressed contexts, one result record per press and size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coldpress.errors import InputError
from coldpress.eval.datasets import Corpus, Document, load_corpus
from coldpress.eval.jobs import Job, make_jobs
from coldpress.eval.models import LoadedModel, load_model
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.run import DECODE_COST, ExampleRun, carry_out, checked_folder, prepared
from coldpress.eval.settings import TaskSettings
from coldpress.eval.task_run import TaskRun
from coldpress.eval.tasks import Example, Material, make_examples
from coldpress.eval.tasks.material import SENTENCES
from coldpress.eval.tokens import note_unreadable

__all__ = ["Questions", "make_questions", "measure_tasks"]

# The haystack of our own sentences, where no text is given
OWN_TEXT = Corpus("filler", "filler", None, None, None, (Document("filler", "\n".join(SENTENCES)),))


def _protocol(settings: TaskSettings) -> str:
    """The name of the way tasks are measured; numbers of different names are not compared."""
    parts = [f"tasks-v1-C{'+'.join(map(str, settings.task_tokens))}-n{settings.task_examples}"]
    parts += [] if settings.template == "none" else [settings.template]
    parts += [] if settings.pin_system is None else ["pinned"]
    parts += [] if settings.chunk_tokens is None else [f"chunk{settings.chunk_tokens}"]
    return "-".join(parts)


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
    """Run tasks under presses, write the results, and print them.

    A run that was killed goes on where it was when it is started again with the same settings.

    Args:
        settings: what to measure.
        command: the command line, for the record.

    Returns:
        The records, in the order of the table, and whether the user interrupted the run.

    Raises:
        InputError: before any long work, when something that was asked for cannot work.
    """
    jobs = make_jobs(settings.of_jobs)
    folder = checked_folder(settings)
    corpus = load_corpus(**settings.reading) if settings.reading else None
    run = make_questions(settings, jobs, corpus, load_model(settings.model, **settings.loading), command)
    run.keep_in(folder)
    return carry_out(run, folder)


@dataclass
class Questions(ExampleRun):
    """A run over tasks of which everything is decided: what is asked, of which model, under which presses."""

    corpus: Corpus | None
    examples: list[Example]

    def point_run(self) -> TaskRun:
        s = self.settings
        return TaskRun(
            self.loaded.model,
            self.loaded.tokenizer,
            [job.point for job in self.jobs],
            self.examples,
            chunk_tokens=s.chunk_tokens,
            max_new_tokens=s.max_new_tokens,
            seed=s.seed,
            ledger=self.ledger,
        )

    @property
    def work(self) -> float:
        n_new = sum(len(e.question_ids) + DECODE_COST * (e.answer_tokens or 1) for e in self.examples)
        return self.n_parameters * (sum(e.length for e in self.examples) + n_new * (1 + len(self.jobs)))

    def facts(self) -> dict[str, Any]:
        s, corpus = self.settings, self.corpus or OWN_TEXT
        tokens = hashlib.sha256("".join(example.fingerprint for example in self.examples).encode()).hexdigest()
        return {
            "protocol": _protocol(s),
            "dataset": s.text_file or s.dataset or corpus.name,
            "dataset_source": corpus.source,
            "subset": corpus.subset,
            "split": corpus.split,
            "text_sha256": corpus.text_sha256,
            "tokens_sha256": tokens,
            "total_tokens": sum(example.length for example in self.examples),
            "context_tokens": s.task_tokens[0] if len(s.task_tokens) == 1 else None,
        }


def make_questions(
    settings: TaskSettings, jobs: Sequence[Job], corpus: Corpus | None, loaded: LoadedModel, command: str
) -> Questions:
    """Decide everything that can be decided before the model runs.

    Raises:
        InputError: sizes that do not fit the model, or a press lacks what it needs of it.
    """
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
    return Questions(settings, jobs, loaded, command, corpus, examples)
