"""What a cache holds after a prefill, head by head, against the papers' formulas from the model's own projections.

Nothing is taken from what presses are shown: queries, keys and values are those of the layer's fused projection,
rotated here in loops; scores, protected tokens, budgets and the choice are written out for each registered press.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny
from tests.oracles import scores as slow
from tests.oracles.choices import adaptive, best, ends
from tests.oracles.scores import lag_weights, leverage, non_causal
from tests.presses.views import rotated

from coldpress import (
    BasePress,
    ComposedPress,
    ExpectedAttentionPress,
    KeyRerotationPress,
    KnormPress,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
    TOVAPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.registry import parameters_of

N, RATIO, KEEP = slow.N, 0.4, 12  # 21 tokens, of which ceil(8.4) go
MODELS = {"gpt_neox": 4, "gpt_neox_full_rotary": 8}  # rotary_pct 0.25 and 1.0: rotary dimensions of a head
HEADS = range(4)
IDS = torch.randperm(90, generator=torch.Generator().manual_seed(0))[None, :N] + 3  # equal tokens would tie in layer 0
SNAP, EXPECTED = SnapKVPress(window_size=2), ExpectedAttentionPress(n_future_positions=6, use_vnorm=False)
Scores = list[list[float]]  # of each head
Held = list[list[int]]  # by each head


class Projected(SimpleNamespace):
    """One layer: ``queries``, ``keys`` and ``values`` ``[1, H, T, D]`` as it attends with them; ``raw_*`` unrotated."""


@cache
def projected(model: str) -> list[Projected]:
    own, seen = tiny(model), []
    layers = list(own.gpt_neox.layers)
    hooks = [
        layer.attention.query_key_value.register_forward_hook(lambda m, args, output: seen.append(output))
        for layer in layers
    ]
    with torch.no_grad():
        own(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    out = []
    for i, fused in enumerate(seen):
        dim = fused.shape[-1] // 12
        q, k, v = (torch.stack([fused[0, :, 3 * h * dim + j * dim :][:, :dim] for h in HEADS]) for j in range(3))
        turned = [
            torch.stack([torch.stack([rotated(model, s[h, t], t) for t in range(N)]) for h in HEADS]) for s in (q, k)
        ]
        out.append(
            Projected(
                queries=turned[0][None], keys=turned[1][None], values=v[None], raw_queries=q, raw_keys=k, layer_idx=i,
                group_size=1, width=MODELS[model], model=model, dense=layers[i].attention.dense.weight.detach(),
            )
        )  # fmt: skip
    return out


def from_slow(oracle: Callable[..., Any], press: BasePress) -> Callable[[Projected], Scores]:
    return lambda layer: [oracle(layer, press, layer.width)[0, h] for h in HEADS]


def attention_of(press: SnapKVPress) -> Callable[[Projected], Scores]:
    return from_slow(slow.snapkv, press)


def cur(layer: Projected) -> Scores:
    scores = []
    for h in HEADS:
        product = []
        for t in range(N):
            window = range(t // 16 * 16, min(N, t // 16 * 16 + 16))
            part = 1.0
            for states in (layer.keys[0, h], layer.values[0, h]):
                squares = [float(states[s] @ states[s]) for s in window]
                part *= float(states[t] @ states[t]) * len(squares) / sum(squares)
            product.append(part)
        scores.append([p / sum(product) for p in product])
    return scores


def cap(layer: Projected) -> Scores:
    scores, ahead = [], range(N, N + 6)
    for h in HEADS:
        mean = layer.raw_queries[h, 4:].mean(0)
        anchor = torch.stack([rotated(layer.model, mean, p) for p in ahead]).mean(0).double()
        keys, values = layer.keys[0, h].double(), layer.values[0, h].double()
        cosine = [float(k @ anchor / k.norm() / anchor.norm()) for k in keys]
        weight = [math.exp(5.0 * (c - max(cosine[4:]))) for c in cosine]
        cover = torch.eye(values.shape[1], dtype=torch.float64)
        for t in range(4, N):
            cover += (weight[t] + 1e-6) * torch.outer(values[t], values[t])
        scores.append([w * float(v @ torch.linalg.solve(cover, v)) for w, v in zip(weight, values, strict=True)])
    return scores


def lagkv(layer: Projected) -> Scores:
    """Sinks 0 .. 3, partitions of 4 tokens from there, and token 20."""
    parts, scores = [range(a, a + 4) for a in range(4, 20, 4)], []
    for h in HEADS:
        mine = [0.0] * 4
        for part, reference in zip(parts, [*parts[1:], parts[-1]], strict=True):
            both = [lag_weights(states[0, h], part, reference) for states in (layer.keys, layer.values)]
            mean = [(k + v) / 2 for k, v in zip(*both, strict=True)]
            mine += [float(sum(other < m for other in mean)) for m in mean]
        scores.append([*mine, 0.0])
    return scores


def compactor(layer: Projected) -> Scores:
    """Without its first 3 and last 2 tokens."""
    scores = []
    for h in HEADS:
        geometry = leverage(layer.raw_keys[h, 3 : N - 2], None)
        attention = non_causal(layer, 0, h, range(3, N - 2), 9)
        middle = [RATIO * x + y for x, y in zip(geometry, attention, strict=True)]
        scores.append([0.0] * 3 + middle + [0.0] * 2)
    return scores


def top(score: Callable[[Projected], Scores], n_sink: int = 0, n_window: int = 0, n: int = KEEP) -> Callable[..., Held]:
    """Of every head the sinks, the window, and the best of the others."""

    def choose(layer: Projected) -> Held:
        always = ends(N, n_sink, n_window)
        return [best(dict(enumerate(scores)), n, *always) for scores in score(layer)]

    return choose


def pyramid(layer: Projected) -> Held:
    """beta 3: 4 tokens in the last layer and 20 in the first, flattened to 18, which is N less the window of 3."""
    press = SnapKVPress(window_size=3)
    return top(attention_of(press), 0, 3, (18, 6)[layer.layer_idx])(layer)


def ada(
    score: Callable[[Projected], Scores], n_sink: int, n_window: int, n_safe: int = 2
) -> Callable[[Projected], Held]:
    """``n_safe``: floor(0.2 * 12)."""

    def choose(layer: Projected) -> Held:
        return adaptive(torch.tensor(score(layer)), KEEP, n_safe, ends(N, n_sink, n_window))

    return choose


def critical(score: Callable[[Projected], Scores], n_sink: int, n_window: int, is_ada: bool) -> Callable[..., Held]:
    def choose(layer: Projected) -> Held:
        always, held, scores = ends(N, n_sink, n_window), [], score(layer)
        counts = [len(head) for head in ada(score, n_sink, n_window)(layer)] if is_ada else [KEEP] * 4
        for h, n in zip(HEADS, counts, strict=True):
            dim = layer.values.shape[3]
            norms = [float((layer.dense[:, h * dim : (h + 1) * dim] @ v).abs().sum()) for v in layer.values[0, h]]
            first = best(dict(enumerate(scores[h])), n // 2, *always)
            weighted = {t: (scores[h][t] + 1e-4) * norms[t] for t in range(N)}
            held.append(best(weighted, n, *first, *always))
        return held

    return choose


def chunks_of_their_own(layer: Projected) -> Held:
    """SnapKV with a window of 2 in three chunks of 7; 10 free places of 19 tokens: 4, 4 and 2 + the 2 newest."""
    held: Held = [[] for _ in HEADS]
    for start, n in ((0, 4), (7, 4), (14, 4)):
        for h in HEADS:
            keys, queries = layer.keys[0, h, start : start + 7], layer.queries[0, h, start : start + 7]
            rows = [slow.attention(queries[q], keys, q) for q in (5, 6)]
            received = [(a + b) / 2 for a, b in zip(*rows, strict=True)][:5]
            padded = [0.0, 0.0, *received, 0.0, 0.0]
            scores = {start + t: sum(padded[t : t + 5]) / 5 for t in range(5)} | {start + 5: 0.0, start + 6: 0.0}
            held[h] += best(scores, n, start + 5, start + 6)
    return held


def whole_chunks(layer: Projected) -> Held:
    """SnapKV's scores by chunks of 5; the chunk at the end of the budget is kept in part."""
    scores, by_token = attention_of(SNAP)(layer), {}
    for start in range(0, N, 5):
        counted = [t for t in range(start, min(N, start + 5)) if t < N - 2]
        mean = sum(scores[h][t] for h in HEADS for t in counted) / max(1, len(counted))
        by_token |= dict.fromkeys(range(start, min(N, start + 5)), mean)
    return [best(by_token, KEEP, N - 2, N - 1)] * 4


def blocks(layer: Projected) -> Held:
    """KeyDiff with a budget that is restored after every 5 tokens."""
    held = []
    for h in HEADS:
        left = list(range(KEEP))
        for start in range(KEEP, N, 5):
            left += range(start, min(N, start + 5))
            keys = layer.keys[0, h, left].double()
            anchor = torch.stack([k / k.norm() for k in keys]).mean(0)
            left = best(
                {t: -float(k @ anchor / k.norm() / anchor.norm()) for t, k in zip(left, keys, strict=True)}, KEEP
            )
        held.append(left)
    return held


def composed(layer: Projected) -> Held:
    """SnapKV keeps 16 of 21 (a ratio of 0.2), Knorm 12 of these; the window is safe from both."""
    held, norms, scores = [], from_slow(slow.knorm, KnormPress())(layer), attention_of(SNAP)(layer)
    for h in HEADS:
        left = best(dict(enumerate(scores[h])), 16, N - 2, N - 1)
        held.append(best({t: norms[h][t] for t in left}, 12, N - 2, N - 1))
    return held


SMALL: dict[str, Any] = {
    "window_size": 2, "n_future_positions": 6, "lag_size": 4, "chunk_size": 9, "sink_size_start": 3, "sink_size_end": 2,
    "seed": 5, "block_size": 5,
}  # fmt: skip
CHANGED: dict[str, dict[str, Any]] = {
    "adakv_snapkv": {"alpha_safeguard": 0.9},
    "pyramidkv": {"window_size": 3, "beta": 3},
    "chunk_snapkv": {"chunk_length": 7},
    "chunkkv": {"chunk_length": 5},
}
expected_values = from_slow(slow.expected_attention, ExpectedAttentionPress(n_future_positions=6))
expected_e2 = from_slow(slow.expected_attention, ExpectedAttentionPress(n_future_positions=6, epsilon=1e-2))
expected_plain = from_slow(slow.expected_attention, EXPECTED)
random = make_press("random", RATIO, seed=5)
KEPT: dict[str, Callable[[Projected], Held]] = {
    "adakv_expected_attention_e2": ada(expected_e2, 4, 0),
    "adakv_snapkv": ada(attention_of(SNAP), 0, 2, 10),  # floor(0.9 * 12)
    "block_keydiff": blocks,
    "cap": top(cap, 4),
    "chunk_snapkv": chunks_of_their_own,
    "chunkkv": whole_chunks,
    "compactor": top(compactor, 3, 2),
    "critical_adakv_expected_attention": critical(expected_plain, 4, 0, True),
    "critical_adakv_snapkv": critical(attention_of(SNAP), 0, 2, True),
    "critical_expected_attention": critical(expected_plain, 4, 0, False),
    "critical_snapkv": critical(attention_of(SNAP), 0, 2, False),
    "cur": top(cur, 4),
    "expected_attention": top(expected_values, 4),
    "keydiff": top(from_slow(slow.keydiff, KnormPress())),
    "knorm": top(from_slow(slow.knorm, KnormPress())),
    "lagkv": top(lagkv, 4, 5),
    "leverage": top(lambda layer: [leverage(layer.raw_keys[h], None) for h in HEADS]),
    "non_causal_attention": top(lambda layer: [non_causal(layer, 0, h, range(N), 9) for h in HEADS]),
    "observed_attention": top(from_slow(slow.observed_attention, ObservedAttentionPress())),
    "pyramidkv": pyramid,
    "random": top(from_slow(slow.random, random)),  # type: ignore[arg-type]
    "rerotated_streaming_llm": lambda layer: [[*range(4), *range(N - 8, N)]] * 4,
    "snapkv": top(attention_of(SNAP), 0, 2),
    "streaming_llm": lambda layer: [[*range(4), *range(N - 8, N)]] * 4,
    "tova": top(from_slow(slow.tova, TOVAPress()), 0, 1),
}
OTHERS: list[tuple[BasePress, Callable[[Projected], Held]]] = [
    (ComposedPress([SnapKVPress(0.2, window_size=2), KnormPress(0.25)]), composed),
    (
        PerLayerCompressionPress(KnormPress(), [0.1, 0.8]),
        lambda layer: top(from_slow(slow.knorm, KnormPress()), n=(18, 4)[layer.layer_idx])(layer),
    ),
    (PrefillDecodingPress(SnapKVPress(RATIO, window_size=2)), KEPT["snapkv"]),
    (KeyRerotationPress(KnormPress(RATIO)), KEPT["knorm"]),
]


def held_after(model: str, press: BasePress | None) -> PressedCache:
    past = PressedCache(press)
    with torch.no_grad():
        tiny(model)(IDS, **cache_argument(past))
    return past


def check(model: str, press: BasePress | None, choose: Callable[[Projected], Held]) -> None:
    past = held_after(model, press)
    for layer, own in zip(past.pressed_layers(), projected(model), strict=True):
        found = [[p for p in head if p >= 0] for head in layer.positions()[0].tolist()]
        assert found == choose(own), f"layer {own.layer_idx}"
        for h, head in enumerate(found):
            n, places = len(head), head
            if isinstance(press, KeyRerotationPress):
                places = list(range(N - n, N))
            keys = [rotated(model, own.raw_keys[h, t], place) for t, place in zip(head, places, strict=True)]
            torch.testing.assert_close(layer.keys[0, h, :n], torch.stack(keys), atol=1e-4, rtol=0)
            torch.testing.assert_close(layer.values[0, h, :n], own.values[0, h, head], atol=1e-5, rtol=0)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", KEPT)
def test_kept_by_every_registered_press(name: str, model: str) -> None:
    given = {k: v for k, v in SMALL.items() if k in parameters_of(name)} | CHANGED.get(name, {})
    check(model, make_press(name, RATIO, **given), KEPT[name])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("press", "choose"), OTHERS, ids=lambda x: type(x).__name__)
def test_kept_by_the_others(press: BasePress, choose: Callable[[Projected], Held], model: str) -> None:
    check(model, press, choose)
