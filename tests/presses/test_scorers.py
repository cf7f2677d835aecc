"""Each scorer against a slow version of its formula: loops over rows, heads and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.contract.architectures import tokens
from tests.oracles.scores import lag_weights, leverage, non_causal, sketch_of
from tests.presses.views import MODELS, rotated, unrotated, view_of
from torch import Tensor

from coldpress import CapPress, CompactorPress, CURPress, LagKVPress, LayerView, LeverageScorePress, NonCausalAttnPress
from coldpress.presses.leverage import leverage_scores
from coldpress.presses.non_causal_attention import standardized as standardized_by_head

every_model = pytest.mark.parametrize("model", MODELS)
N_TOKENS, LAYER, ROWS = 37, 1, 2


def per_head(view: LayerView, score: Callable[[int, int], list[float]]) -> Tensor:
    """Scores ``[B, Hkv, T]`` from a function of row and KV head."""
    n_batch, n_heads = view.keys.shape[:2]
    return torch.tensor([[score(b, h) for h in range(n_heads)] for b in range(n_batch)])


@every_model
def test_unrotated_keys_are_what_the_projection_gave(model: str) -> None:
    view = view_of(model)
    queries, keys = unrotated(model, tokens(ROWS, N_TOKENS), LAYER)
    torch.testing.assert_close(view.unrotated_keys(), keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(view.unrotated_queries(), queries, atol=1e-4, rtol=0)
    torch.testing.assert_close(view.part(11, 30).unrotated_keys(), keys[:, :, 11:30], atol=1e-4, rtol=0)
    torch.testing.assert_close(view.part(11, 30).unrotated_queries(), queries[:, :, 11:30], atol=1e-4, rtol=0)
    chosen = torch.tensor([[0, 3, 9, 20, 21, 22]]).expand(*view.keys.shape[:2], -1)
    among = view.among(chosen, 23, 3)
    torch.testing.assert_close(among.unrotated_keys(), keys[:, :, chosen[0, 0]], atol=1e-4, rtol=0)
    torch.testing.assert_close(among.unrotated_queries(), queries[:, :, 20:23], atol=1e-4, rtol=0)


# -- LagKV --------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@every_model
@pytest.mark.parametrize("cross_scoring", [False, True])
@pytest.mark.parametrize("lag", [6, 128])  # 128 is more than there is: two halves
def test_lagkv(model: str, lag: int, cross_scoring: bool) -> None:
    view, n_sink = view_of(model), 4
    size = min(lag, (N_TOKENS - n_sink) // 2)
    starts = list(range(n_sink, N_TOKENS - size + 1, size))
    parts = [range(a, a + size) for a in starts]
    if parts[-1].stop < N_TOKENS:
        parts.append(range(parts[-1].stop, N_TOKENS))
    whole = len(starts)

    def score(b: int, h: int) -> list[float]:
        scores = [1.0] * n_sink
        for i, part in enumerate(parts):
            reference = parts[min(i + 1, whole - 1)]
            weights = [
                (k + v) / 2
                for k, v in zip(
                    lag_weights(view.keys[b, h], part, reference),
                    lag_weights(view.values[b, h], part, reference),
                    strict=True,
                )
            ]
            if cross_scoring:
                scores += [w * len(part) / size for w in weights]
            else:
                scores += [sum(other < w for other in weights) / len(part) for w in weights]
        return scores

    press = LagKVPress(lag_size=lag, cross_scoring=cross_scoring)
    torch.testing.assert_close(press.score(view), per_head(view, score), atol=1e-5, rtol=1e-5)
    assert press.protected(view) == (n_sink, N_TOKENS - parts[whole - 1].start)


# -- Compactor and its parts --------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("chunk", [9, 256])
def test_non_causal_attention(model: str, chunk: int) -> None:
    view = view_of(model)
    expected = per_head(view, lambda b, h: non_causal(view, b, h, range(N_TOKENS), chunk))
    torch.testing.assert_close(NonCausalAttnPress(chunk_size=chunk).score(view), expected, atol=2e-4, rtol=0)


@every_model
@pytest.mark.parametrize("dimension", [5, 48])  # 48 is more than the heads have: no sketch
@pytest.mark.parametrize(("layer", "seed"), [(0, 0), (1, 0), (1, 7)])
def test_leverage(model: str, layer: int, seed: int, dimension: int) -> None:
    """With a sketch for each seed, layer and head, the same in all rows."""
    view, press = view_of(model, layer=layer), LeverageScorePress(sketch_dimension=dimension, seed=seed)
    _, keys = unrotated(model, tokens(ROWS, N_TOKENS), layer)
    sketch = sketch_of(keys, layer, dimension, seed) if dimension < keys.shape[3] else None
    expected = per_head(view, lambda b, h: leverage(keys[b, h], None if sketch is None else sketch[h]))
    torch.testing.assert_close(press.score(view), expected, atol=2e-3, rtol=0)


def test_rounding_is_no_score() -> None:
    """Two tokens stand out from their mean equally: what is left is rounding, which differs by batch."""
    view = view_of("llama")
    for start in range(30):
        assert (LeverageScorePress(sketch_dimension=5).score(view.part(start, start + 2)) == 0).all()
    flat = torch.full((1, 1, 50), 2 / 3) + 1e-7 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert (standardized_by_head(flat) == 0).all() and (standardized_by_head(flat * 0) == 0).all()
    torch.testing.assert_close(standardized_by_head(torch.tensor([[[1e-9, 3e-9]]])), torch.tensor([[[-1.0, 1.0]]]))


def test_leverage_scores_of_large_rows_are_finite() -> None:
    rows = torch.randn(3, 500, 8, generator=torch.Generator().manual_seed(0)) * 1e4
    rows[..., 1] = rows[..., 0]  # and not of full rank
    scores = leverage_scores(rows, 0.01)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores.sum(-1), torch.full((3,), 7.0), atol=1e-2, rtol=0)  # the trace is the rank


@every_model
@pytest.mark.parametrize("blending", [None, 0.35])
def test_compactor(model: str, blending: float | None) -> None:
    view = view_of(model)
    _, keys = unrotated(model, tokens(ROWS, N_TOKENS), LAYER)
    span, ratio = range(8, N_TOKENS - 4), 0.6
    weight = ratio if blending is None else blending

    def score(b: int, h: int) -> list[float]:
        attention = non_causal(view, b, h, span, 10)
        geometry = leverage(keys[b, h, span.start : span.stop], None)
        middle = [weight * x + y for x, y in zip(geometry, attention, strict=True)]
        return [max(middle)] * 8 + middle + [max(middle)] * 4

    press = CompactorPress(ratio, chunk_size=10, blending=blending)
    torch.testing.assert_close(press.scores(view), per_head(view, score), atol=2e-3, rtol=0)


def test_compactor_blends_by_its_own_ratio() -> None:
    view = view_of("llama")
    low, high = (CompactorPress(ratio, chunk_size=10).scores(view) for ratio in (0.1, 0.9))
    assert not torch.equal(low, high)


# -- CUR and Cap --------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("kind", ["key", "value", "kv_avg", "kv_product"])
@pytest.mark.parametrize("is_local", [True, False])
def test_cur(model: str, kind: str, is_local: bool) -> None:
    view, window = view_of(model), 16

    def lengths(states: Tensor) -> list[float]:
        squares = [sum(float(x) ** 2 for x in row) for row in states]
        if not is_local:
            return squares
        out = []
        for t, square in enumerate(squares):
            start = t // window * window
            neighbours = squares[start : start + window]
            out.append(square / (sum(neighbours) / len(neighbours)))
        return out

    def score(b: int, h: int) -> list[float]:
        pairs = zip(lengths(view.keys[b, h]), lengths(view.values[b, h]), strict=True)
        scores = [{"key": k, "value": v, "kv_avg": (k + v) / 2, "kv_product": k * v}[kind] for k, v in pairs]
        return [s / sum(scores) for s in scores]

    press = CURPress(leverage_type=kind, use_local_approximation=is_local)  # type: ignore[arg-type]
    torch.testing.assert_close(press.score(view), per_head(view, score), atol=1e-6, rtol=1e-4)


def test_cur_with_random_leverage() -> None:
    view = view_of("llama")
    press = CURPress(use_random_leverage=True)
    generator = torch.Generator().manual_seed(view.layer_idx)
    projection = torch.randn(view.keys.shape[3], 20, generator=generator) / math.sqrt(20)
    k, v = ((states @ projection).square().sum(-1) for states in (view.keys, view.values))
    places = [(t, slice(t // 16 * 16, t // 16 * 16 + 16)) for t in range(N_TOKENS)]
    expected = torch.stack([(k * v)[..., t] / (k[..., w].mean(-1) * v[..., w].mean(-1)) for t, w in places], dim=-1)
    torch.testing.assert_close(press.score(view), expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)


@every_model
def test_cap(model: str) -> None:
    view, n_sink, tau, ahead, epsilon = view_of(model), 4, 5.0, 20, 1e-6
    queries, _ = unrotated(model, tokens(ROWS, N_TOKENS), LAYER)

    def score(b: int, h: int) -> list[float]:
        scores = [0.0] * N_TOKENS
        for g in range(view.group_size):
            mean = queries[b, h * view.group_size + g, n_sink:].mean(0)
            places = range(N_TOKENS, N_TOKENS + ahead)
            anchor = torch.stack([rotated(model, mean, p) for p in places]).mean(0).double()
            keys, values = view.keys[b, h].double(), view.values[b, h].double()
            cosine = {t: float(keys[t] @ anchor / keys[t].norm() / anchor.norm()) for t in range(n_sink, N_TOKENS)}
            weight = {t: math.exp(tau * (c - max(cosine.values()))) for t, c in cosine.items()}
            cover = torch.eye(values.shape[1], dtype=torch.float64)
            for t, w in weight.items():
                cover += (w + epsilon) * torch.outer(values[t], values[t])
            for t, w in weight.items():
                scores[t] += w * float(values[t] @ torch.linalg.solve(cover, values[t])) / view.group_size
        return scores

    press = CapPress(tau=tau, n_future_positions=ahead, n_sink=n_sink, epsilon=epsilon)
    torch.testing.assert_close(press.score(view), per_head(view, score), atol=1e-4, rtol=1e-3)
    assert press.protected(view) == (n_sink, 0)
