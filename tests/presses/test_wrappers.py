"""Wrappers against slow versions of what they promise, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.oracles.all_pairs import AllPairs
from tests.oracles.choices import adaptive, best, ends
from tests.presses.views import MODELS, view_of, views_of
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from coldpress import (
    AdaKVPress,
    BlockPress,
    CapPress,
    ChunkKVPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    LagKVPress,
    LayerView,
    MergingPress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    PressedCache,
    PyramidKVPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.projection import output_weight
from coldpress.core.counts import keep_count, spread
from coldpress.core.kept import Place
from coldpress.errors import ModelError, PressError

every_model = pytest.mark.parametrize("model", MODELS)
every_ratio = pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
N_TOKENS = 37


def heads_of(positions: Tensor) -> list[list[list[int]]]:
    """What every head of every row keeps."""
    return [[[t for t in head if t >= 0] for head in row] for row in positions.tolist()]


# -- AdaKV and CriticalKV -----------------------------------------------------------------------------------------


@every_model
@every_ratio
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_adakv(model: str, ratio: float, alpha: float) -> None:
    view, inner = view_of(model), SnapKVPress(ratio, window_size=4)
    n_keep = keep_count(N_TOKENS, ratio)
    scores = inner.score(view)
    expected = [adaptive(row, n_keep, math.floor(alpha * n_keep + 1e-9), ends(N_TOKENS, 0, 4)) for row in scores]
    press = AdaKVPress(inner, alpha_safeguard=alpha)
    positions = press.choose(view)
    assert positions is not None and heads_of(positions) == expected
    if alpha == 1.0:
        assert torch.equal(positions, inner.choose(view))


def weighted_norm(model: str, view: LayerView, b: int, h: int, t: int) -> float:
    """Mean over the group's heads of the L1 norm of a value behind its slice of the output projection."""
    attention = view.module
    weight = attention.dense.weight if model.startswith("gpt_neox") else attention.o_proj.weight
    dim = view.values.shape[3]
    total = 0.0
    for g in range(view.group_size):
        column = (h * view.group_size + g) * dim
        total += float((weight[:, column : column + dim] @ view.values[b, h, t]).abs().sum())
    return total / view.group_size


def critical(model: str, view: LayerView, scores: Tensor, b: int, h: int, n: int, first: float, always: list[int]):
    plain = {t: float(scores[b, h, t]) for t in range(N_TOKENS)}
    stage_1 = best(plain, math.floor(first * n + 1e-9), *always)
    weighted = {t: (s + 1e-4) * weighted_norm(model, view, b, h, t) for t, s in plain.items()}
    return best(weighted, n, *stage_1, *always)


@every_model
@every_ratio
@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
def test_criticalkv(model: str, ratio: float, first: float) -> None:
    view, inner = view_of(model), ExpectedAttentionPress(ratio, use_vnorm=False, n_future_positions=20)
    n_keep, scores, always = keep_count(N_TOKENS, ratio), inner.score(view), ends(N_TOKENS, 4, 0)
    n_batch, n_heads = view.keys.shape[:2]
    expected = [
        [critical(model, view, scores, b, h, n_keep, first, always) for h in range(n_heads)] for b in range(n_batch)
    ]
    press = CriticalKVPress(inner, first_stage_ratio=first)
    assert heads_of(press.choose(view)) == expected
    if first == 1.0:
        assert torch.equal(press.choose(view), inner.choose(view))


@every_model
@every_ratio
def test_critical_adakv(model: str, ratio: float) -> None:
    view, inner = view_of(model), SnapKVPress(ratio, window_size=4)
    n_keep, scores, always = keep_count(N_TOKENS, ratio), inner.score(view), ends(N_TOKENS, 0, 4)
    expected = []
    for b, row in enumerate(scores):
        counts = [len(head) for head in adaptive(row, n_keep, math.floor(0.2 * n_keep + 1e-9), always)]
        expected.append([critical(model, view, scores, b, h, n, 0.5, always) for h, n in enumerate(counts)])
    assert heads_of(CriticalAdaKVPress(inner).choose(view)) == expected


def test_heads_that_keep_different_numbers_are_stored_and_attended_to_as_such() -> None:
    """The next tokens' logits are those of the full cache with every evicted pair masked in every head."""
    model, ids = tiny("llama"), tokens(2, 45)
    press = AdaKVPress(SnapKVPress(0.6, window_size=4), alpha_safeguard=0.0)
    past, masked = PressedCache(press), AllPairs("llama")
    model(ids[:, :40], **cache_argument(past)), masked.read(ids[:, :40])
    masked.keep(past)
    counts = [(past.positions(i) >= 0).sum(-1) for i in range(2)]
    assert any(n.unique().numel() > 1 for n in counts)  # else this tests nothing
    assert [int(n.sum()) for n in counts] == [2 * 2 * keep_count(40, 0.6)] * 2
    assert past.stored_lengths() == [int(n.max()) for n in counts]
    assert abs(past.achieved_ratio() - (1 - keep_count(40, 0.6) / 40)) < 1e-9
    actual = model(ids[:, 40:], **cache_argument(past)).logits

    torch.testing.assert_close(actual, masked.read(ids[:, 40:]), atol=1e-5, rtol=0)


# -- chunks and blocks --------------------------------------------------------------------------------------------


@every_model
@every_ratio
@pytest.mark.parametrize("length", [1, 5, 100])
def test_chunkkv(model: str, ratio: float, length: int) -> None:
    view, inner = view_of(model), SnapKVPress(ratio, window_size=4)
    n_keep, scores = keep_count(N_TOKENS, ratio), inner.score(view)
    always = ends(N_TOKENS, 0, 4)
    expected = []
    for row in scores:
        by_token = {}
        for start in range(0, N_TOKENS, length):
            chunk = range(start, min(start + length, N_TOKENS))
            counted = [t for t in chunk if t not in always]
            mean = sum(float(row[h, t]) for h in range(len(row)) for t in counted) / max(1, len(counted)) / len(row)
            by_token |= dict.fromkeys(chunk, mean)
        expected.append([best(by_token, n_keep, *always)] * len(row))
    press = ChunkKVPress(inner, chunk_length=length)
    assert heads_of(press.choose(view)) == expected


@every_model
@every_ratio
@pytest.mark.parametrize("length", [8, 12])
def test_chunk_press_scores_each_chunk_as_a_text_of_its_own(model: str, ratio: float, length: int) -> None:
    view, inner = view_of(model), KeyDiffPress(ratio)
    n_keep, expected = keep_count(N_TOKENS, ratio), []
    starts = list(range(0, N_TOKENS, length))
    sizes = [min(length, N_TOKENS - a) for a in starts]
    counts = [n_keep * size // N_TOKENS for size in sizes]
    while sum(counts) < n_keep:  # one more for the chunk that rounding down has cost most
        lost = [round(n_keep * size / N_TOKENS - count, 9) for size, count in zip(sizes, counts, strict=True)]
        counts[lost.index(max(lost))] += 1
    for b in range(view.keys.shape[0]):
        row = []
        for h in range(view.keys.shape[1]):
            kept = []
            for start, size, count in zip(starts, sizes, counts, strict=True):
                keys = view.keys[b, h, start : start + size]
                anchor = (keys / keys.norm(dim=1, keepdim=True)).mean(0)
                scores = {start + i: -float(k @ anchor / k.norm() / anchor.norm()) for i, k in enumerate(keys)}
                kept += best(scores, count)
            row.append(kept)
        expected.append(row)
    assert heads_of(ChunkPress(inner, chunk_length=length).choose(view)) == expected


def test_chunk_press_sees_queries_at_their_own_positions() -> None:
    """A chunk's view says where it begins, so that queries are rotated back from where they stood."""
    view = view_of("gpt_neox")
    part = view.part(12, 30)
    moved = LayerView(
        part.keys, part.values, part.queries, part.module, part.scaling, part.layer_idx, part.n_layers,
        first_position=12, find_rope=view.find_rope,
    )  # fmt: skip
    for press in (ExpectedAttentionPress(n_sink=0), CapPress(n_sink=0), SnapKVPress(window_size=3)):
        torch.testing.assert_close(press.score(part), press.score(moved))


@every_ratio
def test_chunk_press_keeps_what_the_inner_press_protects(ratio: float) -> None:
    view = view_of("gpt_neox")
    for length in (5, 9, 11):
        for inner in (SnapKVPress(ratio, window_size=7), StreamingLLMPress(ratio), LagKVPress(ratio, lag_size=3)):
            n_keep = keep_count(N_TOKENS, ratio)
            always = inner.forced(view, n_keep)[0, 0].nonzero()[:, 0].tolist()
            positions = ChunkPress(inner, chunk_length=length).choose(view)
            assert positions is not None and positions.shape[-1] == n_keep
            for head in positions.flatten(0, 1):
                assert {*always} <= {*head.tolist()}
                assert (head.diff() > 0).all()


def test_spread_gives_exactly_what_there_is() -> None:
    assert spread(10, [0, 0, 0], [10, 10, 10]) == [4, 3, 3]
    assert spread(383, [0, 0, 0], [256, 256, 255]) == [128, 128, 127]  # half of each, as far as there are halves
    assert spread(10, [4, 0, 2], [10, 10, 5]) == [5, 2, 3]
    assert spread(3, [0, 3], [10, 3]) == [0, 3]
    assert spread(3, [3], [3]) == [3] and spread(13, [0, 3], [10, 3]) == [10, 3]


@every_model
@every_ratio
@pytest.mark.parametrize("size", [5, 16, 100])
def test_block_keydiff(model: str, ratio: float, size: int) -> None:
    view, n_keep = view_of(model), keep_count(N_TOKENS, ratio)
    expected = []
    for b in range(view.keys.shape[0]):
        row = []
        for h in range(view.keys.shape[1]):
            held = list(range(n_keep))
            for start in range(n_keep, N_TOKENS, size):
                held += range(start, min(start + size, N_TOKENS))
                keys = view.keys[b, h, held]
                anchor = (keys / keys.norm(dim=1, keepdim=True)).mean(0)
                scores = {t: -float(k @ anchor / k.norm() / anchor.norm()) for t, k in zip(held, keys, strict=True)}
                held = best(scores, n_keep)
            row.append(held)
        expected.append(row)
    press = BlockPress(KeyDiffPress(ratio), block_size=size)
    assert heads_of(press.choose(view)) == expected
    if size == 100:
        assert torch.equal(press.choose(view), KeyDiffPress(ratio).choose(view))


@every_model
def test_block_press_shows_the_blocks_queries(model: str) -> None:
    """K: the queries of a block were made from a hidden state stitched together from other tokens in every head."""
    view, n_keep, size = view_of(model), 12, 9
    n_batch, n_heads, group = *view.keys.shape[:2], view.group_size
    held = [[list(range(n_keep)) for _ in range(n_heads)] for _ in range(n_batch)]
    for start in range(n_keep, N_TOKENS, size):
        stop = min(start + size, N_TOKENS)
        for b in range(n_batch):
            tokens_of = [held[b][h] + list(range(start, stop)) for h in range(n_heads)]
            mean = torch.zeros(len(tokens_of[0]))
            for h in range(n_heads):
                for g in range(group):
                    query = view.queries[b, h * group + g, stop - 1]
                    mean += (view.keys[b, h, tokens_of[h]] @ query * view.scaling).softmax(0) / (n_heads * group)
            for h in range(n_heads):  # by place among what is held, the same for all heads
                scores = {t: float(mean[i]) for i, t in enumerate(tokens_of[h])}
                held[b][h] = best(scores, n_keep, stop - 1)
    press = BlockPress(TOVAPress(0.67), block_size=size)
    assert press.keep(view) == n_keep
    assert heads_of(press.choose(view)) == held


def test_block_press_keeps_sinks_and_window() -> None:
    view = view_of("gpt_neox")
    for inner in (StreamingLLMPress(0.6), SnapKVPress(0.6, window_size=6), CURPress(0.6), LagKVPress(0.6, lag_size=3)):
        always = inner.forced(view, keep_count(N_TOKENS, 0.6))[0, 0].nonzero()[:, 0].tolist()
        for head in BlockPress(inner, block_size=7).choose(view).flatten(0, 1):
            assert {*always} <= {*head.tolist()}


# -- several presses, several ratios ------------------------------------------------------------------------------


@every_model
def test_composed_press(model: str) -> None:
    view = view_of(model)
    presses = [KnormPress(0.3), SnapKVPress(0.5, window_size=4)]
    first, second = (press.score(view) for press in presses)
    n_first = keep_count(N_TOKENS, 0.3)
    n_second = keep_count(n_first, 0.5)
    always, expected = ends(N_TOKENS, 0, 4), []
    for b in range(view.keys.shape[0]):
        row = []
        for h in range(view.keys.shape[1]):
            left = best({t: float(first[b, h, t]) for t in range(N_TOKENS)}, n_first, *always)
            row.append(best({t: float(second[b, h, t]) for t in left}, n_second, *always))
        expected.append(row)
    press = ComposedPress(presses)
    assert heads_of(press.choose(view)) == expected
    assert press.compression_ratio == 0.65
    assert torch.equal(ComposedPress([presses[1]]).choose(view), presses[1].choose(view))


def test_composed_press_at_another_ratio() -> None:
    press = ComposedPress([KnormPress(0.5), KeyDiffPress(0.5)]).with_ratio(0.36)
    assert [p.compression_ratio for p in press.presses] == [0.2, 0.2]
    assert press.with_ratio(0.0) == ComposedPress([KnormPress(), KeyDiffPress()])
    assert press.with_ratio(0.0).compression_ratio == 0
    assert [p.compression_ratio for p in press.with_ratio(0.0).with_ratio(0.75).presses] == [0.5, 0.5]


@every_model
def test_per_layer_compression(model: str) -> None:
    own, ids = tiny(model), tokens(1, 40)
    press = PerLayerCompressionPress(KnormPress(0.9), [0.25, 0.5])
    assert press.compression_ratio == 0.375
    past = PressedCache(press)
    own(ids, **cache_argument(past))
    assert past.stored_lengths() == [30, 20] == [press.keep_of(40, Place(i, 2, 0)) for i in (0, 1)]
    for layer, view, n in zip(past.pressed_layers(), views_of(model, ids), (30, 20), strict=True):
        for keys, found in zip(view.keys[0], layer.positions()[0].tolist(), strict=True):
            assert found == sorted(sorted(range(40), key=lambda t, keys=keys: float(keys[t].norm()))[:n])
    logits = own(tokens(1, 7), **cache_argument(past)).logits  # a question of several tokens
    assert torch.isfinite(logits).all()
    assert press.with_ratio(0.6).compression_ratios == (0.4, 0.8)
    assert press.with_ratio(0.0).with_ratio(0.3).compression_ratios == (0.3, 0.3)
    with pytest.raises(PressError, match=r"number in \[0, 1\)"):
        press.with_ratio(0.9)
    with pytest.raises(PressError, match="3 ratios and the model compresses 2"):
        own(ids, **cache_argument(PressedCache(PerLayerCompressionPress(KnormPress(), [0.1, 0.2, 0.3]))))


def test_budgets_of_layers_survive_wrapping() -> None:
    """K: wrappers took the scores of PyramidKV and silently dropped its budgets of layers."""
    inner = PyramidKVPress(0.5, window_size=4, beta=3)
    for wrapper in (*WRAPPERS, MergingPress, lambda press: ThinKPress(0.5, press=press)):
        press = wrapper(inner)
        for i in range(2):
            view = view_of("llama", layer=i)
            kept = press.choose(view)
            assert int((kept >= 0).sum()) == inner.keep(view) * view.keys.shape[:2].numel() == press.keep(view) * 4
        assert press.keep_of(40, Place(0, 2, 0)) > press.keep_of(40, Place(1, 2, 0))


# -- the mechanism ------------------------------------------------------------------------------------------------

WRAPPERS = [AdaKVPress, ChunkKVPress, ChunkPress, BlockPress, CriticalKVPress, CriticalAdaKVPress, KeyRerotationPress]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_forwards_the_ratio(wrapper: type) -> None:
    press = wrapper(SnapKVPress(0.3, window_size=4))
    assert press.compression_ratio == 0.3
    assert press.with_ratio(0.6) == wrapper(SnapKVPress(0.6, window_size=4)) != press
    assert press.with_ratio(0.6).compression_ratio == 0.6
    assert wrapper(press=SnapKVPress(0.3, window_size=4)) == press and hash(press) == hash(press.with_ratio(0.3))
    assert press.with_ratio(0.0).choose(view_of("llama")) is None
    assert "SnapKVPress" in repr(press) and repr(press).count("compression_ratio") == 1


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_refuses_what_it_cannot_wrap(wrapper: type) -> None:
    for other in (None, SnapKVPress, "snapkv"):
        with pytest.raises(PressError, match=r"wraps a press such as SnapKVPress\(0.5\), got"):
            wrapper(other)
    with pytest.raises(PressError, match="KeyRerotationPress"):
        wrapper(KeyRerotationPress(SnapKVPress(0.5)))


@pytest.mark.parametrize("wrapper", WRAPPERS[:-1])
def test_a_wrapper_that_chooses_by_scores_refuses_a_wrapper(wrapper: type) -> None:
    for inner in (AdaKVPress(SnapKVPress(0.5)), CriticalKVPress(SnapKVPress(0.5)), ComposedPress([SnapKVPress(0.5)])):
        with pytest.raises(PressError, match="makes that choice in its own way"):
            wrapper(inner)


def test_combinations_that_make_no_sense_say_why() -> None:
    for wrapper in (CriticalKVPress, CriticalAdaKVPress):
        for inner in (
            KnormPress(0.5),
            KeyDiffPress(0.5),
            StreamingLLMPress(0.5),
            RandomPress(0.5),
            CompactorPress(0.5),
        ):
            with pytest.raises(PressError, match="scores that are no attention"):
                wrapper(inner)
        with pytest.raises(PressError, match="use_vnorm=False"):
            wrapper(ExpectedAttentionPress(0.5))
        wrapper(ObservedAttentionPress(0.5))
    for inner in (NonCausalAttnPress(0.5), CompactorPress(0.5)):
        with pytest.raises(PressError, match="needs those of all tokens"):
            BlockPress(inner)
    for inner in (PyramidKVPress(0.5), AdaKVPress(PyramidKVPress(0.5)), PerLayerCompressionPress(KnormPress(), [0.5])):
        with pytest.raises(PressError, match=r"decide by itself how much each layer keeps, and \w+ does so too"):
            PerLayerCompressionPress(inner, [0.5, 0.5])
    with pytest.raises(PressError, match="one for each layer"):
        PerLayerCompressionPress(KnormPress())
    for given in ([], None, KnormPress(0.5)):
        with pytest.raises(PressError, match="list of at least one press"):
            ComposedPress(given)
    with pytest.raises(PressError, match="makes that choice in its own way"):
        ComposedPress([KnormPress(0.5), AdaKVPress(SnapKVPress(0.5))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaKVPress(SnapKVPress(), alpha_safeguard=1.2), r"alpha_safeguard must be a number in \[0, 1\]"),
        (lambda: CriticalKVPress(SnapKVPress(), epsilon=-1.0), "epsilon must be a number >= 0"),
        (lambda: CriticalKVPress(SnapKVPress(), first_stage_ratio=2.0), "first_stage_ratio"),
        (lambda: ChunkKVPress(SnapKVPress(), chunk_length=0), "chunk_length must be an integer >= 1"),
        (lambda: BlockPress(SnapKVPress(), block_size=0), "block_size"),
        (lambda: LagKVPress(lag_size=0), "lag_size"),
        (lambda: CURPress(leverage_type="product"), "leverage_type must be one of .* Did you mean 'kv_product'"),
        (lambda: CompactorPress(blending=-0.1), "blending must be a number >= 0"),
        (lambda: PerLayerCompressionPress(KnormPress(), [0.5, 1.0]), "each of compression_ratios"),
    ],
)
def test_impossible_parameters(make, message: str) -> None:
    with pytest.raises(PressError, match=message):
        make()


def test_wrappers_nest_where_it_makes_sense() -> None:
    view = view_of("llama")
    inner = AdaKVPress(SnapKVPress(0.5, window_size=4))
    with pytest.raises(PressError, match="put it outside"):
        PerLayerCompressionPress(KeyRerotationPress(inner), [0.5, 0.5])
    outer = KeyRerotationPress(PerLayerCompressionPress(inner, [0.2, 0.7]))
    assert torch.equal(outer.compress(view).positions, inner.with_ratio(0.7).choose(view))
    assert outer.compression_ratio == 0.45


# -- names --------------------------------------------------------------------------------------------------------


def test_names_stand_for_wrappers_with_a_press_inside() -> None:
    assert make_press("adakv_snapkv", 0.5) == AdaKVPress(SnapKVPress(0.5))
    assert make_press("block_keydiff", 0.5, block_size=32) == BlockPress(KeyDiffPress(0.5), block_size=32)
    assert make_press("chunkkv", 0.5, chunk_length=10, window_size=32) == ChunkKVPress(SnapKVPress(0.5, 32), 10)
    assert make_press("critical_expected_attention", 0.5, epsilon=1e-3, n_sink=2) == CriticalKVPress(
        ExpectedAttentionPress(0.5, n_sink=2, use_vnorm=False), epsilon=1e-3
    )
    with pytest.raises(PressError, match=r"adakv_snapkv has no parameter 'windowsize'. Did you mean 'window_size'"):
        make_press("adakv_snapkv", 0.5, windowsize=3)
    with pytest.raises(PressError, match="has no parameter 'press'"):
        make_press("adakv_snapkv", 0.5, press=KnormPress())


# -- the output projection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_output_projection_of_every_architecture(name: str) -> None:
    """It is the linear layer that the attention layer calls last."""
    view, called = views_of(name, tokens(1, 9))[-1], []
    linear = [m for m in view.module.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    handles = [m.register_forward_hook(lambda m, args, output: called.append((m, args[0]))) for m in linear]
    tiny(name, "coldpress", torch.float32)(tokens(1, 9), use_cache=False)
    for handle in handles:
        handle.remove()
    last, heads = called[-1]
    weight = output_weight(view.module, heads.shape[-1], view.values.dtype, view.values.device)
    assert heads.shape[-1] == view.queries.shape[1] * view.values.shape[3]
    torch.testing.assert_close(heads @ weight.T, last(heads) - last(torch.zeros_like(heads)), atol=1e-4, rtol=1e-4)


def test_output_projection_of_layers_that_are_no_linear_ones() -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.extra = torch.nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.extra(x)

    class Attention(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.o_proj = Adapted(torch.nn.Linear(width, 5))

    module = Attention(12)
    weight = output_weight(module, 12, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(weight, module.o_proj.base.weight + module.o_proj.extra.weight, atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match="no output projection"):
        output_weight(torch.nn.Linear(3, 3), 3, torch.float32, torch.device("cpu"))
