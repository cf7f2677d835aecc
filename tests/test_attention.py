"""The attention backends: flash-attention by a stand-in, eager attention's weights, switching, masks."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, VERSION, WINDOW, tiny, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coldpress import AdaKVPress, BasePress, KnormPress, PressedCache, SnapKVPress, use_coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.backends import BACKENDS
from coldpress.cache.masks import additive_mask
from coldpress.errors import MissingDependencyError, ModelError
from coldpress.models.supported import underlying

N = 45
IDS = tokens(1, N + 10)
PRESS = SnapKVPress(0.5, window_size=8)
calls: list[tuple[int, int, bool]] = []  # queries, keys, causal


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """What flash-attention computes: ``[B, T, H, D]`` in and out, causal order aligned to the last key."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    calls.append((n_queries, n_keys, causal))
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if causal:
        seen = torch.arange(n_keys) <= torch.arange(n_queries)[:, None] + n_keys - n_queries
        logits = logits.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    calls.clear()


def in_turns(name: str, backend: str, past: Any, mask: Tensor | None = None) -> Tensor:
    """A prompt, a question of several tokens, two single tokens."""
    model, logits, end = tiny(name, backend), [], 0
    for n in (N, 8, 1, 1):
        start, end = end, end + n
        rows = 1 if mask is None else mask.shape[0]
        options = {} if mask is None else {"attention_mask": mask[:, :end]}
        logits.append(model(IDS[:, start:end].expand(rows, -1), **cache_argument(past), **options).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("press", [None, PRESS])
def test_flash_attention(name: str, press: SnapKVPress | None, flash: None) -> None:
    expected = in_turns(name, "coldpress", PressedCache(press))
    assert calls == []
    found = in_turns(name, "coldpress_fa2", PressedCache(press))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    if name in ("gpt_neox", "llama"):  # all calls, those with evicted keys before them too
        stored = N if press is None else 22
        turns = [(N, N, True), (8, stored + 8, True), (1, stored + 9, False), (1, stored + 10, False)]
        assert calls == [turn for turn in turns for _ in range(2)]


def test_flash_attention_with_padding_or_ragged_heads(flash: None) -> None:
    mask = torch.ones(2, N + 10, dtype=torch.long)
    mask[1, :20] = 0
    for press in (None, PRESS):
        expected = in_turns("llama", "coldpress", PressedCache(press), mask)
        found = in_turns("llama", "coldpress_fa2", PressedCache(press), mask)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert calls == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_without_a_pressed_cache(name: str, backend: str, flash: None) -> None:
    """Soft caps and attention sinks stay, also under the names whose own arithmetic does not know them."""
    expected = tiny(name, "eager")(IDS).logits
    model = tiny(name, backend)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, atol=1e-4, rtol=0)
    found = in_turns(name, backend, DynamicCache(config=model.config))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    padded, mask = torch.cat([IDS.new_zeros(1, 5), IDS], dim=1), torch.ones(1, N + 15)
    mask[:, :5] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0).long()
    found = model(padded, attention_mask=mask, position_ids=position_ids, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_attention_that_is_not_causal_stays_so(backend: str, flash: None) -> None:
    """Vision towers and the like run under the same name as the text model they belong to."""

    module = BY_NAME["gemma2"].build().model.layers[1].self_attn
    module.is_causal = False
    query, states = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    for cap in (2.0, None):
        options = {} if cap is None else {"softcap": cap}
        found, _ = ALL_ATTENTION_FUNCTIONS[backend](module, query, states, states, None, scaling=0.25, **options)
        logits = query @ states.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.25
        weights = (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1)
        torch.testing.assert_close(found, (weights @ states.repeat_interleave(2, dim=1)).transpose(1, 2))


def test_missing_flash_attention() -> None:
    assert "flash_attn" not in sys.modules
    model = BY_NAME["llama"].build("sdpa")
    with pytest.raises(MissingDependencyError, match=r"pip install flash-attn .*attn_implementation sdpa"):
        use_coldpress(model, "flash_attention_2")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ImportError, match="pip install flash-attn"):
        tiny("llama", "coldpress_fa2")(IDS, **cache_argument(PressedCache()))


@pytest.mark.parametrize("press", [None, PRESS])
def test_eager_attention_returns_its_weights(press: SnapKVPress | None) -> None:
    model, past = tiny("llama", "coldpress_eager"), PressedCache(press)
    prompt = model(IDS[:, :N], **cache_argument(past), output_attentions=True)
    expected = tiny("llama", "eager")(IDS[:, :N], output_attentions=True)
    for found, wanted in zip(prompt.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    stored = past.stored_lengths()[0]
    question = model(IDS[:, N : N + 3], **cache_argument(past), output_attentions=True)
    assert [w.shape for w in question.attentions] == [(1, 4, 3, stored + 3)] * 2
    for weights in question.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 3))
        assert (weights.triu(stored + 1) == 0).all() and (weights.tril(stored) > 0).any(-1).all()


def test_sdpa_returns_no_weights() -> None:
    out = tiny("llama")(IDS, **cache_argument(PressedCache(PRESS)), output_attentions=True)
    assert all(weights is None for weights in out.attentions or ())


def test_switching(flash: None) -> None:
    model = BY_NAME["llama"].build("eager")

    def name() -> str:
        return model.config._attn_implementation

    use_coldpress(model)  # keeps the arithmetic
    assert name() == "coldpress_eager" and underlying(name()) == "eager"
    use_coldpress(model)
    assert name() == "coldpress_eager"
    for arithmetic, expected in (("sdpa", "coldpress"), ("flash_attention_2", "coldpress_fa2")):
        use_coldpress(model, arithmetic)
        assert name() == expected and underlying(name()) == arithmetic
    with pytest.raises(ModelError, match="sdpa, eager or flash_attention_2, got 'paged'"):
        use_coldpress(model, "paged")
    assert underlying("flex_attention") == "flex_attention" and underlying(None) is None


def test_each_kind_of_mask() -> None:
    """What a layer tells attention about its slots: nothing where causal order or full view says it all."""
    past = PressedCache(PRESS)
    model = tiny("llama")
    model(IDS[:, :N], **cache_argument(past))
    layer = past.layer(0)
    assert additive_mask(layer.slots, 1, None, None) is None
    question = additive_mask(layer.slots, 3, None, None)  # the last three slots as if they were new
    assert question is not None and question.shape == (1, 1, 3, 22)
    assert (question[0, 0] == 0).tolist() == [[True] * 20 + [False] * 2, [True] * 21 + [False], [True] * 22]
    windowed = additive_mask(layer.slots, 1, None, WINDOW)
    assert windowed is not None
    assert torch.equal(windowed[:, :, 0] == 0, layer.positions() > N - 1 - WINDOW)


@pytest.mark.parametrize("argument", ["position_bias", "head_mask", "indices"])
def test_attention_that_coldpress_does_not_know(argument: str) -> None:

    model, past = BY_NAME["llama"].build(), PressedCache()
    states = torch.randn(1, 2, 5, 8)
    keys, values = past.update(states, states, 0)
    module, attention = model.model.layers[0].self_attn, ALL_ATTENTION_FUNCTIONS["coldpress"]
    with pytest.raises(ModelError, match=f"LlamaAttention attends with '{argument}'"):
        attention(module, torch.randn(1, 4, 5, 8), keys, values, None, **{argument: torch.ones(1)})


def test_attention_to_something_else_than_was_cached() -> None:
    """As differential attention does: the call goes through untouched, and the cache tells at its next use."""

    model, past, states = BY_NAME["llama"].build(), PressedCache(), torch.randn(1, 2, 5, 8)
    keys, values = past.update(states, states, 0)
    ALL_ATTENTION_FUNCTIONS["coldpress"](
        model.model.layers[0].self_attn, torch.randn(1, 4, 5, 8), keys, values * 2, None
    )
    with pytest.raises(ModelError, match="something else than it caches"):
        past.get_seq_length()


def test_a_custom_mask_is_refused() -> None:
    from transformers.masking_utils import create_causal_mask

    model, past = BY_NAME["llama"].build(), PressedCache()
    embeddings = torch.zeros(1, 5, 32)
    takes = inspect.signature(create_causal_mask).parameters
    name = "inputs_embeds" if "inputs_embeds" in takes else "input_embeds"
    options: dict[str, Any] = {name: embeddings, "attention_mask": None, **cache_argument(past)}
    if "cache_position" in takes:
        options["cache_position"] = torch.arange(5)
    options["position_ids"] = None
    assert create_causal_mask(config=model.config, **options) is None
    with pytest.raises(ModelError, match="custom attention mask"):
        create_causal_mask(config=model.config, or_mask_function=lambda b, h, q, k: q >= k, **options)


SLOWLY = [pytest.param(press, marks=pytest.mark.slow) for press in (None, AdaKVPress(KnormPress(0.5), 0.0))]


@pytest.mark.parametrize("press", [PRESS, *SLOWLY], ids=repr)
@pytest.mark.slow
def test_torch_compile(press: BasePress | None) -> None:
    """Of the whole model: graphs break where the cache is filled and read, and the rest is compiled."""
    torch._dynamo.reset()
    n_layers = 2 if isinstance(press, AdaKVPress) else 1  # a second one takes seconds
    model, ids = BY_NAME["llama"].build(num_hidden_layers=n_layers), tokens(2, 44)
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[0, :7] = 0
    compiled = torch.compile(model, backend="eager")
    past, expected = PressedCache(press), PressedCache(press)
    with torch.no_grad():
        for start, stop in ((0, 40), (40, 41), (41, 44)):
            given = {"attention_mask": mask[:, :stop]}
            own = compiled(ids[:, start:stop], **given, **cache_argument(past)).logits
            logits = model(ids[:, start:stop], **given, **cache_argument(expected)).logits
            torch.testing.assert_close(own, logits, atol=1e-5, rtol=0)
        assert past.stored_lengths() == expected.stored_lengths()
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_torch_compile_in_one_graph() -> None:
    """A PressedCache cannot be part of a graph, and torch says why; without one nothing is in the way."""
    torch._dynamo.reset()
    model = BY_NAME["llama"].build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        if VERSION >= (5, 0):  # transformers' own mask could not be compiled before
            own = compiled(IDS, use_cache=False).logits
            torch.testing.assert_close(own, model(IDS, use_cache=False).logits)
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"outside of graphs; compile without fullgraph=True, or"
        ):
            compiled(IDS, **cache_argument(PressedCache(PRESS)))
