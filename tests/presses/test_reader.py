"""The share of attention that a query which reads a part may miss: bounds hold, and are 0 where all is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.presses.test_quest import newest_view
from tests.presses.views import MODELS, view_of

from coldpress import LayerView, QuestPress, SparQPress

READERS = [QuestPress(4, 0.1, 0), QuestPress(16, 0.3, 0), SparQPress(2, 0.2, 2), SparQPress(5, 0.1, 0)]


def missed_in_loops(view: LayerView, read: list[int], row: int, head: int) -> float:
    """Of one query head, in float64."""
    query = view.queries[row, head, -1].double()
    logits = view.keys[row, head // view.group_size].double() @ query * view.scaling
    mass = logits.sub(logits.max()).exp()
    held = len(mass) if view.counts is None else int(view.counts[row, head // view.group_size])
    sink = 0.0 if view.sinks is None else float((view.sinks[head].double() - logits.max()).exp())
    unread = [t for t in range(held) if t not in read]
    return float(mass[unread].sum() / (mass[:held].sum() + sink))


def drawn(view: LayerView, seed: int) -> LayerView:
    """Keys and queries of any size and sign, heads of any length, attention sinks in every third case."""
    random = torch.Generator().manual_seed(seed)
    n = int(torch.randint(13, 60, (1,), generator=random))
    scale = 4 * torch.rand(1, generator=random)
    keys = torch.randn(2, 2, n, 8, generator=random) * scale + torch.randn(2, 2, 1, 8, generator=random)
    held = torch.randint(1, n + 1, (2, 2), generator=random)
    positions = torch.arange(n).expand(2, 2, n).where(torch.arange(n) < held[..., None], -1)
    return replace(
        view, keys=keys, values=torch.randn(2, 2, n, 8, generator=random),
        queries=torch.randn(2, 4, 1, 8, generator=random) - 0.5, _memo={},
        positions=positions if seed % 2 else torch.arange(n).expand(2, 2, n), counts=held if seed % 2 else None,
        sinks=torch.randn(4, generator=random) if seed % 3 == 0 else None, first_position=0,
    )  # fmt: skip


@pytest.mark.parametrize("press", READERS)
def test_no_more_is_missed_than_the_bound_says(press: Any) -> None:
    like, n_tight = newest_view(view_of("llama")), 0
    for seed in range(400):
        view = drawn(like, seed)
        slots = press.select(view)
        if slots is None:
            continue
        bound, true = press.missed(view, slots), press.truly_missed(view, slots)
        assert bound.shape == true.shape == (2, 4) and (bound <= 1).all()
        for row in range(2):
            for head in range(4):
                read = {*slots[row, head // 2].tolist()} - {-1}
                exact = missed_in_loops(view, [*read], row, head)
                assert abs(float(true[row, head]) - exact) < 1e-4
                assert float(bound[row, head]) >= exact - 1e-4
                n_tight += exact < 0.999 * float(bound[row, head]) < 0.5
    assert n_tight > 20  # it says something


@pytest.mark.parametrize("press", READERS)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_missed_where_all_is_read(press: Any, model: str) -> None:
    view = newest_view(view_of(model))
    for slots in (None, torch.arange(view.n_tokens).expand(view.keys.shape[:3])):
        assert not press.missed(view, slots).any() and not press.truly_missed(view, slots).any()
    none = torch.zeros(*view.keys.shape[:2], 1, dtype=torch.long)
    assert (press.missed(view, none) > 0.1).all()


def test_pages_of_one_token_and_all_channels_say_what_is_missed() -> None:
    view = newest_view(view_of("llama"))
    for press in (QuestPress(1, 0.3, 0), SparQPress(view.keys.shape[3], 0.3, 0)):
        slots = press.select(view)
        torch.testing.assert_close(press.missed(view, slots), press.truly_missed(view, slots), atol=1e-5, rtol=1e-4)


def test_softcap_and_bias_count() -> None:
    view = replace(newest_view(view_of("llama")), softcap=0.5, _memo={})
    bias = torch.linspace(-2, 2, view.n_tokens).expand(view.keys.shape[:3])
    for own in (view, replace(view, columns={"bias": bias}, _memo={})):
        press = QuestPress(1, 0.3, 0)
        slots = press.select(own)
        torch.testing.assert_close(press.missed(own, slots), press.truly_missed(own, slots), atol=1e-5, rtol=1e-4)
