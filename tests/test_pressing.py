"""``with press(model):`` and what importing coldpress does to everything else."""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, VERSION, tokens
from tests.presses.others import small_press
from tests.presses.words import Words
from tests.traces import traces
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from coldpress import (
    AdaKVPress,
    BasePress,
    CompactorPress,
    ExpectedAttentionPress,
    FastKVzipPress,
    FinchPress,
    Kept,
    KeyRerotationPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzapPress,
    KVzipPress,
    LayerView,
    PressedCache,
    SnapKVPress,
    make_press,
    press_names,
    use_coldpress,
)
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.cache.layer import PressedLayer
from coldpress.cache.session import THREAD
from coldpress.errors import CacheError, ModelError, PressError

N = 40
PRESS = SnapKVPress(0.5, window_size=8)
IDS, QUESTION = tokens(1, N), tokens(1, 4, seed=1)


@pytest.fixture
def model() -> PreTrainedModel:
    return BY_NAME["llama"].build("sdpa")


def answer(model: PreTrainedModel, past: Any) -> Tensor:
    return model(QUESTION, **cache_argument(past)).logits


@pytest.fixture
def expected(model: PreTrainedModel) -> Tensor:
    """The logits of a question after the compressed context, by an explicit PressedCache."""
    past, twin = PressedCache(PRESS), BY_NAME["llama"].build()
    twin(IDS, **cache_argument(past))
    return answer(twin, past)


def lengths(past: Any) -> list[int]:
    return [layer.stored_length for layer in past.layers if isinstance(layer, PressedLayer)]


@pytest.mark.parametrize("kind", [DynamicCache, PressedCache])
@pytest.mark.parametrize("is_inside", [True, False])
def test_compresses_a_cache_that_is_given(
    model: PreTrainedModel, expected: Tensor, kind: type, is_inside: bool
) -> None:
    past = kind()
    with PRESS(model) as same:
        assert same is model
        model(IDS, **cache_argument(past))
        assert lengths(past) == [20, 20] and past.get_seq_length() == N
        if is_inside:
            assert torch.equal(answer(model, past), expected)
    if not is_inside:
        assert torch.equal(answer(model, past), expected)
    assert lengths(past) == [24, 24] and past.get_seq_length() == N + 4
    model(tokens(1, 3), **cache_argument(past))  # and goes on
    past.crop(-3)
    assert lengths(past) == [24, 24]


def test_makes_a_cache_where_none_is_given(model: PreTrainedModel, expected: Tensor) -> None:
    mask = torch.ones_like(IDS)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((IDS,), {}),
        ((IDS, mask), cache_argument(None)),
        ((IDS, mask, None, None), {"use_cache": True}),
        ((), {"input_ids": IDS, "use_cache": True}),
    ]
    with PRESS(model):
        for args, kwargs in calls:
            past = cache_of(model(*args, **kwargs))
            assert isinstance(past, PressedCache) and lengths(past) == [20, 20]
            assert torch.equal(answer(model, past), expected)
        assert lengths(cache_of(model.model(IDS))) == [20, 20]
        assert lengths(cache_of(model(IDS, None, None, PressedCache()))) == [20, 20]
        assert cache_of(model(IDS, use_cache=False)) is None


@pytest.mark.parametrize("name", [name for name in ("gpt_neox", "llama", "gemma3", "lfm2") if name in BY_NAME])
def test_generate(name: str) -> None:
    model = BY_NAME[name].build("sdpa")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    own = model.generate(IDS, **options)
    with PRESS(model):
        out = model.generate(IDS, return_dict_in_generate=True, **options)
    assert isinstance(cache_of(out), DynamicCache)
    full = [i for i, n in enumerate(lengths(cache_of(out))) if n == 20 + 7]
    assert len(full) == 2
    assert torch.equal(model.generate(IDS, **cache_argument(PressedCache(PRESS)), **options), out.sequences)
    assert torch.equal(model.generate(IDS, **options), own)  # the block is over


REPLAYING = {  # presses that run the model, or look into it
    "fastkvzip": FastKVzipPress(0.5),
    "finch": FinchPress(0.5, delimiter_token_id=int(IDS[0, -5])),
    "kvcompose": KVComposePress(0.5),
    "kvgrad": KVgradPress(0.5, tokenizer=Words()),
    "kvzap_mlp": KVzapPress(0.5),
    "kvzip": KVzipPress(0.5, tokenizer=Words()),
    "kvzip_plus": KVzipPress(0.5, kvzip_plus_normalization=True, tokenizer=Words()),
}


class Fails(SnapKVPress):
    """Raises while it compresses the last layer, or after the prefill."""

    def compress(self, view: LayerView) -> Kept | None:
        if view.layer_idx == view.n_layers - 1 and not self.needs_model:
            raise ArithmeticError("in compress")
        return super().compress(view)

    def finish(self, *args: Any) -> None:
        raise ArithmeticError("in finish")


class FailsLater(Fails):
    needs_model = needs_hidden_states = True


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize(
    "press",
    [
        PRESS,
        ExpectedAttentionPress(0.5),
        KeyRerotationPress(KnormPress(0.5)),
        CompactorPress(0.5),
        FailsLater(),
        *REPLAYING.values(),
    ],
    ids=lambda press: type(press).__name__,
)
def test_leaves_nothing_behind(model: PreTrainedModel, press: BasePress) -> None:
    """G4: the rotary embedding stayed registered as a sub-module of every attention layer."""
    before, logits = traces(model), model(IDS).logits
    past = PressedCache()
    if isinstance(press, Fails):
        with pytest.raises(ArithmeticError), press(model):
            model(IDS, **cache_argument(past))
    else:
        with press(model):
            model(IDS, **cache_argument(past))
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), PRESS(model):
        other = cache_of(model(IDS))
        raise ZeroDivisionError
    assert traces(model) == before
    assert past.press is None and other.press is None
    assert isinstance(press, Fails) or past.achieved_ratio() == 0.5
    assert torch.equal(model(IDS).logits, logits)
    with PRESS(model):  # the block that failed is over
        pass


@pytest.mark.parametrize(("press", "message"), [(Fails(0.5), "in compress"), (FailsLater(0.5), "in finish")])
def test_what_goes_wrong_is_what_is_raised(model: PreTrainedModel, press: BasePress, message: str) -> None:
    """G6: a forward was swapped without try/finally, and compressing in a finally block hid the real exception."""
    use_coldpress(model)
    before, forwards = traces(model), (model.forward, model.model.forward)
    with pytest.raises(ArithmeticError, match=message) as raised, press(model):
        model(IDS)
    assert raised.value.__context__ is None and raised.value.__cause__ is None
    broken = PressedCache()
    with pytest.raises(ZeroDivisionError), press(model):  # the user's own
        raise ZeroDivisionError
    with pytest.raises(ArithmeticError, match=message), press(model):
        model(IDS, **cache_argument(broken))
    with pytest.raises(Exception, match=rf"{message}|failed half-way"):  # it does not go on as if nothing had happened
        model(QUESTION, **cache_argument(broken))
    assert traces(model) == before and (model.forward, model.model.forward) == forwards
    assert model.config._attn_implementation == "coldpress"
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", [name for name, press in REPLAYING.items() if press.needs_model])
@pytest.mark.parametrize("at", ["the model", "a layer", "the scores"])
def test_a_replay_that_fails_leaves_the_model_as_it_was(
    model: PreTrainedModel, name: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6: KVzip swapped a forward and KVCompose the attention, and neither put it back when the second pass failed."""
    press = REPLAYING[name]
    use_coldpress(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before, forwards, logits = traces(model), (model.forward, model.model.forward), model(IDS).logits
    calls, module = [], model.model if at == "the model" else model.model.layers[1]

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # the first is the prefill
            raise ArithmeticError("in the replay")

    handle = None if at == "the scores" else module.register_forward_pre_hook(fail)
    with monkeypatch.context() as patch:
        if handle is None:
            patch.setattr(LayerView, "attention_blocks", lambda self: fail() or fail())
        past = PressedCache()
        with press(model):
            with pytest.raises(ArithmeticError, match="in the replay") as raised:
                model(IDS, **cache_argument(past))
            assert raised.value.__cause__ is None and raised.value.__context__ is None
            patch.undo()
            if handle is not None:
                handle.remove()
            assert cache_of(model(IDS)).achieved_ratio() == 0.5  # the block goes on
    with pytest.raises(ArithmeticError, match="in the replay"):  # what is half done is not used
        model(QUESTION, **cache_argument(past))
    assert traces(model) == before and (model.forward, model.model.forward) == forwards
    assert model.config._attn_implementation == "coldpress"
    assert THREAD.hidden_states is None and past.session.token_ids is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model(IDS).logits, logits)
    with press(model):
        assert cache_of(model(IDS)).achieved_ratio() == 0.5


def test_presses_share_nothing_that_changes(caplog: pytest.LogCaptureFixture) -> None:
    """G5: instances in a shared registry could be changed, results were cached by model name, calls logged warnings."""
    for name in press_names():
        press = small_press(name, "llama")
        with pytest.raises(dataclasses.FrozenInstanceError):
            press.compression_ratio = 0.9
        assert hash(press) == hash(copy.deepcopy(press))
    first, second = BY_NAME["llama"].build(), BY_NAME["llama"].build()
    for parameter in second.parameters():
        parameter.mul_(-1.5)
    first.name_or_path = second.name_or_path = first.config._name_or_path = second.config._name_or_path = "one name"
    third = BY_NAME["llama"].build()  # what the second one is, under a name of its own
    third.load_state_dict(second.state_dict())
    third.name_or_path = third.config._name_or_path = "another name"
    press = make_press("critical_expected_attention", 0.5)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as told:
        kept = []
        for model in (first, second, first, third):
            past = PressedCache()
            with press(model):
                model(IDS, **cache_argument(past))
            kept.append(past.positions(1))
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[3])
    assert told == [] and caplog.records == []


@pytest.mark.usefixtures("given_artefacts", "given_weights")
def test_presses_change_no_weight(model: PreTrainedModel) -> None:
    """G7: adapters stayed on the model, and embeddings were resized for a token that was added."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    presses = [small_press(name, "llama").prepared(model, Words()) for name in press_names(at_prefill=True)]
    for press in (*presses, *REPLAYING.values()):
        with press(model):
            assert cache_of(model(IDS)).achieved_ratio() > 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 97


def test_attention_that_was_registered_later(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """G2: attention registered after the import was not patched, so that head-wise presses silently did nothing."""
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa(*args, **kwargs)

    press = AdaKVPress(SnapKVPress(0.6, window_size=4))
    past, whole = PressedCache(press), PressedCache()
    twin = BY_NAME["llama"].build()
    for cache in (past, whole):
        twin(IDS, **cache_argument(cache))
    expected, uncompressed = answer(twin, past), answer(twin, whole)
    assert not torch.allclose(expected, uncompressed, atol=1e-2)
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", mine)
    model.set_attn_implementation("mine")
    model(IDS)
    assert len(calls) == 2
    with pytest.raises(ModelError, match="another attention backend"):  # said, instead of doing nothing
        past = PressedCache(press)
        model(IDS, **cache_argument(past))
        answer(model, past)
    with press(model):
        past = cache_of(model(IDS))
    torch.testing.assert_close(answer(model, past), expected, atol=1e-5, rtol=0)
    # and a function that takes the place of sdpa serves the models that ask for sdpa
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", mine)
    calls.clear()
    BY_NAME["llama"].build("sdpa")(IDS)
    model(IDS, use_cache=False)
    assert len(calls) == 4


def test_another_press_inside_the_block(model: PreTrainedModel) -> None:
    other, inner = BY_NAME["gpt_neox"].build("sdpa"), KnormPress(0.8)
    with PRESS(model):
        with pytest.raises(PressError, match="one press at a time"), inner(model):
            pass
        with inner(other):  # another model is another matter
            assert lengths(cache_of(other(IDS))) == [8, 8]
        assert lengths(cache_of(model(IDS))) == [20, 20]


def test_a_cache_with_a_press_of_its_own(model: PreTrainedModel) -> None:
    with PRESS(model):
        model(IDS, **cache_argument(PressedCache(PRESS)))  # the same one
        with pytest.raises(CacheError, match="press of its own"):
            model(IDS, **cache_argument(PressedCache(KnormPress(0.5))))


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can, not every five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Looks(KnormPress):
    needs_hidden_states = True


def test_another_thread_may_call_a_hook_before_torch_knows_that_it_takes_keywords() -> None:
    """torch adds a hook to a module first, and then notes that it takes keywords: a thread may come in between."""
    model, found = BY_NAME["llama"].build(), []

    def call(hooks: list[Any]) -> None:
        found.extend(hook(model, (IDS,)) for hook in hooks)

    with Looks(0.5)(model):
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        thread = threading.Thread(target=call, args=(hooks,))
        thread.start()
        thread.join()
    assert len(hooks) >= 3 and found == [None] * len(hooks)


@pytest.mark.parametrize("is_one_model", [False, True])
def test_threads_do_not_disturb_each_other(is_one_model: bool, switching: None) -> None:
    """G3: what one request masked was looked up on the model's modules by every other thread."""
    models = [BY_NAME["llama"].build(), BY_NAME["llama"].build()]
    if is_one_model:
        models[1] = models[0]
    presses = [PRESS, AdaKVPress(KnormPress(0.8))]
    start, results, errors = threading.Barrier(2, timeout=60), [[], []], []

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                with presses[i](models[i]):
                    past = DynamicCache()
                    models[i](IDS, **cache_argument(past))
                    results[i].append((lengths(past), answer(models[i], past)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for press, found in zip(presses, results, strict=True):
        past = PressedCache(press)
        models[0](IDS, **cache_argument(past))
        expected = (past.stored_lengths(), answer(models[0], past))
        assert len(found) == 20
        assert all(stored == expected[0] and torch.equal(logits, expected[1]) for stored, logits in found)


# -- what cannot work -------------------------------------------------------------------------------------------------


def test_other_caches(model: PreTrainedModel) -> None:
    class Mine(DynamicCache):
        pass

    offloaded = DynamicCache()
    offloaded.offloading = True
    quantized = QuantizedCache.__new__(QuantizedCache)  # without the packages it needs
    static = StaticCache(config=model.config, max_cache_len=64)
    others = {"StaticCache": static, "QuantizedCache": quantized, "Mine": Mine(), "one that is offloaded": offloaded}
    for what, past in others.items():
        with PRESS(model), pytest.raises(CacheError, match=rf"not {what}.*coldpress.PressedCache"):
            model(IDS, **cache_argument(past))


@pytest.mark.parametrize("name", ["static", "offloaded"])
def test_an_implementation_that_generate_is_told_of(model: PreTrainedModel, name: str) -> None:
    with PRESS(model), pytest.raises(CacheError, match=r", not (Static|one ).*Leave cache_implementation out, or"):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), cache_implementation=name, max_new_tokens=3)


def test_a_dynamic_cache_that_holds_tokens(model: PreTrainedModel) -> None:
    past = DynamicCache()
    model(IDS, **cache_argument(past))
    with PRESS(model), pytest.raises(CacheError, match="Start empty"):
        model(QUESTION, **cache_argument(past))


_SMALL = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.mark.parametrize(("model_type", "config"), [("t5", _SMALL), ("bart", _SMALL | _BART)])
def test_encoder_decoders(model_type: str, config: dict[str, Any]) -> None:
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **config))
    with pytest.raises(ModelError, match="encoder-decoder"), PRESS(model):
        pass


_OLD = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2},
}
if VERSION < (5, 24):
    _OLD["gptj"] = _OLD["codegen"] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 64}


@pytest.mark.parametrize("model_type", list(_OLD))
def test_models_without_the_attention_interface(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=97, **_OLD[model_type]))
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match="attention interface"), PRESS(model):
        pass
    assert model.config._attn_implementation == before


def test_chunked_attention(model: PreTrainedModel) -> None:
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ModelError, match="fixed chunks"):
        use_coldpress(model)


def test_layers_that_share_a_cache(model: PreTrainedModel) -> None:
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ModelError, match="another layer's cache"):
        use_coldpress(model)


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
_SIZES |= {"num_key_value_heads": 2, "vocab_size": 97}
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8}
_MORE = {
    "falcon_h1": (_STATES, r"keep a state beside their|cache of its own"),
    "inkling_text": ({"moe_intermediate_size": 16, "n_routed_experts": 4}, "keep a state beside their"),
    "deepseek_v4": (
        {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16},
        "something else than these",
    ),
    "mamba": ({"hidden_size": 32}, r"nothing to compress|cache of its own"),
    "xlstm": ({"num_heads": 2}, "cache of its own"),
}


@pytest.mark.parametrize("model_type", [name for name in _MORE if name in CONFIG_MAPPING])
@pytest.mark.parametrize("kind", [DynamicCache, PressedCache])
def test_models_that_keep_something_else(model_type: str, kind: type) -> None:
    more, message = _MORE[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(_SIZES | more)))
    with pytest.raises(ModelError, match=message), PRESS(model):
        model(IDS, **cache_argument(kind()))


@pytest.mark.parametrize("model_type", [name for name in ("inkling_text", "deepseek_v4") if name in CONFIG_MAPPING])
def test_they_are_refused_outside_of_a_block_too(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **(_SIZES | _MORE[model_type][0]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="coldpress")
    with pytest.raises(ModelError, match="something else than these"):
        model(IDS, **cache_argument(PressedCache(PRESS)))


@pytest.mark.parametrize("is_decoder", [True, False])
def test_encoders(is_decoder: bool) -> None:
    """BERT is a decoder if its configuration says so."""
    if is_decoder and VERSION < (5, 0):
        pytest.skip("is not on the attention interface")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=is_decoder, **_SIZES)).eval()
    if is_decoder:
        own = model(IDS).logits
        with PRESS.with_ratio(0.0)(model):
            torch.testing.assert_close(model(IDS, **cache_argument(past := PressedCache())).logits, own)
        assert past.seen_tokens == IDS.shape[1]
        return
    with pytest.raises(ModelError, match=r"causal decoder|attention interface"), PRESS(model):
        model(IDS, **cache_argument(PressedCache()))


# -- everything else --------------------------------------------------------------------------------------------------

_IMPORT = """
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
ids = torch.arange(40)[None]
logits = model(ids).logits
small = dict(embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
             blocks_per_stage=[1] * 4, window_size_per_stage=[2] * 4, global_attention_blocks=[],
             window_positional_embedding_background_size=[2, 2], image_size=[64, 64])
vision = Sam2HieraDetModel(Sam2HieraDetConfig(hidden_size=8, num_attention_heads=1, **small)).eval()
vision.set_attn_implementation("sdpa")  # its attention passes no dropout
image = torch.randn(1, 3, 64, 64)
seen = vision(image).last_hidden_state
before = dict(attention), dict(masks), dict(vars(Cache)), dict(vars(DynamicCache)), dict(vars(type(model)))

import coldpress

for mapping, old in ((attention, before[0]), (masks, before[1])):
    new = dict(mapping)
    assert {name: new[name] for name in old} == old
    assert set(new) - set(old) == {"coldpress", "coldpress_eager", "coldpress_fa2"}, set(new) - set(old)
    assert not mapping._local_mapping, mapping._local_mapping
assert (dict(vars(Cache)), dict(vars(DynamicCache)), dict(vars(type(model)))) == before[2:]
assert torch.equal(model(ids).logits, logits)
assert model.config._attn_implementation == "sdpa"
assert torch.equal(vision(image).last_hidden_state, seen)
vision.set_attn_implementation("coldpress")  # as in a model of pictures and text
torch.testing.assert_close(vision(image).last_hidden_state, seen)

import importlib
from coldpress.architecture.cache_argument import cache_argument, cache_of

def pressed():
    with coldpress.SnapKVPress(0.5, window_size=4)(model):
        past = cache_of(model(ids))
    return past.stored_lengths(), model(ids[:, :3], **cache_argument(past)).logits

model.set_attn_implementation("coldpress")
first = pressed()
for module in (coldpress.models.backend, coldpress):
    importlib.reload(module)
again = pressed()
assert first[0] == again[0] == [20, 20] and torch.equal(first[1], again[1])
assert not attention._local_mapping and torch.equal(model(ids).logits, logits)
"""


@pytest.mark.slow
def test_importing_changes_nothing_for_other_models() -> None:
    """G1: the import patched attention for all models, and those that pass no dropout failed with a TypeError."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_filled_cache_that_was_never_compressed_is_refused() -> None:
    twin, past = BY_NAME["llama"].build(), PressedCache()
    twin(IDS, **cache_argument(past))
    with KnormPress(0.5)(twin), pytest.raises(CacheError, match="holds tokens already"):
        twin(QUESTION, **cache_argument(past))
