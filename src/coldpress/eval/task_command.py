"""``coldpress tasks``: questions about compressed contexts, one result record per press and size."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coldpress.bases.registry import NO_PRESS
from coldpress.bases.scorer import BUDGETS
from coldpress.errors import InputError, OutputError
from coldpress.eval.datasets import Corpus, load_corpus
from coldpress.eval.engine import Engine
from coldpress.eval.engine_by_name import check_engine, make_engine
from coldpress.eval.jobs import Job, make_jobs
from coldpress.eval.ledger import UNFINISHED, versions
from coldpress.eval.models import LoadedModel, load_model, pick_device
from coldpress.eval.plan import UNKNOWN_POSITIONS
from coldpress.eval.points import Point
from coldpress.eval.progress import note, progress
from coldpress.eval.readable import check_readable
from coldpress.eval.records import blank_record
from coldpress.eval.results import SCHEMA_VERSION, check_writable, environment
from coldpress.eval.settings import Settings
from coldpress.eval.task_ledger import TaskLedger
from coldpress.eval.task_results import carry_out
from coldpress.eval.task_run import TaskRun
from coldpress.eval.tasks import Example, Material, find_task, make_examples
from coldpress.eval.tasks.words import SENTENCES
from coldpress.stores.bits import KVBits

__all__ = [
    "TASKS",
    "TEMPLATES",
    "Questions",
    "TaskSettings",
    "check_task_positions",
    "make_questions",
    "measure_tasks",
    "task_protocol",
]

TASKS = ("niah_single", "niah_multikey", "vt", "cwe", "passkey", "repeat_text")  # asked where none is named
TEMPLATES = ("none", "chat")
MOST_EXAMPLES = 10_000  # of a task; all are made before the first is asked
FILLER = "filler"  # the haystack of our own sentences, where no text is given
_ELSEWHERE = ("output_dir", "device_map", "engine", "ray_address", "workers")  # what changes no result
_OF_JOBS = ("press", "compression_ratio", *BUDGETS, "press_args", "kv_bits", "kv_group_size", "kv_residual_tokens")


@dataclass(frozen=True)
class TaskSettings:
    """Everything a run over tasks was asked for; the command line's options have these names.

    Raises:
        InputError: options that can never work.
    """

    model: str = "EleutherAI/pythia-70m"
    revision: str | None = None
    dataset: str | None = None  # the haystack; None for sentences of our own
    subset: str | None = None
    split: str = "test"
    sample_idx: int | None = None
    text_file: str | None = None
    press: tuple[str, ...] = (NO_PRESS,)
    compression_ratio: tuple[float, ...] = ()  # (0.5,) if no budget is given
    budget_tokens: tuple[int, ...] = ()
    budget_bytes: tuple[int, ...] = ()
    press_args: tuple[tuple[str, Any], ...] = ()
    chunk_tokens: int | None = None
    kv_bits: tuple[int, ...] = ()
    kv_group_size: int = KVBits.group_size
    kv_residual_tokens: int = KVBits.residual_tokens
    task: tuple[str, ...] = TASKS
    task_tokens: tuple[int, ...] = (512, 1024)
    task_examples: int = 20
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    template: str = "none"
    pin_system: str | None = None
    max_new_tokens: int | None = None  # what each task says
    allow_extrapolation: bool = False
    attn_implementation: str = "sdpa"
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    seed: int = 0
    engine: str = "local"
    ray_address: str | None = None
    workers: int | None = None
    output_dir: str = "results/tasks"

    def __post_init__(self) -> None:
        for name in self.task:
            find_task(name)
        if self.dataset is not None and self.text_file is not None:
            raise InputError(
                f"--text_file {self.text_file} and --dataset {self.dataset} are both the text; give one of them."
            )
        for name in ("subset", "split", "sample_idx"):
            is_given = getattr(self, name) != getattr(TaskSettings, name)
            if is_given and self.dataset is None and self.text_file is None:
                raise InputError(f"--{name} belongs to a text; name one with --dataset, or leave it out.")
        if self.task_examples > MOST_EXAMPLES:
            raise InputError(f"--task_examples must be at most {MOST_EXAMPLES:,}, got {self.task_examples:,}.")
        if self.template not in TEMPLATES:
            raise InputError(f"--template must be {' or '.join(TEMPLATES)}, got {self.template!r}.")
        if self.pin_system is not None and not self.pin_system.strip():
            raise InputError("--pin_system is empty; give the system prompt, or leave it out.")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"--depths must be numbers from 0 (beginning) to 1 (end), got {list(self.depths)}.")

    @property
    def loading(self) -> dict[str, Any]:
        """The options of load_model beside the name."""
        names = ("device", "dtype", "attn_implementation", "revision", "device_map")
        return {name: getattr(self, name) for name in names}

    @property
    def cluster(self) -> dict[str, Any]:
        """The options of the engine."""
        return {"ray_address": self.ray_address, "workers": self.workers}

    def of_jobs(self) -> Settings:
        """What says which presses are measured: of an evaluation with the same ones."""
        chosen = {name: getattr(self, name) for name in (*_OF_JOBS, "chunk_tokens", "seed", "engine")}
        return Settings(**chosen, ppl_apply_press=True, ppl_only=True)

    def jobs(self) -> list[Job]:
        """The presses to measure; see :func:`coldpress.eval.jobs.make_jobs`."""
        return make_jobs(self.of_jobs())


def task_protocol(
    lengths: Sequence[int],
    n_examples: int,
    template: str = "none",
    chunk_tokens: int | None = None,
    is_pinned: bool = False,
) -> str:
    """The name of the way tasks are measured; numbers of different names are not compared."""
    protocol = f"tasks-v1-C{'+'.join(map(str, lengths))}-n{n_examples}"
    protocol += "" if template == "none" else f"-{template}"
    protocol += "-pinned" if is_pinned else ""
    return protocol if chunk_tokens is None else f"{protocol}-chunk{chunk_tokens}"


def check_task_positions(examples: Sequence[Example], max_positions: int | None, may_pass: bool = False) -> None:
    """Raise :class:`InputError` if an example with its answer is longer than what the model was trained on."""
    limit = max_positions or UNKNOWN_POSITIONS
    needed = [len(e.question_ids) + max(len(e.answer_ids), e.answer_tokens or 0) + e.length for e in examples]
    if max(needed) > limit and not may_pass:
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
    check_engine(settings.engine, **settings.cluster)
    jobs = settings.jobs()
    pick_device(settings.device)
    if not settings.output_dir.strip():
        raise OutputError("--output_dir is empty; name a folder.")
    output_dir = Path(settings.output_dir)
    check_writable(output_dir)
    corpus = load_haystack(settings)
    loaded = load_model(settings.model, **settings.loading)
    questions = make_questions(settings, jobs, corpus, loaded, command)
    with make_engine(settings.engine, loaded, **settings.cluster) as engine:
        return questions.carry_out(output_dir, TaskLedger(output_dir / UNFINISHED / questions.digest), engine)


@dataclass
class Questions:
    """A run over tasks of which everything is decided: what is asked, of which model, under which presses."""

    settings: TaskSettings
    jobs: list[Job]
    loaded: LoadedModel
    examples: list[Example]
    common: dict[str, Any]  # what its records have in common
    show_progress: Callable[..., Any] = progress

    @property
    def digest(self) -> str:
        """The same for runs whose examples may be shared."""
        names = ("weights_fingerprint", "dtype", "device", "attn_implementation", "protocol", "tokens_sha256", "seed")
        parts = [self.common.get(name) for name in names], versions(self.common)
        return "tasks-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]

    def finished_records(self) -> list[dict[str, Any]]:
        """For each job, in order, what its record will look like if it succeeds, with nothing measured."""
        return [blank_record(self.common, job) for job in self.jobs]

    def carry_out(
        self, output_dir: Path, ledger: TaskLedger, engine: Engine | None = None
    ) -> tuple[list[dict[str, Any]], bool]:
        """Ask everything, write the results, and print them; see :func:`measure_tasks`."""
        run = TaskRun(
            self.loaded.model,
            self.loaded.tokenizer,
            [Point(job.press, job.kv_bits) for job in self.jobs],
            self.examples,
            chunk_tokens=self.settings.chunk_tokens,
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
            ledger=ledger,
        )
        progress = partial(self.show_progress, name="tasks")
        return carry_out(run, self.jobs, self.common, output_dir, ledger, progress, engine)


def make_questions(
    settings: TaskSettings, jobs: Sequence[Job], corpus: Corpus | None, loaded: LoadedModel, command: str
) -> Questions:
    """Decide everything that can be decided before the model runs.

    Raises:
        InputError: sizes that do not fit the model, or a press lacks what it needs of it.
    """
    prepared = [
        job if job.press is None else replace(job, press=job.press.prepared(loaded.model, loaded.tokenizer))
        for job in jobs
    ]
    text = None if corpus is None else "\n\n".join(document.text for document in corpus.documents)
    for line in check_readable(loaded.tokenizer, [" ".join(SENTENCES) if text is None else text], loaded.name):
        note(line)
    material = Material(loaded.tokenizer, text, settings.template == "chat", settings.pin_system)
    longest, limit = max(settings.task_tokens, default=0), loaded.max_positions or UNKNOWN_POSITIONS
    if longest > limit and not settings.allow_extrapolation:  # before so long a text is put together
        raise InputError(
            f"--task_tokens {longest} is past the {limit} positions the model was trained on: give less, or "
            "--allow_extrapolation."
        )
    sizes = settings.task, settings.task_tokens, settings.depths, settings.task_examples
    examples = make_examples(material, *sizes, seed=settings.seed)
    check_task_positions(examples, loaded.max_positions, settings.allow_extrapolation)
    loaded.check_ids([torch.tensor(example.context_ids) for example in examples])
    return Questions(settings, prepared, loaded, examples, _common(settings, command, loaded, corpus, examples))


def load_haystack(settings: TaskSettings) -> Corpus | None:
    """The text that answers are hidden in; None for sentences of our own."""
    if settings.dataset is None and settings.text_file is None:
        return None
    return load_corpus(
        settings.dataset or "",
        subset=settings.subset,
        split=settings.split,
        sample_idx=settings.sample_idx,
        text_file=settings.text_file,
    )


def _common(
    s: TaskSettings, command: str, loaded: LoadedModel, corpus: Corpus | None, examples: Sequence[Example]
) -> dict[str, Any]:
    """What the records of one run have in common."""
    own = hashlib.sha256("\n".join(SENTENCES).encode()).hexdigest()
    tokens = hashlib.sha256("".join(example.fingerprint for example in examples).encode()).hexdigest()
    settings = {k: v for k, v in asdict(s).items() if k not in (*_OF_JOBS, *_ELSEWHERE)}
    if s.pin_system is None:  # as before there was one, so that finished runs are found again
        del settings["pin_system"]
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": secrets.token_hex(6),
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "protocol": task_protocol(s.task_tokens, s.task_examples, s.template, s.chunk_tokens, s.pin_system is not None),
        "settings": settings,
        "seed": s.seed,
        **loaded.facts(),
        "dataset": FILLER if corpus is None else s.text_file or s.dataset,
        "dataset_source": FILLER if corpus is None else corpus.source,
        "subset": None if corpus is None else corpus.subset,
        "split": None if corpus is None else corpus.split,
        "text_sha256": own if corpus is None else corpus.text_sha256,
        "tokens_sha256": tokens,
        "total_tokens": sum(example.length for example in examples),
        "context_tokens": s.task_tokens[0] if len(s.task_tokens) == 1 else None,
        "batch_size": 1,
        "position_mode": "original",
        "env": environment(),
    }
