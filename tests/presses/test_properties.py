"""What holds for every press, whatever it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.contract.architectures import distinct_tokens, tiny, tokens
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, other_press
from tests.presses.others import press_of as small_press_of
from tests.presses.views import MODELS, view_of, views_of
from tests.presses.words import Words
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    CapPress,
    ChunkKVPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    DefensiveKVPress,
    FastKVzipPress,
    KeyRerotationPress,
    KnormPress,
    KVzapPress,
    LagKVPress,
    LayerView,
    LeverageScorePress,
    LUKVPress,
    MergingPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.registry import parameters_of
from coldpress.core.choice import protect
from coldpress.core.counts import keep_count
from coldpress.core.press import parts

pytestmark = pytest.mark.usefixtures("given_artefacts")

SMALL = {
    "window_size": 4,
    "chunk_length": 7,
    "block_size": 6,
    "lag_size": 5,
    "chunk_size": 9,
    "sketch_dimension": 3,
    "n_future_positions": 8,
    "seed": 3,
    "n_recent": 4,
    "n_queries": 16,
}
MORE: dict[str, Callable[[float], ScorerPress]] = {
    "block_snapkv": lambda r: BlockPress(SnapKVPress(r, window_size=4), block_size=6),
    "block_leverage": lambda r: BlockPress(LeverageScorePress(r, sketch_dimension=3), block_size=6),
    "block_lagkv": lambda r: BlockPress(LagKVPress(r, lag_size=5), block_size=6),
    "chunk_compactor": lambda r: ChunkPress(CompactorPress(r, chunk_size=9), chunk_length=7),
    "chunk_streaming_llm": lambda r: ChunkPress(StreamingLLMPress(r), chunk_length=7),
    "chunkkv_lagkv": lambda r: ChunkKVPress(LagKVPress(r, lag_size=5), chunk_length=4),
    "composed": lambda r: ComposedPress([CapPress(n_future_positions=8), SnapKVPress(window_size=4)]).with_ratio(r),
    "merging_adakv": lambda r: MergingPress(AdaKVPress(SnapKVPress(r, window_size=4), 0.0), merge_fraction=0.7),
    "per_layer": lambda r: PerLayerCompressionPress(KnormPress(), [r, r / 2]),
    "rerotated_adakv": lambda r: KeyRerotationPress(AdaKVPress(SnapKVPress(r, window_size=4), 0.0)),
}
every_press = pytest.mark.parametrize("name", [*WITH_RATIO, *MORE])


def press_of(name: str, ratio: float) -> ScorerPress:
    if name in MORE:
        return MORE[name](ratio)
    known = parameters_of(name)
    own = {k: v for k, v in SMALL.items() if k in known}
    if ratio == 0 and "key_channel_compression_ratio" in known:  # channels are no pairs
        own["key_channel_compression_ratio"] = 0.0
    press = make_press(name, ratio, **own)
    assert isinstance(press, ScorerPress)
    return press


@st.composite
def random_views(draw: st.DrawFn) -> LayerView:
    """Keys, values and queries of any size and dtype; the layer is a real one."""
    layer = view_of(draw(st.sampled_from(MODELS)), layer=draw(st.integers(0, 1)))
    n_tokens, rows = draw(st.integers(1, 48)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([0.0, 1.0, 100.0]))

    def states(like: torch.Tensor) -> torch.Tensor:
        shape = (rows, like.shape[1], n_tokens, like.shape[3])
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    return replace(layer, keys=states(layer.keys), values=states(layer.values), queries=states(layer.queries), _memo={})


@every_press
@settings(max_examples=25)
@given(view=random_views(), ratio=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]))
@pytest.mark.thinned(5)
def test_what_is_kept(name: str, view: LayerView, ratio: float) -> None:
    press = press_of(name, ratio)
    scores = view.keys.float().norm(dim=-1) if name == "composed" else press.scores(view)  # which has none of its own
    assert torch.isfinite(scores).all() and scores.dtype == torch.float32 and scores.shape == view.keys.shape[:3]
    kept = press.compress(view)
    n_keep = press.keep(view)
    if kept is None:
        assert n_keep >= view.n_tokens
        return
    n_heads = view.keys.shape[1]
    assert kept.keys.dtype == view.keys.dtype and torch.isfinite(kept.keys).all()
    assert kept.keys.shape[:3] == kept.values.shape[:3] == kept.positions.shape
    always = press.forced(view, n_keep)[0, 0].nonzero()[:, 0].tolist()
    for row in kept.positions:
        heads = [head[head >= 0] for head in row]
        assert sum(len(head) for head in heads) == n_heads * n_keep  # the ratio that was asked for, in every row
        for head, slots in zip(heads, row, strict=True):
            assert torch.equal(slots[: len(head)], head)  # empty slots come last
            assert (head.diff() > 0).all() and int(head[-1]) < view.n_tokens  # ascending, so unique
            assert {*always} <= {*head.tolist()}
    assert max(len(head[head >= 0]) for row in kept.positions for head in row) == kept.positions.shape[2]


with_a_budget = pytest.mark.parametrize("name", [n for n in [*WITH_RATIO, *MORE] if n not in ("composed", "per_layer")])


@pytest.mark.thinned(3)
@with_a_budget
@settings(max_examples=12)
@given(view=random_views(), data=st.data())
def test_budgets_are_kept_to(name: str, view: LayerView, data: st.DataObject) -> None:
    """In tokens and in bytes, for one row of the whole model; a budget that is not reached keeps everything."""
    n_heads, n_tokens = view.keys.shape[1:3]
    n = data.draw(st.integers(1, n_tokens + 3))
    token_bytes = view.n_layers * n_heads * (view.keys.shape[3] + view.values.shape[3]) * view.keys.element_size()
    spare = data.draw(st.integers(0, token_bytes - 1))
    presses = [
        press_of(name, 0.0).with_budget(budget_tokens=n),
        press_of(name, 0.5).with_budget(budget_bytes=n * token_bytes + spare),
    ]
    by_tokens, by_bytes = (press.choose(view) for press in presses)
    assert (by_tokens is None and by_bytes is None) or torch.equal(by_tokens, by_bytes)
    if any(part.per_layer for part in parts(presses[0])):
        layers = [presses[0].keep_of(n_tokens, view.place._replace(layer_idx=i)) for i in range(view.n_layers)]
        assert sum(layers) == view.n_layers * min(n, n_tokens)
    else:
        counts = torch.full((1, n_heads), n_tokens) if by_tokens is None else (by_tokens >= 0).sum(-1)
        assert (counts.sum(-1) == n_heads * min(n, n_tokens)).all()
    assert by_tokens is None or n < n_tokens


@pytest.mark.thinned(3)
@every_press
@settings(max_examples=10)
@given(view=random_views(), ratio=st.sampled_from([0.25, 0.5, 0.9]), data=st.data())
def test_permuting_rows_permutes_results(name: str, view: LayerView, ratio: float, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(view.keys.shape[0]))))
    press = press_of(name, ratio)
    permuted = replace(view, keys=view.keys[order], values=view.values[order], queries=view.queries[order], _memo={})
    if name != "composed":
        torch.testing.assert_close(press.scores(permuted), press.scores(view)[order], atol=1e-4, rtol=1e-4)
    if (view.keys == 0).all():  # all scores are equal, and rounding may break the tie in any way
        return
    kept, again = press.choose(view), press.choose(permuted)
    assert (kept is None) == (again is None)
    if kept is not None and again is not None:
        assert (kept[order] == again).float().mean() > 0.9  # scores in low precision tie now and then


@pytest.mark.thinned(3)
@every_press
@pytest.mark.parametrize("model", ["gpt_neox", "llama"])
def test_a_padded_row_keeps_what_it_keeps_alone(name: str, model: str) -> None:
    row, others = distinct_tokens(1, 33), tokens(2, 41, seed=7)
    batch = torch.cat([others[:1], torch.cat([torch.zeros(1, 8, dtype=torch.long), row], 1), others[1:]])
    mask = torch.ones_like(batch)
    mask[1, :8] = 0
    press = press_of(name, 0.5)
    for alone, (padded, _) in zip(views_of(model, row), pairs(views_of(model, batch, mask=mask)), strict=True):
        assert padded.n_tokens == 33
        if name != "composed":
            torch.testing.assert_close(press.scores(padded), press.scores(alone), atol=2e-3, rtol=1e-3)
        assert torch.equal(press.choose(padded), press.choose(alone))


@every_press
@settings(max_examples=3)
@given(
    model=st.sampled_from(["gpt_neox", "gpt_neox_full_rotary", "llama"]),
    pads=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 2, 9])), min_size=2, max_size=4),
    ratio=st.sampled_from([0.0, 0.3, 0.5]),  # of two or three tokens some presses find neither better
)
@pytest.mark.thinned(5)
def test_a_padded_row_equals_the_row_alone(name: str, model: str, pads: list[tuple[int, int]], ratio: float) -> None:
    """Through the model: what is kept of each row, and the answers to a question after it."""
    own, press, length = tiny(model), press_of(name, ratio), 37
    question, mask = tokens(1, 4, seed=5), torch.ones(len(pads), length + 4).long()
    generator = torch.Generator().manual_seed(0)  # tokens of a row differ, so that no scores tie in the first layer
    ids = torch.stack([torch.randperm(90, generator=generator)[:length] + 3 for _ in pads])
    for i, (before, after) in enumerate(pads):
        mask[i, :before] = mask[i, length - after : length] = 0
    places, past = (mask.cumsum(-1) - 1).clamp(min=0), PressedCache(press)
    ids = ids * mask[:, :length]
    with torch.no_grad():
        own(ids, attention_mask=mask[:, :length], position_ids=places[:, :length], **cache_argument(past))
        kept = [past.positions(i) for i in (0, 1)]
        turn = question.expand(len(pads), -1)
        logits = own(turn, attention_mask=mask, position_ids=places[:, length:], **cache_argument(past)).logits
        for i, (before, after) in enumerate(pads):
            alone = PressedCache(press)
            own(ids[i : i + 1, before : length - after], **cache_argument(alone))
            for mine, expected in zip(kept, [alone.positions(j)[0] for j in (0, 1)], strict=True):
                for head, wanted in zip(mine[i], expected, strict=True):
                    assert torch.equal(head[head >= 0] - before, wanted[wanted >= 0])
            expected = own(question, **cache_argument(alone)).logits[0]
            torch.testing.assert_close(logits[i], expected, atol=2e-4, rtol=0)


def pairs(views: list[LayerView]) -> list[tuple[LayerView, LayerView]]:
    """The two groups of rows, shorter rows first, of each layer."""
    return list(zip(views[::2], views[1::2], strict=True))


IDENTITIES = {
    "adakv_snapkv": {"alpha_safeguard": 1.0},
    "adakv_expected_attention_e2": {"alpha_safeguard": 1.0},
    "critical_snapkv": {"first_stage_ratio": 1.0},
    "critical_expected_attention": {"first_stage_ratio": 1.0},
    "critical_adakv_snapkv": {"alpha_safeguard": 1.0, "first_stage_ratio": 1.0},
    "critical_adakv_expected_attention": {"alpha_safeguard": 1.0, "first_stage_ratio": 1.0},
    "chunk_snapkv": {"chunk_length": 1000},
    "block_keydiff": {"block_size": 1000},
    "rerotated_streaming_llm": {},
}


@pytest.mark.parametrize("name", sorted(IDENTITIES))
@settings(max_examples=15)
@given(view=random_views(), ratio=st.sampled_from([0.0, 0.3, 0.6, 0.9]))
def test_a_wrapper_that_changes_nothing_changes_nothing(name: str, view: LayerView, ratio: float) -> None:
    press = make_press(name, ratio, **IDENTITIES[name])
    kept, plain = press.choose(view), press.press.choose(view)
    assert (kept is None and plain is None) or torch.equal(kept, plain)


@pytest.mark.thinned(3)
@every_press
@settings(max_examples=5)
@given(view=random_views(), ratio=st.sampled_from([0.0, 0.3, 0.6, 0.9]))
def test_what_wraps_one_press_and_adds_nothing_changes_nothing(name: str, view: LayerView, ratio: float) -> None:
    press = press_of(name, ratio)
    plain = press.compress(view)
    assert ratio > 0 or plain is None
    same: list[BasePress] = [PrefillDecodingPress(press)]
    if press.offers_scores and not press.per_layer:
        same += [ComposedPress([press]), ChunkPress(press, chunk_length=view.n_tokens)]
        same += [AdaKVPress(press, alpha_safeguard=1.0)]
        even = [[[percent / 100] * view.keys.shape[1]] * view.n_layers for percent in range(1, 100)]
        same += [LUKVPress(press, sink=0, window=0, curves=even)]
        own = ("cap", "expected_attention", "h2o", "observed_attention")
        if name not in own and not press.needs_all_queries:
            same += [BlockPress(press, block_size=view.n_tokens)]  # which shows those the queries of its block only
    same += [] if isinstance(press, ThinKPress) else [ThinKPress(0.0, press=press)]
    if type(press).compress is ScorerPress.compress:
        same += [MergingPress(press, merge_fraction=0.0), MergingPress(press, similarity_threshold=1.0)]
    if not any(part.changes or part.per_layer for part in parts(press)):
        same += [PerLayerCompressionPress(press, [ratio] * view.n_layers)]
    for wrapped in same:
        if name == "compactor" and isinstance(wrapped, ComposedPress):
            continue  # the blending of its scores is the ratio, which stays that of the press
        kept = wrapped.compress(view)
        assert (kept is None) == (plain is None), wrapped
        if plain is not None:
            assert all(torch.equal(a, b) for a, b in zip(kept[:3], plain[:3], strict=True)), wrapped


# -- presses that see more of the model than one layer, or have no ratio: through the model ----------------------------

ENDS = {  # name -> first and last tokens that are kept
    "attention_matching_kvzip": (4, 0), "dms_lagkv": (4, 10), "duo_attention": (2, 9), "fastkvzip": (4, 1),
    "kvgrad": (4, 0), "kvzip": (4, 0),
    "kvzip_plus": (4, 0), "layer_defensive": (0, 4), "lukv": (4, 1), "simlayerkv": (3, 12),
}  # fmt: skip
ALONE = ("attention_matching_kvzip", "kvcompose", "kvgrad", "kvzip", "kvzip_plus", "restorekv")  # one text at a time
through_the_model = pytest.mark.parametrize("name", [*IN_BLOCK, *OTHERS])


def of_model(name: str, model: str, ratio: float) -> BasePress:
    press = other_press(name, model) if name in OTHERS else small_press_of(name, ratio)
    return press.prepared(tiny(model), Words())


def prefilled(
    press: BasePress, model: str, ids: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> PressedCache:
    own, past = tiny(model, "coldpress", dtype), PressedCache()
    places = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), press(own):
        own(ids, attention_mask=mask, position_ids=places, **cache_argument(past))
    return past


def held(past: PressedCache, row: int = 0) -> list[list[list[int]]]:
    """Positions by layer and head; empty slots, which are left out, come last."""
    layers = [layer.positions()[row].tolist() for layer in past.pressed_layers()]
    kept = [[[t for t in head if t >= 0] for head in layer] for layer in layers]
    for of_layer, slots in zip(kept, layers, strict=True):
        assert all(head == own[: len(head)] for head, own in zip(of_layer, slots, strict=True))
    return kept


def distinct(n_tokens: int, rows: int = 1) -> Tensor:
    """Tokens of a row differ, so that no scores tie in the first layer."""
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.stack([torch.randperm(90, generator=generator)[:n_tokens] + 3 for _ in range(rows)])


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_weights")
@through_the_model
@settings(max_examples=9, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.sampled_from(MODELS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    n_tokens=st.integers(1, 44),
    ratio=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
def test_what_is_kept_of_the_whole_model(
    name: str, model: str, dtype: torch.dtype, n_tokens: int, ratio: float
) -> None:
    press, seen = of_model(name, model, ratio), []

    def spy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any) -> Tensor:
            seen.append(out := function(*args))
            return out

        return wrapped

    def recorded(scores: Tensor, must: Tensor) -> Tensor:
        seen.append(scores)
        return protect(scores, must)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coldpress.bases.replay.protect", recorded)
        for scorer in (DefensiveKVPress, FastKVzipPress, KVzapPress):
            patch.setattr(scorer, "score", spy(scorer.score))
        past = prefilled(press, model, distinct(n_tokens), dtype=dtype)
    n_keep = keep_count(n_tokens, 0.5 if name in OTHERS else ratio)
    assert all(scores.isfinite().all() and scores.dtype == torch.float32 for scores in seen)
    assert seen or name in OTHERS or n_keep == n_tokens
    kept = held(past)
    heads = [head for layer in kept for head in layer]
    n_sink, n_window = ENDS.get(name, (0, 0))
    for head in heads:
        if name == "restorekv":  # pairs that are no token's stand at the last one
            head = sorted(set(head))
        assert head == sorted(set(head)) and head[0] >= 0 and head[-1] < n_tokens
        if n_keep >= 2 * (n_sink + n_window) or n_keep == n_tokens:
            assert head[:n_sink] == list(range(min(n_sink, n_tokens)))
            assert head[len(head) - n_window :][:n_window] == list(range(n_tokens))[-n_window or n_tokens :]
    if name in IN_BLOCK or name == "lukv":
        assert sum(map(len, heads)) == n_keep * len(heads)
    n_held = sum(map(len, heads))
    assert past.achieved_ratio() == pytest.approx(1 - n_held / (n_tokens * len(heads)))
    again = prefilled(PrefillDecodingPress(press), model, distinct(n_tokens), dtype=dtype)
    for ours, theirs in zip(past.pressed_layers(), again.pressed_layers(), strict=True):
        assert torch.equal(ours.positions(), theirs.positions()) and torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values) and ours.keys.isfinite().all()


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", [name for name in (*IN_BLOCK, *OTHERS) if name not in ALONE])
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.sampled_from(MODELS),
    pads=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 2, 9])), min_size=2, max_size=3),
    data=st.data(),
)
def test_rows_are_what_they_are_alone_in_any_order(
    name: str, model: str, pads: list[tuple[int, int]], data: st.DataObject
) -> None:
    """What is kept of each row, and the answers to a question after it."""
    length, own, press = 40, tiny(model), of_model(name, model, 0.5)
    order = data.draw(st.permutations(range(len(pads))))
    mask, question = torch.ones(len(pads), length + 3, dtype=torch.long), tokens(1, 3, seed=5)
    for i, (before, after) in enumerate(pads):
        mask[i, :before] = mask[i, length - after : length] = 0
    ids = distinct(length, len(pads)) * mask[:, :length]
    past = prefilled(press, model, ids[order], mask[order, :length])
    kept = [held(past, i) for i in range(len(pads))]
    places = (mask.cumsum(-1) - 1)[order, length:]
    with torch.no_grad():
        turn = question.expand(len(pads), -1)
        logits = own(turn, attention_mask=mask[order], position_ids=places, **cache_argument(past)).logits
        for i, row in enumerate(order):
            before, after = pads[row]
            alone = prefilled(press, model, ids[row : row + 1, before : length - after])
            found = [[[t - before for t in head] for head in layer] for layer in kept[i]]
            assert found == held(alone)
            torch.testing.assert_close(logits[i], own(question, **cache_argument(alone)).logits[0], atol=2e-4, rtol=0)
