"""``model.generate`` with a PressedCache: sampling, beams, streaming, assisted generation, turns."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, GENERATES_IN_PIECES, ROTARY_VARIANTS, VERSION, Look, tiny, tokens
from tests.oracles.models import oracle_logits
from tests.presses.others import block, small_press
from tests.presses.words import Words
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    Kept,
    KeyRerotationPress,
    KnormPress,
    KVComposePress,
    LayerView,
    LUKVPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    RandomPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.errors import CacheError, ModelError

N, NEW = 40, 12
PRESS = SnapKVPress(0.5, window_size=8)
IDS = tokens(1, N)


def named(press: BasePress | str | None) -> str:
    return press if isinstance(press, str) else type(press).__name__


def press_for(press: BasePress | str, model: str) -> BasePress:
    """A press that is registered, where a name is given."""
    return small_press(press, model) if isinstance(press, str) else press


def generate(
    name: str, past: PressedCache | None, ids: Tensor = IDS, attention: str = "coldpress", **options: Any
) -> Any:
    cache = {} if past is None else cache_argument(past)
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return tiny(name, attention).generate(ids, **cache, **settings)


def own(name: str, **options: Any) -> Any:
    """What the model does by itself."""
    return generate(name, None, attention="sdpa", **options)


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
@pytest.mark.parametrize("press", [None, SnapKVPress(0.0), ExpectedAttentionPress(0.0), RandomPress(0.0)], ids=repr)
def test_sampling_draws_what_the_model_draws_by_itself(name: str, press: BasePress | None) -> None:
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20}
    torch.manual_seed(7)
    expected = own(name, **options)
    torch.manual_seed(7)
    assert torch.equal(generate(name, PressedCache(press), **options), expected)


@pytest.mark.parametrize(("press", "n_draws"), [(PRESS, 0), (RandomPress(0.5, seed=3), 0), (RandomPress(0.5), 1)])
def test_compression_leaves_the_random_numbers_alone(press: BasePress, n_draws: int) -> None:
    """But for RandomPress without a seed, which draws one for the whole cache."""
    torch.manual_seed(7)
    tiny("llama")(IDS, **cache_argument(PressedCache(press)))
    after = torch.rand(1)
    torch.manual_seed(7)
    for _ in range(n_draws):
        torch.randint(2**62, (1,))
    assert torch.equal(after, torch.rand(1))


def test_random_press_without_a_seed_follows_torch() -> None:
    def kept(seed: int) -> Tensor:
        torch.manual_seed(seed)
        past = PressedCache(RandomPress(0.5))
        tiny("llama")(IDS, **cache_argument(past))
        return past.positions()

    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mistral"])
def test_beam_search_finds_what_the_model_finds_by_itself(name: str) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(name, PressedCache(), **options), own(name, **options))
    assert torch.equal(generate(name, PressedCache(PRESS.with_ratio(0.0)), **options), own(name, **options))


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mistral"])
def test_beam_search_under_a_press_equals_scoring_its_result(name: str) -> None:
    """The score of a beam is the sum of the log-probabilities that a compressed cache gives its tokens."""
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    first, second = (generate(name, PressedCache(PRESS), **options) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    past, answer = PressedCache(PRESS), first.sequences[:, N:]
    logits = [tiny(name)(IDS, **cache_argument(past)).logits[:, -1]]
    logits += [tiny(name)(answer[:, t : t + 1], **cache_argument(past)).logits[:, -1] for t in range(NEW - 1)]
    score = torch.stack(logits, 1).log_softmax(-1).gather(2, answer[..., None]).sum()
    torch.testing.assert_close(first.sequences_scores[0], score, atol=1e-3, rtol=0)


def test_several_answers_to_one_prompt() -> None:
    torch.manual_seed(0)
    answers = generate("llama", PressedCache(PRESS), do_sample=True, num_return_sequences=4)
    assert answers.shape == (4, N + NEW) and len({tuple(row) for row in answers.tolist()}) > 1


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[int] = []

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.heard.append(-1)


def test_streamer() -> None:
    listener = Listener()
    answer = generate("llama", PressedCache(PRESS), streamer=listener)
    assert listener.heard == [*answer[0].tolist(), -1]


def test_stops_at_the_end_of_the_text() -> None:
    answer = generate("llama", PressedCache(PRESS))[0, N:].tolist()
    past = PressedCache(PRESS)
    shorter = generate("llama", past, eos_token_id=answer[4])[0, N:].tolist()
    assert shorter == answer[: answer.index(answer[4]) + 1]
    assert past.seen_tokens == N + len(shorter) - 1


def test_generate_goes_on_where_a_cache_ends() -> None:
    """Two turns by generate are the tokens one by one; what the cache has seen is not computed again."""
    for press in (None, PRESS):
        past = PressedCache(press)
        first = generate("llama", past)
        second = generate("llama", past, torch.cat([first, tokens(1, 5, seed=3)], dim=1))
        assert past.seen_tokens == second.shape[1] - 1
        other = PressedCache(press)
        tiny("llama")(IDS, **cache_argument(other))
        logits = tiny("llama")(second[:, N:], **cache_argument(other)).logits
        assert torch.equal(logits[0, NEW + 4 : -1].argmax(-1), second[0, N + NEW + 5 :])


def guessing(name: str, guess: str) -> dict[str, Any]:
    if guess == "prompt_lookup":
        return {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    assistant = BY_NAME[name].build("sdpa")
    head = assistant.get_output_embeddings().weight
    head.add_(0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))  # right now and then
    assistant.generation_config.assistant_confidence_threshold = 0.0  # it guesses whatever comes
    return {"assistant_model": assistant}


GUESSES = [("llama", "prompt_lookup"), ("llama", "assistant"), ("gemma3", "prompt_lookup")]
REPETITIVE = tokens(1, 20).repeat(1, 3)  # so that there is something to look up
LONGER: dict[str, Any] = {"ids": REPETITIVE, "max_new_tokens": 30, "eos_token_id": 2}


@pytest.mark.parametrize(("name", "guess"), GUESSES)
def test_assisted_generation(name: str, guess: str) -> None:
    expected = own(name, **LONGER)
    answer = generate(name, PressedCache(), **LONGER, **guessing(name, guess))
    assert torch.equal(answer[:, : expected.shape[1]], expected)  # 4.56 may add a token too many


@pytest.mark.parametrize(("name", "guess"), GUESSES)
def test_assisted_generation_under_a_press(name: str, guess: str) -> None:
    """Guesses come with the prompt, before there is a cache that could take them back."""
    with pytest.raises(CacheError, match=r"guesses together with the prompt|prefill again"):
        generate(name, PressedCache(PRESS), **LONGER, **guessing(name, guess))
    if VERSION < (5, 0):  # later versions feed the whole prompt again, also with caches of their own
        past = PressedCache(PRESS)
        tiny(name)(REPETITIVE[:, :-1], **cache_argument(past))
        expected = generate(name, past.fork(), **LONGER)
        answer = generate(name, past, **LONGER, **guessing(name, guess))
        assert torch.equal(answer[:, : expected.shape[1]], expected)


@pytest.mark.skipif(not GENERATES_IN_PIECES, reason="transformers")
@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize(
    "press",
    [
        PyramidKVPress(0.5, window_size=4),
        AdaKVPress(KnormPress(0.5)),
        "dms_lagkv",
        "duo_attention",
        "fastkvzip",
        "kvcompose",
        "kvzip",
        "lukv",
        "simlayerkv",
    ],
    ids=named,
)
def test_a_second_turn_and_later_chunks_by_a_schedule(press: BasePress | str) -> None:
    """F: later chunks of a prompt and later turns stayed whole: no press could compress them."""
    press = press_for(press, "llama")
    both = PrefillDecodingPress(press, DecodingPress(SnapKVPress(window_size=4), 16, 20))
    past = PressedCache(both)
    with block(tiny("llama"), both):
        answer = generate("llama", past, tokens(1, 128), prefill_chunk_size=32, max_new_tokens=1)
    assert past.seen_tokens == 128 and max(past.stored_lengths()) < 20 + 16
    longer = torch.cat([answer, tokens(1, 64, seed=3)], dim=1)
    generate("llama", past, longer, max_new_tokens=1)
    assert past.seen_tokens == 193 and max(past.stored_lengths()) < 20 + 16
    generate("llama", past, torch.cat([longer, tokens(1, 1)], dim=1))
    assert past.seen_tokens == 194 + NEW - 1 and max(past.stored_lengths()) < 20 + 16
    for layer in past.pressed_layers():
        recent = layer.positions()[..., -4:]  # what came last is there, at its own places
        assert torch.equal(recent, torch.arange(past.seen_tokens - 4, past.seen_tokens).expand_as(recent))


@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(0.75, window_size=4),
        AdaKVPress(SnapKVPress(0.75, window_size=4), 0.9),
        DMSPress(KnormPress(), threshold=0.0),  # nothing scores above it
        DuoAttentionPress(0.9, pattern=[[i / 5, i / 5] for i in range(6)]),
        LUKVPress(KnormPress(0.75), curves=[[[r / 100] * 2] * 6 for r in range(1, 100)]),
        SimLayerKVPress(0.0, n_recent=50),
    ],
    ids=named,
)
def test_one_layer_at_a_time_is_whole(press: BasePress, monkeypatch: pytest.MonkeyPatch) -> None:
    """F: head-wise presses held the whole prompt in every layer until the prefill was over."""
    model, past, held = BY_NAME["llama"].build(num_hidden_layers=6), PressedCache(press), []
    compress = type(press).compress

    def spy(self: Any, view: LayerView) -> Kept | None:
        held.append(past.kv_bytes())
        return compress(self, view)

    monkeypatch.setattr(type(press), "compress", spy)
    model(tokens(1, 400), **cache_argument(past))
    whole = 2 * 2 * 400 * 8 * 4  # keys and values, heads, tokens, dimensions, float32
    assert len(held) == 6
    for i, n_bytes in enumerate(held):
        assert n_bytes <= whole * (1 + i * (0.97 if isinstance(press, DuoAttentionPress) else 0.33))


# -- positions and masks ----------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("backend", ["coldpress", "coldpress_eager"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox_full_rotary", "llama"])
@pytest.mark.parametrize(
    "press",
    [
        PyramidKVPress(0.6, window_size=4, beta=3),
        PerLayerCompressionPress(KnormPress(), [0.8, 0.25]),
        PerLayerCompressionPress(SnapKVPress(window_size=4), [0.0, 0.7]),
        AdaKVPress(KnormPress(0.6), 0.0),
        "dms_lagkv",
        "duo_attention",
        "fastkvzip",
        KVComposePress(0.6),
        "kvzip",
        "lukv",
        "simlayerkv",
    ],
    ids=named,
)
def test_a_question_of_several_tokens_where_layers_differ(name: str, press: BasePress | str, backend: str) -> None:
    """C: one mask, made for layer 0, served all layers: a question of several tokens failed in sdpa and eager."""
    model, question = tiny(name, backend), tokens(1, 5, seed=4)
    look = Look()
    full, past = PressedCache(look), PressedCache()
    model(IDS, **cache_argument(full))
    if press == "simlayerkv":  # with a threshold that one layer reaches
        shares = [
            float(view.window_attention(1)[..., [0, 1, 2, *range(N - 12, N)]].sum(-1).mean()) for view in look.views
        ]
        press = SimLayerKVPress(sum(shares) / 2, n_recent=12, n_initial=3)
    press = press_for(press, name)
    with torch.no_grad(), press.prepared(model, Words())(model):
        model(IDS, **cache_argument(past))
    kept = [[[p for p in head if p >= 0] for head in layer.positions()[0].tolist()] for layer in past.pressed_layers()]
    assert len({len(head) for layer in kept for head in layer}) > 1
    expected = oracle_logits(name, question[0], full, kept)
    torch.testing.assert_close(model(question, **cache_argument(past)).logits[0], expected, atol=1e-4, rtol=0)


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "press",
    [
        KnormPress(0.5),
        PyramidKVPress(0.5, window_size=4),
        AdaKVPress(SnapKVPress(0.6, window_size=4)),
        DecodingPress(KnormPress(), 3, 12),
        "dms_lagkv",
        "duo_attention",
        "fastkvzip",
        "finch",
        "kvcompose",
        "kvzip",
        "lukv",
        "merging_snapkv",
        "simlayerkv",
        "think",
    ],
    ids=named,
)
def test_a_call_without_positions_goes_on_where_the_text_ends(name: str, press: BasePress | str) -> None:
    """D1: a call without position_ids took the stored length for the next position: 64 instead of 128."""
    model, press = tiny(name), press_for(press, name)
    if name == "mistral" and press.needs_model:
        pytest.skip("its windows do not reach back to the text")
    runs = []
    for has_positions in (False, True):
        past, logits, end = PressedCache(press), [], 0
        for n in (N, 1, 4, 1, 1):
            start, end = end, end + n
            places = {"position_ids": torch.arange(start, end)[None]} if has_positions else {}
            assert past.get_seq_length() == start
            with block(model, press):
                logits.append(model(tokens(1, 47)[:, start:end], **cache_argument(past), **places).logits)
        runs.append(torch.cat(logits, dim=1))
    assert torch.equal(*runs)
    assert past.achieved_ratio() > 0.1  # so that it would show


@pytest.mark.parametrize("name", ["gpt_neox", "llama", *(a.name for a in ROTARY_VARIANTS)])
@pytest.mark.parametrize("earlier", [0, 12, 200])
@pytest.mark.parametrize("is_in_block", [True, False])
def test_keys_are_moved_by_the_frequencies_of_their_prefill(
    name: str, earlier: int, is_in_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D2: rotation went by the frequencies of the moment, which dynamic and longrope embeddings swap."""
    model, press = BY_NAME[name].build(), KeyRerotationPress(StreamingLLMPress(0.5))
    if earlier:
        model(tokens(1, earlier))  # which has frequencies of its own
    source, seen = sys.modules[type(model).__module__], []
    apply = source.apply_rotary_pos_emb

    def spy(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if k.shape[2] == N:  # the model's own calls
            seen.append((k, cos, sin))
        return apply(q, k, cos, sin, *args, **kwargs)

    past = PressedCache(press)
    with monkeypatch.context() as patch:
        patch.setattr(source, "apply_rotary_pos_emb", spy)
        if (name, earlier, is_in_block) == ("llama_dynamic", 200, False) and VERSION != (5, 2):
            # but for 5.2 the model keeps the frequencies of its longest text, and a cache by itself does not know them
            with pytest.raises(ModelError, match="other frequencies"):
                model(IDS, **cache_argument(past))
            return
        with press(model) if is_in_block else nullcontext():
            model(IDS, **cache_argument(past))
    for layer, (keys, cos, sin) in zip(past.pressed_layers(), seen, strict=True):
        kept, width = layer.positions()[0, 0], cos.shape[-1]
        assert len(kept) == N // 2
        before, last = keys[:, :, kept], slice(N - N // 2, N)  # next to each other, at the end of the text
        rotated = before[..., :width]
        rotated, _ = apply(rotated, rotated, cos[:, last], sin[:, last])
        expected = torch.cat([rotated, before[..., width:]], dim=-1)
        torch.testing.assert_close(layer.keys[..., : expected.shape[-1]], expected, atol=1e-4, rtol=0)


# -- waiting for the device -------------------------------------------------------------------------------------------

_WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero", "allclose"}
_TO_HOST = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "any_to_bool"}


class Waits(TorchDispatchMode):
    """Operations that need a number on the host, which on a GPU wait for all that was asked of it before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITING or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class ToHost(TorchFunctionMode):
    """The same for what a CPU tensor does without an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _TO_HOST:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(
    "press",
    [
        None,
        SnapKVPress(0.5, window_size=4),
        ExpectedAttentionPress(0.5),
        AdaKVPress(KnormPress(0.5)),
        KeyRerotationPress(StreamingLLMPress(0.5)),
        DecodingPress(KnormPress(), 64, 20),
        "duo_attention",
        "lukv",
        "think",
    ],
    ids=named,
)
def test_decoding_waits_for_nothing(name: str, press: BasePress | str | None, has_mask: bool) -> None:
    """I: every layer asked the device whether this was the prefill, at every step: .item() per layer and token."""
    model, waits, to_host = tiny(name), Waits(), ToHost()
    past = PressedCache(None if press is None else press_for(press, name))
    mask = torch.ones(1, N + 3, dtype=torch.long)
    masks = [{"attention_mask": mask[:, :n]} if has_mask else {} for n in (N, N + 1, N + 2, N + 3)]
    model(IDS, **cache_argument(past), **masks[0])
    model(IDS[:, :1], **cache_argument(past), **masks[1])
    with waits, to_host:
        model(IDS[:, :1], **cache_argument(past), **masks[2])
    # a mask is looked at once a call, as transformers does; a list of several numbers is no scalar of the dispatcher's
    assert len(waits.found) <= len(to_host.found) <= has_mask
    with waits, to_host:  # it is seen when it happens
        bool(torch.ones(1).any())
        torch.ones(1).tolist()
    assert waits.found and "tolist" in to_host.found


def test_decoding_a_batch_waits_once_at_most() -> None:
    """I: for several rows the padding mask is looked at once a call, not once a layer."""
    model = BY_NAME["llama"].build(num_hidden_layers=6)
    past, waits, mask = PressedCache(AdaKVPress(KnormPress(0.5))), Waits(), torch.ones(2, N + 1, dtype=torch.long)
    model(tokens(2, N), attention_mask=mask[:, :N], **cache_argument(past))
    with waits:
        model(tokens(2, 1), attention_mask=mask, **cache_argument(past))
    assert len(waits.found) <= 1


def test_no_cache_at_all() -> None:
    assert torch.equal(generate("llama", None, use_cache=False), own("llama"))
    assert torch.equal(generate("llama", None), own("llama"))


@pytest.mark.parametrize("press", [None, PRESS])
def test_logits_and_hidden_states_on_request(press: BasePress | None) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    out = generate("llama", PressedCache(press), **options)
    assert isinstance(cache_of(out), PressedCache) and len(out.logits) == len(out.hidden_states) == NEW
    if press is None:
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(own("llama", **options).logits))


def test_versions_at_both_ends_are_the_ones_tested() -> None:
    assert (4, 56) <= VERSION < (6, 0)
