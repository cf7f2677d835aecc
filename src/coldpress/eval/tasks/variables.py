"""A chain of assignments that is scattered over a text; the answer names all variables with the value."""

from __future__ import annotations

import random
import string

from coldpress.eval.tasks.example import Draft, register
from coldpress.eval.tasks.material import Material

__all__ = ["vt"]

N_HOPS = 4
_OPENING = "Memorise the chain of variable assignments that is hidden in the following text.\n"


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
        opening=_OPENING,
        filler=material.pieces(rng),
        hidden=tuple(
            (place, f" VAR {name} = {source}.") for place, name, source in zip(places, names, sources, strict=False)
        ),
        question=f"\nFind all variables that are assigned the value {value} in the text above.",
        lead=f"By the chain of assignments in the text, {len(names)} variables have the value {value}, they are: VAR",
        answer=f" {', VAR '.join(names)}",
        references=tuple(names),
    )
