"""Rotary frequencies that follow the longest text read ("dynamic"): no result depends on what came before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import BY_NAME, tokens
from tests.presses.others import block, press_of
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, pipeline

import coldpress
from coldpress import KnormPress, PressedCache, SnapKVPress, prefill
from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rope import stand_at
from coldpress.eval.jobs import Point
from coldpress.eval.losses import forward
from coldpress.eval.point_run import prefilled

N = 40  # tokens; the model was trained on 32
CONTEXT, REST, LONG = tokens(1, N), tokens(1, 12, seed=1), tokens(1, 300, seed=2)


@pytest.mark.parametrize("name", ["llama", "llama_dynamic"])
def test_what_a_text_leaves(name: str) -> None:
    """What a new model has after a text, whatever this one has read."""
    model = BY_NAME[name].build()
    for n in (0, 20, 32, 33, 60, 200):
        expected = BY_NAME[name].build()
        if n:
            expected(tokens(1, n))
        for other in (0, 20, 100, 300):
            if other:
                model(tokens(1, other))
            stand_at(model, n)
            embed, right = model.model.rotary_emb, expected.model.rotary_emb
            assert torch.equal(embed.inv_freq, right.inv_freq)
            assert embed.max_seq_len_cached == right.max_seq_len_cached


@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_a_window_does_not_depend_on_those_before(chunk_tokens: int | None) -> None:
    """Nor what is measured of one press on what was measured of another."""
    model = BY_NAME["llama_dynamic"].build()

    def measure() -> list[Tensor]:
        full, branches = prefilled(model, CONTEXT, [Point(KnormPress(0.5)), Point(SnapKVPress(0.0))], chunk_tokens)
        held = [full, *branches]
        logits = [forward(model, REST, cache.fork()) for cache in held]
        forward(model, LONG, full)
        again = [forward(model, REST, cache) for cache in held[1:]]
        assert all(torch.equal(a, b) for a, b in zip(logits[1:], again, strict=True))
        return [*logits, forward(model, CONTEXT, None)]

    first = measure()
    model(LONG)
    assert all(torch.equal(a, b) for a, b in zip(first, measure(), strict=True))
    torch.testing.assert_close(first[2], first[0])  # at ratio 0


@pytest.mark.parametrize("name", ["kvzip", "kvcompose"])
def test_a_press_that_runs_the_model_leaves_it_as_it_was(name: str) -> None:
    """Its replays are longer than the text."""
    logits = []
    for press in (None, press_of(name, 0.0)):
        model, past = BY_NAME["llama_dynamic"].build(), PressedCache(press)
        if press is None:
            model(CONTEXT, **cache_argument(past))
        else:
            with block(model, press):
                model(CONTEXT, **cache_argument(past))
        logits.append(model(REST[:, :1], **cache_argument(past)).logits)
    torch.testing.assert_close(*logits)


def test_prefill_begins_anew() -> None:
    model = BY_NAME["llama_dynamic"].build()
    expected = model(tokens(1, 32)).logits[:, -1]
    model(LONG)
    actual = prefill(model, tokens(1, 32), PressedCache()).logits[:, -1]
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:The context and its answer go past")
def test_an_answer_does_not_depend_on_questions_before_it(tmp_path: Path) -> None:
    """Nor on the context of another call."""
    demo = Path(coldpress.__file__).parent / "assets" / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path)
    model = BY_NAME["llama_dynamic"].build(vocab_size=4096)
    assert isinstance(model, LlamaForCausalLM)
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    context, long = "The miller weighed the olives, washed them, and laid them down. " * 5, "Who? " * 60
    options = {"press": SnapKVPress(0.3), "max_new_tokens": 12, "max_context_length": 400}
    alone = pipe(context, question="Where?", **options)["answer"]
    assert pipe(context, questions=[long, "Where?"], **options)["answers"][1] == alone
    assert pipe(context, question="Where?", **options)["answer"] == alone
