"""Faults of kvpress 0.5.5 that these presses do not have; the letters are those of the project's list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, Look, tiny, tokens
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, block, lukv, other_press, small_press
from tests.presses.views import view_of, views_of
from tests.presses.words import Words
from transformers import QuantizedCache
from transformers.cache_utils import Cache, QuantizedLayer

from coldpress import (
    AdaKVPress,
    AttentionMatchingPress,
    BasePress,
    CapPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DecodingPress,
    DefensiveKVPress,
    DMSPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    FastKVzipPress,
    FinchPress,
    KeyDiffPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzipPress,
    LagKVPress,
    LayerDefensiveKVPress,
    LayerView,
    LeverageScorePress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PressedCache,
    QFilterPress,
    RandomPress,
    RestoreKVPress,
    SampledDefensiveKVPress,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
    make_press,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.bases.registry import catalogue
from coldpress.core.counts import keep_count
from coldpress.errors import CacheError
from coldpress.presses.leverage import leverage_scores


def changed(view: LayerView, **states: torch.Tensor) -> LayerView:
    return replace(view, _memo={}, **states)


def dms(ratio: float) -> DMSPress:
    """With the threshold that leaves this share of 200 tokens."""
    scores = torch.cat([KnormPress().score(view).flatten() for view in views_of("gpt_neox", tokens(1, 200))])
    return DMSPress(KnormPress(), float(scores.quantile(ratio)) if ratio else -1e9, sliding_window_size=1)


# name -> a press whose heads may keep different numbers, for two layers of four heads, at a ratio
HEAD_WISE: dict[str, Callable[[float], BasePress]] = {
    "adakv": lambda r: AdaKVPress(SnapKVPress(r, window_size=4), alpha_safeguard=0.5),
    "critical_adakv": lambda r: CriticalAdaKVPress(SnapKVPress(r, window_size=4), alpha_safeguard=0.5),
    "defensive": lambda r: DefensiveKVPress(r, window_size=4, first_stage_mass=0.2),
    "dms": dms,
    "duo_attention": lambda r: DuoAttentionPress(
        r, pattern=[[0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.3, 0.4]], sink_size=2, recent_size=9
    ),
    "attention_matching": lambda r: AttentionMatchingPress(AdaKVPress(SnapKVPress(r)), bias=False),
    "fastkvzip": lambda r: FastKVzipPress(r),
    "kvcompose": lambda r: KVComposePress(r, structured=False),
    "kvgrad": lambda r: KVgradPress(r, chunk_size=50),
    "kvzip": lambda r: KVzipPress(r, chunk_size=50),
    "sampled_defensive": lambda r: SampledDefensiveKVPress(r, window_size=4, first_stage_mass=0.2),
    "layer_defensive": lambda r: LayerDefensiveKVPress(r, window_size=4, first_stage_mass=0.2),
    "lukv": lambda r: lukv(2, 4).with_ratio(r),
    "restorekv": lambda r: RestoreKVPress(r, chunk_size=50),
}


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", HEAD_WISE)
def test_a_head_wise_budget_frees_memory(name: str) -> None:
    """A: the cache stayed as large as it was, with the evicted keys masked."""
    model, ids = tiny("gpt_neox"), tokens(1, 200)
    sizes = {}
    for ratio in (0.0, 0.8):
        past, press = PressedCache(), HEAD_WISE[name](ratio).prepared(model, Words())
        with torch.no_grad(), press(model):
            model(ids, **cache_argument(past))
        sizes[ratio] = past.kv_bytes()
        n_held = sum(int((layer.positions() >= 0).sum()) for layer in past.pressed_layers())
        assert sizes[ratio] == pytest.approx(n_held * 2 * 16 * 4, rel=0.01)  # keys and values, float32
    assert sizes[0.8] < 0.65 * sizes[0.0]
    assert name == "duo_attention" or abs(past.achieved_ratio() - 0.8) < 0.005


def test_every_head_wise_press_frees_memory() -> None:
    """A: the table above is complete; what has no ratio has tests of its own."""
    known = {type(make(0.5)).__name__ for make in HEAD_WISE.values()}
    assert {info.class_name for info in catalogue() if info.per_head and info.has_ratio} <= known


class Unchanged(QuantizedLayer):
    """A quantised layer without the packages that quantise: it loses nothing by itself."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.clone()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_newest_tokens_are_there_between_compressions() -> None:
    """B1: of a quantised cache only the quantised part was read, and up to 128 of the newest tokens were lost."""
    model, press, quantized = tiny("llama"), DecodingPress(KnormPress(), 64, 80), QuantizedCache.__new__(QuantizedCache)
    Cache.__init__(quantized, layers=[Unchanged(residual_length=16) for _ in range(2)])
    assert model(tokens(1, 9), **cache_argument(quantized)).logits.isfinite().all()  # it works without a press
    with press(model):
        with pytest.raises(CacheError, match=r"not QuantizedCache.*PressedCache"):
            model(tokens(1, 9), **cache_argument(quantized))
        past = PressedCache()
        model(tokens(1, 128), **cache_argument(past))
        for i in range(20):
            model(tokens(1, 1, seed=i), **cache_argument(past))
    for layer in past.pressed_layers():
        assert (layer.positions() == torch.arange(148)).all() and layer.keys.shape[2] == 148


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", HEAD_WISE)
def test_head_wise_caches_do_not_meet(name: str) -> None:
    """G3: the masked keys of one request were left on the model's modules, and changed the next request's answer."""
    model, first, second = tiny("gpt_neox"), tokens(1, 40), tokens(1, 40, seed=9)
    press = HEAD_WISE[name](0.6).prepared(model, Words())

    def run(ids: torch.Tensor) -> PressedCache:
        past = PressedCache()
        with torch.no_grad(), press(model):
            model(ids, **cache_argument(past))
        return past

    question = tokens(1, 5, seed=3)
    expected = model(question, **cache_argument(run(first))).logits
    past = run(first)
    model(question, **cache_argument(run(second)))
    assert torch.equal(model(question, **cache_argument(past)).logits, expected)


@pytest.mark.parametrize("press", [ChunkKVPress(SnapKVPress(0.5, 4), 5), CriticalAdaKVPress(SnapKVPress(0.5, 4))])
def test_every_row_chooses_for_itself(press: ChunkKVPress | CriticalAdaKVPress) -> None:
    """E: ChunkKV kept the chunks of row 0 in all rows; CriticalAdaKV added up the budgets of all rows."""
    batch = press.choose(view_of("gpt_neox", rows=3))
    rows = [press.choose(views_of("gpt_neox", row[None])[1]) for row in tokens(3, 37)]
    for kept, alone in zip(batch, rows, strict=True):
        assert torch.equal(kept[:, : alone.shape[2]], alone[0])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("press", [KnormPress(0.5), StreamingLLMPress(0.5), AdaKVPress(ExpectedAttentionPress(0.5))])
@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_padding_is_neither_scored_nor_kept(name: str, press: ScorerPress) -> None:
    """E: padding was scored and became the sinks, and a mask as long as the text no longer fitted the cache."""
    model, row, question = tiny(name), tokens(1, 33), tokens(2, 4, seed=5)
    ids = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.long), row], 1), tokens(1, 41, seed=7)])
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[0, :8] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(press: BasePress) -> tuple[torch.Tensor, torch.Tensor]:
        past = PressedCache(press)
        model(ids, attention_mask=mask[:, :41], position_ids=places[:, :41], **cache_argument(past))
        kept = past.positions(1)
        answer = model(question, attention_mask=mask, position_ids=places[:, 41:], **cache_argument(past))
        return kept, answer.logits

    look, alone = Look(), PressedCache(press)
    run(look)
    assert sorted(view.n_tokens for view in look.views) == [33, 33, 41, 41]
    model(row, **cache_argument(alone))
    kept, answer = run(press)
    expected = alone.positions(1)[0]
    for mine, head in zip(kept[0], expected, strict=True):
        assert torch.equal(mine[mine >= 0] - 8, head[head >= 0])
    logits = model(question[:1], **cache_argument(alone)).logits
    torch.testing.assert_close(answer[:1], logits, atol=1e-4, rtol=0)


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


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", [*IN_BLOCK, *OTHERS])
def test_replays_and_thresholds_keep_no_more_than_there_is(name: str) -> None:
    """K: SimLayerKV kept 129 tokens of 128, DuoAttention reported a ratio of -1 on a short prompt."""
    model = tiny("llama")
    presses = [small_press(name, "llama")]
    if name == "simlayerkv":
        presses.append(SimLayerKVPress(0.0, n_last=1, n_recent=1, n_initial=1))
    for press in presses:
        for n_tokens in (1, 2, 3, 11, 12, 13, 40):
            past = PressedCache(press)
            with torch.no_grad(), block(model, press):
                model(tokens(1, n_tokens), **cache_argument(past))
            assert 0 <= past.achieved_ratio() < 1
            for layer in past.pressed_layers():
                assert 1 <= layer.stored_length <= n_tokens
                for head in layer.positions()[0]:
                    kept = head[head >= 0].tolist()
                    if name == "restorekv":  # pairs that are no token's stand at the last one
                        while kept[-2:] == [n_tokens - 1] * 2:
                            kept.pop()
                    assert kept == sorted(set(kept)) and kept[-1] < n_tokens
        assert past.achieved_ratio() > 0.1  # 40 tokens are enough to see something go


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


def test_leverage_scores_of_nearly_dependent_keys() -> None:
    """K: scores were solved for in float32, and off in the third digit for keys as they are in a trained model."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator) * torch.logspace(0, -2.7, 48)[:, None]
    rows = torch.randn(1, 2, 1500, 48, generator=generator) @ mix
    wide, ridge = rows.double(), 0.01 * torch.eye(48, dtype=torch.float64)
    expected = (wide @ torch.linalg.inv(wide.mT @ wide + ridge) * wide).sum(-1)
    factor = torch.linalg.cholesky(rows.mT @ rows + ridge.float())
    as_there = (rows * torch.cholesky_solve(rows.mT, factor).mT).sum(-1)

    def error(scores: torch.Tensor) -> float:
        return float((scores - expected).abs().max() / expected.std())

    assert error(leverage_scores(rows, 0.01)) < 1e-3 < error(as_there)


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


def test_random_layers_differ_and_draws_do_not_tie() -> None:
    """K: a seed kept the same positions in every layer; draws in bfloat16 had 698 values for 4,096 tokens."""
    past = PressedCache(RandomPress(0.5, seed=3))
    tiny("gpt_neox")(tokens(1, 60), **cache_argument(past))
    assert not torch.equal(past.positions(0), past.positions(1))
    view = view_of("gpt_neox")
    states = torch.zeros(1, 4, 4096, 16, dtype=torch.bfloat16)
    draws = RandomPress(seed=3).score(changed(view, keys=states, values=states))
    assert all(len(head.unique()) > 4090 for head in draws[0])


@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize(
    "press",
    [
        KeyDiffPress(),
        KnormPress(),
        LagKVPress(cross_scoring=True),
        ExpectedAttentionPress(),
        SnapKVPress(),
        CapPress(),
        CURPress(),
        FinchPress(window_size=64),
        QFilterPress(),
        TOVAPress(),
    ],
    ids=lambda press: type(press).__name__,
)
def test_scores_of_a_model_in_bfloat16_do_not_tie(press: ScorerPress) -> None:
    """K: scores in bfloat16 tied for many tokens, and the earliest ones were kept."""
    layer, generator = view_of("gpt_neox"), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 800, 16, generator=generator).bfloat16() for _ in range(3))
    scores = press.scores(changed(layer, queries=q, keys=k, values=v))
    assert all(len(head.unique()) > 760 for head in scores[0])
    assert all(len(head.bfloat16().unique()) < 700 for head in scores[0])  # it would show


@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(budget_tokens=12),
        AdaKVPress(SnapKVPress(budget_tokens=12), 1.0),
        FinchPress(budget_tokens=12, window_size=64),
        FinchPress(budget_tokens=12, window_size=64, chunk_length=200),
    ],
    ids=lambda press: type(press).__name__,
)
def test_a_budget_below_the_window_keeps_what_the_window_looks_at(press: ScorerPress) -> None:
    """K: with fewer places than window tokens, an arbitrary 12 of 64 were kept and every heavy hitter was lost."""
    view = view_of("gpt_neox", n_tokens=128)
    keys = view.keys.clone()
    keys[:, :, 20] = 20 * torch.nn.functional.normalize(view.queries[:, :, -64:].mean(2), dim=-1)
    kept = press.choose(changed(view, keys=keys))
    assert kept.shape[2] == 12
    assert (kept == 20).any(-1).all()
    assert (kept[..., -6:] == torch.arange(122, 128)).all()  # half of the budget is for the newest tokens


@pytest.mark.usefixtures("given_artefacts")
def test_nothing_keeps_more_than_there_is() -> None:
    """K: 129 tokens were kept of 128, and a ratio of 0.99 was reported."""
    view = view_of("llama", n_tokens=40)
    for name in WITH_RATIO:
        for ratio, n_keep in ((0.0, 40), (0.01, 39), (0.03, 38), (0.97, 1), (0.999, 1)):
            kept = make_press(name, ratio).choose(view)
            held = torch.tensor(40 * 4) if kept is None else (kept >= 0).sum()
            assert int(held) == n_keep * 4, name  # two rows of two heads
            assert kept is None or int(kept.max()) < 40, name


@pytest.mark.parametrize("wrapper", [CriticalKVPress, CriticalAdaKVPress])
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox", "gpt2", "phi"])
def test_critical_presses_find_every_output_projection(wrapper: type[ScorerPress], name: str) -> None:
    """Table: CriticalKV read o_proj and config.head_dim, and crashed on Qwen2, which has no head_dim."""
    past = PressedCache(wrapper(SnapKVPress(0.5, window_size=4)))
    tiny(name)(tokens(1, 40), **cache_argument(past))
    assert past.achieved_ratio() == 0.5


@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("name", press_names())
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.thinned(7)
def test_short_prompts_on_any_backend(name: str, attention: str) -> None:
    """Table: presses asserted q_len > window, k_len > n_sink, eager attention or its absence; DMS failed in eager."""
    model = BY_NAME["gpt_neox"].build(attention)
    press = other_press(name, "gpt_neox") if name in OTHERS else make_press(name, 0.5)
    assert press is not None
    press = press.prepared(model, Words())
    for n_tokens in (1, 2, 3, 5, 17):
        with press(model):
            past = cache_of(model(tokens(1, n_tokens)))
        assert model(tokens(1, 3), **cache_argument(past)).logits.isfinite().all()
        assert min(past.stored_lengths()) >= 4  # something of the prompt, and the three that followed


def test_observed_attention_needs_no_attention_matrix() -> None:
    """Table: ObservedAttention needed eager attention, whose weights take T * T numbers per head."""
    view = view_of("gpt_neox", n_tokens=64)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with pytest.MonkeyPatch.context() as patch, Sizes():
        patch.setattr("coldpress.core.pick._CPU_ELEMENTS", 2 * 4 * 64 * 8)  # eight queries at a time
        ObservedAttentionPress().score(changed(view))
    assert 0 < largest <= 2 * 4 * 64 * 16
