"""What presses that ask for hidden states are shown: what the layer's query projection was given, and nothing else."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.contract.architectures import ARCHITECTURES, BY_NAME, Architecture, Look, tiny, tokens
from tests.presses.hidden import LookDeeper, projected
from torch import Tensor, nn

from coldpress import (
    AdaKVPress,
    BasePress,
    ComposedPress,
    Kept,
    KeyRerotationPress,
    KnormPress,
    LayerView,
    PerLayerCompressionPress,
    PressedCache,
    ScorerPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.session import THREAD
from coldpress.core.requirements import require_block
from coldpress.errors import PressError
from coldpress.models.block import prefilling

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


@dataclass(frozen=True)
class MeanPress(ScorerPress):
    """A scorer that looks at hidden states."""

    needs_hidden_states = True

    def score(self, view: LayerView) -> Tensor:
        require_block(self, view.hidden_states)
        assert view.hidden_states is not None and view.hidden_states.shape[1] == view.n_tokens
        return view.hidden_states.float().mean(-1)[:, None].expand(view.keys.shape[:3])


@every_architecture
def test_they_are_what_the_query_projection_is_given(architecture: Architecture) -> None:
    model, look, ids = tiny(architecture.name), LookDeeper(), tokens(2, 40)
    with projected(model) as seen, look(model):
        model(ids, **cache_argument(PressedCache()))
    assert [view.layer_idx for view in look.views] == list(range(look.views[0].n_layers))
    for view in look.views:
        (given,) = seen[view.module]
        assert view.hidden_states is not None
        assert torch.equal(view.hidden_states, given[:, -view.n_tokens :])  # less where a window has moved on
    assert THREAD.hidden_states is None


@every_architecture
def test_a_padded_row_is_shown_what_it_is_shown_alone(architecture: Architecture) -> None:
    model, look = tiny(architecture.name), LookDeeper()
    rows, pads = tokens(3, 33), [(7, 0), (0, 0), (2, 5)]
    ids, mask = torch.zeros(3, 33, dtype=torch.long), torch.zeros(3, 33, dtype=torch.long)
    for i, (left, right) in enumerate(pads):
        ids[i, left : 33 - right], mask[i, left : 33 - right] = rows[i, : 33 - left - right], 1
    with look(model):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=position_ids, **cache_argument(PressedCache()))
    for i, (left, right) in enumerate(pads):
        alone = LookDeeper()
        with alone(model):
            model(rows[i : i + 1, : 33 - left - right], **cache_argument(PressedCache()))
        for view in alone.views:
            group = [v for v in look.views if v.layer_idx == view.layer_idx and v.n_tokens == view.n_tokens]
            assert any(close(row, view.hidden_states[0]) for v in group for row in v.hidden_states)  # type: ignore[index, union-attr]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4, rtol=0)


def test_a_shared_prefill_shows_them_to_every_branch() -> None:
    model, full = tiny("llama"), PressedCache()
    looks: list[Look] = [LookDeeper(), Look(), LookDeeper()]
    branches = full.branches(looks)
    with prefilling(model, *branches):
        model(tokens(1, 20), **cache_argument(full))
    states = [view.hidden_states for look in looks for view in look.views]
    assert len(states) == 6 and all(isinstance(state, Tensor) for state in states)


def test_nothing_is_shown_to_those_who_do_not_ask() -> None:
    model, look = tiny("llama"), Look()
    with look(model):
        model(tokens(1, 20), **cache_argument(PressedCache()))
    assert [view.hidden_states for view in look.views] == [None, None]


def test_outside_the_block_it_says_so() -> None:
    press = MeanPress(0.5)
    with pytest.raises(PressError, match=r"MeanPress .* inside 'with press\(model\):'"):
        tiny("llama")(tokens(1, 20), **cache_argument(PressedCache(press)))
    assert MeanPress() == MeanPress(0.0)


@pytest.mark.parametrize(
    "press",
    [
        AdaKVPress(MeanPress(0.5)),
        KeyRerotationPress(AdaKVPress(MeanPress(0.5))),
        ComposedPress([KnormPress(0.2), MeanPress(0.5)]),
        PerLayerCompressionPress(MeanPress(), [0.5, 0.5]),
    ],
    ids=repr,
)
def test_a_wrapper_asks_for_the_press_inside(press: BasePress) -> None:
    model, cache = tiny("llama"), PressedCache(press)
    with prefilling(model, cache):
        model(tokens(1, 20), **cache_argument(cache))
    assert cache.achieved_ratio() >= 0.5


def test_parts_of_a_view_have_their_share() -> None:
    model, look = tiny("llama"), LookDeeper()
    with look(model):
        model(tokens(2, 20), **cache_argument(PressedCache()))
    view = look.views[0]
    assert view.hidden_states is not None
    assert torch.equal(view.part(5, 12).hidden_states, view.hidden_states[:, 5:12])  # type: ignore[arg-type]
    chosen = torch.tensor([0, 3, 8, 9, 10]).expand(2, 2, 5)
    assert torch.equal(view.among(chosen, 11, 3).hidden_states, view.hidden_states[:, 8:11])  # type: ignore[arg-type]
    assert torch.equal(view.of_head(1, 0).hidden_states, view.hidden_states[1:])  # type: ignore[arg-type]


def test_threads_see_their_own() -> None:
    """Two threads prefill with one model at the same time, and a third without a press."""
    model = BY_NAME["llama"].build()
    inputs = [tokens(1, 30, seed=seed) for seed in range(3)]
    looks: list[Look] = [LookDeeper(), LookDeeper(), Look()]
    expected: list[Look] = [LookDeeper(), LookDeeper(), Look()]
    for look, ids in zip(expected, inputs, strict=True):
        with look(model):
            model(ids, **cache_argument(PressedCache()))
    start, errors = threading.Barrier(3), []

    def run(i: int) -> None:
        try:
            with torch.no_grad(), looks[i](model):
                start.wait(timeout=30)
                for _ in range(5):
                    model(inputs[i], **cache_argument(PressedCache()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for look, twin in zip(looks, expected, strict=True):
        assert len(look.views) == 10
        for view, other in zip(look.views, twin.views * 5, strict=True):
            if isinstance(look, LookDeeper):
                assert torch.equal(view.hidden_states, other.hidden_states)  # type: ignore[arg-type]
            else:
                assert view.hidden_states is None


class FailingPress(LookDeeper):
    def compress(self, view: LayerView) -> Kept | None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
@pytest.mark.parametrize("press", [LookDeeper(), FailingPress()], ids=lambda press: type(press).__name__)
def test_nothing_is_left_on_the_model(name: str, press: Look) -> None:
    model = BY_NAME[name].build()
    before = traces(model)
    try:
        with press(model):
            model(tokens(1, 20), **cache_argument(PressedCache()))
    except RuntimeError as error:
        assert str(error) == "broken"
    assert traces(model) == before
    assert THREAD.hidden_states is None


def traces(model: nn.Module) -> list[Any]:
    """What hooks and attributes every module has."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [
        (path, sorted(vars(module)), *(len(getattr(module, name)) for name in hooks))
        for path, module in model.named_modules()
    ]


def test_they_are_freed_with_the_views() -> None:
    model, look = tiny("llama"), LookDeeper()
    with look(model):
        model(tokens(1, 20), **cache_argument(PressedCache()))
        states = [weakref.ref(view.hidden_states) for view in look.views if view.hidden_states is not None]
        assert len(states) == 2
        look.views.clear()
        gc.collect()
        assert [state() for state in states] == [None, None]
