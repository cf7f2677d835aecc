"""The tasks: needles, chains of variables and common words, scored by string match; passkeys and repetition, probes."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator, Sequence

from coldpress.eval.tasks.example import Draft, register
from coldpress.eval.tasks.material import ADJECTIVES, NOUNS, Ids, Material

__all__ = ["cwe", "niah_multikey", "niah_single", "passkey", "repeat", "repeat_text", "vt"]

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
