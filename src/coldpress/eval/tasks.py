"""What a task is, how a draft of an example becomes exactly so many tokens, and the tasks: questions and probes."""

from __future__ import annotations

import hashlib
import itertools
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from coldpress.errors import DataError, InputError, nearest
from coldpress.eval.material import ADJECTIVES, NOUNS, Ids, Material


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


def make_examples(
    material: Material,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    n_examples: int,
    seed: int = 0,
) -> list[Example]:
    """``n_examples`` of each task at each length; those of a task with a depth take the depths in turn.

    ``lengths`` of contexts are in tokens, ``depths`` in [0, 1]. InputError where there is no such task, where numbers
    are out of range, or a length is too short for a task.
    """
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"--depths must be numbers from 0 (beginning) to 1 (end), got {list(depths)}.")
    if n_examples < 1 or not tasks or not lengths:
        raise InputError("Tasks need at least one name, one length and one example.")
    found = [find_task(name) for name in dict.fromkeys(tasks)]
    return [
        make_example(task, material, length, depths[index % len(depths)], seed, index)
        for task in found
        for length in dict.fromkeys(lengths)
        for index in range(n_examples)
    ]


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


# Needles, chains of variables and common words, scored by string match; passkeys and repetition, probes

N_KEYS = 4
_OF_NEEDLES = (
    "Special magic numbers are hidden in the following text. Memorise them; you will be asked about one of them.\n"
)


@register("niah_single", has_depth=True, answer_tokens=16)
def niah_single(rng: random.Random, depth: float, material: Material) -> Draft:
    """One number is hidden in the text, under a key of two words; the answer has to name it.

    Source: Hsieh et al. 2024, arXiv:2404.06654 (RULER), section 3.1, S-NIAH.
    """
    return _needles(rng, [depth], material)


@register("niah_multikey", has_depth=True, answer_tokens=16)
def niah_multikey(rng: random.Random, depth: float, material: Material) -> Draft:
    """Four numbers are hidden under four keys, one of them at the depth; the answer has to name that one.

    Source: Hsieh et al. 2024, arXiv:2404.06654 (RULER), section 3.1, MK-NIAH.
    """
    return _needles(rng, [depth, *(rng.random() for _ in range(N_KEYS - 1))], material)


def _needles(rng: random.Random, depths: list[float], material: Material) -> Draft:
    """The first depth's number is asked for."""
    n = len(depths)
    keys = [f"{a}-{b}" for a, b in zip(rng.sample(ADJECTIVES, n), rng.sample(NOUNS, n), strict=True)]
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), n)]
    hidden = tuple(
        (at, f" One of the special magic numbers for {key} is: {number}.")
        for at, key, number in zip(depths, keys, numbers, strict=True)
    )
    return Draft(
        opening=_OF_NEEDLES,
        filler=material.pieces(rng),
        hidden=hidden,
        question=f"\nWhat is the special magic number for {keys[0]} mentioned in the text?",
        lead=f"The special magic number for {keys[0]} mentioned in the text is",
        answer=f" {numbers[0]}",
        references=(numbers[0],),
    )


N_HOPS = 4
_OF_CHAINS = "Memorise the chain of variable assignments that is hidden in the following text.\n"


@register("vt", has_depth=False, answer_tokens=40)
def vt(rng: random.Random, depth: float, material: Material) -> Draft:
    """Variable tracking: of a chain of assignments scattered over the text, all variables of one value.

    Source: Hsieh et al. 2024, arXiv:2404.06654 (RULER), section 3.2: one chain of four hops.
    """
    names: list[str] = []
    while len(names) < N_HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=3))
        if name not in (*names, "VAR"):
            names.append(name)
    value = rng.randrange(10_000, 100_000)
    places = sorted(rng.random() for _ in names)
    sources = [str(value), *(f"VAR {name}" for name in names)]
    return Draft(
        opening=_OF_CHAINS,
        filler=material.pieces(rng),
        hidden=tuple(
            (place, f" VAR {name} = {source}.") for place, name, source in zip(places, names, sources, strict=False)
        ),
        question=f"\nFind all variables that are assigned the value {value} in the text above.",
        lead=f"By the chain of assignments in the text, {len(names)} variables have the value {value}, they are: VAR",
        answer=f" {', VAR '.join(names)}",
        references=tuple(names),
    )


N_COMMON, N_OTHERS = 3, 5  # words of each round of the list


@register("cwe", has_depth=False, answer_tokens=16)
def cwe(rng: random.Random, depth: float, material: Material) -> Draft:
    """Common words: a list of words in which three come again and again, and the others seldom; name the three.

    Every round of eight words holds each of the three once, and five others, which take turns.

    Source: Hsieh et al. 2024, arXiv:2404.06654 (RULER), section 3.3, with three words instead of ten.
    """
    words = rng.sample(NOUNS, len(NOUNS))
    common, others = words[:N_COMMON], words[N_COMMON:]
    return Draft(
        opening="Below is a list of words. Some of them come often. Memorise the ones that come most often.\n",
        filler=_rounds(rng, common, others),
        hidden=(),
        question=f"\nWhat are the {N_COMMON} most common words in the list above?",
        lead=f"The {N_COMMON} most common words in the list are:",
        answer=f" {', '.join(common)}",
        references=tuple(common),
    )


def _rounds(rng: random.Random, common: list[str], others: list[str]) -> Iterator[str]:
    turns = itertools.cycle(others)
    while True:
        words = [*common, *itertools.islice(turns, N_OTHERS)]
        rng.shuffle(words)
        yield from (f" {word}," for word in words)


@register("passkey", has_depth=True, answer_tokens=None)
def passkey(rng: random.Random, depth: float, material: Material) -> Draft:
    """Probe: nats a token of a five-digit pass key that was hidden in the text, by depth.

    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300, section 4.2, with log-probabilities instead of an answer.
    """
    key = str(rng.randrange(10_000, 100_000))
    return Draft(
        opening="A pass key is hidden in the following text. Find it and remember it.\n",
        filler=material.pieces(rng),
        hidden=((depth, f" The pass key is {key}. Remember it: {key} is the pass key."),),
        question="\nWhat is the pass key?",
        lead="The pass key is",
        answer=f" {key}",
    )


SPAN_TOKENS, CUE_TOKENS = 40, 8


@register("repeat", has_depth=True, answer_tokens=None, takes_template=False)
def repeat(rng: random.Random, depth: float, material: Material) -> Draft:
    """Probe: nats a token of a span of random tokens in the text, whose beginning comes again, by depth.

    Only what reads the earlier span can know how it goes on: an induction head, which models of any size have.

    Source: Olsson et al. 2022, arXiv:2209.11895, repeated random tokens.
    """
    return _repeated(tuple(rng.choices(material.plain_ids, k=SPAN_TOKENS)), depth, rng, material)


@register("repeat_text", has_depth=True, answer_tokens=None, takes_template=False)
def repeat_text(rng: random.Random, depth: float, material: Material) -> Draft:
    """Probe: as repeat, with a span of whole sentences, which come nowhere else in the text."""
    span: list[int] = []
    sentences = []
    for piece in material.pieces(rng):
        sentences.append(piece)
        span += material.ids(piece)
        if len(span) >= SPAN_TOKENS:
            break
    return _repeated(tuple(span[:SPAN_TOKENS]), depth, rng, material, sentences)


def _repeated(span: Ids, depth: float, rng: random.Random, material: Material, without: Sequence[str] = ()) -> Draft:
    return Draft(
        opening="",
        filler=material.pieces(rng, without),
        hidden=((depth, span),),
        question=span[:CUE_TOKENS],
        lead="",
        answer=span[CUE_TOKENS:],
    )
