"""DefensiveKV and Layer-DefensiveKV against loops, and what they promise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.examples.test_extend import OFTEN, Watching, pinned
from tests.oracles.choices import ends
from tests.oracles.defensive import attention, best, first_stage, pooled, scores
from tests.presses.test_wrappers import heads_of, weighted_norm
from tests.presses.views import MODELS, view_of, views_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    CriticalKVPress,
    DecodingPress,
    DefensiveKVPress,
    KeyRerotationPress,
    KnormPress,
    LayerDefensiveKVPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    SampledDefensiveKVPress,
    SnapKVPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.counts import keep_count
from coldpress.errors import PressError
from coldpress.models.block import prefilling

N = 23
MANY = [
    {},
    {"first_stage_mass": 0.0, "kernel_size": 1},
    {"first_stage_mass": 0.3, "alpha_safeguard": 0.5, "n_sink": 2},
    {"first_stage_mass": 0.5, "norms_over": "heads", "window_bias": "before"},
]
every_model = pytest.mark.parametrize("model", MODELS)
options = pytest.mark.parametrize("options", MANY, ids=str)


def norms_of(model: str, view: LayerView, row: int) -> Tensor:
    n_heads, n = view.keys.shape[1:3]
    return torch.tensor([[weighted_norm(model, view, row, h, t) for t in range(n)] for h in range(n_heads)])


def expected(model: str, views: list[LayerView], press: DefensiveKVPress, row: int = 0) -> list[list[list[int]]]:
    """What the heads of ``views`` keep that share one budget, by layer."""
    n_keep, always = keep_count(N, press.compression_ratio), ends(N, press.n_sink, press.window_size)
    tables = [scores(view, press, row, norms_of(model, view, row)) for view in views]
    first = [first_stage(view, press, row, n_keep, always) for view in views]
    return best(tables, first, always, n_keep, math.floor(press.alpha_safeguard * n_keep + 1e-9))


def prefilled(press: Any, ids: Tensor, model: str = "llama", mask: Tensor | None = None, **given: Any) -> PressedCache:
    past = PressedCache(**given)
    places = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), press(tiny(model)):
        tiny(model)(ids, attention_mask=mask, position_ids=places, **cache_argument(past))
    return past


def kept(past: PressedCache, row: int = 0) -> list[list[list[int]]]:
    """Positions by layer and head."""
    return [heads_of(layer.positions())[row] for layer in past.pressed_layers()]


@every_model
@options
def test_scores(model: str, options: dict[str, Any]) -> None:
    press = DefensiveKVPress(0.5, 4, **options)
    for view in views_of(model, tokens(2, N)):
        found = press.score(view)
        assert found.dtype == torch.float32
        for row in range(2):
            own = torch.tensor(scores(view, press, row, norms_of(model, view, row)))
            torch.testing.assert_close(found[row], own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@every_model
@options
def test_what_the_heads_of_a_layer_keep(model: str, options: dict[str, Any], ratio: float) -> None:
    press = DefensiveKVPress(ratio, 4, **options)
    for view in views_of(model, tokens(2, N)):
        assert heads_of(press.choose(view)) == [expected(model, [view], press, row)[0] for row in range(2)]


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@every_model
@options
def test_what_all_layers_keep(model: str, options: dict[str, Any], ratio: float) -> None:
    press, ids = LayerDefensiveKVPress(ratio, 4, **options), tokens(2, N)
    past, views = prefilled(press, ids, model), views_of(model, ids)
    assert [kept(past, row) for row in range(2)] == [expected(model, views, press, row) for row in range(2)]
    n_pairs = sum(len(head) for layer in kept(past) for head in layer)
    assert n_pairs == keep_count(N, ratio) * sum(view.keys.shape[1] for view in views)
    for layer, view in zip(past.pressed_layers(), views, strict=True):  # and what is stored are the model's own pairs
        for h, at in enumerate(kept(past)[view.layer_idx]):
            assert torch.equal(layer.keys[0, h, : len(at)], view.keys[0, h, at])  # type: ignore[index]
            assert torch.equal(layer.values[0, h, : len(at)], view.values[0, h, at])  # type: ignore[index]


@pytest.mark.parametrize(
    "press", [DefensiveKVPress(0.9), LayerDefensiveKVPress(0.9)], ids=lambda press: type(press).__name__
)
def test_heads_keep_the_first_tokens(press: Any) -> None:
    """Where a few pairs are kept, a head without them is far off what it said."""
    for layer in prefilled(press, tokens(1, 400)).pressed_layers():
        for head in layer.positions()[0].tolist():
            assert head[:4] == [0, 1, 2, 3]


# -- properties -------------------------------------------------------------------------------------------------------


def test_without_groups_and_with_one_query_the_maximum_is_what_the_query_gives() -> None:
    """Of equal window queries the first sees the fewest keys, and so gives the most to each."""
    view = view_of("gpt_neox", N)
    same = replace(view, queries=view.queries[:, :, -1:].expand(view.queries.shape), _memo={})
    for window in (1, 4):
        press = DefensiveKVPress(0.5, window)
        for head, own in enumerate(norms_of("gpt_neox", same, 0)):
            most = torch.tensor(pooled(attention(same, 0, head, window)[0][: N - window], 5))
            found = press.score(same)[0, head] / own * own.mean()
            torch.testing.assert_close(found[: N - window], most.clamp(min=float(most.mean())), atol=1e-5, rtol=1e-4)


def test_a_pair_that_one_query_needs_stays() -> None:
    """All window queries but one look at tokens 9, 10 and 11, and that one at token 7 alone; values weigh the same."""
    view, window = view_of("gpt_neox", 40), 16
    keys, queries = torch.zeros_like(view.keys), torch.zeros_like(view.queries)
    keys[:, :, 9:12, 0], keys[:, :, 7, 1], queries[:, :, 24:, 0] = 3.5, 10.0, 10.0
    queries[:, :, 30] = queries[:, :, 30].roll(1, -1)
    view = replace(view, keys=keys, queries=queries, values=torch.ones_like(view.values), scaling=0.1, _memo={})
    given: dict[str, Any] = {"budget_tokens": window + 1, "window_size": window, "kernel_size": 1}
    press = DefensiveKVPress(**given, n_sink=0, first_stage_mass=0.0)
    assert {tuple(head) for row in heads_of(press.choose(view)) for head in row} == {(7, *range(24, 40))}
    mean = {tuple(head) for row in heads_of(SnapKVPress(**given).choose(view)) for head in row}
    assert mean == {(9, *range(24, 40))}


def test_no_score_is_below_the_mean_of_the_maxima() -> None:
    view, window = view_of("llama", 40), 8
    press, most = DefensiveKVPress(window_size=window), view.window_attention(window).amax(dim=(2, 3))
    own = press.score(view) / (norms := view.projected_value_norms()) * norms.mean(-1, keepdim=True)
    lowest = own.amin(-1, keepdim=True)
    assert ((own[..., :-window] - lowest).abs() < 1e-6 * lowest).sum() > 20  # many pairs stand at the floor
    kernel = replace(press, kernel_size=1).score(view) / norms * norms.mean(-1, keepdim=True)
    torch.testing.assert_close(kernel.amin(-1), most[..., :-window].mean(-1))


def test_the_first_stage_keeps_what_the_mean_looks_at() -> None:
    """Whatever the values weigh: 9 in 10 of the attention of each head, less one pair, as far as the budget goes."""
    view = view_of("llama", 40)
    values = view.values.clone()
    mean = view.window_attention(8).mean(dim=(2, 3))
    heaviest = mean[..., :-8].argmax(-1)
    values.scatter_(2, heaviest[..., None, None].expand(-1, -1, 1, values.shape[3]), 0.0)
    light = replace(view, values=values, _memo={})
    press = DefensiveKVPress(0.5, 8, n_sink=0)
    for row, heads in enumerate(heads_of(press.choose(light))):
        for h, head in enumerate(heads):
            assert int(heaviest[row, h]) in head
            others = mean[row, h].index_fill(0, torch.tensor(head), 0.0)
            assert len(head) >= 20 or float(mean[row, h, head].sum() + others.max()) >= 0.9
    without = heads_of(replace(press, first_stage_mass=0.0).choose(light))
    assert any(int(heaviest[row, h]) not in without[row][h] for row in range(2) for h in range(2))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8, 0.9])
def test_heads_share_exactly_what_the_ratio_says(ratio: float) -> None:
    view, differ = view_of("llama", 80), []
    for alpha in (0.0, 0.2, 1.0):
        press = DefensiveKVPress(ratio, 4, n_sink=0, first_stage_mass=0.2, alpha_safeguard=alpha)
        counts = torch.tensor([[len(head) for head in row] for row in heads_of(press.choose(view))])
        n_keep = keep_count(80, ratio)
        assert counts.sum(-1).tolist() == [2 * n_keep] * 2
        assert int(counts.min()) >= max(4, math.floor(alpha * n_keep + 1e-9))
        differ.append(counts.unique().numel() > 1)
    assert differ[0] and not differ[2]


def test_the_safeguard_is_of_every_head_of_every_layer() -> None:
    ids = tokens(1, 80)
    for alpha in (0.0, 0.9, 1.0):
        past = prefilled(LayerDefensiveKVPress(0.6, 4, first_stage_mass=0.1, alpha_safeguard=alpha), ids)
        counts = [len(head) for layer in kept(past) for head in layer]
        assert sum(counts) == 4 * 32 and min(counts) >= math.floor(alpha * 32 + 1e-9)
        assert (len(set(counts)) > 1) == (alpha < 1)


# -- in caches --------------------------------------------------------------------------------------------------------

Defensive: dict[str, Any] = {"window_size": 4, "first_stage_mass": 0.3}
CASES = {
    "defensive": Case(DefensiveKVPress(0.5, **Defensive), n_most=25),
    "defensive pins": Case(DefensiveKVPress(0.5, n_sink=2, alpha_safeguard=0.2, **Defensive), rows=pinned, n_most=25),
    "defensive both": Watching(
        PrefillDecodingPress(DefensiveKVPress(0.3, **Defensive), DecodingPress(DefensiveKVPress(**Defensive), **OFTEN)),
        n_most=35,
    ),
    "layer": Case(LayerDefensiveKVPress(0.5, **Defensive), lacks=("chunks", "rerotated")),
    "layer both": Watching(
        PrefillDecodingPress(LayerDefensiveKVPress(0.3, **Defensive), DecodingPress(KnormPress(), **OFTEN)),
        rows=pinned,
        lacks=("chunks", "ragged", "rerotated"),
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


@pytest.mark.parametrize("cls", [DefensiveKVPress, LayerDefensiveKVPress])
def test_sinks_window_and_pins_stay_in_every_head(cls: type[DefensiveKVPress]) -> None:
    press = cls(0.6, 5, n_sink=3, first_stage_mass=0.2)
    for layer in kept(prefilled(press, tokens(1, 50), pin=[(20, 24)])):
        for head in layer:
            assert {0, 1, 2, *range(20, 24), *range(45, 50)} <= {*head}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "mistral"])
@pytest.mark.parametrize("cls", [LayerDefensiveKVPress, SampledDefensiveKVPress])
def test_rows_of_a_padded_batch_share_nothing(cls: type[DefensiveKVPress], name: str) -> None:
    press, ids, pads = cls(0.6, **Defensive), tokens(3, 40), [(0, 0), (9, 0), (2, 6)]
    mask = torch.ones(3, 40, dtype=torch.long)
    for row, (left, right) in enumerate(pads):
        mask[row, :left] = mask[row, 40 - right :] = 0
    past = prefilled(press, ids, name, mask)
    for row, (left, right) in enumerate(pads):
        alone = prefilled(press, ids[row : row + 1, left : 40 - right], name)
        for own, other in zip(past.pressed_layers(), alone.pressed_layers(), strict=True):
            if own.was_compressed:
                mine = [[t - left for t in head] for head in heads_of(own.positions())[row]]
                assert mine == heads_of(other.positions())[0]


def test_a_row_that_is_shorter_than_the_budget_keeps_all_of_it() -> None:
    mask = (torch.arange(40) >= torch.tensor([[0], [22]])).long()
    past = prefilled(LayerDefensiveKVPress(budget_tokens=30, **Defensive), tokens(2, 40), mask=mask)
    assert kept(past, 1) == [[[*range(22, 40)]] * 2] * 2
    assert sum(len(head) for layer in kept(past) for head in layer) == 4 * 30


def test_a_shared_prefill_gives_what_each_gives_alone() -> None:
    presses = [DefensiveKVPress(0.5, **Defensive), LayerDefensiveKVPress(0.5, **Defensive), SnapKVPress(0.5, 4)]
    full, ids = PressedCache(), tokens(2, 40)
    branches = full.branches(presses)
    with torch.no_grad(), prefilling(tiny("llama"), full, *branches):
        tiny("llama")(ids, **cache_argument(full))
    for branch, press in zip(branches, presses, strict=True):
        alone = prefilled(press, ids)
        assert [kept(branch, row) for row in range(2)] == [kept(alone, row) for row in range(2)]


def test_short_texts_and_small_budgets() -> None:
    for n in (1, 2, 3, 5, 33, 40):
        for cls in (DefensiveKVPress, LayerDefensiveKVPress, SampledDefensiveKVPress):
            for ratio in (0.0, 0.5, 0.95):
                past = prefilled(cls(ratio), tokens(1, n))
                assert sum(len(head) for layer in kept(past) for head in layer) == 4 * keep_count(n, ratio)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": 0}, "window_size must be an integer >= 1"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"n_sink": -1}, "n_sink must be an integer >= 0"),
        ({"first_stage_mass": 1.5}, r"first_stage_mass must be a number in \[0, 1\]"),
        ({"alpha_safeguard": -0.1}, r"alpha_safeguard must be a number in \[0, 1\]"),
        ({"norms_over": "rows"}, "norms_over must be 'tokens' or 'heads', got 'rows'"),
        ({"window_bias": None}, "window_bias must be 'own' or 'before', got None"),
    ],
)
@pytest.mark.parametrize("name", ["defensive", "layer_defensive"])
def test_bad_arguments_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PressError, match=words):
        make_press(name, 0.5, **options)


def test_what_does_not_go_together_is_refused() -> None:
    layer, own = LayerDefensiveKVPress(0.5), DefensiveKVPress(0.5)
    for wrapper in (AdaKVPress, KeyRerotationPress):
        with pytest.raises(PressError, match="chooses among the pairs of all layers; use it by itself"):
            wrapper(layer)
    with pytest.raises(PressError, match="chooses among the pairs of all layers"):
        DecodingPress(LayerDefensiveKVPress())
    with pytest.raises(PressError, match="chooses once, from a whole prompt"):
        PressedCache(layer, chunk_tokens=16)
    with pytest.raises(PressError, match="chooses once, from a whole prompt"):  # heads do not have the same tokens then
        DecodingPress(DefensiveKVPress(norms_over="heads"))
    with pytest.raises(PressError, match="makes that choice in its own way"):
        AdaKVPress(own)
    with pytest.raises(PressError, match="makes that choice in its own way"):
        CriticalKVPress(own)
    with pytest.raises(PressError, match=r"a cache by itself.*run the prefill inside 'with press\(model\):'"):
        tiny("llama")(tokens(1, 40), **cache_argument(PressedCache(layer)))
    assert KeyRerotationPress(own).compression_ratio == 0.5
