"""Words that are more frequent than the others in a list; the answer names them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from coldpress.eval.tasks.example import Draft, register
from coldpress.eval.tasks.material import Material
from coldpress.eval.tasks.words import NOUNS

__all__ = ["cwe"]

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
