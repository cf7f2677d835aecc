"""A row of a batch is the row alone under every schedule that goes on while decoding, wherever its padding stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.architectures import N_VOCAB, tiny
from tests.presses.weights import write_kvzap
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    CompressionRatioDecodingPress,
    DecodingPress,
    DMSPress,
    ExpectedAttentionPress,
    KnormPress,
    KVzapPress,
    LayerView,
    MassCAMPress,
    PrefillDecodingPress,
    PressedCache,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.newest import Newest, newest_from

SNAPKV = SnapKVPress(window_size=4)
SCHEDULES: list[BasePress] = [
    DecodingPress(SNAPKV, 2, 12, 16),
    DecodingPress(SNAPKV, 5, 9, 3),
    DecodingPress(AdaKVPress(SNAPKV, 0.1), 3, 12, 8),
    DecodingPress(ExpectedAttentionPress(n_future_positions=4), 4, 10, 7),
    DecodingPress(StreamingLLMPress(n_sink=2), 3, 8, 0),
    CompressionRatioDecodingPress(TOVAPress(), 3, 6, 0.5),
    CAMPress(KnormPress(), 4, 12, 6),
    PrefillDecodingPress(SnapKVPress(0.5, window_size=3), DecodingPress(SNAPKV, 3, 10, 12)),
    PrefillDecodingPress(AdaKVPress(KnormPress(0.5), 0.0), DecodingPress(AdaKVPress(TOVAPress()), 3, 10, 4)),
    DMSPress(KnormPress(), -3.1, 6, decoding=True),
    PrefillDecodingPress(KnormPress(0.4), DMSPress(KnormPress(), -3.1, 4, decoding=True)),
    MassCAMPress(KnormPress(), 4, 12, 6),
]


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Text:
    """Two or three rows in calls of some columns, and where in these a row has a token.

    Attributes:
        cuts: columns of each call, the prompt's first.
        real: bool ``[B, columns]``.
    """

    cuts: list[int]
    real: Tensor

    @property
    def ids(self) -> Tensor:
        """int64 ``[B, columns]``, no token of a row twice, so that no scores tie in the first layer."""
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randperm(N_VOCAB - 3, generator=generator)[: self.real.shape[1]] + 3 for _ in self.real]
        return torch.stack(rows) * self.real


@st.composite
def texts(draw: st.DrawFn) -> Text:
    cuts = [draw(st.integers(16, 40)), *draw(st.lists(st.sampled_from([1, 1, 1, 1, 1, 3, 6]), min_size=3, max_size=14))]
    real = torch.ones(draw(st.integers(2, 3)), sum(cuts), dtype=torch.bool)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    for row in real[1:]:
        start, n = draw(st.integers(0, cuts[0])), draw(st.integers(0, 20))  # left, right, in the middle, or none
        row[start : min(start + n, cuts[0])] = False
        row[cuts[0] :] = torch.rand(len(row) - cuts[0], generator=generator) < draw(st.sampled_from([1.0, 1.0, 0.6]))
        row[0 if start else cuts[0] - 1] = True
    return Text(cuts, real)


def answers(model: str, cache: PressedCache, ids: Tensor, real: Tensor, cuts: list[int]) -> list[Tensor]:
    """Logits of each call ``[B, n, V]``; a call without a token is left out."""
    places, end, logits = (real.long().cumsum(-1) - 1).clamp(min=0), 0, []
    for n in cuts:
        start, end = end, end + n
        if n:
            mask = real[:, :end].long()
            torch.manual_seed(0)
            out: Any = tiny(model)(
                ids[:, start:end], attention_mask=mask, position_ids=places[:, start:end], **cache_argument(cache)
            )
            logits.append(out.logits)
    return logits


def check(model: str, press: BasePress, text: Text, **options: Any) -> None:
    together = PressedCache(press, **options)
    batch = torch.cat(answers(model, together, text.ids, text.real, text.cuts), 1)
    assert torch.isfinite(batch).all()
    for row, real in enumerate(text.real):
        alone, cuts = PressedCache(press, **options), [int(part.sum()) for part in real.split(text.cuts)]
        ids = text.ids[row, real][None]
        own = torch.cat(answers(model, alone, ids, torch.ones_like(ids).bool(), cuts), 1)
        torch.testing.assert_close(batch[row, real], own[0], atol=1e-3, rtol=0)
        if "DMS" in repr(press):  # what has left the window may still be there, hidden, until others have moved on
            continue
        rank = real.cumsum(0) - 1
        for mine, theirs in zip(together.pressed_layers(), alone.pressed_layers(), strict=True):
            for held, expected in zip(mine.positions()[row], theirs.positions()[0], strict=True):
                held = held[(held >= 0) & real[held.clamp(min=0)]]
                assert rank[held].tolist() == expected[expected >= 0].tolist()


anything = given(press=st.sampled_from(SCHEDULES), text=texts(), model=st.sampled_from(["gpt_neox", "llama"]))


@settings(max_examples=15)
@anything
def test_a_row_is_the_row_alone(press: BasePress, text: Text, model: str) -> None:
    check(model, press, text)


@pytest.mark.slow
@settings(max_examples=200)
@anything
def test_a_row_is_the_row_alone_in_more_texts(press: BasePress, text: Text, model: str) -> None:
    check(model, press, text)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("press", SCHEDULES, ids=repr)
def test_a_row_that_ends_in_padding(press: BasePress) -> None:
    """E: the newest columns were remembered, padding included."""
    real = torch.ones(2, 64, dtype=torch.bool)
    real[1, 20:40] = False
    check("llama", press, Text([40, *[1] * 24], real))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("press", [press for press in SCHEDULES if isinstance(press, DecodingPress)][:6], ids=repr)
def test_with_keys_that_move_up(press: DecodingPress) -> None:
    if isinstance(press, CAMPress):
        pytest.skip("changes keys")
    real = torch.ones(3, 60, dtype=torch.bool)
    real[1, 18:30], real[2, 5:11], real[2, 36:40] = False, False, False
    check("llama", press, Text([30, 4, 6, *[1] * 20], real), positions="rerotate")


@pytest.mark.parametrize("press", [SCHEDULES[0], SCHEDULES[4], SCHEDULES[9]], ids=repr)
def test_sliding_windows(press: BasePress) -> None:
    real = torch.ones(2, 70, dtype=torch.bool)
    real[1, 22:40], real[0, 42:46] = False, False
    check("mistral", press, Text([40, 6, *[1] * 24], real))


@pytest.mark.parametrize("press", SCHEDULES, ids=repr)
@pytest.mark.thinned(3)
def test_reordered_cropped_forked_and_saved(press: BasePress, tmp_path: Path) -> None:
    """What is remembered of each row goes with it."""
    model, text = tiny("llama"), Text([30, 5, 1, 1], torch.ones(2, 60, dtype=torch.bool))
    text.real[1, 12:30], text.real[0, 31:35] = False, False
    cache, real, ids = PressedCache(press), text.real, text.ids
    answers("llama", cache, ids[:, :37], real[:, :37], text.cuts)
    cache.save(tmp_path / "cache", model, real[:, :37])
    turned = cache.fork()
    turned.reorder_cache(torch.tensor([1, 0]))
    places = real.long().cumsum(-1) - 1

    def go_on(cache: PressedCache, order: list[int], first: int) -> Tensor:
        out = []
        for i in range(first, 50):
            torch.manual_seed(0)
            given = {"attention_mask": real[order, : i + 1].long(), "position_ids": places[order, i : i + 1]}
            out.append(model(ids[order, i : i + 1], **given, **cache_argument(cache)).logits)
        return torch.cat(out, 1)

    others = [PressedCache.load(tmp_path / "cache", model), cache.fork()]
    expected = go_on(cache, [0, 1], 37)
    for other in others:
        assert torch.equal(go_on(other, [0, 1], 37), expected)
    torch.testing.assert_close(go_on(turned, [1, 0], 37), expected.flip(0), atol=1e-4, rtol=0)


def test_every_row_counts_its_own_tokens() -> None:
    """Two rows, one without tokens of its own in most of a turn; a crop takes back what a call has added."""
    model, real = tiny("llama"), torch.ones(2, 60, dtype=torch.bool)
    real[0, 31:35] = False
    cache, text = PressedCache(SCHEDULES[1]), Text([30, 5, 1, 1], real)
    answers("llama", cache, text.ids[:, :37], real[:, :37], text.cuts)
    assert [layer.pending.n_new for layer in cache.pressed_layers()] == [
        [3, 2]
    ] * 2  # the second was cut back after its fifth
    model(text.ids[:, 37:38], attention_mask=real[:, :38].long(), **cache_argument(cache))
    assert cache.layer(0).pending.n_new == [4, 3]
    cache.crop(37)
    assert cache.layer(0).pending.n_new == [3, 2]
    assert [(row >= 0).sum().item() for row in cache.positions(0)[:, 0]] == [30 + 3, 9 + 2]


@dataclass(frozen=True)
class NewHiddenPress(ScorerPress):
    """Old tokens by their keys; those that have come since the press was asked last by their hidden states."""

    needs_hidden_states = True
    can_rechoose = True

    def score(self, view: LayerView) -> Tensor:
        assert view.hidden_states is not None and view.hidden_states.shape[1] == view.n_new
        scores = -view.keys.float().norm(dim=-1)
        n = min(view.hidden_states.shape[1], view.n_tokens)
        scores[..., view.n_tokens - n :] = view.hidden_states.float()[:, -n:].mean(-1)[:, None]
        return scores


@pytest.mark.parametrize("decodes", [True, False])
def test_scores_of_hidden_states(decodes: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    write_kvzap(tmp_path, model.config.hidden_size, 2, 2, None)
    scorer = KVzapPress(model_type="linear", weights=str(tmp_path))
    press: BasePress = DecodingPress(NewHiddenPress(), 4, 10, 4) if decodes else DMSPress(scorer, 0.0, 6, decoding=True)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[1, 20:34], real[0, 36:39], real[1, 45] = False, False, False
    text = Text([34, 6, *[1] * 20], real)
    with press(model):
        check("llama", press, text)


def test_newest() -> None:
    """By hand: which columns are left of each row, and what they hold."""
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    states = torch.arange(6.0)[None, None, :, None] + 10 * torch.arange(3)[:, None, None, None]  # [3, 1, 6, 1]
    newest = Newest.nothing(states[:, :, :2], 2).and_then(states[:, :, :2], 2, 2, padding[:, :2])
    for i in range(2, 6):
        newest = newest.and_then(states[:, :, i : i + 1], i + 1, 2, padding[:, : i + 1])
        assert newest.n <= 4
    last = newest.newest(2, padding)
    assert last.columns().tolist() == [[4, 5], [1, 3], [-1, -1]] and last.counts() == [2, 2, 0]
    assert last.states[:2, 0, :, 0].tolist() == [[4, 5], [11, 13]]
    assert last.until(4).columns().tolist() == [[-1, -1], [1, 3], [-1, -1]]
    assert last.until(4).newest(1, padding).counts() == [0, 1, 0]
    assert last.index_rows(torch.tensor([1])).columns().tolist() == [[1, 3]]
    assert newest_from(padding, 2).tolist() == [4, 1, 6] and newest_from(padding, 9).tolist() == [0, 0, 6]
    later = last.and_then(states[:, :, :1], 9, 2, None)  # two columns came in between that nobody saw
    assert later.columns().tolist() == [[8]] * 3
