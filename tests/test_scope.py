"""What a press's block holds for: wrappers, threads, and whether anything came of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tokens
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from coldpress import DecodingPress, KnormPress, KVComposePress, PressedCache, SnapKVPress, compiled, use_coldpress
from coldpress.architecture.cache_argument import NAMES, argument_name, cache_argument, cache_of, given_cache
from coldpress.errors import CacheError, ModelError, PressError

N = 40
PRESS = SnapKVPress(0.5, window_size=8)
IDS = tokens(1, N)
GENERATE: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def model() -> PreTrainedModel:
    return BY_NAME["llama"].build("sdpa")


def lengths(output: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache_of(output).layers]


def generated(model: Any, **options: Any) -> Any:
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GENERATE, **options)


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises, in a thread that starts now and is waited for."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


# -- the names of a cache ---------------------------------------------------------------------------------------------


def test_a_cache_has_the_name_that_the_function_has_for_it() -> None:
    def newer(ids: Any, cache: Any = None) -> None: ...
    def older(ids: Any, past_key_values: Any = None) -> None: ...
    def either(ids: Any, **kwargs: Any) -> None: ...

    own = argument_name()
    assert (argument_name(newer), argument_name(older), argument_name(either)) == (*NAMES, own)
    assert own in NAMES
    past = PressedCache()
    assert cache_argument(past) == {own: past}
    for name in NAMES:
        assert given_cache({name: past, "input_ids": IDS}) is past
    assert given_cache({NAMES[0]: None, NAMES[1]: past}) is past
    assert given_cache({"input_ids": IDS}) is None


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_either_name_is_understood_inside_a_block(model: PreTrainedModel) -> None:
    for name in {argument_name(), "past_key_values"}:
        with PRESS(model):
            assert lengths(model(IDS, **{name: PressedCache()})) == [20, 20]
            assert lengths(generated(model, **{name: DynamicCache()})) == [22, 22]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_name_that_this_transformers_does_not_know_is_refused(name: str) -> None:
    """Before 5.24 a model passes cache= on to its attention, and computes without it."""
    model, past = BY_NAME[name].build(), PressedCache(PRESS)
    if argument_name() == "cache":
        model(IDS, cache=past)
        assert past.stored_lengths() == [20, 20]
    else:
        with pytest.raises(CacheError, match="calls the argument past_key_values, not cache"):
            model(IDS, cache=past)


# -- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize("press", [PRESS, KVComposePress(0.5)], ids=["snapkv", "kvcompose"])
def test_a_peft_model_is_compressed(press: Any) -> None:
    peft = pytest.importorskip("peft")
    model = BY_NAME["llama"].build("sdpa")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad(), press(wrapped):
        by_generate = cache_of(generated(wrapped))
        by_call = cache_of(wrapped(input_ids=IDS))
    with torch.no_grad(), press(model):  # the model inside has the adapter's layers
        expected = cache_of(model(IDS))
    for past, new in ((by_generate, 2), (by_call, 0)):
        n_pairs = [int((layer.positions() >= 0).sum()) for layer in past.layers]
        assert sum(n_pairs) == 2 * 2 * (N // 2 + new)
        for own, other in zip(past.layers, expected.layers, strict=True):
            assert torch.equal(own.positions()[..., : other.stored_length - 1], other.positions()[..., :-1])


class Wrapper(nn.Module):
    """Runs a model past its own forward, as PEFT's generate does."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.inner = model


def test_a_wrapper_without_a_forward(model: PreTrainedModel) -> None:
    wrapped = Wrapper(model)
    with PRESS(wrapped):  # type: ignore[arg-type]
        assert lengths(generated(wrapped.inner)) == [22, 22]
        with pytest.raises(PressError, match="one press at a time"), PRESS(model):
            pass


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: torch.compile(model), "as it was"),
        (lambda model: Wrapper(torch.compile(model)), "as it was"),
        (lambda model: model.compile() or model, "as it was"),
        (nn.DataParallel, "model.module"),
        (lambda model: nn.Linear(2, 2), "Linear holds none"),
    ],
    ids=["compiled", "wrapped", "in place", "data parallel", "no model"],
)
def test_wrappers_that_cannot_be_watched(model: PreTrainedModel, wrap: Callable[..., Any], message: str) -> None:
    wrapped = wrap(model)
    for block in (PRESS, compiled):
        with pytest.raises(ModelError, match=message), block(wrapped):
            raise AssertionError("the block should not begin")
    with pytest.raises(ModelError, match=message):
        use_coldpress(wrapped)


# -- threads ----------------------------------------------------------------------------------------------------------


def test_a_thread_that_is_started_inside_is_inside(model: PreTrainedModel) -> None:
    """The usual way to stream: generate in a thread, and read what it says in this one."""
    with PRESS(model):
        assert lengths(in_a_thread(lambda: generated(model))) == [22, 22]


def test_a_thread_that_was_there_before_is_left_alone(model: PreTrainedModel) -> None:
    begins, found = threading.Event(), []

    def work() -> None:
        begins.wait(60)
        found.append(lengths(model(IDS)))

    thread = threading.Thread(target=work)
    thread.start()
    with PRESS(model):
        begins.set()
        thread.join()
    assert found == [[N, N]]


def test_a_thread_with_a_block_of_its_own(model: PreTrainedModel) -> None:
    def work() -> list[int]:
        with KnormPress(0.8)(model):
            return lengths(model(IDS))

    with PRESS(model):
        assert in_a_thread(work) == [8, 8]
        assert lengths(model(IDS)) == [20, 20]


def test_a_thread_that_may_belong_to_two_blocks_is_refused(model: PreTrainedModel) -> None:
    def work() -> Any:
        with KnormPress(0.8)(model):
            model(IDS)
            return in_a_thread(lambda: model(IDS))

    with PRESS(model):
        model(IDS)
        assert isinstance(found := in_a_thread(work), PressError)
    assert "Open the block inside the thread" in str(found)


def test_two_threads_of_one_block_at_once(model: PreTrainedModel) -> None:
    found: list[list[int]] = []
    prompts = [tokens(1, 30, seed=3), tokens(1, 50, seed=4)]
    start = threading.Barrier(2, timeout=60)

    def work(ids: torch.Tensor) -> None:
        start.wait()
        for _ in range(5):
            found.append([ids.shape[1], *lengths(model(ids))])

    with KVComposePress(0.5)(model):
        threads = [threading.Thread(target=work, args=(ids,)) for ids in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 10
    assert all(sum(own) == n for n, *own in found)  # half of two layers' pairs, wherever they are


def test_a_thread_that_reads_on_when_the_block_ends(model: PreTrainedModel) -> None:
    inside, ends = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        inside.set()
        ends.wait(60)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: model(IDS))
    with pytest.raises(PressError, match="still reading its prompt"), PRESS(model):
        thread.start()
        inside.wait(60)
    ends.set()
    thread.join()
    handle.remove()


def test_a_thread_that_has_not_begun_when_the_block_ends(model: PreTrainedModel) -> None:
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait, args=(60,))
    with pytest.warns(UserWarning, match=r"join\(\) the thread inside"), PRESS(model):
        thread.start()
    ends.set()
    thread.join()


# -- blocks that do nothing -------------------------------------------------------------------------------------------


def test_an_empty_block_is_no_fault(model: PreTrainedModel) -> None:
    with PRESS(model):
        pass
    with PRESS(model), pytest.raises((AttributeError, TypeError)):  # a call that fails has said so
        model("no tokens")


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model(IDS, use_cache=False),
        lambda model: model.model.layers[0](torch.randn(1, 5, 32), position_embeddings=(torch.ones(1, 5, 8),) * 2),
    ],
    ids=["without a cache", "past its forward"],
)
def test_a_block_that_compresses_nothing_says_so(model: PreTrainedModel, run: Callable[..., Any]) -> None:
    with pytest.raises(PressError, match="compressed nothing"), PRESS(model):
        run(model)
    with PRESS(model):
        run(model)
        model(IDS)  # something was compressed
    with pytest.raises(ZeroDivisionError), PRESS(model):  # what went wrong first is what is said
        run(model)
        raise ZeroDivisionError


def test_a_copy_of_the_model_does_not_count(model: PreTrainedModel) -> None:
    other = BY_NAME["llama"].build("sdpa")
    with PRESS(model):  # another model runs: nothing was given to this press
        other(IDS)


@pytest.mark.parametrize("press", [SnapKVPress(0.0), SnapKVPress(budget_tokens=1000), SnapKVPress(0.5)])
def test_a_second_turn_in_a_second_block(model: PreTrainedModel, press: SnapKVPress) -> None:
    """Whether anything was removed does not matter: the press was asked."""
    past = PressedCache()
    with press(model):
        model(IDS, **cache_argument(past))
    n = max(past.stored_lengths())
    with press(model):
        model(IDS[:, :5], **cache_argument(past))
    assert max(past.stored_lengths()) == n + 5
    for cache in (past, past.fork()):
        with pytest.raises(CacheError, match="was compressed by SnapKVPress"), KnormPress(0.5)(model):
            model(IDS[:, :5], **cache_argument(cache))
    with DecodingPress(KnormPress(), 4, 12, 8)(model):  # goes on from what is there
        for token in IDS[:, :9].split(1, dim=1):
            model(token, **cache_argument(past))
    assert max(past.stored_lengths()) < 20
    past.reset()
    with KnormPress(0.5)(model):
        model(IDS, **cache_argument(past))
    assert past.stored_lengths() == [20, 20]


def test_a_compressed_cache_and_another_press(model: PreTrainedModel) -> None:
    past = PressedCache(PRESS)
    use_coldpress(model)
    model(IDS, **cache_argument(past))
    with pytest.raises(CacheError, match="press of its own"), KnormPress(0.5)(model):
        model(IDS[:, :5], **cache_argument(past))
