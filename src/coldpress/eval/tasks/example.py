"""What a task is: how one example of it is drafted, and how a draft becomes exactly so many tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from coldpress.errors import DataError, InputError, nearest
from coldpress.eval.tasks.material import Ids, Material

__all__ = ["Draft", "Example", "Task", "find_task", "make_example", "register", "task_names"]


@dataclass(frozen=True)
class Draft:
    """One example before it has a length."""

    opening: str  # what the context begins with
    filler: Iterable[str]  # pieces of text, as many as anybody asks for; what is hidden goes between two of them
    # what is hidden among them, as text or token ids, with its depth: 0 before all of them, 1 after
    hidden: tuple[tuple[float, str | Ids], ...]
    question: str | Ids  # asked after the compression
    lead: str  # the beginning of the answer, which the model does not have to find
    answer: str | Ids  # how it goes on; its tokens are scored
    references: tuple[str, ...] = ()  # texts that a right answer holds; empty where nothing is generated


@dataclass(frozen=True)
class Task:
    """A kind of example."""

    name: str  # it is asked for by
    summary: str  # a line about it
    # makes one example, from the random numbers, the depth and the material that it is given
    draft: Callable[[random.Random, float, Material], Draft]
    has_depth: bool  # whether what is asked for stands at one place
    # how many to generate at most; None for a probe, of which only log-probabilities are taken
    answer_tokens: int | None
    takes_template: bool  # whether a chat template may go around it


@dataclass(frozen=True)
class Example:
    """One context, one question about it, and the answer."""

    task: str
    index: int  # of the example, among those of its task and length
    length: int  # tokens of the context, all counted, also what a chat template or a tokenizer puts before the text
    depth: float | None  # fraction of the filler that stands before what is asked for; None where it is in many places
    hidden_at: tuple[tuple[int, int], ...]  # first token of each hidden part, and of what follows it
    context_ids: Ids  # read and compressed
    question_ids: Ids  # fed after the compression, at the positions that follow the context's; not scored
    answer_ids: Ids  # scored, each from what stands before it
    references: tuple[str, ...]  # texts that a right answer holds; empty where nothing is generated
    answer_tokens: int | None  # how many to generate at most; None where nothing is
    n_pinned: int = 0  # tokens at the beginning of the context that nothing may evict

    @property
    def fingerprint(self) -> str:
        """The same for examples of the same tokens and references: 16 hex digits."""
        pinned = (self.n_pinned,) if self.n_pinned else ()
        parts = (self.context_ids, self.question_ids, self.answer_ids, self.references, self.answer_tokens, *pinned)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


_TASKS: dict[str, Task] = {}
_Drafter = Callable[[random.Random, float, Material], Draft]


def register(
    name: str, *, has_depth: bool, answer_tokens: int | None, takes_template: bool = True
) -> Callable[[_Drafter], _Drafter]:
    """Make a function that drafts examples known as the task ``name``; its docstring's first line is the summary."""

    def add(draft: _Drafter) -> _Drafter:
        if name in _TASKS:
            raise ValueError(f"There are two tasks {name!r}.")
        summary = (draft.__doc__ or "").strip().partition("\n")[0]
        _TASKS[name] = Task(name, summary, draft, has_depth, answer_tokens, takes_template)
        return draft

    return add


def task_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_TASKS)


def find_task(name: str) -> Task:
    """A task by its name; :class:`InputError` if there is none of that name."""
    if name not in _TASKS:
        known = task_names()
        raise InputError(f"Unknown task {name!r}; allowed: {', '.join(known)}.{nearest(name, known)}")
    return _TASKS[name]


def make_example(task: Task, material: Material, length: int, depth: float, seed: int, index: int) -> Example:
    """One example, which depends on nothing but the arguments.

    The context has exactly ``length`` tokens: pieces of filler are taken until there are enough, and the first one
    loses its beginning, as when a text is read from somewhere in its middle. DataError where there is no room for any.
    """
    own_depth = depth if task.has_depth else None
    rng = random.Random(f"coldpress {seed} {task.name} {length} {own_depth} {index}")
    draft = task.draft(rng, depth, material)
    chat = material.chat if task.takes_template else None
    after = "" if chat is None else chat[1]
    head, n_pinned = material.opening(draft.opening, task.takes_template)
    hidden = [(d, material.ids(part)) for d, part in draft.hidden]
    room = length - len(head) - sum(len(ids) for _, ids in hidden)
    if room < 1:
        raise DataError(
            f"Task {task.name} needs {length - room + 1} tokens for what it hides and asks, and more for the text "
            f"around it; --task_tokens {length} is too short."
        )
    filler = _filled(map(material.ids, draft.filler), room)
    context, places = _hide(head, filler, sorted(hidden, key=lambda part: part[0]))
    question = material.ids(draft.question)
    if after or draft.lead:
        question = material.ids(f"{draft.question}{after}{draft.lead}" if after else f"{draft.question} {draft.lead}")
    return Example(
        task.name,
        index,
        length,
        own_depth,
        places,
        context,
        question,
        material.ids(draft.answer),
        draft.references,
        task.answer_tokens,
        n_pinned,
    )


def _filled(pieces: Iterator[Ids], room: int) -> list[Ids]:
    """Pieces of ``room`` tokens together."""
    taken: list[Ids] = []
    missing = room
    while missing > 0:
        piece = next(pieces)
        missing -= len(piece)
        taken.append(piece)
    while missing:  # too many by less than the last piece, which may be longer than the first
        n = min(-missing, len(taken[0]))
        missing += n
        taken[0] = taken[0][n:]
        if not taken[0]:
            taken.pop(0)
    return taken


def _hide(head: Ids, filler: list[Ids], hidden: list[tuple[float, Ids]]) -> tuple[Ids, tuple[tuple[int, int], ...]]:
    """``filler`` after ``head``, with each hidden part between the two pieces that are nearest to its depth."""
    ends = [0]
    for piece in filler:
        ends.append(ends[-1] + len(piece))
    gaps = [min(range(len(ends)), key=lambda gap: abs(ends[gap] - depth * ends[-1])) for depth, _ in hidden]
    context, places = list(head), []
    for gap in range(len(ends)):
        for wanted, (_, ids) in zip(gaps, hidden, strict=True):
            if wanted == gap:
                places.append((len(context), len(context) + len(ids)))
                context += ids
        context += filler[gap] if gap < len(filler) else ()
    return tuple(context), tuple(places)
