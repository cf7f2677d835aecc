"""Queries before rotation, against those the model itself hands to its ``apply_rotary_pos_emb``."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tests.contract.architectures import ARCHITECTURES, BY_NAME, ROTARY_VARIANTS, Architecture, Look, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldpress import ColdpressError, Kept, LayerView, PressedCache
from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rope import Rope
from coldpress.cache.session import Session

LENGTH = 45
WITHOUT = ("gpt2", "opt", "gpt_bigcode")  # learned positions


class Spy:
    """Remembers what each attention module gives to ``apply_rotary_pos_emb`` and what it gets back."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
        self.before: dict[nn.Module, Tensor] = {}
        self.after: dict[nn.Module, Tensor] = {}
        self.running: nn.Module | None = None
        self.modules = [m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "layer_idx")]
        for module in self.modules:
            module.register_forward_pre_hook(self.enter)
        source = sys.modules[type(model).__module__]
        if hasattr(source, "apply_rotary_pos_emb"):
            self.original = source.apply_rotary_pos_emb
            monkeypatch.setattr(source, "apply_rotary_pos_emb", self)

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running = module

    def __call__(self, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        rotated = self.original(q, k, *args, **kwargs)
        module = self.running
        if module is None:  # coldpress, which looks at one token
            return rotated
        if isinstance(rotated, Tensor):  # GPT-J and CodeGen rotate keys, then queries, [B, T, H, D]
            self.running = None if module in self.before else module
            self.before[module], self.after[module] = (x.transpose(1, 2).clone() for x in (q, rotated))
            return rotated
        self.running = None
        self.before[module], self.after[module] = q.clone(), rotated[0]
        return rotated


@pytest.mark.parametrize("architecture", ARCHITECTURES + ROTARY_VARIANTS, ids=str)
def test_unrotated_queries(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    model, look = architecture.build(), Look()
    with monkeypatch.context() as patch:
        spy = Spy(model, patch)
        model(tokens(1, LENGTH), **cache_argument(PressedCache(look)))
    assert look.views and bool(spy.before) == (architecture.name not in WITHOUT)
    for view in look.views:
        expected = view.queries.float()
        if view.module in spy.before:
            before = spy.before[view.module][:, :, -view.n_tokens :]
            expected = torch.cat([before, expected[..., before.shape[-1] :]], dim=-1)
        torch.testing.assert_close(view.unrotated_queries(), expected, atol=1e-4, rtol=1e-4)
    for module in spy.modules:  # the local layers too, which no press is shown
        rope = Session().rope(module, torch.device("cpu"))
        assert (rope is None) == (module not in spy.before)
        if rope is not None:
            unrotated = rope.unrotate(spy.after[module], torch.arange(LENGTH))
            torch.testing.assert_close(unrotated, spy.before[module], atol=1e-4, rtol=1e-4)


def test_layers_without_rotation_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"smollm3": [True, False], "cohere2": [True, False] * 2, "exaone4": [True, False] * 2}
    for name, rotates in expected.items():
        modules = Spy(BY_NAME[name].build(), monkeypatch).modules
        assert [Session().rope(module, torch.device("cpu")) is not None for module in modules] == rotates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_without_rotation_among_others(dtype: torch.dtype) -> None:
    """What they project is what they hand over; of the others it is what is left when the rotation is undone."""
    rotates = [1, 0, 0, 1]
    model = BY_NAME["smollm3"].build(dtype=dtype, num_hidden_layers=4, no_rope_layers=rotates)
    projected: dict[nn.Module, Tensor] = {}
    seen = []

    def note(part: nn.Module, args: Any, output: Tensor) -> None:
        projected.setdefault(part, output)  # of the text; the one token comes later

    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(note)

    class Asks(Look):
        def compress(self, view: LayerView) -> Kept | None:
            parts: Any = view.module
            for linear, states, unrotated in (
                (parts.q_proj, view.queries, view.unrotated_queries()),
                (parts.k_proj, view.keys, view.unrotated_keys()),
            ):
                before = projected[linear].unflatten(-1, (-1, states.shape[-1])).transpose(1, 2)
                seen.append(not torch.equal(states, before))
                tolerance = 1e-4 if dtype == torch.float32 else 0.02 * float(before.abs().max())
                torch.testing.assert_close(unrotated, before.float(), atol=tolerance if seen[-1] else 0, rtol=0)
            mean = view.mean_future_rotation(unrotated, 64)
            assert torch.equal(mean, unrotated) != seen[-1]
            return super().compress(view)

    model(tokens(1, LENGTH), **cache_argument(PressedCache(Asks())))
    assert seen == [answer for answer in rotates for _ in range(2)]


def test_dynamic_frequencies_do_not_leak_from_layer_to_layer() -> None:
    """Looking at future positions lengthens the input of a dynamic embedding; the next layer must not notice."""
    model, look = BY_NAME["llama_dynamic"].build(), Look()
    model(tokens(1, LENGTH), **cache_argument(PressedCache(look)))
    first, second = look.views
    before = first.unrotated_queries()
    first.mean_future_rotation(before, 512)
    rope = first.find_rope()
    assert rope is not None and second.find_rope() is rope
    assert torch.equal(rope.unrotate(first.queries, torch.arange(LENGTH)), before)


@pytest.mark.parametrize("earlier", [0, 12, 200])
def test_dynamic_frequencies_are_those_that_the_model_has(earlier: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a block: a model goes on with the frequencies of a longer text, and a part of a text is no shorter one."""

    class Asks(Look):
        def compress(self, view: LayerView) -> Kept | None:
            assert view.find_rope() is not None
            return super().compress(view)

    model, look, past = BY_NAME["llama_dynamic"].build(), Asks(), PressedCache()
    if earlier:
        model(tokens(1, earlier))
    with monkeypatch.context() as patch:
        spy = Spy(model, patch)
        with look(model):
            model(tokens(1, LENGTH), **cache_argument(past))
    seen = dict(spy.before)
    model(tokens(1, 400, seed=1))  # swaps them again
    for view in look.views:
        before = seen[view.module]
        torch.testing.assert_close(view.unrotated_queries(), before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(view.part(0, 20).unrotated_queries(), before[:, :, :20], atol=1e-4, rtol=1e-4)
    rope = look.views[0].find_rope()
    assert past.fork().session.rope(look.views[0].module, torch.device("cpu")) is rope
    past.reset()
    assert past.session.rope(look.views[0].module, torch.device("cpu")) is not rope


def test_a_rotation_that_cannot_be_undone_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = BY_NAME["llama"].build().config

    Model.__module__ = "transformers.models.deepseek_v2.modeling_deepseek_v2"  # rotates by complex numbers
    __import__(Model.__module__)
    with pytest.raises(ColdpressError, match=r"cannot undo.*SnapKVPress"):
        Rope.of(Model(), torch.device("cpu"))
