"""Pinned spans in a cache: what may be given, rows with spans of their own, padding, and the numbers of a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from torch import Tensor

from coldpress import DecodingPress, KnormPress, PressedCache, StreamingLLMPress, prefill
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.pins import checked_pins
from coldpress.errors import CacheError, PressError

SPANS = [[(0, 3), (10, 12)], [(5, 9)]]


def read(past: PressedCache, ids: Tensor, mask: Tensor | None = None) -> None:
    position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        tiny("llama")(ids, attention_mask=mask, position_ids=position_ids, **cache_argument(past))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        ([], ()),
        ([[], []], ()),
        ([(0, 4)], (((0, 4),),)),
        ([[0, 4], [6, 9]], (((0, 4), (6, 9)),)),
        ([[(0, 4)], []], (((0, 4),), ())),
        ([[(0, 4), (6, 9)]], (((0, 4), (6, 9)),)),
    ],
)
def test_spans_of_all_rows_or_of_each(given: Any, expected: Any) -> None:
    assert checked_pins(given) == expected


@pytest.mark.parametrize(
    "given", [5, (0, 4), [4], [(4, 4)], [(-1, 2)], [(0, 2.0)], [(0, True)], "ab", [(0, 1, 2)], {0: 4}]
)
def test_what_is_no_span_is_refused(given: Any) -> None:
    with pytest.raises(CacheError, match="pin must be spans of tokens"):
        PressedCache(KnormPress(0.5), pin=given)


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_count_tokens_without_padding(side: str) -> None:
    """Before the press, too: presses that choose in all layers together look at columns of whole layers."""
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, slice(7) if side == "left" else slice(23, None)] = 0
    for press in (None, KnormPress(0.3)):
        past = PressedCache(press, pin=SPANS)
        read(past, tokens(2, 30), mask)
        for layer in past.pressed_layers():
            pinned, at = layer.columns()["pinned"], layer.positions()
            for row, skipped in enumerate((0, 7 if side == "left" else 0)):
                expected = [t + skipped for start, stop in SPANS[row] for t in range(start, stop)]
                for head in range(at.shape[1]):
                    assert at[row, head][pinned[row, head]].tolist() == expected


@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
def test_spans_go_with_their_rows(how: str) -> None:
    past = PressedCache(DecodingPress(KnormPress(), compression_interval=2, target_size=9), pin=SPANS)
    read(past, tokens(2, 30))
    fork = past.fork()
    getattr(past, how)(torch.tensor([1, 0, 1]))
    assert fork.session.pins == tuple(map(tuple, SPANS))
    read(past, tokens(3, 2, seed=1))
    for layer in past.pressed_layers():
        for row, spans in enumerate((SPANS[1], SPANS[0], SPANS[1])):
            expected = {t for start, stop in spans for t in range(start, stop)}
            assert all(expected <= {*head.tolist()} for head in layer.positions()[row])
    fork.batch_repeat_interleave(2)
    assert fork.session.pins == tuple(tuple(SPANS[row]) for row in (0, 0, 1, 1))
    read(fork, tokens(4, 2, seed=1))


def test_spans_of_other_rows_than_there_are() -> None:
    with pytest.raises(CacheError, match="pin= has spans for 2 rows, and the cache holds 3; give one for each"):
        read(PressedCache(KnormPress(0.5), pin=SPANS), tokens(3, 30))


@pytest.mark.parametrize("how", ["cache", "block", "pieces", "branches", "rows"])
def test_a_span_beyond_the_prompt_is_said_once_where_it_can_pin_nothing(how: str) -> None:
    model, press = tiny("llama"), KnormPress(0.5)
    past = PressedCache(press, chunk_tokens=8 if how == "pieces" else None, pin=[(2, 4), (50, 60)])
    said = pytest.warns(UserWarning, match=r"\(50, 60\), which lies beyond the 20 tokens .* KnormPress compresses")
    if how == "block":
        own = PressedCache(pin=[(50, 60)])
        with said as warned, press(model):
            read(own, tokens(1, 20))
    elif how == "pieces":
        with said as warned:
            prefill(model, tokens(1, 20), past)
    elif how == "branches":
        own = PressedCache(pin=[(50, 60)])
        branches = own.branches([None, press])
        with said as warned:
            read(own, tokens(1, 20))
        assert branches[1].stored_lengths() == [10, 10]
    elif how == "rows":
        mask = torch.ones(2, 55, dtype=torch.long)
        mask[1, :35] = 0
        with said as warned:
            read(PressedCache(press, pin=[[(50, 60)], [(50, 60)]]), tokens(2, 55), mask)
        read(PressedCache(press, pin=[(50, 60)]), tokens(2, 55), mask)  # it is of a row at least
    else:
        with said as warned:
            read(past, tokens(1, 20))
        read(past, tokens(1, 20))
    assert len(warned) == 1


def test_a_span_of_tokens_to_come() -> None:
    past = PressedCache(DecodingPress(KnormPress(), 4, 8), pin=[(22, 24)])
    read(past, tokens(1, 20))
    read(PressedCache(KnormPress(0.5), pin=[(19, 60)]), tokens(1, 20))  # a part of it is there
    read(PressedCache(pin=[(50, 60)]), tokens(1, 20))  # nothing is evicted
    for token in tokens(1, 20, seed=1).split(1, dim=1):
        read(past, token)
    assert {22, 23} <= set(past.positions()[0, 0].tolist())


def test_a_budget_below_what_must_stay_is_refused_with_the_numbers() -> None:
    said = r"20 pinned tokens, 4 sinks and a window of 1 are 25 tokens that must stay, and the budget keeps 20 .*=25 or"
    with pytest.raises(PressError, match=said):
        read(PressedCache(StreamingLLMPress(0.5), pin=[(10, 30)]), tokens(1, 40))
