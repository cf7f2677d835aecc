"""SampledDefensive against loops: queries from all over the prompt, asked again at its end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.examples.test_extend import OFTEN, Watching, pinned
from tests.oracles.choices import ends
from tests.oracles.defensive import attention, best, pooled
from tests.presses.test_defensive import kept, norms_of, prefilled
from tests.presses.views import MODELS, rotated, unrotated, view_of, views_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    DecodingPress,
    LayerDefensiveKVPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    SampledDefensiveKVPress,
    SnapKVPress,
    make_press,
)
from coldpress.bases.moved import samples_moved_on
from coldpress.core.counts import keep_count
from coldpress.errors import PressError

N = 23
MANY: list[dict[str, Any]] = [
    {"n_samples": 5},
    {"n_samples": 100, "first_stage_mass": 0.0},
    {"n_samples": 4, "first_stage_mass": 0.4, "kernel_size": 3, "alpha_safeguard": 0.5, "n_sink": 2},
]


def asked_again(model: str, view: LayerView, ids: Tensor, row: int, head: int, n: int) -> list[list[float]]:
    """What each of the ``n`` samples of each query head of a group gives to every token, all of which it sees."""
    queries, n_tokens, given = unrotated(model, ids, view.layer_idx)[0][row], view.n_tokens, []
    keys = view.keys[row, head].double()
    for own in queries[head * view.group_size : (head + 1) * view.group_size]:
        for i in range(n):
            query = rotated(model, own[math.floor((i + 0.5) * n_tokens / n)], n_tokens + i).double()
            logits = [math.exp(float(query @ key) * view.scaling) for key in keys]
            given.append([x / sum(logits) for x in logits])
    return given


def expected(model: str, ids: Tensor, views: list[LayerView], press: SampledDefensiveKVPress, row: int) -> Any:
    """What every head of every layer keeps, by loops."""
    n_keep, n, window = keep_count(N, press.compression_ratio), min(press.n_samples, N), press.window_size
    always = ends(N, press.n_sink, min(window, max(1, n_keep // 8)))
    tables, first = [], []
    for view in views:
        own_tables, own_first = [], []
        for head, norms in enumerate(norms_of(model, view, row).double()):
            recent = attention(view, row, head, window)
            wide = [pooled(given[: N - window], press.kernel_size) + given[N - window :] for given in recent]
            wide += [pooled(given, press.kernel_size) for given in asked_again(model, view, ids, row, head, n)]
            most = [max(given[t] for given in wide) for t in range(N)]
            floor = sum(most[: N - window]) / (N - window)
            own_tables.append([max(most[t], floor) * float(norms[t] / norms.mean()) for t in range(N)])
            mean = [sum(given[t] for given in recent) / len(recent) for t in range(N)]
            has, taken = sum(mean[t] for t in always), []
            for t in sorted((t for t in range(N) if t not in always), key=lambda t: -mean[t])[: n_keep - len(always)]:
                has += mean[t]
                if has >= press.first_stage_mass * sum(mean):
                    break
                taken.append(t)
            own_first.append(taken)
        tables.append(own_tables)
        first.append(own_first)
    return best(tables, first, always, n_keep, math.floor(press.alpha_safeguard * n_keep + 1e-9))


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", MANY, ids=str)
def test_what_all_layers_keep(model: str, options: dict[str, Any], ratio: float) -> None:
    press, ids = SampledDefensiveKVPress(ratio, 4, **options), tokens(2, N)
    past, views = prefilled(press, ids, model), views_of(model, ids)
    assert [kept(past, row) for row in range(2)] == [expected(model, ids, views, press, row) for row in range(2)]


def test_samples_are_evenly_apart_and_see_every_pair() -> None:
    view = view_of("llama", 40)
    for n in (1, 3, 40):
        ahead = samples_moved_on(view, n)
        assert ahead.queries.shape[2] == n
        ((_, given),) = ahead.attention_blocks()
        assert given.shape[-1] == 40 and bool((given > 0).all())
        torch.testing.assert_close(given.sum(-1), torch.ones(given.shape[:-1]))
    own = view.unrotated_queries()[:, :, [6, 20, 33]]  # the middles of three parts of 40 tokens
    moved = samples_moved_on(view, 3)
    for i, position in enumerate(range(40, 43)):
        at = rotated("llama", own[0, 0, i], position)
        torch.testing.assert_close(moved.queries[0, 0, i], at, atol=1e-5, rtol=1e-5)


def test_a_pair_that_one_early_query_needs_stays() -> None:
    """Of all tokens, only the one in the middle asks for token 30, which comes after it."""
    view = view_of("gpt_neox", 41)
    plain = torch.zeros(2, 4, 41, view.keys.shape[3])
    plain[:, :, 20, -1] = 60.0  # a channel that is not rotated
    keys = torch.zeros_like(view.keys)
    keys[:, :, 30, -1] = 10.0
    asked = replace(view, keys=keys, queries=plain, values=torch.ones_like(view.values), scaling=0.1, _memo={})
    press = SampledDefensiveKVPress(budget_tokens=9, n_sink=0, n_samples=41, first_stage_mass=0.0)
    scores = press.score(asked)
    assert (scores.argmax(-1) == 30).all()
    assert (LayerDefensiveKVPress(n_sink=0, window_size=4).score(asked)[..., :37].argmax(-1) != 30).any()


def test_the_newest_take_an_eighth_at_most() -> None:
    for ratio, newest in ((0.0, 25), (0.5, 12), (0.9, 2), (0.98, 1)):
        assert SampledDefensiveKVPress(ratio).protected(view_of("llama", 200)) == (4, newest)
    assert SampledDefensiveKVPress(0.0).protected(view_of("llama", 400)) == (4, 32)


SAMPLED: dict[str, Any] = {"window_size": 4, "first_stage_mass": 0.3, "n_samples": 6}
CASES = {
    "sampled": Case(SampledDefensiveKVPress(0.5, **SAMPLED), lacks=("chunks", "rerotated")),
    "sampled both": Watching(
        PrefillDecodingPress(
            SampledDefensiveKVPress(0.3, **SAMPLED), DecodingPress(SnapKVPress(window_size=4), **OFTEN)
        ),
        rows=pinned,
        lacks=("chunks", "ragged", "rerotated"),
    ),
}


@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(PressError, match="n_samples must be an integer >= 1"):
        make_press("sampled_defensive", 0.5, n_samples=0)
    with pytest.raises(PressError, match="chooses among the pairs of all layers; use it by itself"):
        AdaKVPress(SampledDefensiveKVPress(0.5))
    with pytest.raises(PressError, match="chooses once, from a whole prompt"):
        PressedCache(SampledDefensiveKVPress(0.5), chunk_tokens=16)
