"""What generate does to a cache that would go wrong: guesses along with the prompt, caches that are thrown away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, GENERATES_IN_PIECES, VERSION, tokens
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from coldpress import DecodingPress, KnormPress, PressedCache, SimLayerKVPress, SnapKVPress, prefill
from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.generating import _say_padding, switching_point
from coldpress.errors import CacheError, InputError

IDS = tokens(1, 20).repeat(1, 3)
PRESS = SnapKVPress(0.5, window_size=8)
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": 2,
    "return_dict_in_generate": True,
    "attention_mask": torch.ones_like(IDS),
}


@pytest.fixture
def model() -> PreTrainedModel:
    return BY_NAME["llama"].build()


def guesses(how: str, model: PreTrainedModel) -> dict[str, Any]:
    if how == "config":
        return {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=8)}
    return {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": BY_NAME["llama"].build()}


@pytest.mark.parametrize("how", ["lookup", "assistant", "config"])
@pytest.mark.parametrize("given", ["press", "block", "own cache"])
def test_guesses_are_not_compressed_along_with_the_prompt(model: PreTrainedModel, how: str, given: str) -> None:
    options = {k: v for k, v in OPTIONS.items() if k != "max_new_tokens"} if how == "config" else OPTIONS
    with pytest.raises(CacheError, match="guesses together with the prompt"):
        if given == "press":
            model.generate(IDS, **cache_argument(PressedCache(PRESS)), **options, **guesses(how, model))
        else:
            own = {} if given == "block" else cache_argument(DynamicCache())
            with PRESS(model):
                model.generate(IDS, **own, **options, **guesses(how, model))
    whole = model.generate(IDS, **cache_argument(PressedCache()), **options, **guesses(how, model))
    assert whole.sequences.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_guesses_after_a_filled_cache(model: PreTrainedModel, how: str) -> None:
    """transformers 5.23 feeds the prompt again, also to a cache of its own."""
    past = PressedCache()
    model(IDS[:, :-1], **cache_argument(past))
    try:
        found = model.generate(IDS, **cache_argument(past), **OPTIONS, **guesses(how, model)).sequences
    except CacheError as error:
        assert "feeds a prompt again" in str(error) and VERSION > (5, 2)
    else:
        n = IDS.shape[1] + OPTIONS["max_new_tokens"]
        assert torch.equal(found[:, :n], model.generate(IDS, **OPTIONS).sequences)


# -- a prompt that generate cuts up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "chunk"),
    [("press", None), ("press", 32), ("block", None), ("block", 32), ("own cache", None), ("branches", None)],
)
def test_a_first_piece_is_not_compressed_alone(model: PreTrainedModel, given: str, chunk: int | None) -> None:
    past, base = PressedCache(PRESS if given != "block" else None, chunk_tokens=chunk), PressedCache()
    own = {"own cache": DynamicCache(), "branches": base}.get(given, past)
    branches = base.branches([None, PRESS]) if given == "branches" else []
    said = r"prefill_chunk_size=16, .*SnapKVPress would .*: give both .*chunk_tokens=16\) and prefill_chunk_size=16\."
    block = PRESS(model) if given in ("block", "own cache") else nullcontext()
    with pytest.raises(CacheError, match=said), block:
        model.generate(IDS, **cache_argument(own), **OPTIONS, prefill_chunk_size=16)
    assert past.seen_tokens == 0 and not any(branch.seen_tokens for branch in branches)


def test_a_press_that_cannot_take_pieces_does_not_advise_them(model: PreTrainedModel) -> None:
    press = SimLayerKVPress()
    with pytest.raises(CacheError, match=r"SimLayerKVPress would .*: leave prefill_chunk_size out"):
        model.generate(IDS, **cache_argument(PressedCache(press)), **OPTIONS, prefill_chunk_size=16)


@torch.no_grad()
def test_pieces_of_another_caller_are_turns_that_no_ratio_counts(model: PreTrainedModel) -> None:
    past = PressedCache(PRESS)
    for piece in IDS.split(16, dim=1):
        model(piece, **cache_argument(past))
    assert past.stored_lengths() == [8 + 60 - 16] * 2
    assert past.achieved_ratio() == 0.5  # of the first call, which was the prompt


@pytest.mark.parametrize(
    ("cache", "n"),
    [
        (lambda: PressedCache(), 60),
        (lambda: PressedCache(PRESS, chunk_tokens=16), 60),
        (lambda: PressedCache(DecodingPress(SnapKVPress(window_size=8), 4, 20)), 60),
        (lambda: PressedCache(PRESS), 16),  # a single piece, and no token or one that is left over
        (lambda: PressedCache(PRESS), 17),
    ],
)
@pytest.mark.skipif(not GENERATES_IN_PIECES, reason="transformers")
def test_pieces_that_are_taken(model: PreTrainedModel, cache: Callable[[], PressedCache], n: int) -> None:
    past, options = cache(), OPTIONS | {"attention_mask": torch.ones(1, n), "min_new_tokens": 8}
    model.generate(IDS[:, :n], **cache_argument(past), **options, prefill_chunk_size=16)
    assert past.seen_tokens == n + 7


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cache", "block", "pieces", "later"])
def test_padding_on_the_right_is_said_once(model: PreTrainedModel, how: str) -> None:
    _say_padding.cache_clear()
    ids, mask = IDS.repeat(2, 1), torch.ones(2, 60, dtype=torch.long)
    past = PressedCache(KnormPress(0.5), chunk_tokens=32 if how == "pieces" else None)
    own = {} if how == "block" else cache_argument(past)
    options = OPTIONS | {"attention_mask": mask} | ({"prefill_chunk_size": 32} if how == "pieces" else {})
    if how == "later":
        model(ids[:, :40], **own)
    block = KnormPress(0.5)(model) if how == "block" else nullcontext()
    mask[1, 50:] = 0
    with block, pytest.warns(UserWarning, match="padding_side='left'") as said:
        model.generate(ids, **own, **options)
        if how == "cache":
            past.reset()
            model.generate(ids, **own, **options)
    assert len(said) == 1


@torch.no_grad()
def test_padding_elsewhere_is_not_spoken_of(model: PreTrainedModel) -> None:
    _say_padding.cache_clear()
    mask = torch.ones_like(IDS)
    mask[:, 50:] = 0
    model(IDS, attention_mask=mask, **cache_argument(PressedCache(PRESS)))
    prefill(model, IDS, PressedCache(PRESS), attention_mask=mask)
    model.generate(IDS, **cache_argument(PressedCache(PRESS)), **OPTIONS | {"attention_mask": mask.flip(1)})


# -- no tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["press", "no press", "block", "later"])
def test_no_tokens_are_refused(model: PreTrainedModel, given: str) -> None:
    past, none = PressedCache(None if given == "no press" else KnormPress(0.5)), IDS[:, :0]
    if given == "later":
        model(IDS, **cache_argument(past))
    block = PRESS(model) if given == "block" else nullcontext()
    with pytest.raises(InputError, match="at least one token"), block:
        model(none, **({} if given == "block" else cache_argument(past)))
    if given != "later" and VERSION >= (5, 0):  # before, generate fails by itself
        with pytest.raises(InputError, match="at least one token"), PRESS(model):
            model.generate(none, attention_mask=none, max_new_tokens=3)


@torch.no_grad()
def test_a_mask_that_hides_all_is_refused(model: PreTrainedModel) -> None:
    mask = torch.zeros_like(IDS)
    for past in (PressedCache(PRESS), PressedCache().branches([PRESS])[0]):
        with pytest.raises(CacheError, match="hides all tokens of the prompt"):
            model(IDS, attention_mask=mask, **cache_argument(past))
    with pytest.raises(CacheError, match="hides all tokens of the prompt"), PRESS(model):
        model.generate(IDS, **OPTIONS | {"attention_mask": mask})
    with pytest.raises(InputError, match="hides all tokens of the prompt"):
        prefill(model, IDS, PressedCache(PRESS, chunk_tokens=16), attention_mask=mask)
    rows = torch.cat([mask, torch.ones_like(mask)])  # one of them may fill up a batch
    model(IDS.repeat(2, 1), attention_mask=rows, **cache_argument(past := PressedCache(PRESS)))
    assert past.achieved_ratio() == 0.5


# -- frequencies that change with the length of a text ----------------------------------------------------------------


def phi() -> PreTrainedModel:
    """Its frequencies change after 16 tokens."""
    return BY_NAME["phi3_longrope"].build()


def test_where_frequencies_change() -> None:
    assert switching_point(phi().config) == 16
    assert switching_point(BY_NAME["llama"].build().config) is None
    assert switching_point(BY_NAME["llama_dynamic"].build().config) is None


@pytest.mark.parametrize("press", [None, KnormPress(0.5)])
def test_a_text_does_not_cross_the_point_with_a_cache(press: Any) -> None:
    model, ids = phi(), tokens(1, 14)
    mask = torch.ones_like(ids)
    with pytest.raises(CacheError, match="changes its rotary frequencies after 16 tokens"):
        model.generate(ids, attention_mask=mask, max_new_tokens=6, **cache_argument(PressedCache(press)))
    past = PressedCache(press)  # up to the point, and no further
    model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, **cache_argument(past))
    assert past.seen_tokens == 16
    for cache in (past, past.fork()):
        with pytest.raises(CacheError, match="changes its rotary frequencies after 16 tokens"):
            model(ids[:, :1], **cache_argument(cache))
    past.reset()
    longer = tokens(1, 17)
    model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=4, **cache_argument(past))
    assert past.seen_tokens == 20
    with pytest.raises(CacheError, match="changes its rotary frequencies after 16 tokens"):
        prefill(model, longer, PressedCache(press and KnormPress(budget_tokens=8), chunk_tokens=10))
