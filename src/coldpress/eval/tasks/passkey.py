"""A pass key hidden in a text: how surprised a model is by it when asked."""

from __future__ import annotations

import random

from coldpress.eval.tasks.example import Draft, register
from coldpress.eval.tasks.material import Material

__all__ = ["passkey"]


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
