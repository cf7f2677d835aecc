"""Which tokens must stay: one mask of sinks, window and pins, which every press and every wrapper honours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.contract.architectures import tiny
from tests.presses.others import OTHERS, WITH_RATIO
from tests.presses.test_properties import ALONE, MODELS, MORE, distinct, of_model, press_of
from tests.presses.views import view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    CAMPress,
    CapPress,
    ChunkPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    DMSPress,
    EntropyGatedChunkKVPress,
    ExpectedAttentionPress,
    FairPress,
    FastKVzipPress,
    FinchPress,
    Kept,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    LUKVPress,
    MergingPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.forced import as_far_as, ends, forced, must_keep, shrink_protected
from coldpress.errors import PressError

COMPOSED: dict[str, Callable[[float], BasePress]] = {
    "adakv": lambda r: AdaKVPress(ExpectedAttentionPress(r), 0.0),
    "critical": lambda r: CriticalKVPress(SnapKVPress(r, window_size=4)),
    "critical_adakv": lambda r: CriticalAdaKVPress(SnapKVPress(r, window_size=4), 0.0),
    "entropy": lambda r: EntropyGatedChunkKVPress(SnapKVPress(r, window_size=3), 6, low_entropy_chunk_length=2),
    "finch": lambda r: FinchPress(r, window_size=5, chunk_length=8, rerotate_keys=False),
    "chunk_window": lambda r: ChunkPress(SnapKVPress(r, window_size=6), chunk_length=9),
    "block_window": lambda r: BlockPress(SnapKVPress(r, window_size=5), block_size=3),
    "composed_three": lambda r: ComposedPress([StreamingLLMPress(), KnormPress(), CapPress()]).with_ratio(r),
    "rerotated_merging": lambda r: KeyRerotationPress(MergingPress(AdaKVPress(SnapKVPress(r, window_size=4)))),
    "think_per_layer": lambda r: ThinKPress(0.5, 4, press=PerLayerCompressionPress(AdaKVPress(KnormPress()), [r, r])),
    "per_layer_chunks": lambda r: PerLayerCompressionPress(ChunkPress(KnormPress(), 7), [r, r]),
    "fair": lambda r: FairPress(SnapKVPress(r, window_size=4), [(0, 5), (20, 31)]),
    "fair_adakv": lambda r: FairPress(AdaKVPress(KnormPress(r), 0.0), [(3, 5), (5, 12)]),
    "both": lambda r: PrefillDecodingPress(AdaKVPress(KnormPress(r)), DecodingPress(KnormPress())),
}
NO_COUNT = [name for name in OTHERS if name not in WITH_RATIO and name != "lukv"]
N = 37


def pinned(view: LayerView, pins: Tensor) -> LayerView:
    return replace(view, columns={"pinned": pins.expand(view.keys.shape[:3]).clone()}, _memo={})


def check_kept(kept: Kept | None, pins: Tensor, n_keep: int | None) -> None:
    """Every pinned token is kept in every head; the heads of a row keep ``n_keep`` on average."""
    assert kept is not None
    for row in range(len(kept.positions)):
        heads = [[t for t in head.tolist() if t >= 0] for head in kept.positions[row]]
        for head, own in zip(heads, pins.expand(*kept.positions.shape[:2], N)[row], strict=True):
            assert {*own.nonzero()[:, 0].tolist()} <= {*head} and head == sorted({*head})
        assert n_keep is None or sum(map(len, heads)) == n_keep * len(heads)
    held = kept.columns["pinned"] & (kept.positions >= 0)
    assert torch.equal(held.sum(-1), pins.expand(*kept.positions.shape[:2], N).sum(-1))


def made(name: str, ratio: float, model: str) -> BasePress:
    if name in COMPOSED:
        return COMPOSED[name](ratio)
    if name in OTHERS:
        view = view_of(model)
        return OTHERS[name](view.n_layers, view.keys.shape[1])
    return press_of(name, ratio)


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize("name", [*WITH_RATIO, *MORE, *COMPOSED, *OTHERS])
@settings(max_examples=12, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    model=st.sampled_from(MODELS),
    ratio=st.sampled_from([0.2, 0.5, 0.7]),
    tokens=st.sets(st.integers(0, N - 1), min_size=1, max_size=6),
    is_shared=st.booleans(),
)
def test_what_is_pinned_stays(name: str, model: str, ratio: float, tokens: set[int], is_shared: bool) -> None:
    view = view_of(model)
    pins = torch.zeros(1 if is_shared else 2, 1 if is_shared else view.keys.shape[1], N, dtype=torch.bool)
    for i, t in enumerate(sorted(tokens)):
        pins[i % len(pins), i // len(pins) % pins.shape[1], t] = True
        if is_shared:
            pins[..., t] = True
    press = made(name, ratio, model)
    n_keep = None if name in NO_COUNT or name == "both" else press.keep(view)  # type: ignore[attr-defined]
    try:
        kept = press.compress(pinned(view, pins))
    except PressError as error:
        assert "must stay" in str(error), error
        protected = press.protected(view) if hasattr(press, "protected") else (0, 0)
        assert n_keep is None or int((pins | ends(view, protected)).sum(-1).max()) > n_keep
        assume(False)
    check_kept(kept, pins, None if name == "lukv" else n_keep)
    if name == "lukv":  # counts differ by layer
        plain = press.compress(view)
        assert plain is not None and kept is not None
        assert (kept.positions >= 0).sum() == (plain.positions >= 0).sum()


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", ALONE)
def test_presses_that_read_the_text_again_keep_what_is_pinned(name: str) -> None:
    tokens, model = [5, 6, 17], tiny("llama")

    def prefilled(ratio: float) -> PressedCache:
        past = PressedCache(pin=[(5, 7), (17, 18)])
        with torch.no_grad(), of_model(name, "llama", ratio)(model):
            model(distinct(N), **cache_argument(past))
        return past

    past = prefilled(0.6)
    n_kept = 0
    for layer in past.pressed_layers():
        for head in layer.positions()[0]:
            assert {*tokens} <= {*head.tolist()}
            n_kept += int((head >= 0).sum())
    assert n_kept == sum(layer.positions().shape[1] for layer in past.pressed_layers()) * (N - 23)
    with pytest.raises(PressError, match=r"3 pinned tokens, .* the budget keeps 1 of each head"):
        prefilled(0.96)


def test_fastkvzip_keeps_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastKVzipPress, "score", lambda self, view: view.value_norms())
    view, pins = view_of("llama"), torch.zeros(1, 1, N, dtype=torch.bool)
    pins[..., 9:12] = True
    kept = FastKVzipPress(0.5).compress(pinned(view, pins))
    assert kept is not None and kept.carry is not None and "pinned" in kept.columns
    assert (kept.carry.isinf() == forced(pinned(view, pins), (4, 1))).all()


@pytest.mark.parametrize("schedule", [DecodingPress, CAMPress])
@pytest.mark.parametrize("inner", [SnapKVPress(window_size=4), AdaKVPress(KnormPress(), 0.0)], ids=repr)
def test_what_is_pinned_stays_while_decoding(schedule: type[DecodingPress], inner: SnapKVPress) -> None:
    """Heads hold different tokens by then, and some of them fewer."""
    view = view_of("llama")
    counts = torch.tensor([[N, 20], [25, N]])
    slots = torch.arange(N).expand(2, 2, N)
    positions = (2 * slots + 30).masked_fill(slots >= counts[..., None], -1)
    later = replace(
        view, positions=positions, counts=counts, first_position=120 - N, queries=view.queries[:, :, -4:], n_new=4
    )
    pins = torch.isin(positions, torch.tensor([34, 50, 52]))
    press = schedule(inner, target_size=12, compression_interval=4)
    kept = press.compress_again(pinned(later, pins))
    assert kept is not None
    for row in range(2):
        heads = [[t for t in head.tolist() if t >= 0] for head in kept.positions[row]]
        assert sum(map(len, heads)) == 24
        assert all({2, 10, 11} <= {*head} for head in heads)


def test_dms_judges_nothing_that_is_pinned() -> None:
    view, pins = view_of("llama"), torch.zeros(1, 1, N, dtype=torch.bool)
    pins[..., [7, 20]] = True
    press = DMSPress(KnormPress(), 1e6, decoding=True)
    assert torch.equal(press.judge(pinned(view, pins)), pins.expand(view.keys.shape[:3]))
    assert not press.judge(view).any()


def test_a_budget_below_what_is_pinned_is_refused_with_the_numbers() -> None:
    view, pins = view_of("llama"), torch.zeros(1, 1, N, dtype=torch.bool)
    pins[..., 10:20] = True
    said = r"10 pinned tokens, 4 sinks and a window of 1 are 15 tokens that must stay, and the budget keeps 11 .*=15 or"
    for press in (StreamingLLMPress(0.7), AdaKVPress(StreamingLLMPress(0.7))):
        with pytest.raises(PressError, match=said):
            press.compress(pinned(view, pins))
    pins[...] = False
    pins[..., :10] = True  # sinks are among them
    assert StreamingLLMPress(0.7).compress(pinned(view, pins)) is not None
    with pytest.raises(PressError, match="must stay, and the budget keeps 7 of each head"):
        LUKVPress(KnormPress(0.8), curves=[[[0.8] * 2] * 2] * 99).compress(pinned(view, pins))


@given(st.integers(1, 30), st.integers(0, 12), st.integers(0, 12), st.integers(0, 9), st.data())
def test_the_mask_of_both_ends(n_tokens: int, n_sink: int, n_window: int, n_gone: int, data: st.DataObject) -> None:
    """As sinks and window of a view were counted by hand; n_gone tokens are behind a sliding window."""
    n_keep = data.draw(st.integers(1, n_tokens))
    at = torch.arange(n_gone, n_gone + n_tokens)[None, None]
    mask = must_keep(at, n_gone + n_tokens, (n_sink, n_window), n_keep, n_gone=n_gone)[0, 0].tolist()
    sink, window = shrink_protected(n_keep, max(0, n_sink - n_gone), min(n_window, n_tokens))
    assert mask == [t < sink or t >= n_tokens - window for t in range(n_tokens)]
    assert sum(mask) <= n_keep


def test_the_mask_goes_by_positions_and_leaves_empty_slots_out() -> None:
    view = view_of("llama")
    positions = torch.full((2, 2, N), -1)
    positions[..., :5] = torch.tensor([0, 3, 7, 40, 41])
    later = replace(view, positions=positions, counts=torch.full((2, 2), 5), first_position=42 - N, _memo={})
    assert forced(later, (4, 2))[0, 0].nonzero()[:, 0].tolist() == [0, 1, 3, 4]
    assert forced(later, (4, 1), grace=3)[0, 0].nonzero()[:, 0].tolist() == [0, 1, 3, 4]
    assert forced(pinned(later, torch.ones(1, 1, N, dtype=torch.bool)), (0, 0))[1, 1].sum() == 5


def test_what_does_not_fit_beside_pins_gives_way_from_its_start() -> None:
    must, more = torch.tensor([[[True, False, False, False]]]), torch.tensor([[[False, True, False, True]]])
    assert as_far_as(must, more, 2)[0, 0].tolist() == [True, False, False, True]
    assert as_far_as(must, more, torch.tensor([[3]]))[0, 0].tolist() == [True, True, False, True]
    assert as_far_as(None, more, 1) is more


def test_what_is_protected_has_what_reserved_tokens_leave() -> None:
    view = view_of("llama", 20)
    reserved = torch.zeros(1, 1, 20, dtype=torch.bool)
    reserved[..., 6:11] = True
    for n_keep, kept in (
        (6, [*range(6, 11), 19]),
        (7, [0, *range(6, 11), 19]),
        (20, [0, 1, *range(6, 11), *range(16, 20)]),
    ):
        assert forced(view, (2, 4), n_keep, reserved=reserved)[0, 0].nonzero()[:, 0].tolist() == kept
