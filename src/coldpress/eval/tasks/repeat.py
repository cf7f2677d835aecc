"""A passage that comes again: how surprised a model is by what it has read before."""

from __future__ import annotations

import random
from collections.abc import Sequence

from coldpress.eval.tasks.example import Draft, register
from coldpress.eval.tasks.material import Ids, Material

__all__ = ["repeat", "repeat_text"]

SPAN_TOKENS, CUE_TOKENS = 40, 8


@register("repeat", has_depth=True, answer_tokens=None, takes_template=False)
def repeat(rng: random.Random, depth: float, material: Material) -> Draft:
    """Probe: nats a token of a span of random tokens in the text, whose beginning comes again, by depth.

    Only what reads the earlier span can know how it goes on: an induction head, which models of any size have.

    Source: Olsson et al. 2022, arXiv:2209.11895, repeated random tokens.
    """
    return _draft(tuple(rng.choices(material.plain_ids, k=SPAN_TOKENS)), depth, rng, material)


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
    return _draft(tuple(span[:SPAN_TOKENS]), depth, rng, material, sentences)


def _draft(span: Ids, depth: float, rng: random.Random, material: Material, without: Sequence[str] = ()) -> Draft:
    return Draft(
        opening="",
        filler=material.pieces(rng, without),
        hidden=((depth, span),),
        question=span[:CUE_TOKENS],
        lead="",
        answer=span[CUE_TOKENS:],
    )
