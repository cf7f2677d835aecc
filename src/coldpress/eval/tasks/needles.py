"""A number hidden in a text: needles in a haystack, scored by whether the answer names it."""

from __future__ import annotations

import random

from coldpress.eval.tasks.example import Draft, register
from coldpress.eval.tasks.material import Material
from coldpress.eval.tasks.words import ADJECTIVES, NOUNS

__all__ = ["niah_multikey", "niah_single"]

N_KEYS = 4
_OPENING = (
    "Special magic numbers are hidden in the following text. Memorise them; you will be asked about one of them.\n"
)


@register("niah_single", has_depth=True, answer_tokens=16)
def niah_single(rng: random.Random, depth: float, material: Material) -> Draft:
    """One number is hidden in the text, under a key of two words; the answer has to name it.

    Source: Hsieh et al. 2024, arXiv:2404.06654 (RULER), section 3.1, S-NIAH.
    """
    return _draft(rng, [depth], material)


@register("niah_multikey", has_depth=True, answer_tokens=16)
def niah_multikey(rng: random.Random, depth: float, material: Material) -> Draft:
    """Four numbers are hidden under four keys, one of them at the depth; the answer has to name that one.

    Source: Hsieh et al. 2024, arXiv:2404.06654 (RULER), section 3.1, MK-NIAH.
    """
    return _draft(rng, [depth, *(rng.random() for _ in range(N_KEYS - 1))], material)


def _draft(rng: random.Random, depths: list[float], material: Material) -> Draft:
    """The first depth's number is asked for."""
    n = len(depths)
    keys = [f"{a}-{b}" for a, b in zip(rng.sample(ADJECTIVES, n), rng.sample(NOUNS, n), strict=True)]
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), n)]
    hidden = tuple(
        (at, f" One of the special magic numbers for {key} is: {number}.")
        for at, key, number in zip(depths, keys, numbers, strict=True)
    )
    return Draft(
        opening=_OPENING,
        filler=material.pieces(rng),
        hidden=hidden,
        question=f"\nWhat is the special magic number for {keys[0]} mentioned in the text?",
        lead=f"The special magic number for {keys[0]} mentioned in the text is",
        answer=f" {numbers[0]}",
        references=(numbers[0],),
    )
