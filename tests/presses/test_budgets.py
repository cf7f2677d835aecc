"""Budgets in tokens and bytes, beside the ratio."""

from __future__ import annotations

import pytest
from tests.contract.architectures import tiny, tokens
from tests.presses.others import IN_BLOCK

from coldpress import (
    AdaKVPress,
    AttentionMatchingPress,
    Codec,
    ComposedPress,
    KnormPress,
    KVBits,
    KVComposePress,
    MassMergingPress,
    MergingPress,
    MomentKVPress,
    PerLayerCompressionPress,
    PressedCache,
    PyramidKVPress,
    RotatedBits,
    ScorerPress,
    SnapKVPress,
    make_press,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError

with_a_ratio = [
    name for name in press_names(kind="training-free", has_ratio=True, at_prefill=True) if name not in IN_BLOCK
]


def prefilled(press: ScorerPress, n_tokens: int = 60, rows: int = 1) -> PressedCache:
    past = PressedCache(press)
    tiny("gpt_neox")(tokens(rows, n_tokens), **cache_argument(past))
    return past


def held(past: PressedCache) -> list[float]:
    """Pairs that a head holds on average, by layer."""
    return [(layer.positions() >= 0).sum(-1).double().mean().item() for layer in past.pressed_layers()]


@pytest.mark.parametrize("name", with_a_ratio)
def test_every_press_takes_a_budget_of_tokens(name: str) -> None:
    past = prefilled(make_press(name, 0.0, budget_tokens=24))
    assert sum(held(past)) == 2 * 24
    assert past.stored_lengths() == prefilled(make_press(name, 0.6)).stored_lengths()  # 60 * 0.4


@pytest.mark.parametrize("n_tokens", [1, 10, 24])
def test_a_budget_that_is_not_reached_keeps_everything(n_tokens: int) -> None:
    past = prefilled(KnormPress(budget_tokens=24), n_tokens)
    assert past.stored_lengths() == [n_tokens] * 2
    assert past.achieved_ratio() == 0


@pytest.mark.parametrize("press", [KnormPress, PyramidKVPress])
def test_a_budget_of_bytes_holds_for_each_row(press: type[ScorerPress]) -> None:
    token_bytes = 2 * 4 * 2 * 16 * 4  # layers, heads, keys and values, dimensions, float32
    past = prefilled(press(budget_bytes=20 * token_bytes + 5), rows=3)
    assert sum(held(past)) == 2 * 20
    tensors = [t for layer in past.pressed_layers() for t in (layer.keys, layer.values) if t is not None]
    assert sum(t.numel() * t.element_size() for t in tensors) <= 3 * (20 * token_bytes + 5)


@pytest.mark.parametrize(
    "storage", [RotatedBits(4, 4, newest=8), RotatedBits(8, 2, sinks=0, newest=0), KVBits(4, 16, 16), KVBits(2, 32, 0)]
)
@pytest.mark.parametrize("press", [KnormPress, PyramidKVPress])
def test_a_budget_of_bytes_is_of_what_few_bits_take(press: type[ScorerPress], storage: Codec) -> None:
    def bytes_after(n_bytes: int) -> int:
        past = PressedCache(press(budget_bytes=n_bytes), storage=storage)
        tiny("gpt_neox")(tokens(1, 400), **cache_argument(past))
        return past.kv_bytes()

    whole = 400 * 2 * 4 * 2 * 16 * 4  # tokens, layers, heads, keys and values, dimensions, float32
    least = bytes_after(whole // 8)
    assert 0.9 * whole / 8 < least <= whole / 8
    assert bytes_after(whole // 8 + 8 * 1024) > least + 4 * 1024  # or some pairs more would have fitted
    assert bytes_after(whole) < 0.6 * whole  # all of them


@pytest.mark.parametrize("n_tokens", [4, 20, 60])
@pytest.mark.parametrize("rows", [1, 2])
def test_pairs_that_all_wait_to_be_encoded_take_what_they_are(n_tokens: int, rows: int) -> None:
    """Where nothing is in codes yet, no code is held either."""
    n_bytes = n_tokens * 2 * 4 * 2 * 16 * 4
    past = PressedCache(KnormPress(budget_bytes=n_bytes), kv_bits="k8v4")
    tiny("gpt_neox")(tokens(rows, 100), **cache_argument(past))
    assert past.stored_lengths() == [n_tokens] * 2 and past.kv_bytes() == rows * n_bytes


@pytest.mark.parametrize("of_all", [0.1, 0.25, 0.27, 0.4])
def test_layers_that_keep_different_numbers_share_one_budget(of_all: float) -> None:
    """The short layers of a pyramid may keep too few pairs to encode any."""
    n_bytes = int(of_all * 200 * 2 * 4 * 2 * 16 * 4)
    press = PyramidKVPress(budget_bytes=n_bytes, window_size=8)
    past = PressedCache(press, storage=RotatedBits(4, 4, newest=32))
    tiny("gpt_neox")(tokens(1, 200), **cache_argument(past))
    assert 0.5 * n_bytes < past.kv_bytes() <= n_bytes


@pytest.mark.parametrize("press", [AttentionMatchingPress, MassMergingPress, MomentKVPress])
def test_a_budget_of_bytes_counts_biases(press: type[MergingPress]) -> None:
    pair = (2 * 16 + 1) * 4
    past = prefilled(press(SnapKVPress(budget_bytes=2 * 4 * 30 * pair, window_size=8)))
    assert past.stored_lengths() == [30, 30]
    assert past.kv_bytes() == 2 * 4 * 30 * pair


def test_branches_count_their_own_bits() -> None:
    n_bytes = 100 * 2 * 4 * 2 * 16 * 4
    codecs = [None, RotatedBits(8, 8, newest=8), RotatedBits(4, 4, newest=8)]
    past = PressedCache()
    branches = past.branches([KnormPress(budget_bytes=n_bytes)] * 3, codecs)
    tiny("gpt_neox")(tokens(1, 400), **cache_argument(past))
    for branch, codec in zip(branches, codecs, strict=True):
        alone = PressedCache(KnormPress(budget_bytes=n_bytes), storage=codec)
        tiny("gpt_neox")(tokens(1, 400), **cache_argument(alone))
        assert branch.stored_lengths() == alone.stored_lengths()
        assert branch.kv_bytes() == alone.kv_bytes() <= n_bytes


@pytest.mark.parametrize("press", [KVComposePress, AdaKVPress])
def test_presses_that_choose_among_all_heads_count_bits_too(press: type[ScorerPress]) -> None:
    n_bytes = 100 * 2 * 4 * 2 * 16 * 4
    inner = press(budget_bytes=n_bytes) if press is KVComposePress else press(KnormPress(budget_bytes=n_bytes))
    past, model = PressedCache(inner, storage=RotatedBits(4, 4, newest=8)), tiny("gpt_neox")
    with inner(model):
        model(tokens(1, 400), **cache_argument(past))
    assert past.stored_lengths()[0] > 150
    assert past.kv_bytes() <= n_bytes


def test_less_than_one_token_is_refused() -> None:
    with pytest.raises(PressError, match="less than the 1024 bytes of one token in 2 layers"):
        prefilled(KnormPress(budget_bytes=100))


@pytest.mark.parametrize("budget", [0, -1, 2.5, "9", True])
@pytest.mark.parametrize("name", ["budget_tokens", "budget_bytes"])
def test_budgets_are_positive_integers(name: str, budget: object) -> None:
    with pytest.raises(PressError, match=f"{name} must be an integer >= 1"):
        KnormPress(**{name: budget})


def test_only_one_of_them_says_how_much_is_kept() -> None:
    with pytest.raises(PressError, match="compression_ratio and budget_tokens both say how much is kept"):
        KnormPress(0.5, budget_tokens=9)
    with pytest.raises(PressError, match="budget_tokens and budget_bytes both"):
        SnapKVPress(budget_tokens=9, budget_bytes=9)
    with pytest.raises(PressError, match="compression_ratio and budget_tokens both"):
        make_press("knorm", 0.5, budget_tokens=9)


def test_wrappers_have_the_budget_of_the_press_inside() -> None:
    press = AdaKVPress(KnormPress(budget_tokens=9))
    assert (press.compression_ratio, press.budget_tokens) == (0.0, 9)
    assert press.with_ratio(0.5) == AdaKVPress(KnormPress(0.5))
    assert press.with_ratio(0.5).with_budget(budget_bytes=10**6) == AdaKVPress(KnormPress(budget_bytes=10**6))


def test_ratios_of_layers_or_presses_leave_no_place_for_a_budget() -> None:
    with pytest.raises(PressError, match="has a budget too"):
        PerLayerCompressionPress(KnormPress(budget_tokens=9), [0.5, 0.5])
    for press in (PerLayerCompressionPress(KnormPress(), [0.5]), ComposedPress([KnormPress(0.5)])):
        with pytest.raises(PressError, match="no budget in tokens or bytes"):
            press.with_budget(budget_tokens=9)


def test_composed_presses_count_down() -> None:
    past = prefilled(ComposedPress([KnormPress(0.5), SnapKVPress(budget_tokens=20, window_size=4)]))
    assert past.stored_lengths() == [20, 20]
