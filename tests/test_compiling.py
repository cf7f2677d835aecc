"""A compiled step of decoding, against the same calls outside the block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    PressedCache,
    PyramidKVPress,
    SnapKVPress,
    compiled,
    use_coldpress,
)
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.cache.layer import PressedLayer
from coldpress.errors import CacheError, ModelError
from coldpress.models import columns
from coldpress.models import compiled as compiling

COMPILE = torch.compile


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is traced and then run as it is: what a C++ compiler adds is the slow tests' business."""
    monkeypatch.setattr(torch, "compile", lambda step, **options: COMPILE(step, backend="eager", fullgraph=True))
    torch._dynamo.reset()


def filled(model: PreTrainedModel, press: BasePress | None = None, n: int = 40, **options: Any) -> PressedCache:
    use_coldpress(model)
    cache = PressedCache(press, **options)
    with torch.no_grad():
        model(tokens(1, n), **cache_argument(cache))
    return cache


def decoded(model: PreTrainedModel, cache: PressedCache, n: int = 5) -> Tensor:
    """Logits of n tokens, one at a time."""
    with torch.no_grad():
        logits = [model(token, **cache_argument(cache)).logits for token in tokens(1, n, seed=1).split(1, -1)]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.thinned(3)
def test_as_outside(name: str) -> None:
    """Layers of different lengths; logits, cache and what follows are those of the same calls outside the block."""
    model = tiny(name)
    cache = filled(model, PyramidKVPress(0.5, window_size=8))
    twin = cache.fork()
    expected, pieces = decoded(model, twin), tokens(1, 3)
    with compiled(model):
        assert_close(decoded(model, cache), expected)
        for one in (cache, twin):
            one.crop(-2)
        fork = cache.fork()
        assert_close(decoded(model, cache, 3), decoded(model, twin, 3))
        with torch.no_grad():  # several tokens at once run as ever
            expected = model(pieces, **cache_argument(fork.fork())).logits
            assert_close(model(pieces, **cache_argument(fork)).logits, expected)
    assert_close(decoded(model, cache), decoded(model, twin))
    assert cache.seen_tokens == twin.seen_tokens and torch.equal(cache.positions(), twin.positions())


def test_buffers_that_are_full_move() -> None:
    model = tiny("gpt_neox")
    cache = filled(model, SnapKVPress(0.5, window_size=8), n=60)
    twin = cache.fork()
    expected = decoded(model, twin, 70)
    with compiled(model, new_tokens=1):
        assert_close(decoded(model, cache, 70), expected)


def test_empty_slots_hold_anything() -> None:
    """What memory has before it is written to may be NaN."""
    model = tiny("llama")
    cache = filled(model, n=300)
    model(tokens(1, 1, seed=7), **cache_argument(cache))  # makes room
    expected = decoded(model, cache.fork())
    model(tokens(1, 1, seed=7), **cache_argument(cache))  # and so does the first token after a fork, for itself
    cache.crop(-1)
    for layer in cache.pressed_layers():
        for buffer in layer.tensors():
            assert buffer.shape[2] > 310
            buffer[:, :, 301:] = torch.nan
    with compiled(model):
        assert_close(decoded(model, cache), expected)


def test_rows_and_generate() -> None:
    """Two rows; generate() takes compiled steps, and the signature that it looks at is the model's own."""
    model = tiny("gpt_neox")
    prompt = tokens(2, 30)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    use_coldpress(model)
    expected = model.generate(prompt, **cache_argument(PressedCache(KnormPress(0.5))), **options)
    with compiled(model), counted() as steps:
        actual = model.generate(prompt, **cache_argument(PressedCache(KnormPress(0.5))), **options)
    assert torch.equal(actual, expected) and len(steps) == 5


def test_weights_by_columns() -> None:
    """Inside, weights lie otherwise and are equal; outside, nothing is left, whatever happened."""
    model = BY_NAME["llama"].build()
    before = {name: (p.clone(), p.stride()) for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), compiled(model):
        assert model.get_output_embeddings().weight.stride(0) == 1
        assert all(torch.equal(p, before[name][0]) for name, p in model.named_parameters())
        raise ZeroDivisionError
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.stride() == before[name][1]
    assert "forward" not in vars(model)


@pytest.mark.parametrize("n_parts", [1, 2, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_by_columns(n_parts: int, has_bias: bool) -> None:
    x, weight, bias = torch.randn(1, 1, 17), torch.randn(17, 9).t(), torch.randn(9) if has_bias else None
    expected = (weight.double() @ x[0, 0].double()).float() + (bias if has_bias else 0)
    assert_close(columns.OneRow(n_parts).linear(x, weight, bias), expected[None, None])


def test_other_threads_are_left_alone() -> None:
    model = tiny("gpt_neox")
    cache = filled(model, AdaKVPress(SnapKVPress(0.5, window_size=8)))  # which a compiled step refuses
    expected, got = decoded(model, cache.fork()), []
    begins = threading.Event()

    def work() -> None:
        begins.wait(60)
        got.append(decoded(model, cache))

    thread = threading.Thread(target=work)
    thread.start()
    with compiled(model):
        begins.set()
        thread.join()
    assert_close(got[0], expected)


def test_a_thread_that_is_started_inside_is_compiled() -> None:
    model, got = tiny("gpt_neox"), []
    cache = filled(model)
    expected = decoded(model, cache.fork())
    with compiled(model):
        step = model.forward.__closure__  # type: ignore[attr-defined]
        decoder = next(cell.cell_contents for cell in step if isinstance(cell.cell_contents, compiling._Decoder))
        thread = threading.Thread(target=lambda: got.append(decoded(model, cache)))
        thread.start()
        thread.join()
        assert (decoder.n_steps, decoder.n_eager) == (5, 0)
    assert_close(got[0], expected)


def test_a_block_that_compiles_nothing_says_so() -> None:
    model = tiny("gpt_neox")
    with compiled(model):
        pass  # nothing ran
    with pytest.warns(UserWarning, match="nothing was compiled"), compiled(model):
        model(tokens(1, 5))
    with compiled(model):  # what is refused has been said
        past = cache_of(model(tokens(1, 5), **cache_argument(DynamicCache())))
        with pytest.raises(CacheError, match="not from a DynamicCache"):
            model(tokens(1, 1), **cache_argument(past))


@pytest.mark.parametrize(
    ("press", "options", "message"),
    [
        (AdaKVPress(SnapKVPress(0.5, window_size=8)), {}, "equally many pairs"),
        (SnapKVPress(0.5, window_size=8), {"kv_bits": 8}, "equally many pairs"),
        (DecodingPress(KnormPress()), {}, "goes on while decoding"),
    ],
    ids=["ragged", "quantised", "goes on"],
)
def test_caches_it_refuses(press: BasePress, options: dict[str, Any], message: str) -> None:
    """And they are as they were."""
    model = tiny("gpt_neox")
    cache = filled(model, press, **options)
    stored = cache.stored_lengths()
    with compiled(model), pytest.raises(CacheError, match=message):
        decoded(model, cache)
    assert cache.stored_lengths() == stored


def test_calls_it_refuses() -> None:
    model = tiny("gpt_neox")
    cache, own, one = filled(model), DynamicCache(), tokens(1, 1)
    padding = torch.ones(1, 41, dtype=torch.long)
    padding[:, 0] = 0
    pressed = filled(model, KnormPress(0.5))
    with torch.no_grad(), compiled(model):
        model(tokens(1, 5), **cache_argument(own))
        with pytest.raises(CacheError, match="not from a DynamicCache"):
            model(one, **cache_argument(own))
        with pytest.raises(CacheError, match="without padding"):
            model(one, **cache_argument(cache), attention_mask=padding)
        with pytest.raises(ModelError, match="output_attentions=True"):
            model(one, **cache_argument(cache), output_attentions=True)
        with pytest.raises(CacheError, match="Inside 'with press"), KnormPress(0.5)(model):
            model(one, **cache_argument(pressed))
        with pytest.raises(CacheError, match="holds 1 rows"):
            model(tokens(2, 1), **cache_argument(cache))
        with pytest.raises(ModelError, match="replaced already"), compiled(model):
            pass
    with pytest.raises(CacheError, match="new_tokens"), compiled(model, new_tokens=0):
        pass


@pytest.mark.parametrize(
    ("name", "message"), [("gemma2", "sliding_attention"), ("llama_dynamic", "depend on the text")]
)
def test_models_it_refuses(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message), compiled(tiny(name)):
        pass


def test_sliding_windows_are_refused() -> None:
    model = tiny("mistral")
    cache = filled(model)
    with compiled(model), pytest.raises(ModelError, match="sliding windows"):
        decoded(model, cache)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts compiled steps."""
    steps: list[int] = []
    own = PressedLayer.commit

    def commit(layer: PressedLayer, n: int) -> None:
        if not layer.index:
            steps.append(n)
        own(layer, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PressedLayer, "commit", commit)
        yield steps


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_real(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By inductor, over enough pairs for the attention of one token."""
    monkeypatch.setattr(torch, "compile", COMPILE)
    model = tiny("gpt_neox", dtype=dtype)
    cache = filled(model, SnapKVPress(0.3, window_size=8), n=450)
    expected = decoded(model, cache.fork())
    with compiled(model, 32):
        actual = decoded(model, cache)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
