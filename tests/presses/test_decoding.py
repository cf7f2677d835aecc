"""Presses that go on while decoding: budgets, positions and queries of a text that grows."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import Look, distinct_tokens, tiny, tokens
from tests.presses.views import rotated, unrotated, view_of
from torch import Tensor

import coldpress
from coldpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    CapPress,
    ChunkPress,
    CompactorPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    DecodingPress,
    DMSPress,
    ExpectedAttentionPress,
    Kept,
    KeyDiffPress,
    KeyformerPress,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    LeverageScorePress,
    MassCAMPress,
    ObservedAttentionPress,
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
from coldpress.core.press import Press, parts
from coldpress.errors import PressError

TARGET, INTERVAL = 24, 5


def decode(
    press: BasePress, n_tokens: int, prompt: int = 16, model: str = "gpt_neox", ids: Tensor | None = None
) -> Iterator[tuple[PressedCache, Tensor | None]]:
    """The cache and the logits after a prompt (without logits) and after every following token."""
    past, ids = PressedCache(press), tokens(1, n_tokens) if ids is None else ids
    own = tiny(model)
    with torch.no_grad():
        own(ids[:, :prompt], **cache_argument(past))
        yield past, None
        for i in range(prompt, n_tokens):
            yield past, own(ids[:, i : i + 1], **cache_argument(past)).logits


def decoded(
    press: BasePress, n_tokens: int, prompt: int = 16, model: str = "gpt_neox", ids: Tensor | None = None
) -> PressedCache:
    """The cache at the end; no logits on the way were NaN or infinite."""
    steps = list(decode(press, n_tokens, prompt, model, ids))  # the cache is the same at every step
    assert all(torch.isfinite(logits).all() for _, logits in steps if logits is not None)
    return steps[-1][0]


def held(past: PressedCache, layer: int = 0) -> list[list[int]]:
    """Positions that each head of row 0 holds."""
    return [[p for p in head if p >= 0] for head in past.positions(layer)[0].tolist()]


STREAMING, EXPECTED = StreamingLLMPress(), ExpectedAttentionPress(n_future_positions=16)
# press, tokens between two compressions, sinks and newest tokens that are always there; DMSPress has a test of its own
SCHEDULES: dict[str, tuple[BasePress, int, int, int]] = {
    "decoding": (DecodingPress(STREAMING, INTERVAL, TARGET, 8), INTERVAL, 4, 1),
    "decoding_by_attention": (DecodingPress(EXPECTED, INTERVAL, TARGET, 8), INTERVAL, 4, 0),
    "decoding_by_head": (DecodingPress(AdaKVPress(SnapKVPress(window_size=4)), 25, TARGET, 8), 25, 0, 4),
    "every_token": (DecodingPress(STREAMING, 1, TARGET, 0), 1, 4, 1),
    "share": (CompressionRatioDecodingPress(STREAMING, INTERVAL, 8, 0.6), INTERVAL, 4, 1),
    "share_by_attention": (CompressionRatioDecodingPress(SnapKVPress(window_size=4), 25, 8, 0.6), 25, 0, 4),
    "cam": (CAMPress(STREAMING, INTERVAL, TARGET, 8, merge_budget=4), INTERVAL, 4, 1),
    "mass_cam": (MassCAMPress(STREAMING, INTERVAL, TARGET, 8, merge_budget=4), INTERVAL, 4, 1),
    "cam_by_head": (CAMPress(AdaKVPress(SnapKVPress(window_size=4)), 25, TARGET, 8, merge_budget=4), 25, 0, 4),
    "after_a_press": (
        PrefillDecodingPress(STREAMING.with_ratio(0.5), DecodingPress(EXPECTED, 25, TARGET, 8)),
        25,
        4,
        0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [name if name in ("decoding_by_head", "cam") else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES],
)
@pytest.mark.thinned(2)
def test_a_thousand_steps_stay_within_the_budget(schedule: str) -> None:
    press, interval, n_sink, n_window = SCHEDULES[schedule]

    def budget(n_seen: int) -> int:
        return keep_count(n_seen, 0.6) if schedule.startswith("share") else TARGET

    prompt = 8 if schedule == "after_a_press" else 16
    for past, logits in decode(press, 1016):
        assert logits is None or torch.isfinite(logits).all()
        n_seen = past.seen_tokens
        is_cut = n_seen > 16 and (n_seen - 16) % interval == 0
        for layer in past.pressed_layers():
            most = max(budget(n_seen), 0 if is_cut else prompt if n_seen < 200 else TARGET)
            n_pairs = int((layer.positions() >= 0).sum())
            assert n_pairs <= 4 * (most + (0 if is_cut else interval - 1))
        if n_seen > 100 and n_seen % 50 in (0, 1):
            for head in (*held(past), *held(past, 1)):
                assert head == sorted(set(head))
                assert head[:n_sink] == list(range(n_sink))
                assert head[-1] < n_seen and set(range(n_seen - n_window, n_seen)) <= set(head)
    assert past.seen_tokens == 1016 and past.achieved_ratio() == pytest.approx(1 - budget(1016) / 1016, abs=0.01)


def test_every_schedule_is_run_for_a_thousand_steps() -> None:
    """Whoever writes another schedule has to add it here, or to give it a test of its own as DMSPress has."""
    known = {type(part) for press, *_ in SCHEDULES.values() for part in parts(press)} | {DMSPress}
    classes = [cls for cls in vars(coldpress.public).values() if isinstance(cls, type) and issubclass(cls, BasePress)]
    asked = {"compress_again", "judge"}
    assert {
        cls for cls in classes if any(asked & set(vars(base)) for base in cls.__mro__ if base not in (BasePress, Press))
    } <= known


def test_a_share_of_the_text_so_far() -> None:
    press = CompressionRatioDecodingPress(KnormPress(), 10, target_compression_ratio=0.75)
    lengths = {past.seen_tokens: past.stored_lengths() for past, _ in decode(press, 216)}
    assert lengths[16] == [16, 16] and lengths[25] == [25, 25]
    assert lengths[26] == [6, 6] and lengths[35] == [15, 15] and lengths[216] == [54, 54]


@pytest.mark.parametrize("base", [KnormPress(), KeyDiffPress(), StreamingLLMPress(), RandomPress(seed=0)])
def test_against_a_slow_simulation(base: ScorerPress) -> None:
    """Keys of layer 0 depend on their token only, so what is held there can be followed by hand."""
    model, ids = tiny("gpt_neox"), torch.randperm(90, generator=torch.Generator().manual_seed(0))[None, :60] + 3
    full = PressedCache()
    model(ids, **cache_argument(full))
    keys = full.layer(0).keys[0].double()  # [H, T, D]
    kept = [list(range(16)) for _ in range(4)]
    for past, _ in decode(DecodingPress(base, INTERVAL, TARGET), 60, ids=ids):
        n_seen = past.seen_tokens
        for h in range(4) if n_seen > 16 else ():
            kept[h].append(n_seen - 1)
            if (n_seen - 16) % INTERVAL == 0 and len(kept[h]) > TARGET:
                if isinstance(base, StreamingLLMPress):
                    kept[h] = kept[h][:4] + kept[h][len(kept[h]) - TARGET + 4 :]
                elif isinstance(base, RandomPress):
                    kept[h] = held(past)[h]
                else:
                    mine = keys[h, kept[h]]
                    if isinstance(base, KnormPress):
                        scores = [-float(k.norm()) for k in mine]
                    else:
                        mean = torch.stack([k / k.norm() for k in mine]).mean(0)
                        scores = [-float(k @ mean / k.norm() / mean.norm()) for k in mine]
                    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:TARGET]
                    kept[h] = [kept[h][i] for i in sorted(best)]
        assert held(past) == kept


def slow_snapkv(text: Text, h: int, held: list[int], n_seen: int, n_queries: int) -> dict[int, float]:
    """Window of 3, kernel of 5, pooled along what is held."""
    received = [0.0] * len(held)
    for at in range(n_seen - 3, n_seen):
        for slot, weight in enumerate(text.attention(h, at, held)):
            received[slot] += weight / 3
    n = len(held) - 3
    pooled = [sum(received[max(0, i - 2) : min(n, i + 3)]) / 5 for i in range(n)]
    return dict(zip(held, [*pooled, *[math.inf] * 3], strict=True))


def slow_tova(text: Text, h: int, held: list[int], n_seen: int, n_queries: int) -> dict[int, float]:
    weights = [text.attention(g, n_seen - 1, held) for g in range(4)]
    return dict(zip(held, [sum(w) for w in zip(*weights, strict=True)], strict=True)) | {n_seen - 1: math.inf}


def slow_expected(text: Text, h: int, held: list[int], n_seen: int, n_queries: int) -> dict[int, float]:
    """6 positions ahead of the text; the first 4 tokens are sinks, and their queries do not count."""
    seen = [text.raw_queries[h, t].double() for t in range(max(n_seen - n_queries, 4), n_seen)]
    mean = sum(seen) / len(seen)
    covariance = sum(torch.outer(q - mean, q - mean) for q in seen) / len(seen)
    rotation = sum(text.rotation(p) for p in range(n_seen, n_seen + 6)) / 6
    mean, covariance = rotation @ mean, rotation @ covariance @ rotation.T
    keys = [text.keys[h, t].double() for t in held]
    logits = [float(k @ mean) / text.dim**0.5 + float(k @ covariance @ k) / (2 * text.dim) for k in keys]
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    norms = [float(text.values[h, t].norm()) for t in held]
    scores = {t: math.exp(x - top) / total * norm for t, x, norm in zip(held, logits, norms, strict=True)}
    return scores | dict.fromkeys(range(4), math.inf)


class Text:
    """Layer 0 of a whole text: what it attends with depends on token and position only."""

    def __init__(self, model: str, ids: Tensor):
        full = PressedCache()
        with torch.no_grad():
            tiny(model)(ids, **cache_argument(full))
        self.model, self.values = model, full.layer(0).values[0]
        self.raw_queries, raw_keys = (states[0] for states in unrotated(model, ids, 0))
        n, self.dim = ids.shape[1], raw_keys.shape[2]
        self.queries, self.keys = (
            torch.stack([torch.stack([rotated(model, states[h, t], t) for t in range(n)]) for h in range(4)])
            for states in (self.raw_queries, raw_keys)
        )

    def attention(self, h: int, at: int, held: list[int]) -> list[float]:
        """Weights that the query of token ``at`` gives to what is held, as far as it came before."""
        query = self.queries[h, at].double()
        logits = [math.exp(float(query @ self.keys[h, t].double()) / self.dim**0.5) * (t <= at) for t in held]
        return [x / sum(logits) for x in logits]

    def rotation(self, position: int) -> Tensor:
        return torch.stack([rotated(self.model, unit, position) for unit in torch.eye(self.dim).double()], dim=1)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", ["gpt_neox", "gpt_neox_full_rotary"])
@pytest.mark.parametrize("kind", ["fixed", "share", "after_a_press"])
@pytest.mark.parametrize(
    ("base", "slow"),
    [
        (SnapKVPress(window_size=3), slow_snapkv),
        (TOVAPress(), slow_tova),
        (ExpectedAttentionPress(n_future_positions=6), slow_expected),
    ],
    ids=["snapkv", "tova", "expected_attention"],
)
def test_scores_by_queries_against_a_slow_simulation(
    base: ScorerPress, slow: Callable[..., dict[int, float]], kind: str, model: str
) -> None:
    """Held sets of every head after every token, for both widths of rotation."""
    ids = torch.randperm(90, generator=torch.Generator().manual_seed(1))[None, :46] + 3
    text, buffer, prompt = Text(model, ids), 7, 16
    press: BasePress = DecodingPress(base, INTERVAL, 14, buffer)
    kept = [list(range(prompt)) for _ in range(4)]
    if kind == "share":
        press = CompressionRatioDecodingPress(base, INTERVAL, buffer, 0.6)
    elif kind == "after_a_press":
        press = PrefillDecodingPress(StreamingLLMPress(0.5), press)
        kept = [[0, 1, 2, 3, 12, 13, 14, 15] for _ in range(4)]
    for past, _ in decode(press, 46, prompt, model, ids):
        n_seen = past.seen_tokens
        if n_seen > prompt:
            kept = [[*head, n_seen - 1] for head in kept]
        target = n_seen * 2 // 5 if kind == "share" else 14
        if n_seen > prompt and (n_seen - prompt) % INTERVAL == 0 and len(kept[0]) > target:
            scores = [slow(text, h, kept[h], n_seen, buffer) for h in range(4)]
            kept = [
                sorted(sorted(head, key=lambda t, own=own: (-own[t], t))[:target])
                for head, own in zip(kept, scores, strict=True)
            ]
        assert held(past) == kept, n_seen


class Spy(SnapKVPress):
    """SnapKV that remembers the views it was shown of layer 0."""

    seen: list[LayerView] = []  # noqa: RUF012

    def compress(self, view: LayerView) -> Kept | None:
        if view.layer_idx == 0:
            self.seen.append(view)
        return super().compress(view)


@pytest.mark.parametrize("model", ["gpt_neox", "gpt_neox_full_rotary", "llama"])
def test_queries_are_those_of_the_newest_tokens_at_their_positions(model: str) -> None:
    """B3: all buffered queries were rotated to the position of the newest one."""
    Spy.seen.clear()
    decoded(DecodingPress(Spy(window_size=4), INTERVAL, TARGET, 8), 61, model=model)
    look = Look()
    with torch.no_grad():
        tiny(model)(tokens(1, 61), **cache_argument(PressedCache(look)))
    dense, view = look.views[0], Spy.seen[-1]
    assert view.end == 61 and view.n_queries == 8
    torch.testing.assert_close(view.queries, dense.queries[:, :, 53:61], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(view.unrotated_queries(), dense.unrotated_queries()[:, :, 53:61], atol=1e-4, rtol=1e-4)
    index = view.positions[..., None].expand_as(view.keys)
    torch.testing.assert_close(view.keys, dense.keys.gather(2, index), atol=1e-5, rtol=1e-5)
    scores = view.window_attention(4)
    for h, g, q in [(0, 0, 0), (1, 0, 3)]:  # by hand, with causal order by position
        query = dense.queries[0, h * view.group_size + g, 57 + q].double()
        logits = [
            float(query @ dense.keys[0, h, p].double()) * view.scaling if p <= 57 + q else -torch.inf
            for p in view.positions[0, h].tolist()
        ]
        torch.testing.assert_close(
            scores[0, h, g, q].double(), torch.tensor(logits).double().softmax(0), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("base", [ExpectedAttentionPress(n_future_positions=4), CapPress(n_future_positions=4)])
@pytest.mark.parametrize("interval", [1, 3, 4])
def test_expected_attention_of_few_queries(interval: int, base: ScorerPress) -> None:
    """B2: four queries of the buffer were dropped as if they were sinks: none were left, and every score was NaN."""
    past = decoded(DecodingPress(base, interval, 12, hidden_states_buffer_size=interval), 40)
    assert max(past.stored_lengths()) < 12 + interval
    assert all(head[:4] == [0, 1, 2, 3] for head in held(past))


def test_expected_attention_looks_ahead_of_the_text() -> None:
    """B2: the positions to come were counted from the length of the buffer."""

    class Ahead(ExpectedAttentionPress):
        ends: list[int] = []  # noqa: RUF012

        def score(self, view: LayerView) -> Tensor:
            self.ends.append(view.end)
            return super().score(view)

    decoded(DecodingPress(Ahead(n_future_positions=4), 8, 12), 32)
    assert sorted(set(Ahead.ends)) == [24, 32]


def test_sinks_and_recent_tokens_after_many_rounds() -> None:
    """B4: pairs were stored in the order of their scores, so that later rounds lost sinks and recent tokens."""
    past = decoded(DecodingPress(StreamingLLMPress(), 8, 64), 16 + 12 * 8, prompt=16)
    n = past.seen_tokens
    assert held(past) == [[0, 1, 2, 3, *range(n - 60, n)]] * 4


@pytest.mark.parametrize(
    "inner", [ExpectedAttentionPress(n_future_positions=8, epsilon=1e-2), TOVAPress(), KnormPress()]
)
def test_heads_that_share_a_budget_are_cut_back(inner: ScorerPress) -> None:
    """B5: masked keys were scored again and came back, and the cache never shrank."""
    past = decoded(DecodingPress(AdaKVPress(inner), INTERVAL, TARGET), 16 + 20 * INTERVAL)
    counts = torch.tensor([len(head) for head in held(past, 1)])
    assert int(counts.sum()) == 4 * TARGET
    assert past.layer(1).stored_length == int(counts.max())
    if not isinstance(inner, TOVAPress):
        assert counts.min() < counts.max()


def test_scores_of_unequal_heads_are_those_of_each_head_alone() -> None:
    look = Look()

    class Asks(DecodingPress):
        def compress_again(self, view: LayerView) -> Kept | None:
            look.views.append(view)
            return super().compress_again(view)

    decoded(Asks(AdaKVPress(SnapKVPress(window_size=4)), INTERVAL, TARGET, 8), 16 + 10 * INTERVAL)
    view = next(view for view in reversed(look.views) if view.counts is not None)
    press = SnapKVPress(window_size=4)
    scores = press.scores(view)
    for h in range(4):
        n = int(view.counts[0, h])
        assert torch.equal(scores[0, h, :n], press.score(view.of_head(0, h))[0, 0])
        assert (scores[0, h, n:] == -torch.inf).all()


def test_cam_around_adakv() -> None:
    """B6: AttributeError, AdaKVPress has no method score."""
    past = decoded(CAMPress(AdaKVPress(SnapKVPress(window_size=4)), INTERVAL, TARGET), 80)
    assert sum(len(head) for head in held(past)) < 4 * (TARGET + INTERVAL)


@pytest.mark.parametrize("model", ["gpt_neox", "gpt_neox_full_rotary"])
def test_cam_by_hand(model: str) -> None:
    """Every number of one compression, by loops over heads and tokens."""
    shown: list[tuple[LayerView, Kept]] = []

    class Asks(CAMPress):
        def compress_again(self, view: LayerView) -> Kept | None:
            kept = super().compress_again(view)
            shown.append((view, kept))
            return kept

    press = Asks(KnormPress(), 6, 12, merge_budget=3)
    decoded(press, 16 + 18, model=model, ids=distinct_tokens(1, 16 + 18))
    before, after = [pair for pair in shown if pair[0].layer_idx == 0][-2:]
    view, kept = after
    n_merged = 0
    torch.testing.assert_close(view.carried[..., :12], before[1].carry)
    assert view.carried[..., 12:].isnan().all() and view.n_new == 6
    generator = torch.Generator().manual_seed((view.seed + 1_009 * view.layer_idx + 1_000_003 * view.end) % 2**63)
    for h in range(4):
        n, positions = view.n_tokens, view.positions[0, h].tolist()
        received = [0.0 if torch.isnan(c) else float(c) for c in view.carried[0, h]]
        for i in range(6):
            q = view.queries[0, h, view.n_queries - 6 + i].double()
            seen = [t for t in range(n) if positions[t] <= view.end - 6 + i]
            weights = torch.stack([q @ view.keys[0, h, t].double() * view.scaling for t in seen]).softmax(0)
            for t, weight in zip(seen, weights.tolist(), strict=True):
                received[t] += weight
        norms = [float(view.keys[0, h, t].norm()) for t in range(n)]
        stays = sorted(sorted(range(n), key=lambda t: norms[t])[:12])
        goes = sorted(set(range(n)) - set(stays), key=lambda t: norms[t])[:6]
        values = view.values[0, h].double().clone()
        draws = torch.rand(len(goes), generator=generator).tolist()
        for t, draw in zip(goes, draws, strict=True):
            heirs = [s for s in stays if s > t][:3]
            if heirs and draw < min(1.0, received[t] / (sum(received[s] for s in heirs) / len(heirs))):
                n_merged += 1
                for s in heirs:
                    values[s] += view.values[0, h, t].double() / len(heirs)
        torch.testing.assert_close(kept.values[0, h].double(), values[stays], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept.carry[0, h], torch.tensor([received[t] for t in stays]), atol=1e-5, rtol=1e-5)
        assert torch.equal(kept.keys[0, h], view.keys[0, h, stays])
    assert n_merged > 3


@pytest.mark.parametrize("model", ["gpt_neox", "gpt_neox_full_rotary"])
def test_mass_cam_by_hand(model: str) -> None:
    """Every weight and value of two compressions: the number of tokens that a pair stands for, and their mean."""
    shown: list[tuple[LayerView, Kept]] = []

    class Asks(MassCAMPress):
        def compress_again(self, view: LayerView) -> Kept | None:
            kept = super().compress_again(view)
            shown.append((view, kept))
            return kept

    decoded(Asks(KnormPress(), 6, 12, merge_budget=3), 16 + 12, model=model, ids=distinct_tokens(1, 16 + 12))
    first, second = (pair for pair in shown if pair[0].layer_idx == 0)
    assert "bias" not in first[0].columns
    assert torch.equal(second[0].columns["bias"][..., :12], first[1].bias)
    n_merged, n_again = 0, 0
    for view, kept in (first, second):
        generator = torch.Generator().manual_seed((view.seed + 1_009 * view.layer_idx + 1_000_003 * view.end) % 2**63)
        for h in range(4):
            n = view.n_tokens
            received = attention_received(view, h)
            norms = [float(view.keys[0, h, t].norm()) for t in range(n)]
            stays = sorted(sorted(range(n), key=lambda t: norms[t])[:12])
            goes = sorted(set(range(n)) - set(stays), key=lambda t: norms[t])[:6]
            bias = view.columns["bias"][0, h].double() if "bias" in view.columns else torch.zeros(n).double()
            stands_for = {t: [(float(bias[t].exp()), view.values[0, h, t].double())] for t in range(n)}
            draws = torch.rand(len(goes), generator=generator).tolist()
            for t, draw in zip(goes, draws, strict=True):
                heirs = [s for s in stays if s > t][:3]
                if heirs and draw < min(1.0, received[t] / (sum(received[s] for s in heirs) / len(heirs))):
                    n_merged += 1
                    n_again += float(bias[t]) > 0
                    for s in heirs:
                        stands_for[s] += [(w / len(heirs), v) for w, v in stands_for[t]]
            for i, t in enumerate(stays):
                weight = sum(w for w, _ in stands_for[t])
                mean = sum(w * v for w, v in stands_for[t]) / weight
                assert float(kept.bias[0, h, i]) == pytest.approx(math.log(weight), abs=1e-6)
                torch.testing.assert_close(kept.values[0, h, i].double(), mean, atol=1e-5, rtol=1e-5)
    assert n_merged > 3 and n_again > 0


def attention_received(view: LayerView, h: int) -> list[float]:
    """Attention that each stored pair of a head has received, biases counted, by a loop over queries."""
    n_new, positions = int(view.n_new or 0), view.positions[0, h].tolist()
    bias = view.columns["bias"][0, h].double() if "bias" in view.columns else torch.zeros(view.n_tokens).double()
    carried = torch.zeros(view.n_tokens) if view.carried is None else view.carried[0, h].nan_to_num(nan=0.0)
    received = carried.tolist()
    for i in range(n_new):
        q = view.queries[0, h, view.n_queries - n_new + i].double()
        seen = [t for t in range(view.n_tokens) if positions[t] <= view.end - n_new + i]
        logits = torch.stack([q @ view.keys[0, h, t].double() * view.scaling + bias[t] for t in seen])
        for t, weight in zip(seen, logits.softmax(0).tolist(), strict=True):
            received[t] += weight
    return received


def test_mass_cam_leaves_the_mean_of_equal_values() -> None:
    """Where all values are the same, merging changes none, and a pair that is merged adds its weight to the others."""
    view = replace(view_of("gpt_neox"), _memo={}, n_new=1)
    view = replace(view, values=torch.ones_like(view.values))
    kept = MassCAMPress(KnormPress(), target_size=view.n_tokens // 2, merge_budget=1).compress_again(view)
    torch.testing.assert_close(kept.values, torch.ones_like(kept.values))
    more = kept.bias.exp().sum(-1) - view.n_tokens // 2  # of each head the one that is merged, if it is drawn
    assert ((more - 1).abs() < 1e-5).logical_or(more.abs() < 1e-5).all() and more.max() > 0.5


def test_cam_repeats_with_the_seed() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        past = decoded(CAMPress(KnormPress(), 4, 12), 60)
        runs.append(past.layer(1).values)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "press",
    [
        DecodingPress(SnapKVPress(window_size=4), INTERVAL, 12, 8),
        DecodingPress(AdaKVPress(KnormPress()), INTERVAL, 12, 8),
        CAMPress(StreamingLLMPress(), INTERVAL, 12, 8),
        MassCAMPress(AdaKVPress(KnormPress()), INTERVAL, 12, 8),
        PrefillDecodingPress(KnormPress(0.5), CompressionRatioDecodingPress(SnapKVPress(window_size=4), 4, 8)),
    ],
)
def test_a_padded_row_decodes_as_it_does_alone(press: BasePress) -> None:
    model, ids = tiny("gpt_neox"), distinct_tokens(3, 50)
    pads = [0, 3, 9]
    mask = torch.ones(3, 50, dtype=torch.long)
    for row, n in enumerate(pads):
        mask[row, :n], ids[row, :n] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(rows: slice, start: int) -> tuple[PressedCache, Tensor]:
        torch.manual_seed(0)
        past, logits = PressedCache(press), []
        cuts = [20, 24, *range(25, 51)]
        for a, b in zip([start, *cuts], cuts, strict=False):
            out = model(
                ids[rows, a:b],
                attention_mask=mask[rows, start:b],
                position_ids=positions[rows, a:b],
                **cache_argument(past),
            )
            logits.append(out.logits[:, -1])
        return past, torch.stack(logits, 1)

    with torch.no_grad():
        batch, logits = run(slice(0, 3), 0)
        for row, pad in enumerate(pads):
            alone, expected = run(slice(row, row + 1), pad)
            torch.testing.assert_close(logits[row], expected[0], atol=2e-4, rtol=0)
            for layer in (0, 1):
                mine = [[p - pad for p in head if p >= 0] for head in batch.positions(layer)[row].tolist()]
                assert mine == held(alone, layer)


@pytest.mark.parametrize(
    "press",
    [
        DecodingPress(KnormPress(), 4, 12, 0),
        DecodingPress(AdaKVPress(SnapKVPress(window_size=2)), 4, 12, 4),
        CAMPress(KnormPress(), 4, 12, 4),
    ],
)
def test_a_row_whose_newest_tokens_are_padding_waits(press: BasePress) -> None:
    """Its turn is shorter than the others': it keeps what it holds, and is cut back with them the next time."""
    model, ids, mask = tiny("llama"), distinct_tokens(2, 52), torch.ones(2, 52, dtype=torch.long)
    mask[1, 32:40] = 0
    places, past = mask.cumsum(-1) - 1, PressedCache(press)
    runs = {}
    with torch.no_grad():
        for a, b in [(0, 20), (20, 30), (30, 40), (40, 52)]:
            out = model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=places[:, a:b], **cache_argument(past))
            assert torch.isfinite(out.logits).all()
            runs[b] = past.positions(1)
    held, before, after = runs[40][1], runs[30][1], runs[52][1]
    for mine, earlier, later in zip(held, before, after, strict=True):
        assert mine[mine >= 0].tolist() == [*earlier[earlier >= 0].tolist(), 30, 31]
        assert len(later[later >= 0]) > 0 and not set(range(32, 40)) & set(later.tolist())
    assert int((after >= 0).sum()) == 2 * 12


@pytest.mark.parametrize(
    "press", [CAMPress(KnormPress(), 4, 12, 4, merge_budget=3), DecodingPress(AdaKVPress(RandomPress(seed=1)), 4, 12)]
)
def test_rows_of_one_length_draw_what_they_draw_alone(press: BasePress) -> None:
    """E: what was drawn for a row depended on the rows before it."""
    ids = tokens(1, 60).repeat(3, 1)
    past = PressedCache(press)
    torch.manual_seed(1)
    with torch.no_grad():
        for a, b in [(0, 30), *((i, i + 1) for i in range(30, 60))]:
            tiny("gpt_neox")(ids[:, a:b], **cache_argument(past))
    for layer in past.pressed_layers():
        assert torch.equal(layer.positions()[0], layer.positions()[2])
        torch.testing.assert_close(layer.values[0], layer.values[2])


DRAWING = [
    CAMPress(KnormPress(), 4, 12, 4, merge_budget=3),
    DecodingPress(RandomPress(), 4, 12),
    DecodingPress(KeyformerPress(n_sink=1, grace=2), 4, 12),
]


@pytest.mark.parametrize("copied", ["fork", "deepcopy", "pickle", "file"])
@pytest.mark.parametrize("press", DRAWING, ids=["cam", "random", "keyformer"])
def test_a_copy_draws_what_its_original_draws(press: DecodingPress, copied: str, tmp_path: Path) -> None:
    """Also where nothing was drawn before it was made."""
    model, ids = tiny("gpt_neox"), tokens(1, 60)
    past = PressedCache(press)
    model(ids[:, :30], **cache_argument(past))
    if copied == "file":
        past.save(tmp_path / "cache", model)
    other = {
        "fork": lambda: past.fork().fork(),
        "deepcopy": lambda: copy.deepcopy(past),
        "pickle": lambda: pickle.loads(pickle.dumps(past)),
        "file": lambda: PressedCache.load(tmp_path / "cache", model),
    }[copied]()
    for cache in (past, other):
        for i in range(30, 60):
            model(ids[:, i : i + 1], **cache_argument(cache))
    for own, layer in zip(other.pressed_layers(), past.pressed_layers(), strict=True):
        assert torch.equal(own.positions(), layer.positions()) and torch.equal(own.values, layer.values)
    past.reset()
    model(ids[:, :30], **cache_argument(past))
    assert past.session.seed != other.session.seed


def test_a_question_counts_its_tokens() -> None:
    model, ids, past = tiny("llama"), tokens(1, 60), PressedCache(DecodingPress(KnormPress(), 10, 20))
    model(ids[:, :30], **cache_argument(past))
    model(ids[:, 30:39], **cache_argument(past))
    assert past.stored_lengths() == [39, 39]
    model(ids[:, 39:45], **cache_argument(past))
    assert past.stored_lengths() == [20, 20]
    assert past.seen_tokens == 45


def test_generate_keeps_to_the_budget() -> None:
    model, past = tiny("llama"), PressedCache(DecodingPress(SnapKVPress(window_size=4), 6, 20, 8))
    ids = tokens(1, 30)
    out = model.generate(
        ids, **cache_argument(past), max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    assert out.shape == (1, 70)
    assert max(past.stored_lengths()) < 26
    beams = PressedCache(DecodingPress(SnapKVPress(window_size=4), 6, 20, 8))
    model.generate(
        ids,
        **cache_argument(beams),
        max_new_tokens=20,
        num_beams=3,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
    )
    assert max(beams.stored_lengths()) < 26


def test_forks_go_their_own_ways() -> None:
    model, ids = tiny("gpt_neox"), tokens(1, 60)
    past = decoded(DecodingPress(SnapKVPress(window_size=4), INTERVAL, TARGET, 8), 40)
    fork, before = past.fork(), past.layer(0).keys.clone()
    for i in range(40, 60):
        model(ids[:, i : i + 1], **cache_argument(fork))
    assert torch.equal(past.layer(0).keys, before) and past.seen_tokens == 40
    for i in range(40, 60):
        model(ids[:, i : i + 1], **cache_argument(past))
    assert held(past) == held(fork) and held(past, 1) == held(fork, 1)


def test_cropped_tokens_are_forgotten_by_the_schedule_too() -> None:
    model, ids = tiny("gpt_neox"), tokens(1, 70)
    press = DecodingPress(SnapKVPress(window_size=4), 10, TARGET, 8)
    straight, detour = PressedCache(press), PressedCache(press)
    for past in (straight, detour):
        model(ids[:, :20], **cache_argument(past))
        for i in range(20, 46):
            model(ids[:, i : i + 1], **cache_argument(past))
    model(tokens(1, 3, seed=9), **cache_argument(detour))
    detour.crop(46)
    for i in range(46, 60):
        for past in (straight, detour):
            model(ids[:, i : i + 1], **cache_argument(past))
    assert held(straight) == held(detour) and held(straight, 1) == held(detour, 1)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize(
    "base", [SnapKVPress(window_size=4), AdaKVPress(KnormPress()), LeverageScorePress(sketch_dimension=6)]
)
@pytest.mark.thinned(3)
def test_other_architectures(name: str, base: ScorerPress) -> None:
    past = decoded(DecodingPress(base, INTERVAL, 12, 8), 90, prompt=30, model=name)
    local = [
        i for i, kind in enumerate(getattr(tiny(name).config, "layer_types", None) or ()) if kind != "full_attention"
    ]
    if name in ("mistral",):
        local = []
    for layer in past.pressed_layers():
        if layer.index not in local:
            n_heads = layer.keys.shape[1]
            assert int((layer.positions() >= 0).sum()) == 12 * n_heads  # 60 steps: just cut back


def test_pyramids_share_the_budget_over_layers() -> None:
    press = DecodingPress(PyramidKVPress(window_size=4, beta=4), INTERVAL, TARGET, 8)
    past = decoded(press, 16 + 30 * INTERVAL)
    first, last = past.stored_lengths()
    assert first > last and first + last == 2 * TARGET


def test_after_a_compressed_prompt() -> None:
    press = PrefillDecodingPress(KnormPress(0.5), DecodingPress(SnapKVPress(window_size=4), INTERVAL, 12, 8))
    lengths = {past.seen_tokens: past.stored_lengths() for past, _ in decode(press, 60)}
    assert lengths[16] == [8, 8] and lengths[20] == [12, 12] and lengths[21] == [12, 12] and lengths[30] == [16, 16]
    nothing = PrefillDecodingPress(prefilling_press=KnormPress(0.5))
    assert {past.seen_tokens: past.stored_lengths() for past, _ in decode(nothing, 60)}[60] == [52, 52]


def test_the_buffer_does_not_grow() -> None:
    sizes = [past.kv_bytes() for past, _ in decode(DecodingPress(KnormPress(), 8, 32), 400)]
    assert len(set(sizes[150:])) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodingPress(KnormPress), "wraps a press such as SnapKVPress.* got the class KnormPress"),
        (lambda: DecodingPress(DecodingPress(KnormPress())), "has no budget and no scores"),
        (lambda: DecodingPress(KnormPress(0.5)), "to say by itself how much is kept, and KnormPress has a ratio"),
        (lambda: DecodingPress(AdaKVPress(KnormPress(budget_tokens=9))), "AdaKVPress has a ratio or budget; leave it"),
        (
            lambda: CompressionRatioDecodingPress(KnormPress(0.5)),
            "CompressionRatioDecodingPress needs to say by itself",
        ),
        (lambda: CompressionRatioDecodingPress(KnormPress(), target_compression_ratio=1.0), "target_compression_ratio"),
        (lambda: DecodingPress(CompactorPress()), "CompactorPress chooses once"),
        (lambda: DecodingPress(ObservedAttentionPress()), "ObservedAttentionPress chooses once"),
        (lambda: DecodingPress(ChunkPress(KnormPress())), "ChunkPress chooses once"),
        (lambda: DecodingPress(KeyRerotationPress(KnormPress())), "KeyRerotationPress chooses once"),
        (lambda: DecodingPress(KnormPress(), 0), "compression_interval must be an integer >= 1"),
        (lambda: DecodingPress(KnormPress(), 5, 0), "target_size must be an integer >= 1"),
        (lambda: CAMPress(KnormPress(), merge_budget=0), "merge_budget must be an integer >= 1"),
        (lambda: PrefillDecodingPress(), "needs a prefilling_press, a decoding_press or both"),
        (lambda: PrefillDecodingPress(decoding_press=KnormPress(0.5)), "KnormPress does nothing while decoding"),
        (lambda: PrefillDecodingPress(DecodingPress(KnormPress())), "DecodingPress begins after it"),
        (lambda: PrefillDecodingPress("knorm"), "must be a press or None"),
        (lambda: AdaKVPress(DecodingPress(KnormPress())), "AdaKVPress needs a press that says which pairs stay"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], BasePress], message: str) -> None:
    with pytest.raises(PressError, match=message):
        make()


def test_critical_heads_while_decoding() -> None:
    press = DecodingPress(CriticalAdaKVPress(SnapKVPress(window_size=4)), INTERVAL, TARGET, 8)
    past = decoded(press, 16 + 20 * INTERVAL, model="llama")
    assert sum(len(head) for head in held(past)) == 2 * TARGET
