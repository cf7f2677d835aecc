"""Faults of kvpress 0.5.5 that these presses do not have; the letters are those of the project's list of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.views import view_of, views_of

from coldpress import (
    AdaKVPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    CriticalAdaKVPress,
    CURPress,
    ExpectedAttentionPress,
    KnormPress,
    LagKVPress,
    LayerView,
    LeverageScorePress,
    NonCausalAttnPress,
    PressedCache,
    RandomPress,
    SnapKVPress,
)
from coldpress.budget import keep_count


def changed(view: LayerView, **states: torch.Tensor) -> LayerView:
    return replace(view, _memo={}, **states)


def test_a_head_wise_budget_frees_memory() -> None:
    """A: the cache stayed as large as it was, with the evicted keys masked."""
    model, ids = tiny("gpt_neox"), tokens(1, 200)
    sizes = {}
    for ratio in (0.0, 0.8):
        past = PressedCache(AdaKVPress(KnormPress(ratio), alpha_safeguard=0.5))
        model(ids, past_key_values=past)
        sizes[ratio] = past.kv_bytes()
        heads = (past.positions(0) >= 0).sum(-1)
        assert past.layer(0).stored_length == int(heads.max())
    assert sizes[0.8] < 0.5 * sizes[0.0]
    assert abs(past.achieved_ratio() - 0.8) < 1e-9


def test_head_wise_caches_do_not_meet() -> None:
    """G3: the masked keys of one request were left on the model's modules, and changed the next request's answer."""
    model, first, second = tiny("llama"), tokens(1, 40), tokens(1, 40, seed=9)
    press = AdaKVPress(SnapKVPress(0.6, window_size=4))

    def run(ids: torch.Tensor) -> PressedCache:
        past = PressedCache(press)
        model(ids, past_key_values=past)
        return past

    question = tokens(1, 5, seed=3)
    expected = model(question, past_key_values=run(first)).logits
    past = run(first)
    model(question, past_key_values=run(second))
    assert torch.equal(model(question, past_key_values=past).logits, expected)


@pytest.mark.parametrize("press", [ChunkKVPress(SnapKVPress(0.5, 4), 5), CriticalAdaKVPress(SnapKVPress(0.5, 4))])
def test_every_row_chooses_for_itself(press: ChunkKVPress | CriticalAdaKVPress) -> None:
    """E: ChunkKV kept the chunks of row 0 in all rows; CriticalAdaKV added up the budgets of all rows."""
    batch = press.choose(view_of("gpt_neox", rows=3))
    rows = [press.choose(views_of("gpt_neox", row[None])[1]) for row in tokens(3, 37)]
    for kept, alone in zip(batch, rows, strict=True):
        assert torch.equal(kept[:, : alone.shape[2]], alone[0])
    assert not torch.equal(batch[0], batch[1])


def test_a_composed_press_protects_the_right_window() -> None:
    """B4: pairs were gathered in the order of scores, so that the next press protected a window of other tokens."""
    view = view_of("llama")
    kept = ComposedPress([KnormPress(0.5), SnapKVPress(0.4, window_size=6)]).choose(view)
    assert (kept[..., -6:] == torch.arange(31, 37)).all()
    assert (kept.diff(dim=-1) > 0).all()


def test_lagkv_scores_short_texts() -> None:
    """K: below n_sink + 2 * lag_size tokens, what is called no compression kept the newest ones, whatever they say."""
    view = view_of("llama")
    kept = LagKVPress(0.5).choose(view)  # 37 tokens, a lag of 128
    assert kept.shape[2] == keep_count(37, 0.5)
    older = (kept < 37 - kept.shape[2] + 4).sum(-1) - 4  # beside the sinks
    assert (older > 0).all()
    turned = view.keys.clone()
    turned[:, :, 4:20] = turned[:, :, 4:20].flip(2)
    assert not torch.equal(LagKVPress(0.5).choose(changed(view, keys=turned)), kept)


def test_cur_does_not_favour_a_short_last_window() -> None:
    """K: a last window of one token gave it the share of sixteen."""
    view = view_of("gpt_neox", n_tokens=33)
    flat = changed(view, keys=torch.ones_like(view.keys), values=torch.ones_like(view.values))
    scores = CURPress().score(flat)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 33))


def test_non_causal_attention_of_a_short_last_chunk() -> None:
    """K: padded queries added uniform attention to the last chunk, and padded keys took some of it."""
    view = view_of("llama", n_tokens=37)
    press = NonCausalAttnPress(chunk_size=32)
    last, alone = press.score(view)[..., 33:], press.score(view.part(32, 37))[..., 1:]  # 5 tokens, less the pooled edge
    for pair in zip(last.flatten(0, 1), alone.flatten(0, 1), strict=True):  # the same but for mean and scale
        assert torch.corrcoef(torch.stack(pair))[0, 1] > 0.9999


@pytest.mark.parametrize("press", [NonCausalAttnPress(), LeverageScorePress()])
def test_scores_are_standardized_by_head(press: NonCausalAttnPress | LeverageScorePress) -> None:
    """K: one z-score over rows, heads and tokens let a head's scores depend on those of other heads and rows."""
    view = view_of("gpt_neox")
    scores = press.score(view)
    torch.testing.assert_close(scores.mean(-1), torch.zeros(scores.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.std(-1, correction=0), torch.ones(scores.shape[:2]), atol=1e-5, rtol=0)
    values, keys = view.values.clone(), view.keys.clone()
    values[0, 0, :5] *= 50
    keys[0, 0, :5] *= 50
    again = press.score(changed(view, keys=keys, values=values))
    torch.testing.assert_close(again[0, 1:], scores[0, 1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(again[1:], scores[1:], atol=1e-6, rtol=0)


def test_leverage_scores_repeat() -> None:
    """Table: the sketch was drawn anew, from the global generator, at every call."""
    view, press = view_of("llama"), LeverageScorePress(sketch_dimension=4)
    torch.manual_seed(0)
    first, state = press.score(view), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, press.score(changed(view)))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # and the generator is left alone


@pytest.mark.parametrize("inner", [SnapKVPress(0.5, window_size=4), ExpectedAttentionPress(0.5, n_future_positions=9)])
@pytest.mark.parametrize("model", ["gpt_neox", "gpt_neox_full_rotary", "llama"])
def test_a_chunk_is_scored_at_its_own_positions(inner: SnapKVPress | ExpectedAttentionPress, model: str) -> None:
    """K: queries of a chunk were rotated to the first positions of the text, or all to the same ones."""
    ids = tokens(2, 40)
    kept = ChunkPress(inner, chunk_length=20).choose(views_of(model, ids)[1])
    prefix = views_of(model, ids[:, :20])[1]  # a causal model sees the same in the first 20 of 40 tokens
    n_first = int((kept[0, 0] < 20).sum())
    alone = inner.with_ratio(1 - n_first / 20).choose(prefix)
    assert alone.shape[2] == n_first and torch.equal(kept[..., :n_first], alone)


def test_random_chunks_do_not_repeat_one_pattern() -> None:
    """K: a seed that is applied anew draws the same places again and again."""
    view = view_of("gpt_neox", n_tokens=40)
    kept = ChunkPress(RandomPress(0.5, seed=0), chunk_length=20).choose(view)
    first, second = kept[0, 0, :10], kept[0, 0, 10:]
    assert not torch.equal(first, second - 20)
