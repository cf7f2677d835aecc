"""What a prefill shows to presses beside keys and values, and presses that finish after it with the model's help."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.contract.architectures import BY_NAME, tokens
from tests.oracles.all_pairs import AllPairs
from tests.traces import traces
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from coldpress import BasePress, Kept, KnormPress, KVComposePress, LayerView, PressedCache
from coldpress.architecture.cache_argument import cache_argument, cache_of
from coldpress.cache.layer import PressedLayer
from coldpress.errors import PressError
from coldpress.models.block import prefilling

N = 20
IDS = tokens(1, N)


@pytest.fixture
def model() -> PreTrainedModel:
    return BY_NAME["llama"].build("sdpa")


@dataclass(frozen=True)
class Told(BasePress):
    """Keeps all, and remembers the token ids that its views have."""

    ids: list[Tensor | None] = field(default_factory=list, compare=False)

    def compress(self, view: LayerView) -> Kept | None:
        self.ids.append(view.token_ids)
        return None


@dataclass(frozen=True)
class Evens(BasePress):
    """Keeps every other pair, after running the model on the text once more."""

    needs_model = True

    fails: bool = False
    log: list[Any] = field(default_factory=list, compare=False, repr=False)

    def compress(self, view: LayerView) -> Kept | None:
        return None

    def finish(self, cache: PressedCache, model: nn.Module, token_ids: Tensor) -> None:
        fork = cache.fork()
        fork.session.press = None
        calls: list[tuple[int, int, int]] = []
        fork.session.on_attention = lambda layer, call: calls.append(
            (layer.index, layer.stored_length, call.query.shape[2])
        )
        hidden = model(input_ids=token_ids, **cache_argument(fork)).last_hidden_state
        self.log.append((token_ids, calls, hidden))
        if self.fails:
            raise ZeroDivisionError("on purpose")
        for layer in cache.pressed_layers():
            layer.keep(torch.arange(0, N, 2).expand(1, layer.keys.shape[1], -1))


@dataclass(frozen=True)
class Later(Evens):
    """Is told of the model when the block begins."""

    of: str = field(default="", compare=False)

    def prepared(self, model: PreTrainedModel, tokenizer: Any = None) -> Later:
        if self.fails:
            raise PressError("nothing to prepare with")
        return Later(log=self.log, of=type(model).__name__)

    def finish(self, cache: PressedCache, model: nn.Module, token_ids: Tensor) -> None:
        self.log.append(self.of)


def stored(past: Any) -> list[int]:
    return [layer.stored_length for layer in past.layers if isinstance(layer, PressedLayer)]


# -- token ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ("gpt_neox", "llama", "opt", "gpt2", "lfm2") if name in BY_NAME])
def test_views_are_told_the_token_ids(name: str) -> None:
    model, press = BY_NAME[name].build("sdpa"), Told()
    ids = tokens(2, N)
    with press(model):
        past = cache_of(model(ids))
        model(tokens(2, 3), **cache_argument(past))  # no prefill
        model.base_model(input_ids=ids, **cache_argument(DynamicCache(config=model.config)))
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert len(press.ids) >= 6 and all(torch.equal(seen, ids) for seen in press.ids if seen is not None)
    assert None not in press.ids
    press.ids.clear()
    model(ids, **cache_argument(PressedCache(press)))
    assert press.ids and set(press.ids) == {None}


def test_padding_is_not_among_the_token_ids(model: PreTrainedModel) -> None:
    press, mask = Told(), torch.ones(2, N, dtype=torch.long)
    mask[1, :5] = 0
    ids = tokens(2, N)
    with press(model):
        model(ids, attention_mask=mask)
    assert [seen.tolist() for seen in press.ids[:2]] == [ids[1:, 5:].tolist(), ids[:1].tolist()]


def test_branches_of_a_shared_prefill_are_told(model: PreTrainedModel) -> None:
    presses, full = [Told(), Told()], PressedCache()
    branches = full.branches([*presses, KnormPress(0.5)])
    with prefilling(model, full, *branches):
        model.set_attn_implementation("coldpress")
        model(IDS, **cache_argument(full))
    for press in presses:
        assert len(press.ids) == 2 and all(torch.equal(seen, IDS) for seen in press.ids)
    assert all(past.session.token_ids is None for past in (full, *branches))


def test_a_forward_that_fails_leaves_no_ids_behind(model: PreTrainedModel) -> None:
    press, past = Told(), PressedCache(Told())
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with press(model), pytest.raises(ZeroDivisionError):
        model(IDS, **cache_argument(past))
    handle.remove()
    assert past.session.token_ids is None


# -- finishing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DynamicCache, PressedCache])
def test_a_press_finishes_after_the_prefill(model: PreTrainedModel, kind: type) -> None:
    press, past, plain = Evens(), kind(), BY_NAME["llama"].build("sdpa")
    with press(model):
        model(IDS, **cache_argument(past))
        assert stored(past) == [N // 2] * 2 and past.get_seq_length() == N
        model(tokens(1, 3), **cache_argument(past))  # is no prefill
    ((ids, calls, hidden),) = press.log
    assert torch.equal(ids, IDS)
    assert calls == [(0, 2 * N, N), (1, 2 * N, N)]  # both layers, the text and the text again
    twice = plain.model(torch.cat([IDS, IDS], 1)).last_hidden_state[:, N:]
    torch.testing.assert_close(hidden, twice, atol=1e-4, rtol=0)
    layers = [layer for layer in past.layers if isinstance(layer, PressedLayer)]
    assert [layer.positions()[0, 0].tolist() for layer in layers] == [[*range(0, N, 2), N, N + 1, N + 2]] * 2
    assert not hidden.requires_grad


def test_heads_may_keep_different_numbers(model: PreTrainedModel) -> None:
    model.set_attn_implementation("coldpress")
    past, question, masked = PressedCache(), tokens(1, 4, seed=3), AllPairs("llama")
    model(IDS, **cache_argument(past)), masked.read(IDS)
    past.layer(0).keep(torch.tensor([[[0, 5, 6, 19], [3, -1, -1, -1]]]))
    assert past.positions(0).tolist() == [[[0, 5, 6, 19], [3, -1, -1, -1]]]
    assert past.stored_lengths() == [4, N] and past.achieved_ratio() == 1 - 5 / (2 * N)
    masked.keep(past)
    expected = masked.read(question)
    torch.testing.assert_close(model(question, **cache_argument(past)).logits, expected, atol=1e-5, rtol=0)


def test_a_press_is_prepared_when_the_block_begins(model: PreTrainedModel) -> None:
    press = Later()
    with press(model):
        model(IDS)
    past = PressedCache(press)
    with press(model):
        model(IDS, **cache_argument(past))  # an equal press, which is not prepared
    full = PressedCache()
    (branch,) = full.branches([press])
    with prefilling(model, full, branch):
        model(IDS, **cache_argument(full))
    assert press.log == ["LlamaForCausalLM"] * 3
    with pytest.raises(PressError, match="nothing to prepare with"), Later(fails=True)(model):
        raise AssertionError("the block should not begin")
    full = PressedCache()
    broken, whole = full.branches([Later(fails=True), None])
    with prefilling(model, full, broken, whole):
        model(IDS, **cache_argument(full))
    with pytest.raises(PressError, match="nothing to prepare with"):
        broken.get_seq_length()
    assert whole.get_seq_length() == N


def test_a_failure_in_finishing(model: PreTrainedModel) -> None:
    before = traces(model)
    past = PressedCache()
    with Evens(fails=True)(model):
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            model(IDS, **cache_argument(past))
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            model(IDS, **cache_argument(past))  # the cache is broken
        past.reset()
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            model(IDS)  # and the block goes on
    assert traces(model) == before
    with Evens()(model):
        model(IDS, **cache_argument(past))
    assert stored(past) == [N // 2] * 2


def test_a_failure_breaks_one_branch_only(model: PreTrainedModel) -> None:
    model.set_attn_implementation("coldpress")
    full, presses = PressedCache(), [Evens(), Evens(fails=True), KnormPress(0.5), Evens()]
    branches = full.branches(presses)
    with prefilling(model, full, *branches):
        model(IDS, **cache_argument(full))
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        branches[1].get_seq_length()
    assert [stored(branches[i]) for i in (0, 2, 3)] == [[N // 2] * 2] * 3
    assert stored(full) == [N, N]
    alone, question = PressedCache(), tokens(1, 4, seed=3)
    with Evens()(model):
        model(IDS, **cache_argument(alone))
    expected = model(question, **cache_argument(alone)).logits
    assert torch.equal(model(question, **cache_argument(branches[3])).logits, expected)


def test_nothing_is_left_on_the_model(model: PreTrainedModel) -> None:
    model.set_attn_implementation("coldpress")
    before, logits = traces(model), model(IDS).logits
    with Evens()(model):
        model(IDS)
    with pytest.raises(KeyError), prefilling(model, PressedCache(Evens())):
        raise KeyError
    assert traces(model) == before
    assert torch.equal(model(IDS).logits, logits)


def test_a_block_holds_on_to_no_cache(model: PreTrainedModel) -> None:
    with KVComposePress(0.5)(model):
        past = PressedCache()
        model(IDS, **cache_argument(past))
        layer = weakref.ref(past.layer(0))
        del past
        model(IDS)
        gc.collect()
        assert layer() is None


def test_threads_replay_beside_each_other(model: PreTrainedModel) -> None:
    model.set_attn_implementation("coldpress")
    presses, texts = [KVComposePress(0.5), KVComposePress(0.7)], [tokens(1, N), tokens(1, N + 9, seed=5)]

    def run(i: int) -> list[Tensor]:
        past = DynamicCache()
        with torch.no_grad(), presses[i](model):
            model(texts[i], **cache_argument(past))
        return [layer.positions() for layer in past.layers]

    alone, found, errors = [run(0), run(1)], [[], []], []
    start = threading.Barrier(2, timeout=60)

    def work(i: int) -> None:
        try:
            start.wait()
            found[i] = [run(i) for _ in range(10)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i in range(2):
        assert len(found[i]) == 10
        assert all(torch.equal(a, b) for own in found[i] for a, b in zip(own, alone[i], strict=True))


def test_generate_inside_the_block(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    press = KVComposePress(0.5)
    with press(model):
        out = model.generate(IDS, return_dict_in_generate=True, **options)
        past = PressedCache()
        logits = model(IDS, **cache_argument(past)).logits[:, -1:]
        answer = []
        for _ in range(6):
            answer.append(int(logits.argmax()))
            logits = model(torch.tensor([answer[-1:]]), **cache_argument(past)).logits
    assert out.sequences[0, N:].tolist() == answer
    assert sum(stored(cache_of(out))) == N + 2 * 5
