"""Which presses are tried on which architectures: all on all of them, of which ``make test`` runs enough for pairs.

Presses of a kind go through the same code for what an architecture may do to them: every architecture meets one
press of each kind, and every press some architectures; GPT-NeoX meets them all. ``make test-slow`` runs the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.contract.architectures import ARCHITECTURES
from tests.presses.others import OTHERS, press_of

from coldpress.core.press import parts

WHOLE = "gpt_neox"


def kind_of(name: str) -> str:
    """What a press needs of a model, or does with its heads."""
    if name in OTHERS:
        return "without a ratio"
    inside = list(parts(press_of(name, 0.5)))
    if any(press.needs_model for press in inside):
        return "runs the model again"
    if any(press.needs_hidden_states for press in inside):
        return "looks at hidden states"
    if any(press.kind == "calibrated" for press in inside):
        return "calibrated"
    if any(press.per_head for press in inside):
        return "heads differ"
    return "wraps" if len(inside) > 1 else "scores"


def fast_pairs(names: Sequence[str]) -> set[tuple[str, str]]:
    """Pairs of an architecture and a press that are enough to run often."""
    chosen = {(WHOLE, name) for name in names}
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(kind_of(name), []).append(name)
    for own in by_kind.values():
        for i, architecture in enumerate(ARCHITECTURES):
            chosen.add((architecture.name, own[i % len(own)]))  # its neighbours meet others
    return chosen


def every_pair(names: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrizes ``architecture`` and ``name`` with all pairs, most of them slow."""
    fast = fast_pairs(names)
    return pytest.mark.parametrize(
        ("architecture", "name"),
        [
            pytest.param(
                architecture,
                name,
                id=f"{name}-{architecture}",
                marks=() if (architecture.name, name) in fast else pytest.mark.slow,
            )
            for name in names
            for architecture in ARCHITECTURES
        ],
    )
