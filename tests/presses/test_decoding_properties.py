"""What holds for every schedule, whatever the prompt, the turns and the parameters; and rows do not know each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.architectures import N_VOCAB, tiny
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    CapPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    LeverageScorePress,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    RandomPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.counts import keep_count
from coldpress.core.forced import shrink_protected

ENDS: dict[ScorerPress, tuple[int, int]] = {  # base presses, and how many sinks and newest tokens they protect
    KnormPress(): (0, 0),
    KeyDiffPress(): (0, 0),
    RandomPress(seed=3): (0, 0),
    StreamingLLMPress(): (4, 1),
    StreamingLLMPress(n_sink=1): (1, 1),
    SnapKVPress(window_size=1): (0, 1),
    TOVAPress(): (0, 1),
    ExpectedAttentionPress(n_future_positions=5): (4, 0),
    CapPress(n_future_positions=5): (4, 0),
    CURPress(): (4, 0),
    LeverageScorePress(sketch_dimension=3): (0, 0),
    LagKVPress(lag_size=3): (0, 0),  # what it protects depends on the length
    PyramidKVPress(window_size=1, beta=3): (0, 1),
    AdaKVPress(KnormPress(), 0.0): (0, 0),
    AdaKVPress(RandomPress(seed=3), 0.3): (0, 0),
    AdaKVPress(ExpectedAttentionPress(n_future_positions=5), 0.2): (4, 0),
    CriticalKVPress(TOVAPress()): (0, 1),
    CriticalAdaKVPress(SnapKVPress(window_size=1)): (0, 1),
}
SYMMETRIC = (KeyDiffPress, LagKVPress, LeverageScorePress)  # of two tokens they find neither better: rounding decides
BEFORE: list[BasePress | None] = [
    None,
    KnormPress(0.7),
    AdaKVPress(KnormPress(0.5), 0.0),
    SnapKVPress(budget_tokens=3, window_size=2),
]


@dataclass(frozen=True)
class Run:
    """A text in pieces: a prompt, then turns; rows that begin with padding; and a press."""

    model: str
    prompt: int
    pads: list[int]
    pieces: list[int]
    base: ScorerPress
    schedule: DecodingPress
    before: BasePress | None

    @property
    def press(self) -> BasePress:
        return self.schedule if self.before is None else PrefillDecodingPress(self.before, self.schedule)

    def target(self, n_seen: int) -> int:
        if isinstance(self.schedule, CompressionRatioDecodingPress):
            return keep_count(n_seen, self.schedule.target_compression_ratio)
        return self.schedule.target_size


@st.composite
def runs(draw: st.DrawFn) -> Run:
    prompt = draw(st.integers(1, 40))
    base = draw(st.sampled_from(list(ENDS)))
    interval, buffer = draw(st.integers(1, 9)), draw(st.integers(0, 12))
    target = draw(st.sampled_from([1, 2, 3, 7, 12, 30]))
    ratio = draw(st.sampled_from([0.0, 0.3, 0.9, 0.999]))
    schedule: DecodingPress = draw(
        st.sampled_from([
            DecodingPress(base, interval, target, buffer),
            CompressionRatioDecodingPress(base, interval, buffer, ratio),
            CAMPress(base, interval, target, buffer, merge_budget=1 + buffer // 3),
        ])
    )  # fmt: skip
    return Run(
        model=draw(st.sampled_from(["gpt_neox", "llama"])),
        prompt=prompt,
        pads=[0, *draw(st.lists(st.integers(0, prompt - 1), max_size=2))],
        pieces=draw(
            st.lists(st.sampled_from([1, 1, 1, 2, 5, 11]), min_size=1, max_size=14).filter(
                lambda turns: sum(turns) <= 54
            )
        ),
        base=base,
        schedule=schedule,
        before=draw(st.sampled_from(BEFORE)),
    )


class Turns:
    """A cache that is fed the pieces of some rows of a run, without the padding that they share."""

    def __init__(self, run: Run, rows: list[int]):
        self.run, self.rows, self.start = run, rows, min(run.pads[row] for row in rows)
        length = run.prompt + sum(run.pieces)
        generator = torch.Generator().manual_seed(0)  # no token comes twice, so that no scores tie in the first layer
        ids = torch.stack([torch.randperm(N_VOCAB - 3, generator=generator)[:length] + 3 for _ in range(3)])
        self.ids, self.mask = ids[rows], torch.ones(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            self.ids[i, : run.pads[row]] = self.mask[i, : run.pads[row]] = 0
        self.ids, self.mask = self.ids[:, self.start :], self.mask[:, self.start :]
        self.places = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.past, self.end = PressedCache(run.press), 0
        self.go_on(run.prompt - self.start)

    def go_on(self, n: int) -> Tensor:
        """The logits of the next ``n`` tokens."""
        start, self.end = self.end, self.end + n
        torch.manual_seed(0)
        with torch.no_grad():
            out: Any = tiny(self.run.model)(
                self.ids[:, start : self.end],
                attention_mask=self.mask[:, : self.end],
                position_ids=self.places[:, start : self.end],
                **cache_argument(self.past),
            )
        assert torch.isfinite(out.logits).all()
        return out.logits

    def held(self, row: int, layer: int) -> list[list[int]]:
        """Positions, among the real tokens of a row, that its heads hold."""
        pad = self.run.pads[self.rows[row]] - self.start
        return [[p - pad for p in head if p >= 0] for head in self.past.positions(layer)[row].tolist()]


@settings(max_examples=50)
@given(run=runs())
def test_budgets_sinks_and_newest_tokens(run: Run) -> None:
    turns = Turns(run, list(range(len(run.pads))))
    shared = isinstance(run.base, PyramidKVPress)  # the layers share their budget
    most, n_new, lost = {}, 0, run.before is not None
    sinks, window = ENDS[run.base]
    survived = [sinks] * len(run.pads)
    for row in range(len(run.pads)):
        most[row] = [len(head) for layer in (0, 1) for head in turns.held(row, layer)]
    n_heads = len(most[0]) // 2
    totals = {row: sum(counts) for row, counts in most.items()}
    for n in run.pieces:
        turns.go_on(n)
        n_new += n
        is_due = n_new >= run.schedule.compression_interval
        n_new = 0 if is_due else n_new
        for row, pad in enumerate(run.pads):
            n_seen, both = (
                run.prompt - pad + turns.end - (run.prompt - turns.start),
                [turns.held(row, i) for i in (0, 1)],
            )
            totals[row] += n * 2 * n_heads
            if is_due:
                target = min(n_seen, run.target(n_seen))
                totals[row] = min(totals[row], target * 2 * n_heads)
                survived[row] = min(survived[row], shrink_protected(target, sinks, window)[0])
            found = sum(len(head) for heads in both for head in heads)
            assert found <= totals[row]
            if not turns_are_ragged(run):
                assert found == totals[row]
            for heads in both:
                for head in heads:
                    assert head == sorted(set(head)) and not {-1, n_seen} & {*head[:1], *head[-1:]}
                    if not lost and not shared:
                        assert head[: survived[row]] == list(range(min(survived[row], n_seen)))
                    if is_due:  # as many of the newest as there is room for
                        newest = shrink_protected(target, sinks, window)[1]
                    else:
                        newest = n
                    assert head[len(head) - newest :] == list(range(n_seen - newest, n_seen))


def turns_are_ragged(run: Run) -> bool:
    """Whether a head may be short of pairs that its layer's budget has a place for."""
    return isinstance(run.base, (AdaKVPress, PyramidKVPress)) or isinstance(run.before, AdaKVPress)


@settings(max_examples=150)
@given(run=runs().filter(lambda run: len(run.pads) > 1 and not isinstance(run.base, SYMMETRIC)), data=st.data())
@pytest.mark.slow
def test_a_row_of_a_batch_decodes_as_it_does_alone(run: Run, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(run.pads) - 1))
    together, alone = Turns(run, list(range(len(run.pads)))), Turns(run, [row])
    for n in run.pieces:
        batch, expected = together.go_on(n)[row], alone.go_on(n)[0]
        torch.testing.assert_close(batch, expected, atol=1e-3, rtol=0)
        for layer in (0, 1):
            assert together.held(row, layer) == alone.held(0, layer)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("base", [base for base in ENDS if not isinstance(base, PyramidKVPress)], ids=repr)
def test_a_schedule_that_is_never_short_of_room_changes_nothing(base: ScorerPress) -> None:
    run = Run("gpt_neox", 12, [0, 5], [1, 1, 3, 1, 7], base, DecodingPress(base, 2, 99, 4), None)
    expected = Turns(run, [0, 1])
    logits = [expected.go_on(n) for n in run.pieces]
    for schedule in (CompressionRatioDecodingPress(base, 1, 4, 0.0), CAMPress(base, 3, 30, 4)):
        turns = Turns(Run("gpt_neox", 12, [0, 5], run.pieces, base, schedule, None), [0, 1])
        for n, wanted in zip(run.pieces, logits, strict=True):
            torch.testing.assert_close(turns.go_on(n), wanted, atol=1e-4, rtol=0)
    ids, mask = expected.ids, expected.mask
    own = tiny("gpt_neox", "sdpa")(ids, attention_mask=mask, position_ids=expected.places, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), own[:, 12:], atol=1e-4, rtol=0)
