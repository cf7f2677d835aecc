"""The pipeline: one compressed context, answers that do not know of each other, and refusals before any work."""

from __future__ import annotations

import gc
import importlib.util
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import VERSION
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, small_press
from tests.tiny_folder import CONTEXT, DEMO, POSITIONS, QUESTIONS
from tests.tiny_folder import folder as folder
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GPTNeoXConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Phi3Config,
    PreTrainedModel,
    QuantizedCache,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from coldpress import (
    AdaKVPress,
    BasePress,
    ChunkPress,
    ComposedPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    FinchPress,
    Kept,
    KnormPress,
    KVBits,
    KVzapPress,
    KVzipPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    make_press,
    prefill,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.layer import PressedLayer
from coldpress.cache.session import Session
from coldpress.errors import CacheError, InputError, PressError
from coldpress.models.pipeline import TASKS, KVPressTextGenerationPipeline


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def pipe(model: PreTrainedModel, tokenizer: Any) -> KVPressTextGenerationPipeline:
    return pipeline(TASKS[0], model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=8)


class Fed:
    """Shapes and ids of what the model's backbone was given."""

    def __init__(self, model: PreTrainedModel):
        self.ids: list[list[int]] = []
        model.base_model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids.append((args[0] if args else kwargs["input_ids"]).flatten().tolist())


def encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def own_answer(model: PreTrainedModel, tokenizer: Any, *texts: str, **options: Any) -> str:
    """The model's own answer to texts that are tokenised one by one, without this package."""
    ids = torch.cat([encode(tokenizer, text) for text in texts], 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    if "stop_strings" in options:
        settings["tokenizer"] = tokenizer
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    output = getattr(output, "sequences", output)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


# Answers


@pytest.mark.parametrize("prefix", ["", "The answer is"])
def test_without_a_press_it_is_the_models_own_greedy_answer(
    pipe: KVPressTextGenerationPipeline, folder: Path, tokenizer: Any, prefix: str
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    for question in QUESTIONS:
        expected = own_answer(plain, tokenizer, "<|endoftext|>" + CONTEXT, question + "\n" + prefix)
        assert pipe(CONTEXT, question=question, answer_prefix=prefix) == {"answer": expected}
    assert pipe(CONTEXT) == {"answer": own_answer(plain, tokenizer, "<|endoftext|>" + CONTEXT, "\n")}
    assert pipe.model.config._attn_implementation == "coldpress"  # which changes nothing without a press
    assert own_answer(pipe.model, tokenizer, CONTEXT) == own_answer(plain, tokenizer, CONTEXT)


@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("name", [*WITH_RATIO, *IN_BLOCK, *OTHERS])
@pytest.mark.thinned(9)
def test_several_questions_are_answered_as_if_each_was_the_only_one(
    pipe: KVPressTextGenerationPipeline, name: str
) -> None:
    """H: 20 tokens of an answer stayed in the quantised cache and leaked into the next question."""
    press = make_press(name, 0.5, seed=1) if name == "random" else None
    press = press or (OTHERS[name](2, 4) if name in OTHERS else make_press(name, 0.5))
    together = pipe(CONTEXT, questions=QUESTIONS, press=press)["answers"]
    assert len(together) == len(set(together)) == 3  # they do differ
    for question, answer in zip(QUESTIONS, together, strict=True):
        assert pipe(CONTEXT, question=question, press=press)["answer"] == answer
    assert pipe(CONTEXT, questions=QUESTIONS[::-1], press=press)["answers"] == together[::-1]
    assert pipe(CONTEXT, questions=[], press=press) == {"answers": []}


def test_presses_that_speak_to_the_model_get_the_pipelines_tokenizer(
    model: PreTrainedModel, tokenizer: Any, folder: Path
) -> None:
    """L: KVzip loaded the tokenizer again by the model's name, and could not take a model made in memory."""
    model.config._name_or_path = ""  # a model made in memory
    pipe = pipeline(TASKS[0], model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=8)
    expected, found = PressedCache(), [PressedCache(), PressedCache(KVzipPress(0.5))]
    with torch.no_grad(), KVzipPress(0.5, tokenizer=tokenizer)(model):
        model(encode(tokenizer, "<|endoftext|>" + CONTEXT), **cache_argument(expected))
    answers = [pipe(CONTEXT, question=QUESTIONS[0], press=KVzipPress(0.5), cache=found[0])]
    answers.append(pipe(CONTEXT, question=QUESTIONS[0], cache=found[1]))
    assert answers[0] == answers[1]
    for past in found:
        assert past.achieved_ratio() > 0.4
        for ours, theirs in zip(past.pressed_layers(), expected.pressed_layers(), strict=True):
            assert torch.equal(ours.positions(), theirs.positions())


def test_finch_takes_the_question_with_the_context(pipe: KVPressTextGenerationPipeline, tokenizer: Any) -> None:
    mark, question = tokenizer.eos_token, QUESTIONS[0]
    cache, n_question = PressedCache(), encode(tokenizer, question).shape[1]
    answer = pipe(
        CONTEXT + mark + question, press=FinchPress(0.5, delimiter_token_id=tokenizer.eos_token_id), cache=cache
    )
    assert answer == pipe(CONTEXT + mark + question, press=FinchPress(0.5, window_size=n_question))
    seen = cache.seen_tokens
    assert cache.positions()[0, 0, -n_question:].tolist() == list(range(seen - n_question, seen))


def test_the_context_is_read_once_and_the_question_stays_outside(
    pipe: KVPressTextGenerationPipeline, model: PreTrainedModel, tokenizer: Any
) -> None:
    fed, cache = Fed(model), PressedCache(KnormPress(0.5))
    pipe(CONTEXT, questions=QUESTIONS, cache=cache)
    context = encode(tokenizer, "<|endoftext|>" + CONTEXT)[0].tolist()
    assert fed.ids[0] == context
    asked = [ids for ids in fed.ids[1:] if len(ids) > 1]
    assert asked == [encode(tokenizer, question + "\n")[0].tolist() for question in QUESTIONS]
    assert fed.ids.count(context) == 1
    assert cache.seen_tokens == len(context)  # and no answer
    assert cache.stored_lengths() == [len(context) // 2] * 2


def test_a_cache_is_used_again_and_goes_on(pipe: KVPressTextGenerationPipeline) -> None:
    press, cache = SnapKVPress(0.5), PressedCache(SnapKVPress(0.5))
    first = pipe(CONTEXT, questions=QUESTIONS, cache=cache)
    assert first == pipe(CONTEXT, questions=QUESTIONS, press=press)
    seen, stored = cache.seen_tokens, cache.stored_lengths()
    second = pipe(" More of it. ", question=QUESTIONS[1], cache=cache)
    n_more = cache.seen_tokens - seen
    assert n_more == len(pipe.tokenizer(" More of it. ")["input_ids"])
    assert cache.stored_lengths() == [n + n_more for n in stored]  # what comes later is stored whole
    other = PressedCache(press)
    pipe(CONTEXT, questions=[], cache=other)
    assert pipe(" More of it. ", question=QUESTIONS[1], cache=other) == second
    assert pipe(" No more. ", question=QUESTIONS[1], cache=other)["answer"]


@pytest.mark.parametrize("press", [SnapKVPress(0.5), DecodingPress(KnormPress(), 4, 20), None])
def test_a_cache_that_holds_the_context_is_asked_without_its_text(
    pipe: KVPressTextGenerationPipeline, press: BasePress | None, tmp_path: Path
) -> None:
    expected = pipe(CONTEXT, questions=QUESTIONS, press=press)
    cache = PressedCache(press)
    pipe(CONTEXT, questions=[], cache=cache)
    cache.save(tmp_path / "a.safetensors", pipe.model)
    loaded = PressedCache.load(tmp_path / "a.safetensors", pipe.model)
    fed = Fed(pipe.model)
    for each in (cache, loaded):
        assert pipe(questions=QUESTIONS, cache=each) == expected
        assert pipe(None, question=QUESTIONS[1], cache=each, press=press)["answer"] == expected["answers"][1]
        assert each.seen_tokens == len(encode(pipe.tokenizer, CONTEXT)[0]) + bool(pipe.tokenizer.bos_token)
    assert encode(pipe.tokenizer, CONTEXT)[0].tolist() not in fed.ids
    assert pipe(" More. ", question="Who?", cache=loaded) == pipe(" More. ", question="Who?", cache=cache)
    assert loaded.seen_tokens == cache.seen_tokens
    with pytest.raises(InputError, match="left out only with a cache= that holds one"):
        pipe(question="Who?", cache=PressedCache(press))
    asked = rf"max_new_tokens={POSITIONS} need \d+ of the model's {POSITIONS} positions\.$"
    with pytest.raises(InputError, match=rf"no room for a question and its answer after the .*{asked}"):
        pipe(question="Who?", cache=loaded, max_new_tokens=POSITIONS)


@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("name", ["qfilter", "kvzip", "kvzap"])
def test_a_press_that_has_done_its_work_needs_nothing_of_the_model(
    pipe: KVPressTextGenerationPipeline, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither artefacts nor weights need to be on the machine on which a compressed context is asked."""
    cache = PressedCache(make_press(name, 0.5))
    expected = pipe(CONTEXT, question=QUESTIONS[0], cache=cache)

    def refuse(*args: Any) -> None:
        raise PressError("it looked")

    monkeypatch.setattr(type(cache.press), "prepared", refuse)
    assert pipe(question=QUESTIONS[0], cache=cache) == expected
    with pytest.raises(PressError, match="it looked"):
        pipe(CONTEXT, cache=PressedCache(make_press(name, 0.5)))


def test_a_press_and_an_empty_cache(pipe: KVPressTextGenerationPipeline) -> None:
    cache = PressedCache()
    answers = pipe(CONTEXT, questions=QUESTIONS, press=KnormPress(0.5), cache=cache)
    assert answers == pipe(CONTEXT, questions=QUESTIONS, press=KnormPress(0.5))
    assert cache.achieved_ratio() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(CacheError, match="another press or holds tokens"):
        pipe(CONTEXT, press=SnapKVPress(0.5), cache=cache)
    with pytest.raises(CacheError, match="another press or holds tokens"):
        pipe(CONTEXT, press=SnapKVPress(0.5), cache=PressedCache(KnormPress(0.5)))


def test_a_list_of_contexts_is_answered_one_after_the_other(pipe: KVPressTextGenerationPipeline) -> None:
    """E: contexts of a list shared the cache that was passed."""
    contexts, press = [CONTEXT, CONTEXT[::-1]], KnormPress(0.3)
    for question in ({"question": QUESTIONS[0]}, {"questions": QUESTIONS}):
        expected = [pipe(context, press=press, **question) for context in contexts]
        assert pipe(contexts, press=press, **question) == expected
        assert pipe(tuple(contexts), press=press, **question) == expected
    assert pipe([], press=press) == []
    with pytest.raises(CacheError, match="One cache holds one context"):
        pipe(contexts, cache=PressedCache(press))


def test_what_the_constructor_was_given_holds_for_every_call(model: PreTrainedModel, tokenizer: Any) -> None:
    pipe = pipeline(TASKS[1], model=model, tokenizer=tokenizer, device="cpu", press=KnormPress(0.75), max_new_tokens=3)
    cache = PressedCache()
    answer = pipe(CONTEXT, question=QUESTIONS[0], cache=cache)["answer"]
    assert cache.achieved_ratio() == pytest.approx(0.75, abs=0.01)
    longer = pipe(CONTEXT, question=QUESTIONS[0], max_new_tokens=8)["answer"]
    assert longer.startswith(answer) and len(longer) > len(answer)
    whole = PressedCache()
    pipe(CONTEXT, press=None, cache=whole)
    assert whole.achieved_ratio() == 0


def test_a_prompt_shorter_than_the_window_works(pipe: KVPressTextGenerationPipeline, tokenizer: Any) -> None:
    """L: SnapKV failed with an AssertionError on a prompt of 60 tokens."""
    cache = PressedCache(SnapKVPress(0.5))
    text = tokenizer.decode(encode(tokenizer, CONTEXT)[0, :58])
    assert pipe(text, question="Who?", cache=cache)["answer"]
    assert cache.seen_tokens < 64 and cache.achieved_ratio() == pytest.approx(0.5, abs=0.02)
    assert pipe("Oil", question="Who?", press=SnapKVPress(0.9))["answer"]


def test_a_quantised_cache_is_refused(pipe: KVPressTextGenerationPipeline) -> None:
    """H: a quantised cache was scored on noisy keys, quantised twice, and kept answers; it is refused."""
    quantized = QuantizedCache.__new__(QuantizedCache)  # without the packages that quantise
    with pytest.raises(CacheError, match=r"must be a coldpress\.PressedCache, not QuantizedCache"):
        pipe(CONTEXT, question="Who?", press=KnormPress(0.5), cache=quantized)


def test_few_bits(pipe: KVPressTextGenerationPipeline) -> None:
    """In the place of kvpress's cache=QuantizedCache(...): each question sees the context, and no answer before it."""
    for press in (None, SnapKVPress(0.3, window_size=8), AdaKVPress(SnapKVPress(0.3, window_size=8))):
        kv_bits = KVBits(2, 8, 8)
        together = pipe(CONTEXT, questions=QUESTIONS, press=press, kv_bits=kv_bits, max_new_tokens=20)["answers"]
        cache = PressedCache(press, kv_bits=kv_bits)
        assert pipe(CONTEXT, questions=QUESTIONS, cache=cache, max_new_tokens=20)["answers"] == together
        plain = PressedCache(press)
        assert pipe(CONTEXT, questions=QUESTIONS, cache=plain, max_new_tokens=20)["answers"] != together
        assert cache.kv_bytes() < 0.5 * plain.kv_bytes()
        for question, answer in zip(QUESTIONS, together, strict=True):
            again = pipe(
                CONTEXT, question=question, press=press, cache=PressedCache(kv_bits=kv_bits), max_new_tokens=20
            )
            assert again["answer"] == answer


@pytest.mark.parametrize("max_new_tokens", [1, 20])
def test_the_cache_holds_the_context_and_no_answer(pipe: KVPressTextGenerationPipeline, max_new_tokens: int) -> None:
    """H: the cache held 148 tokens after an answer of 20 to a context of 128."""
    press = PrefillDecodingPress(SnapKVPress(0.5, window_size=8), DecodingPress(KnormPress(), 8, 40))
    for given in (None, SnapKVPress(0.5), AdaKVPress(SnapKVPress(0.5)), press):
        cache, other = PressedCache(given), PressedCache(given)
        pipe(CONTEXT, questions=[], cache=other)
        pipe(CONTEXT, questions=QUESTIONS, cache=cache, max_new_tokens=max_new_tokens)
        assert cache.seen_tokens == other.seen_tokens and cache.stored_lengths() == other.stored_lengths()
        for layer, expected in zip(cache.pressed_layers(), other.pressed_layers(), strict=True):
            assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)
            assert torch.equal(layer.positions(), expected.positions())


def test_schedules_answer_several_questions(pipe: KVPressTextGenerationPipeline) -> None:
    """Table: DecodingPress refused more than one question."""
    press = DecodingPress(SnapKVPress(window_size=4), 4, 30, 8)
    together = pipe(CONTEXT, questions=QUESTIONS, press=press, max_new_tokens=20)["answers"]
    alone = [pipe(CONTEXT, question=q, press=press, max_new_tokens=20)["answer"] for q in QUESTIONS]
    assert together == alone
    whole = pipe(CONTEXT, questions=QUESTIONS, max_new_tokens=20)["answers"]
    assert whole != together  # it does compress


@pytest.mark.parametrize("given", ["cache", "press"])
def test_a_context_in_pieces(pipe: KVPressTextGenerationPipeline, model: PreTrainedModel, given: str) -> None:
    press, fed = KnormPress(0.5), Fed(model)
    cache = PressedCache(press if given == "cache" else None, chunk_tokens=16)
    answers = pipe(CONTEXT, questions=QUESTIONS, cache=cache, press=None if given == "cache" else press)["answers"]
    n = cache.seen_tokens
    sizes = [len(ids) for ids in fed.ids]
    n_pieces = -(-n // 16)
    assert sizes[:n_pieces] == [n % 16 or 16] + [16] * (n_pieces - 1) and n_pieces > 2
    assert cache.stored_lengths() == [n // 2] * 2
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert pipe(CONTEXT, question=question, cache=PressedCache(press, chunk_tokens=16))["answer"] == answer
    pipe(CONTEXT, question=QUESTIONS[0], cache=cache)  # a second context goes on from there, stored whole
    assert cache.stored_lengths() == [n // 2 + cache.seen_tokens - n] * 2


@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("given_cache", [False, True])
def test_a_press_that_goes_on_is_shown_what_is_generated(
    pipe: KVPressTextGenerationPipeline, given_cache: bool
) -> None:
    """KVzap reads the hidden states of new tokens; a cache of the user's own, without a press, makes no difference."""
    judged: list[int] = []

    class Judges(DMSPress):
        def judge(self, view: LayerView) -> Tensor:
            judged.append(view.n_tokens)
            return super().judge(view)

    press = Judges(KVzapPress(), 0.0, 6, decoding=True)
    cache = PressedCache() if given_cache else None
    answers = pipe(CONTEXT, questions=QUESTIONS, press=press, cache=cache)["answers"]
    n_context = judged[0]
    assert judged[1] == n_context and judged.count(1) == 3 * 7 * 2  # 8 tokens each, the first from the question
    assert answers == [pipe(CONTEXT, question=question, press=press)["answer"] for question in QUESTIONS]
    if cache is not None:
        assert cache.seen_tokens == n_context and cache.press is None


@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_was_never_saved(tokenizer: Any, attention: str) -> None:
    """L: presses failed in eager attention, DMS with an AttributeError, or changed the tokenizer."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = GPTNeoXConfig(vocab_size=4096, max_position_embeddings=POSITIONS, initializer_range=0.4, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    assert not model.name_or_path
    tokenizer.name_or_path = ""
    pipe = pipeline(TASKS[0], model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=3)
    for name in press_names():
        n_before = len(tokenizer)
        press = OTHERS[name](2, 4) if name in OTHERS else make_press(name, 0.5)
        assert pipe(CONTEXT, question="Who?", press=press)["answer"]
        assert len(tokenizer) == n_before and model.get_input_embeddings().weight.shape[0] == 4096


@pytest.mark.parametrize(
    "make",
    [
        lambda: KnormPress(1.0),
        lambda: SnapKVPress(0.5, window_size=0),
        lambda: AdaKVPress(KnormPress),
        lambda: DecodingPress(KnormPress(), 0),
        lambda: StreamingLLMPress(0.5, n_sink=-1),
        lambda: PressedCache("knorm"),
        lambda: ChunkPress(KnormPress(0.5), chunk_length=0),
        lambda: ComposedPress([]),
        lambda: make_press("knrm", 0.5),
        lambda: KVzipPress(0.5, chunk_size=0),
        lambda: DMSPress(KnormPress()),
        lambda: FinchPress(0.5),
        lambda: ThinKPress(1.0),
        lambda: DuoAttentionPress(-0.1),
        lambda: SimLayerKVPress(2.0),
    ],
)
def test_refusals_do_not_need_assertions(make: Callable[[], object]) -> None:
    """L: parameters were checked by assert, which python -O leaves out."""
    with pytest.raises(InputError):  # which no AssertionError is
        make()


def test_logits_on_request(pipe: KVPressTextGenerationPipeline, model: PreTrainedModel) -> None:
    """L: no log-probabilities; a step API by generate gives them, for the compressed context too."""
    scores: list[Tensor] = []

    class Keep(LogitsProcessor):
        def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
            scores.append(logits.log_softmax(-1))
            return logits

    answer = pipe(CONTEXT, question="Who?", press=KnormPress(0.5), logits_processor=LogitsProcessorList([Keep()]))
    assert len(scores) == 8
    best = torch.cat(scores).argmax(-1)
    assert pipe.tokenizer.decode(best, skip_special_tokens=True) == answer["answer"]


# Lengths


def test_a_context_past_max_context_length_is_cut_with_a_warning(
    pipe: KVPressTextGenerationPipeline, tokenizer: Any
) -> None:
    cache = PressedCache()
    with pytest.warns(UserWarning, match=r"cut from \d+ to its first 20 tokens \(max_context_length\)"):
        pipe(CONTEXT, cache=cache, max_context_length=20)
    assert cache.seen_tokens == 20


def test_the_default_leaves_room_for_question_and_answer(pipe: KVPressTextGenerationPipeline, tokenizer: Any) -> None:
    longest = max(encode(tokenizer, question + "\n").shape[1] for question in QUESTIONS)
    cache = PressedCache(KnormPress(0.5))
    with pytest.warns(UserWarning, match="The context is cut"):
        pipe(CONTEXT * 10, questions=QUESTIONS, cache=cache)
    assert cache.seen_tokens == POSITIONS - longest - 8
    more = cache.fork()
    with pytest.warns(UserWarning, match="to its first 5 tokens"):  # what is in the cache takes room too
        pipe(CONTEXT, question=QUESTIONS[2], cache=more, max_new_tokens=3)
    assert more.seen_tokens == cache.seen_tokens + 5
    with pytest.raises(InputError, match="no room for a context"):
        pipe(CONTEXT, max_new_tokens=POSITIONS)


def test_the_end_of_text_is_seen_on_the_first_token(pipe: KVPressTextGenerationPipeline, tokenizer: Any) -> None:
    """L: the end of the text was never checked on the first token."""
    answer = pipe(CONTEXT, question="Who?", press=KnormPress(0.5))["answer"]
    first = pipe(CONTEXT, question="Who?", press=KnormPress(0.5), max_new_tokens=1)["answer"]
    (token,) = encode(tokenizer, first)[0].tolist()
    fed = Fed(pipe.model)
    assert pipe(CONTEXT, question="Who?", press=KnormPress(0.5), eos_token_id=token)["answer"] == first
    assert len(fed.ids) == 2  # the context and the question, and no further token
    assert len(answer) > len(first)


# Options of generate


class Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_every_token(pipe: KVPressTextGenerationPipeline, tokenizer: Any) -> None:
    """L: no streaming."""
    streamer = Streamed()
    answer = pipe(CONTEXT, question="Who?", press=KnormPress(0.5), streamer=streamer)["answer"]
    prompt = encode(tokenizer, "<|endoftext|>" + CONTEXT)[0].tolist() + encode(tokenizer, "Who?\n")[0].tolist()
    assert streamer.ids[: len(prompt)] == prompt
    assert tokenizer.decode(streamer.ids[len(prompt) :], skip_special_tokens=True) == answer
    assert streamer.ended == 1


def test_sampling_repeats_with_the_seed(pipe: KVPressTextGenerationPipeline) -> None:
    """L: greedy decoding only; sampling options were ignored."""
    options: dict[str, Any] = {"question": "Who?", "press": KnormPress(0.5), "do_sample": True, "temperature": 2.0}
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(pipe(CONTEXT, **options)["answer"])
    assert answers[0] == answers[1] != answers[2]
    assert answers[0] != pipe(CONTEXT, question="Who?", press=KnormPress(0.5))["answer"]


def test_a_generation_config_is_followed(pipe: KVPressTextGenerationPipeline, tokenizer: Any) -> None:
    config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=2.0)
    before = config.to_dict()
    fresh = pipeline(TASKS[0], model=pipe.model, tokenizer=tokenizer, device="cpu")
    answers = []
    for seed in (1, 1):
        torch.manual_seed(seed)
        answers.append(fresh(CONTEXT, question="Who?", press=KnormPress(0.5), generation_config=config)["answer"])
    assert answers[0] == answers[1]
    torch.manual_seed(1)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "temperature": 2.0}
    assert fresh(CONTEXT, question="Who?", press=KnormPress(0.5), **options)["answer"] == answers[0]
    torch.manual_seed(1)
    longer = fresh(CONTEXT, question="Who?", press=KnormPress(0.5), generation_config=config, max_new_tokens=6)
    assert longer["answer"].startswith(answers[0]) and longer["answer"] != answers[0]
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5, "bad_words_ids": [[7]]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["zzzz"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_do_what_they_do_without_a_press(
    pipe: KVPressTextGenerationPipeline, folder: Path, tokenizer: Any, options: dict[str, Any]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    torch.manual_seed(0)
    expected = own_answer(plain, tokenizer, "<|endoftext|>" + CONTEXT, "Who?\n", **options)
    torch.manual_seed(0)
    assert pipe(CONTEXT, question="Who?", **options)["answer"] == expected
    assert pipe(CONTEXT, question="Who?", press=KnormPress(0.5), **options)["answer"]


class Counts(LogitsProcessor):
    """Forbids each token that the text has had an odd number of times."""

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        is_odd = torch.nn.functional.one_hot(ids, logits.shape[1]).sum(1) % 2 == 1
        return logits.masked_fill(is_odd, -torch.inf)


READING: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 1.5},
    {"sequence_bias": [[[7, 9], -5.0]]},
    {"logits_processor": LogitsProcessorList([Counts()])},
]


@pytest.mark.parametrize("options", READING, ids=lambda options: next(iter(options)))
@pytest.mark.thinned(3)
def test_options_that_read_the_text_see_the_cached_context(
    tokenizer: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """Its place was taken by token 0, which is the end of text of Pythia."""
    model = AutoModelForCausalLM.from_pretrained(DEMO).eval()  # trained: it repeats what it reads
    pipe = pipeline(TASKS[0], model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=8)
    expected = own_answer(model, tokenizer, "<|endoftext|>" + CONTEXT, "Who?\n", **options)
    assert expected != own_answer(model, tokenizer, "<|endoftext|>" + CONTEXT, "Who?\n") or "bias" in str(options)
    told, bare = PressedCache(), PressedCache()
    pipe(CONTEXT, questions=[], cache=told)
    by_prefill = PressedCache(chunk_tokens=50)
    prefill(model, encode(tokenizer, "<|endoftext|>" + CONTEXT), by_prefill)
    in_block = PressedCache()
    with SnapKVPress(0.0)(model):
        model(encode(tokenizer, "<|endoftext|>" + CONTEXT), **cache_argument(in_block))
    model(encode(tokenizer, "<|endoftext|>" + CONTEXT), **cache_argument(bare))
    told.save(tmp_path / "told.safetensors", model)
    loaded = PressedCache.load(tmp_path / "told.safetensors", model)
    for cache in (told, by_prefill, in_block, loaded):
        assert pipe(question="Who?", cache=cache, **options) == {"answer": expected}
    fed = Fed(model)
    with pytest.raises(InputError, match=f"{next(iter(options))} reads the tokens of the context"):
        pipe(question="Who?", cache=bare, **options)
    assert fed.ids == []
    assert pipe(question="Who?", cache=bare, max_new_tokens=8)  # what reads nothing is answered


def test_what_a_generation_config_holds_is_refused_too(
    pipe: KVPressTextGenerationPipeline, model: PreTrainedModel
) -> None:
    fed = Fed(model)
    for name, value in {"prompt_lookup_num_tokens": 3, "num_return_sequences": 2, "min_length": 300}.items():
        config = GenerationConfig(max_new_tokens=4, num_beams=2, **{name: value})
        with pytest.raises(InputError, match=f"does not take {name}={value} in generation_config"):
            pipe(CONTEXT, question="Who?", generation_config=config)
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(InputError, match="does not take prompt_lookup_num_tokens=3 in the model's generation_config"):
        pipe(CONTEXT, question="Who?")
    assert fed.ids == []


def test_an_answer_that_may_cross_a_change_of_frequencies(tokenizer: Any) -> None:
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    name = "rope_parameters" if VERSION >= (5, 0) else "rope_scaling"
    if VERSION < (5, 0):
        scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    else:
        scaling |= {"original_max_position_embeddings": 64}
    config = Phi3Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
        original_max_position_embeddings=64, bos_token_id=0, eos_token_id=None, **{name: scaling},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    pipe = pipeline(TASKS[0], model=model, tokenizer=tokenizer, device="cpu")
    text = "olives " * 15
    n = encode(tokenizer, "<|endoftext|>" + text).shape[1]
    assert n < 64
    fed = Fed(model)
    with pytest.raises(InputError, match="changes its rotary frequencies after 64 tokens"):
        pipe(text, question="Who?", press=KnormPress(0.5), max_new_tokens=60)
    assert fed.ids == []
    assert "answer" in pipe(text, question="Who?", press=KnormPress(0.5), max_new_tokens=2)
    assert "answer" in pipe(text * 4, question="Who?", press=KnormPress(0.5), max_new_tokens=60)


# Chat templates


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


@pytest.fixture
def chat(pipe: KVPressTextGenerationPipeline) -> Iterator[KVPressTextGenerationPipeline]:
    pipe.tokenizer.chat_template = TEMPLATE
    yield pipe


@pytest.mark.parametrize("thinking", [False, True])
def test_a_chat_template_puts_the_context_before_and_the_rest_after_the_question(
    chat: KVPressTextGenerationPipeline, model: PreTrainedModel, thinking: bool
) -> None:
    fed, cache = Fed(model), PressedCache(KnormPress(0.5))
    chat(CONTEXT, question="Who? ", answer_prefix="It was", cache=cache, enable_thinking=thinking)
    decode = chat.tokenizer.decode
    assert decode(fed.ids[0]) == "<|user|>" + CONTEXT
    end = "<|end|><|assistant|>" + ("<think>" if thinking else "")
    assert decode(fed.ids[1]) == "Who? " + end + "It was"
    assert cache.seen_tokens == len(fed.ids[0])


def test_a_context_in_a_cache_is_asked_within_its_chat_turn(chat: KVPressTextGenerationPipeline) -> None:
    cache = PressedCache(KnormPress(0.5))
    expected = chat(CONTEXT, question="Who?", cache=cache)
    fed = Fed(chat.model)
    assert chat(question="Who?", cache=cache) == expected
    assert chat.tokenizer.decode(fed.ids[0]) == "Who?<|end|><|assistant|>"


def test_a_context_full_of_separators_is_split_at_the_right_place(
    chat: KVPressTextGenerationPipeline, model: PreTrainedModel
) -> None:
    fed = Fed(model)
    chat("# One\n" + "#" * 40, question="#?")
    assert chat.tokenizer.decode(fed.ids[0]) == "<|user|># One\n" + "#" * 40
    assert chat.tokenizer.decode(fed.ids[1]) == "#?<|end|><|assistant|>"


@pytest.mark.parametrize("template", ["nothing of it", "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"])
def test_a_template_that_does_not_hold_the_text_is_refused(chat: KVPressTextGenerationPipeline, template: str) -> None:
    chat.tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template"):
        chat(CONTEXT)


# Refusals


@pytest.mark.parametrize(
    ("context", "options", "error", "message"),
    [
        (CONTEXT, {"max_new_token": 3}, InputError, "Unknown option 'max_new_token'.*'max_new_tokens'"),
        (CONTEXT, {"temprature": 3}, InputError, "Unknown option 'temprature'.*'temperature'"),
        (CONTEXT, {"query": "Who?"}, InputError, "Unknown option 'query'"),
        (CONTEXT, {"use_cache": False}, InputError, "does not take use_cache"),
        (CONTEXT, {"cache_implementation": "static"}, InputError, "give your own with cache="),
        (CONTEXT, {"num_return_sequences": 2}, InputError, "one answer"),
        (CONTEXT, {"max_length": 20}, InputError, "give max_new_tokens"),
        (CONTEXT, {"prompt_lookup_num_tokens": 2}, InputError, "assisted decoding"),
        (CONTEXT, {"question": "Who?", "questions": ["Where?"]}, InputError, "not both"),
        (CONTEXT, {"questions": "Who?"}, InputError, "must be a list of texts"),
        (CONTEXT, {"questions": [3]}, InputError, "must be a list of texts"),
        (CONTEXT, {"question": ["Who?"]}, InputError, "question must be a text"),
        (CONTEXT, {"press": "snapkv"}, PressError, "such as coldpress.SnapKVPress"),
        (CONTEXT, {"press": SnapKVPress}, PressError, "such as coldpress.SnapKVPress"),
        (CONTEXT, {"cache": DynamicCache()}, CacheError, "must be a coldpress.PressedCache, not DynamicCache"),
        (CONTEXT, {"max_new_tokens": 0}, InputError, "max_new_tokens must be an integer of at least 1"),
        (CONTEXT, {"max_context_length": 0}, InputError, "max_context_length must be an integer of at least 1"),
        (CONTEXT, {"max_context_length": "4k"}, InputError, "max_context_length must be an integer of at least 1"),
        ("", {}, InputError, "context must be a text that is not empty"),
        (None, {}, InputError, "context must be a text that is not empty"),
        ([CONTEXT, 3], {}, InputError, "context must be a text that is not empty"),
    ],
)
def test_refusals(
    pipe: KVPressTextGenerationPipeline, context: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """L: unknown options were swallowed, and asserts took the place of refusals."""
    fed = Fed(pipe.model)
    with pytest.raises(error, match=message):
        pipe(context, **options)
    assert fed.ids == [] or isinstance(context, list)


def test_a_constructor_refuses_unknown_options_too(model: PreTrainedModel, tokenizer: Any) -> None:
    """L: unknown options were swallowed, so that a typo changed nothing."""
    with pytest.raises(InputError, match="Unknown option 'compression_ratio'"):
        pipeline(TASKS[0], model=model, tokenizer=tokenizer, device="cpu", compression_ratio=0.5)


# From a folder


def test_from_a_folder(folder: Path) -> None:
    pipe = pipeline(TASKS[0], model=str(folder), device="cpu")
    assert isinstance(pipe, KVPressTextGenerationPipeline)
    assert pipe(CONTEXT, question="Who?", press=KnormPress(0.5), max_new_tokens=3)["answer"]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="device_map needs accelerate")
def test_from_a_folder_with_a_device_map(folder: Path) -> None:
    pipe = pipeline(TASKS[0], model=str(folder), device_map="auto")
    answers = pipe(CONTEXT, questions=QUESTIONS, press=SnapKVPress(0.5), max_new_tokens=3)["answers"]
    assert len(answers) == 3 and all(answers)


# Memory


LEAKY = ("snapkv", "adakv_snapkv", "expected_attention", "kvzip", "think", "finch", "tova", "rerotated_streaming_llm")
SCHEDULES = (DecodingPress(AdaKVPress(KnormPress(), 0.0), 2, 12), DMSPress(KnormPress(), -1.0, 4, decoding=True))


def _is_alive(kind: type) -> int:
    return sum(issubclass(type(each), kind) for each in gc.get_objects())


def _resident_bytes() -> int:
    """What the process holds of main memory; 0 where Linux does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.exists() else 0


class _Fails(BasePress):
    def compress(self, view: LayerView) -> Kept | None:
        if view.layer_idx == 1:
            raise PressError("This press fails at the second layer.")
        return None


@pytest.mark.slow
def test_many_requests_leave_nothing_behind(pipe: KVPressTextGenerationPipeline) -> None:
    """The objects of one round are gone after it, whatever was asked for, and so is the memory of 96 requests."""
    presses: list[BasePress | None] = [None, *(small_press(name, "gpt_neox") for name in LEAKY), *SCHEDULES, _Fails()]

    def ask(i: int) -> None:
        press = presses[i % len(presses)]
        options: dict[str, Any] = {"press": press}
        if i % 3 == 1 and (press is None or not (press.evicts_while_decoding or "Think" in repr(press))):
            options["kv_bits"] = KVBits(4, 8, 8)
        elif i % 3 == 2:
            options = {"cache": PressedCache(press, chunk_tokens=16 if press.chooses_again else None)}
        if i % 4 == 3:
            options |= {"num_beams": 2}
        try:
            pipe(f"{i} " + CONTEXT, questions=["Who?", "Where?"], max_new_tokens=3, **options)
        except PressError as error:
            assert "second layer" in str(error)

    def left() -> list[int]:
        gc.collect()
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.model.modules()]
        return [_is_alive(PressedCache), _is_alive(PressedLayer), _is_alive(Session), _is_alive(Tensor), sum(hooks)]

    for i in range(2 * len(presses)):  # what is made once, for a model or by torch, is made
        ask(i)
    before, resident = left(), _resident_bytes()
    for i in range(96):
        ask(i)
    assert left() == before
    assert _resident_bytes() - resident < 32 << 20
