"""QFilter and ExpectedAttention with statistics: scores and calibration against their formulas, in loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.views import MODELS, rotated, unrotated, view_of, views_of
from torch import Tensor

from coldpress import (
    DecodingPress,
    ExpectedAttentionPress,
    ExpectedAttentionStatsPress,
    PressedCache,
    QFilterPress,
    ScorerPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.io.artefacts import Artefact
from coldpress.learned.calibration import calibrate

SAMPLES = [tokens(1, n, seed=n)[0] for n in (40, 33, 51)]


def saved(name: str, tensors: dict[str, Tensor], folder: Path) -> str:
    Artefact(name, tensors).save(folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


@pytest.mark.parametrize("model", MODELS)
def test_qfilter(model: str, tmp_path: Path) -> None:
    view = view_of(model)
    _, n_heads, n_tokens, dim = view.keys.shape
    filters = torch.randn(2, n_heads, dim)
    press = QFilterPress(filters=saved("qfilter", {"filters": filters}, tmp_path))
    scores = press.score(view)
    for row, head, t in ((b, h, t) for b in range(2) for h in range(n_heads) for t in range(0, n_tokens, 5)):
        dot = sum(float(filters[1, head, d]) * float(view.keys[row, head, t, d]) for d in range(dim))
        assert float(scores[row, head, t]) == pytest.approx(-dot, abs=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_filters_are_the_main_direction_of_the_queries(model: str) -> None:
    check_directions(model, calibrate(QFilterPress(), tiny(model), SAMPLES)["filters"])


def check_directions(model: str, filters: Tensor) -> None:
    """A row for each compressed layer, which points against the queries of its samples."""
    views = [views_of(model, ids[None]) for ids in SAMPLES]
    assert len(filters) == len(views[0])
    for layer in range(len(filters)):
        queries = torch.cat([sample[layer].queries[0] for sample in views], dim=1).double()  # [Hq, n, D]
        n_heads = filters.shape[1]
        group = queries.shape[0] // n_heads
        for head in range(n_heads):
            own = []
            for q in queries[head * group : (head + 1) * group]:
                main = torch.linalg.svd(q).Vh[0]
                own.append(-main if float((q @ main).sum()) > 0 else main)  # the mean query points away from it
            expected = torch.stack(own).mean(0)
            torch.testing.assert_close(filters[layer, head].double(), expected, atol=1e-5, rtol=0)


def test_qfilter_keeps_the_keys_that_get_attention(tmp_path: Path) -> None:
    """The sign: with queries that point one way, keys that point there too are kept."""
    view = view_of("llama")
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    view.keys[:, :, 20], view.keys[:, :, 21] = 9 * direction, -9 * direction
    try:
        scores = QFilterPress(filters=saved("qfilter", {"filters": (-direction).expand(2, 2, 8)}, tmp_path)).score(view)
        assert (scores.argmax(-1) == 20).all() and (scores.argmin(-1) == 21).all()
    finally:
        view_of.cache_clear()


@pytest.mark.parametrize("model", MODELS)
def test_statistics_are_mean_and_covariance_before_rotation(model: str) -> None:
    press = ExpectedAttentionStatsPress(n_sink=3)
    found = calibrate(press, tiny(model), SAMPLES)
    for layer in range(2):
        queries = torch.cat([unrotated(model, ids[None], layer)[0][0, :, 3:] for ids in SAMPLES], dim=1).double()
        for head, own in enumerate(queries):
            torch.testing.assert_close(found["mean"][layer, head].double(), own.mean(0), atol=1e-4, rtol=0)
            covariance = own.T.cov(correction=0)
            torch.testing.assert_close(found["covariance"][layer, head].double(), covariance, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("use_covariance", [True, False])
def test_expected_attention_with_stats(model: str, use_covariance: bool, tmp_path: Path) -> None:
    view, n_future = view_of(model), 6
    n_heads, n_tokens, dim = view.keys.shape[1:]
    n_query_heads = view.queries.shape[1]
    mean, half = torch.randn(2, n_query_heads, dim), torch.randn(2, n_query_heads, dim, dim)
    stats = {"mean": mean, "covariance": half @ half.mT / dim}
    press = ExpectedAttentionStatsPress(
        n_future_positions=n_future,
        use_covariance=use_covariance,
        epsilon=0.01,
        stats_folder=saved("expected_attention_with_stats", stats, tmp_path),
    )
    scores, group = press.score(view), n_query_heads // n_heads
    columns = [rotated(model, torch.eye(dim)[d], p) for d in range(dim) for p in range(n_tokens, n_tokens + n_future)]
    turn = torch.stack(columns).view(dim, n_future, dim).mean(1).T.double()  # the mean rotation as a matrix
    for row, head in ((b, h) for b in range(2) for h in range(n_heads)):
        expected = torch.zeros(n_tokens, dtype=torch.float64)
        for q in range(head * group, (head + 1) * group):
            mu, sigma = turn @ mean[1, q].double(), turn @ stats["covariance"][1, q].double() @ turn.T
            logits = []
            for t in range(n_tokens):
                k = view.keys[row, head, t].double()
                extra = float(k @ sigma @ k) / (2 * dim) if use_covariance else 0.0
                logits.append(float(k @ mu) / math.sqrt(dim) + extra)
            expected += torch.tensor(logits).softmax(0) / group
        expected = (expected + 0.01) * view.values[row, head].double().norm(dim=-1)
        torch.testing.assert_close(scores[row, head].double(), expected, atol=1e-4, rtol=1e-3)


def test_statistics_of_the_text_itself_give_expected_attention(tmp_path: Path) -> None:
    ids = tokens(1, 50, seed=4)
    stats = calibrate(ExpectedAttentionStatsPress(), tiny("gpt_neox"), [ids[0]])
    path = saved("expected_attention_with_stats", stats, tmp_path)
    for view in views_of("gpt_neox", ids):
        ours = ExpectedAttentionStatsPress(stats_folder=path).score(view)
        torch.testing.assert_close(ours, ExpectedAttentionPress().score(view), atol=1e-5, rtol=1e-3)


@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize(
    "press", [QFilterPress(), ExpectedAttentionStatsPress(n_future_positions=8)], ids=lambda press: press.artefact
)
def test_one_head_alone_has_its_own_numbers(press: ScorerPress) -> None:
    view = view_of("llama")
    scores = press.score(view)
    for row, head in ((0, 0), (1, 1)):
        alone = press.score(view.of_head(row, head))[0, 0]
        torch.testing.assert_close(alone, scores[row, head], atol=1e-5, rtol=1e-4)


def test_models_that_compress_some_of_their_layers() -> None:
    """Published artefacts have a row for every layer of the model, ours for those that are compressed."""
    model = tiny("gemma3")
    found = calibrate(QFilterPress(), model, SAMPLES)["filters"]
    assert found.shape == (2, 2, 16)  # of 4 layers, 2 look at a window only
    check_directions("gemma3", found)


def test_published_rows_belong_to_the_models_own_layers(tmp_path: Path) -> None:
    filters = torch.randn(4, 2, 16)
    kept = []
    for each in (filters, filters[[1, 3]]):
        path = saved("qfilter", {"filters": each}, tmp_path)
        past = PressedCache(QFilterPress(0.5, filters=path))
        tiny("gemma3")(tokens(1, 30), **cache_argument(past))
        kept.append([past.positions(layer) for layer in (1, 3)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.usefixtures("given_artefacts")
def test_while_decoding(tmp_path: Path) -> None:
    model, past = tiny("llama"), PressedCache(DecodingPress(QFilterPress(), 4, 12))
    ids = tokens(1, 40)
    model(ids[:, :20], **cache_argument(past))
    for i in range(20, 40):
        model(ids[:, i : i + 1], **cache_argument(past))
    assert past.stored_lengths() == [12, 12]


def test_parameters() -> None:
    for wrong in ({"num_samples": 0}, {"sample_seq_len": "9"}, {"dataset_name": ""}, {"n_sink": -1}):
        with pytest.raises(PressError, match=next(iter(wrong))):
            ExpectedAttentionStatsPress(**wrong)
    with pytest.raises(PressError, match="No sample is longer than the 60 tokens of n_sink"):
        calibrate(ExpectedAttentionStatsPress(n_sink=60), tiny("llama"), SAMPLES)
