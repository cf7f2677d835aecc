"""``model.generate`` with a PressedCache: sampling, beams, streaming, assisted generation, turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, VERSION, tiny, tokens
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from coldpress import BasePress, ExpectedAttentionPress, KnormPress, PressedCache, RandomPress, SnapKVPress
from coldpress.errors import CacheError

N, NEW = 40, 12
PRESS = SnapKVPress(0.5, window_size=8)
IDS = tokens(1, N)


def generate(
    name: str, past: PressedCache | None, ids: Tensor = IDS, attention: str = "coldpress", **options: Any
) -> Any:
    cache = {} if past is None else {"past_key_values": past}
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
    tiny("llama")(IDS, past_key_values=PressedCache(press))
    after = torch.rand(1)
    torch.manual_seed(7)
    for _ in range(n_draws):
        torch.randint(2**62, (1,))
    assert torch.equal(after, torch.rand(1))


def test_random_press_without_a_seed_follows_torch() -> None:
    def kept(seed: int) -> Tensor:
        torch.manual_seed(seed)
        past = PressedCache(RandomPress(0.5))
        tiny("llama")(IDS, past_key_values=past)
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
    logits = [tiny(name)(IDS, past_key_values=past).logits[:, -1]]
    logits += [tiny(name)(answer[:, t : t + 1], past_key_values=past).logits[:, -1] for t in range(NEW - 1)]
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
        tiny("llama")(IDS, past_key_values=other)
        logits = tiny("llama")(second[:, N:], past_key_values=other).logits
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
        tiny(name)(REPETITIVE[:, :-1], past_key_values=past)
        expected = generate(name, past.fork(), **LONGER)
        answer = generate(name, past, **LONGER, **guessing(name, guess))
        assert torch.equal(answer[:, : expected.shape[1]], expected)


def test_prefill_in_chunks_compresses_the_first_one_only() -> None:
    """As PressedCache says; what generate computes with the later chunks is right all the same."""
    past, by_hand = PressedCache(KnormPress(0.5)), PressedCache(KnormPress(0.5))
    answer = generate("llama", past, prefill_chunk_size=16)
    assert past.stored_lengths() == [8 + N + NEW - 1 - 16] * 2
    for chunk in IDS.split(16, dim=1):
        logits = tiny("llama")(chunk, past_key_values=by_hand).logits
    assert answer[0, N] == logits[0, -1].argmax()


def test_no_cache_at_all() -> None:
    assert torch.equal(generate("llama", None, use_cache=False), own("llama"))
    assert torch.equal(generate("llama", None), own("llama"))


@pytest.mark.parametrize("press", [None, PRESS])
def test_logits_and_hidden_states_on_request(press: BasePress | None) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    out = generate("llama", PressedCache(press), **options)
    assert isinstance(out.past_key_values, PressedCache) and len(out.logits) == len(out.hidden_states) == NEW
    if press is None:
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(own("llama", **options).logits))


def test_versions_at_both_ends_are_the_ones_tested() -> None:
    assert (4, 56) <= VERSION < (6, 0)
