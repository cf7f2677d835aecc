"""What presses say of themselves: compared with what they do, and never inherited beyond what it was said of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO
from tests.presses.test_forced import COMPOSED
from tests.presses.test_properties import MODELS, MORE, press_of
from tests.presses.views import view_of
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    CompressionRatioDecodingPress,
    CriticalKVPress,
    DecodingPress,
    DMSPress,
    ExpectedAttentionPress,
    FinchPress,
    Kept,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    MergingPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    ThinKPress,
    TOVAPress,
    make_press,
)
from coldpress.core.kept import Place
from coldpress.core.press import parts
from coldpress.core.requirements import CHOICE, SCORER, require
from coldpress.errors import PressError

SCHEDULES: dict[str, BasePress] = {
    "decoding": DecodingPress(SnapKVPress(window_size=4), target_size=20),
    "decoding_ratio": CompressionRatioDecodingPress(KnormPress(), target_compression_ratio=0.8),
    "decoding_tova": DecodingPress(TOVAPress(), target_size=20),
}


def alone(view: LayerView, head: int) -> LayerView:
    """What a process would see that has but one KV head and the query heads that share it."""
    group = slice(head * view.group_size, (head + 1) * view.group_size)
    own = slice(head, head + 1)
    positions = None if view.positions is None else view.positions[:, own]
    return replace(
        view,
        keys=view.keys[:, own],
        values=view.values[:, own],
        queries=view.queries[:, group],
        positions=positions,
        _memo={},
    )


def looks_at_each_head_alone(view: LayerView, compress: Callable[[LayerView], Kept | None]) -> bool:
    """Whether each head keeps, and as many as the others, what it keeps where there is no other."""
    together = compress(view)
    assert together is not None
    if (together.positions < 0).any():
        return False
    for head in range(view.keys.shape[1]):
        try:
            kept = compress(alone(view, head))
        except (PressError, RuntimeError, ValueError):  # weights and artefacts are those of all heads
            return False
        own = [part[:, head : head + 1] for part in together[:3]]
        if kept is None or kept.positions.shape != own[2].shape or not torch.equal(kept.positions, own[2]):
            return False
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own[:2], kept[:2], strict=True)):
            return False
    return True


def made(name: str, view: LayerView) -> BasePress:
    if name == "dms_lagkv":  # whose ranks are as many in every head
        return DMSPress(KnormPress(), float(KnormPress().score(view).median()), sliding_window_size=8)
    if name in SCHEDULES:
        return SCHEDULES[name]
    if name in OTHERS:
        return OTHERS[name](view.n_layers, view.keys.shape[1])
    return COMPOSED[name](0.5) if name in COMPOSED else press_of(name, 0.5)


# what one attends to that is lazy anyway, or chunks that are all sinks, show nothing
SHOWN = {*WITH_RATIO, *MORE, *COMPOSED, *OTHERS, *SCHEDULES} - {"simlayerkv", "chunk_compactor"}


@pytest.mark.usefixtures("given_artefacts")
@pytest.mark.parametrize("name", sorted(SHOWN))
def test_who_looks_at_each_head_alone_says_so(name: str) -> None:
    found = set()
    for model in MODELS:
        view = view_of(model)
        press = made(name, view)
        if name in SCHEDULES:
            later = torch.arange(view.n_tokens).expand(view.keys.shape[:3]) * 2
            view = replace(view, positions=later, first_position=37, queries=view.queries[:, :, -5:], _memo={})
        compress = press.compress_again if name in SCHEDULES else press.compress
        found.add(looks_at_each_head_alone(view, compress))
        says = all(part.per_head_independent for part in parts(press))
    assert says == (found == {True}), (says, found)


def test_a_mean_over_heads_needs_them_all() -> None:
    view = view_of("gpt_neox")
    press = SimLayerKVPress(0.0, n_recent=12, n_initial=3)
    both = view.window_attention(1)[..., [0, 1, 2, *range(25, 37)]].sum(-1).mean((2, 3))[0]  # [Hkv]
    press = replace(press, lazy_threshold=float(both.mean() + both.min()) / 2)
    one = replace(view, keys=view.keys[:1], values=view.values[:1], queries=view.queries[:1], _memo={})
    assert not looks_at_each_head_alone(one, press.compress) and not press.per_head_independent


@pytest.mark.parametrize("name", IN_BLOCK)
def test_who_needs_more_of_the_model_does_not_say_so(name: str) -> None:
    press = make_press(name, 0.5)
    assert press is not None and not all(part.per_head_independent for part in parts(press))


def test_what_is_said_of_a_method_goes_with_the_method() -> None:
    class Wider(SnapKVPress):
        def score(self, view: LayerView) -> Tensor:
            return view.keys.float().norm(dim=-1)

    class Same(KnormPress):
        """Another name for it."""

    class Own(KnormPress):
        per_head_independent = True
        pointwise = True

        def score(self, view: LayerView) -> Tensor:
            return -super().score(view)

    class Loud:
        def score(self, view: LayerView) -> Tensor:
            return view.value_norms()

    class Mixed(Loud, KnormPress):
        """Has its score from elsewhere."""

    assert KnormPress.pointwise and not Mixed.pointwise
    assert SnapKVPress().estimates_attention and not Wider().estimates_attention
    assert Same.pointwise and Own.pointwise and not Same.per_head_independent and Own.per_head_independent
    assert not Wider.per_head_independent and SnapKVPress.per_head_independent
    with pytest.raises(
        PressError, match=r"CriticalKVPress needs attention weights.* and Wider gives scores that are no"
    ):
        CriticalKVPress(Wider(0.5))
    DMSPress(Same(), 0.0, decoding=True)


def test_another_choice_budget_or_storage_is_seen_when_the_class_is_defined() -> None:
    class Chooses(KnormPress):
        def choose(self, view: LayerView) -> Tensor | None:
            return None

    @dataclass(frozen=True)
    class ByLayer(KnormPress):
        def keep_of(self, n_tokens: int, place: Place) -> int:
            return 3 + place.layer_idx

    class Stores(KnormPress):
        def compress(self, view: LayerView) -> Kept | None:
            return super().compress(view)

    class Leaves(Stores):
        changes = frozenset()

        def compress(self, view: LayerView) -> Kept | None:
            return super().compress(view)

    with pytest.raises(PressError, match=r"AdaKVPress needs scores.*, and Chooses makes that choice in its own way"):
        AdaKVPress(Chooses(0.5))
    with pytest.raises(PressError, match="how much each layer keeps, and ByLayer does so too"):
        PerLayerCompressionPress(ByLayer(), [0.5, 0.5])
    with pytest.raises(PressError, match=r"Stores changes the pairs it keeps; use it by itself"):
        AdaKVPress(Stores(0.5))
    with pytest.raises(PressError, match=r"positions='rerotate', which moves keys up .*, and Stores changes the keys"):
        PressedCache(Stores(0.5), positions="rerotate")
    AdaKVPress(Leaves(0.5))
    PressedCache(Leaves(0.5), positions="rerotate")


def test_what_parameters_decide_goes_by_the_instance() -> None:
    assert ExpectedAttentionPress(use_vnorm=False).estimates_attention
    assert not ExpectedAttentionPress().estimates_attention
    assert not ThinKPress().changes and ThinKPress(0.5).changes == {"channels"}
    assert FinchPress(window_size=4).changes == {"keys"} and not FinchPress(window_size=4, rerotate_keys=False).changes
    PrefillDecodingPress(ThinKPress(), DecodingPress(KnormPress()))
    KeyRerotationPress(MergingPress(FinchPress(0.5, window_size=4, rerotate_keys=False)))
    for inner in (make_press("kvzip", 0.5), make_press("fastkvzip", 0.5)):
        press = PrefillDecodingPress(inner, DecodingPress(KnormPress()))
        assert (press.needs_model, press.chooses_together) == (inner.needs_model, inner.chooses_together)
        assert press.needs_hidden_states
        assert vars(press).keys() == {"prefilling_press", "decoding_press"}


def test_the_sentence_names_both_and_says_what_to_do() -> None:
    require(AdaKVPress(KnormPress()), KnormPress(0.5), *SCORER)
    require("somebody", AdaKVPress(KnormPress()), *CHOICE)
    with pytest.raises(PressError) as refused:
        require("somebody", ScorerPress(), "pointwise", instead="ask {inner} nothing for {outer}")
    assert str(refused.value) == (
        "somebody needs scores of single tokens, because it judges each token as it comes, and ScorerPress scores "
        "tokens by one another or by the queries of others; ask ScorerPress nothing for somebody."
    )
