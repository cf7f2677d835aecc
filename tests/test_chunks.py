"""A prompt in pieces, with compression after each: budgets, positions, padding, memory, and who may cut it up."""

from __future__ import annotations

import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.batches import Batch, is_local
from tests.contract.architectures import GENERATES_IN_PIECES, VERSION, WINDOW, tiny, tokens
from tests.presses.others import small_press
from torch import Tensor
from transformers import DynamicCache

import coldpress
from coldpress import (
    AdaKVPress,
    BasePress,
    ChunkKVPress,
    CompactorPress,
    CriticalAdaKVPress,
    DecodingPress,
    DMSPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LayerView,
    ObservedAttentionPress,
    PrefillDecodingPress,
    PressedCache,
    PyramidKVPress,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
    make_press,
    prefill,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.layer import PressedLayer
from coldpress.core.call import LayerCall
from coldpress.core.counts import keep_count
from coldpress.errors import CacheError, InputError, PressError
from coldpress.models.prompts import pieces

pytestmark = pytest.mark.usefixtures("given_artefacts")

N, CHUNK = 56, 12
CHUNKED = [name for name in press_names(at_prefill=True) if make_press(name, 0.0).chooses_again]


def prefilled(
    model: str, press: BasePress | None, ids: Tensor, chunk: int | None = CHUNK, **options: Any
) -> PressedCache:
    past = PressedCache(press, chunk_tokens=chunk)
    prefill(tiny(model), ids, past, **options)
    return past


def held(past: PressedCache, row: int = 0) -> list[list[list[int]]]:
    """Positions that each head of each layer holds."""
    return [
        [[p for p in head if p >= 0] for head in layer.positions()[row].tolist()] for layer in past.pressed_layers()
    ]


@torch.no_grad()
def answer(model: str, past: PressedCache, **options: Any) -> Tensor:
    logits: Tensor = tiny(model)(tokens(1, 5, seed=9), **cache_argument(past), **options).logits
    return logits


# A slow twin: the same pieces with a cache that has no press, cut back by hand after each


def knorm(keys: Tensor, queries: Tensor, at: list[int]) -> list[float]:
    return [-float(key.norm()) for key in keys]


def keydiff(keys: Tensor, queries: Tensor, at: list[int]) -> list[float]:
    mean = torch.stack([key / key.norm() for key in keys]).mean(0)
    return [-float(key @ mean / key.norm() / mean.norm()) for key in keys]


def streaming(keys: Tensor, queries: Tensor, at: list[int]) -> list[float]:
    return [math.inf if position < 2 else float(position) for position in at]


def snapkv(keys: Tensor, queries: Tensor, at: list[int]) -> list[float]:
    """Window of 3, kernel of 5, pooled along what is held; a mean over the group."""
    n, scores = len(keys), [0.0] * len(keys)
    for own in queries:
        received = [0.0] * n
        for back in (3, 2, 1):
            query = own[-back]
            visible = [position <= at[-1] + 1 - back for position in at]
            logits = [
                math.exp(float(query @ key) / len(query) ** 0.5) * is_seen
                for key, is_seen in zip(keys, visible, strict=True)
            ]
            for slot, logit in enumerate(logits):
                received[slot] += logit / sum(logits) / 3
        for slot in range(n - 3):
            scores[slot] += sum(received[max(0, slot - 2) : min(n - 3, slot + 3)]) / 5 / len(queries)
    return [*scores[: n - 3], *[math.inf] * 3]


SLOW: dict[str, tuple[ScorerPress, Callable[[Tensor, Tensor, list[int]], list[float]]]] = {
    "knorm": (KnormPress(), knorm),
    "keydiff": (KeyDiffPress(), keydiff),
    "streaming_llm": (StreamingLLMPress(n_sink=2), streaming),
    "snapkv": (SnapKVPress(window_size=3), snapkv),
}


@torch.no_grad()
def by_hand(model: str, score: Callable[..., list[float]], ids: Tensor, size: dict[str, Any]) -> PressedCache:
    past, n, own = PressedCache(), ids.shape[1], tiny(model)
    window = own.config.sliding_window if model == "mistral" else None
    queries: dict[int, Tensor] = {}

    def look(layer: PressedLayer, call: LayerCall) -> None:
        queries[layer.index] = call.query

    past.session.on_attention = look
    start, stop = 0, n % CHUNK or CHUNK
    while start < n:
        own(ids[:, start:stop], **cache_argument(past))
        length = stop if stop == n else max(stop, CHUNK)
        if window:
            length = min(length, window - 1)
        budget = keep_count(length, size["compression_ratio"]) if "compression_ratio" in size else size["budget_tokens"]
        for layer in past.pressed_layers():
            if is_local(own, layer.index):
                continue
            assert layer.keys is not None
            keys, at, group = layer.keys[0].double(), layer.positions()[0], queries[layer.index][0].double()
            slots = []
            for head, (mine, places) in enumerate(zip(keys, at, strict=True)):
                near = [i for i, p in enumerate(places.tolist()) if not window or p > stop - window]
                per_head = group.shape[0] // keys.shape[0]
                asking = group[head * per_head : (head + 1) * per_head]
                scores = score(mine[near], asking, places[near].tolist())
                best = sorted(range(len(near)), key=lambda i, s=scores: (-s[i], i))[:budget]
                slots.append([near[i] for i in sorted(best)])
            layer.keep(torch.tensor([slots]))
        start, stop = stop, stop + CHUNK
    return past


@pytest.mark.thinned(3)
@pytest.mark.parametrize("size", [{"compression_ratio": 0.6}, {"budget_tokens": 14}], ids=["ratio", "budget"])
@pytest.mark.parametrize("model", ["gpt_neox", "llama", "mistral", "gemma3"])
@pytest.mark.parametrize("name", SLOW)
def test_against_a_slow_twin(name: str, model: str, size: dict[str, Any]) -> None:
    press, slow = SLOW[name]
    ids = torch.randperm(90, generator=torch.Generator().manual_seed(0))[None, :N] + 3  # equal tokens have equal scores
    expected = by_hand(model, slow, ids, size)
    past = prefilled(model, press.with_budget(**size), ids)
    for j, (own, other) in enumerate(zip(held(past), held(expected), strict=True)):
        assert is_local(tiny(model), j) or own == other
    torch.testing.assert_close(answer(model, past), answer(model, expected), atol=1e-5, rtol=0)


# Pieces and whole prompts


@pytest.mark.parametrize("n", [1, 5, 11, 12, 13, 24, 25, 60])
def test_where_a_prompt_is_cut(n: int) -> None:
    cut = pieces(n, 12)
    assert [i for start, stop in cut for i in range(start, stop)] == list(range(n))
    assert all(stop - start == 12 for start, stop in cut[1:]) and 1 <= cut[0][1] <= 12
    assert pieces(n, None) == [(0, n)]


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("chunk", [N, N + 1])
@pytest.mark.parametrize("name", CHUNKED)
def test_a_prompt_in_one_piece_is_what_it_is_without_pieces(name: str, chunk: int) -> None:
    press = small_press(name, "llama")
    torch.manual_seed(3)
    past, whole = prefilled("llama", press, tokens(1, N), chunk), PressedCache(press)
    torch.manual_seed(3)
    with torch.no_grad():
        tiny("llama")(tokens(1, N), **cache_argument(whole))
    for own, other in zip(past.pressed_layers(), whole.pressed_layers(), strict=True):
        assert torch.equal(own.positions(), other.positions())
        assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)  # type: ignore[arg-type]
    assert past.achieved_ratio() == whole.achieved_ratio() and past.kv_bytes() == whole.kv_bytes()
    assert torch.equal(answer("llama", past), answer("llama", whole))


@pytest.mark.parametrize("model", ["gpt_neox", "llama", "mistral", "gemma3"])
@pytest.mark.parametrize("press", [None, KnormPress(0.0), AdaKVPress(SnapKVPress(window_size=4))], ids=repr)
def test_without_compression_pieces_change_nothing(press: BasePress | None, model: str) -> None:
    past, plain = prefilled(model, press, tokens(1, N)), DynamicCache()
    with torch.no_grad():
        tiny(model, "sdpa")(tokens(1, N), **cache_argument(plain))
        expected = tiny(model, "sdpa")(tokens(1, 5, seed=9), **cache_argument(plain)).logits
    torch.testing.assert_close(answer(model, past), expected, atol=1e-5, rtol=0)
    assert past.seen_tokens == N + 5 and past.achieved_ratio() == 0


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_weights")
@pytest.mark.parametrize("model", ["gpt_neox", "llama"])
@pytest.mark.parametrize("name", CHUNKED)
def test_every_press_stays_within_its_budget_and_a_piece(name: str, model: str) -> None:
    """Pairs at any time, and bytes of the whole cache, whatever room its buffers have included."""
    press = small_press(name, model).with_budget(budget_tokens=16)  # type: ignore[attr-defined]
    past, ids = PressedCache(press, chunk_tokens=CHUNK), tokens(1, 100)
    most: list[int] = []

    def look(layer: PressedLayer, call: LayerCall) -> None:
        assert int((layer.positions() >= 0).sum()) <= layers[layer.index] * heads + CHUNK * heads
        most.append(past.kv_bytes())

    config = tiny(model).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = [CHUNK * 10] * config.num_hidden_layers if press.per_layer else [16] * config.num_hidden_layers
    past.session.on_attention = look
    prefill(tiny(model), ids, past)
    keys = past.pressed_layers()[0].keys
    assert keys is not None
    token_bytes = heads * 2 * keys.shape[3] * keys.element_size()
    assert max(most) <= len(layers) * (16 + CHUNK) * token_bytes
    assert sum(sum(map(len, layer)) for layer in held(past)) <= len(layers) * heads * 16
    for layer in held(past):
        assert all(head == sorted(set(head)) and head[-1] < 100 for head in layer if head)
    assert past.achieved_ratio() >= 1 - 16 / 100
    assert torch.isfinite(answer(model, past)).all()


def test_memory_of_a_long_prompt_is_flat() -> None:
    def peak(n: int) -> int:
        past, most = PressedCache(KeyDiffPress(budget_tokens=32), chunk_tokens=32), [0]
        past.session.on_attention = lambda layer, call: most.append(past.kv_bytes())
        prefill(tiny("llama"), tokens(1, n), past)
        return max(most)

    assert peak(320) == peak(128)


@pytest.mark.parametrize(
    "press",
    [
        SnapKVPress(0.5, window_size=4),
        AdaKVPress(SnapKVPress(0.5, window_size=4)),
        CriticalAdaKVPress(SnapKVPress(0.5, window_size=4)),
        PrefillDecodingPress(AdaKVPress(KnormPress(0.5)), DecodingPress(AdaKVPress(SnapKVPress(window_size=2)), 2, 8)),
    ],
    ids=repr,
)
@pytest.mark.thinned(2)
def test_what_a_press_was_shown_is_freed_at_once(press: BasePress) -> None:
    """E: views of single heads and of all of them held each other, and the pairs of many pieces, until garbage was
    collected."""
    gc.collect()
    gc.disable()
    try:
        before = [each for each in gc.get_objects() if type(each) is LayerView]  # of other tests
        past = prefilled("llama", press, tokens(1, 60))
        for i in range(5):
            with torch.no_grad():
                tiny("llama")(tokens(1, 1, seed=i), **cache_argument(past))
        assert sum(type(each) is LayerView for each in gc.get_objects()) <= len(before)
    finally:
        gc.enable()


def test_a_short_first_piece_does_not_lose_the_sinks() -> None:
    """3 tokens, then 4 pieces: at ratio 0.5 one of the three would be left, which is no sink."""
    past = prefilled("llama", StreamingLLMPress(0.5), tokens(1, 3 + 4 * CHUNK))
    assert all(head == [0, 1, 2, 3, *range(30, 51)] for layer in held(past) for head in layer)


def test_scores_of_a_token_alone_keep_the_best_of_the_whole_prompt() -> None:
    """In the first layer, whose keys do not depend on what was kept of earlier tokens."""
    ids = torch.randperm(90, generator=torch.Generator().manual_seed(0))[None, :N] + 3
    past, whole = (prefilled("llama", KnormPress(budget_tokens=14), ids, chunk) for chunk in (CHUNK, None))
    assert held(past)[0] == held(whole)[0]


def test_streaming_llm_keeps_what_one_piece_keeps() -> None:
    for press in (StreamingLLMPress(budget_tokens=14), StreamingLLMPress(0.5)):  # room for the sinks
        assert held(prefilled("llama", press, tokens(1, N))) == held(prefilled("llama", press, tokens(1, N), None))


def test_presses_see_the_queries_of_the_piece_and_what_is_kept() -> None:
    views: list[LayerView] = []

    class Spy(KnormPress):
        def score(self, view: LayerView) -> Tensor:
            views.append(view)
            return super().score(view)

    prefilled("gpt_neox", Spy(budget_tokens=8), tokens(1, 30))
    mine = [view for view in views if view.layer_idx == 0]
    assert [(view.n_tokens, view.n_queries, view.end) for view in mine] == [(18, 12, 18), (20, 12, 30)]
    assert mine[0].positions is not None and mine[0].positions[0, 0, -12:].tolist() == list(range(6, 18))


# Padding


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", ["gpt_neox", "llama", "mistral", "gpt2"])
@pytest.mark.parametrize(
    "press",
    [
        KnormPress(0.6),
        StreamingLLMPress(budget_tokens=9, n_sink=2),
        SnapKVPress(0.5, window_size=4),
        AdaKVPress(SnapKVPress(0.6, window_size=4)),
        ExpectedAttentionPress(0.6, n_future_positions=8, n_sink=2),
        PyramidKVPress(0.5, window_size=4),
    ],
    ids=repr,
)
def test_a_row_of_a_batch_is_the_row_alone(press: BasePress, model: str) -> None:
    """Rows that begin in the first piece, at the border of one, in the middle of one, and in the last one."""
    batch = Batch(60, [(0, 0), (24, 0), (31, 0), (53, 0)])
    past = prefilled(model, press, batch.ids, attention_mask=batch.mask)
    after = held(past), past.achieved_ratio()
    question, pads = batch.question, 60 - batch.mask.sum(-1)
    positions = batch.add(question)
    with torch.no_grad():
        logits = tiny(model)(question, attention_mask=batch.mask, position_ids=positions, **cache_argument(past)).logits
    assert 0 < after[1] < 1
    for i, row in enumerate(batch.rows):
        alone = prefilled(model, press, row[None])
        expected = [[[p + int(pads[i]) for p in head] for head in layer] for layer in held(alone)]
        own = [[[p for p in head if p < 60] for head in layer] for layer in held(past, i)]
        assert own == expected
        with torch.no_grad():
            its = tiny(model)(question[i : i + 1], **cache_argument(alone)).logits
        torch.testing.assert_close(logits[i : i + 1], its, atol=1e-4, rtol=0)


def test_padding_on_the_right_is_dropped_too() -> None:
    batch = Batch(36, [(0, 0), (0, 24), (0, 17)])
    past = prefilled("llama", KnormPress(0.5), batch.ids, attention_mask=batch.mask)
    for i, (_, n_pad) in enumerate([(0, 0), (0, 24), (0, 17)]):
        assert all(
            len(head) == (36 - n_pad) // 2 and head[-1] < 36 - n_pad for layer in held(past, i) for head in layer
        )


# Who may cut a prompt up


@pytest.mark.skipif(not GENERATES_IN_PIECES, reason="transformers")
@torch.no_grad()
def test_generate_cuts_it_up_from_its_start() -> None:
    for n in (40, 48):
        past, ids = PressedCache(SnapKVPress(0.5, window_size=4), chunk_tokens=16), tokens(1, n)
        output = tiny("llama").generate(
            ids, **cache_argument(past), prefill_chunk_size=16, max_new_tokens=6, do_sample=False
        )
        expected = PressedCache(SnapKVPress(0.5, window_size=4), chunk_tokens=16)
        prompt = ids if VERSION >= (5, 0) else ids[:, :-1]
        for piece in prompt.split(16, dim=1):
            logits = tiny("llama")(piece, **cache_argument(expected)).logits
        assert expected.stored_lengths() == [prompt.shape[1] // 2] * 2
        if VERSION >= (5, 0):
            assert output[0, n] == logits[0, -1].argmax()
        for piece in output[:, prompt.shape[1] : -1].split(1, dim=1):
            tiny("llama")(piece, **cache_argument(expected))
        assert past.stored_lengths() == [prompt.shape[1] // 2 + n + 5 - prompt.shape[1]] * 2
        assert held(past) == held(expected)


@torch.no_grad()
@pytest.mark.parametrize("press", [TOVAPress(budget_tokens=5), KnormPress(0.5)], ids=repr)
@pytest.mark.parametrize("n", [2, 7, 8, 9, 16, 17, 20, 24, 25])
def test_budgets_after_pieces_from_generate(press: BasePress, n: int) -> None:
    """Of the prompt, but for a single token that is left over: it is stored as a generated one is."""
    past = PressedCache(press, chunk_tokens=8)
    given = n if VERSION >= (5, 0) else n - 1
    if given == 1:
        with pytest.raises(CacheError, match="a single token first"):
            tiny("llama").generate(tokens(1, n), **cache_argument(past), prefill_chunk_size=8, max_new_tokens=4)
        return
    tiny("llama").generate(
        tokens(1, n), **cache_argument(past), prefill_chunk_size=8, max_new_tokens=4, do_sample=False
    )
    in_pieces = given - 1 if given % 8 == 1 else given
    budget = min(in_pieces, 5) if press.budget_tokens else keep_count(in_pieces, 0.5)
    assert past.stored_lengths() == [budget + n + 3 - in_pieces] * 2


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 8])
def test_a_prompt_that_begins_with_a_single_token_has_no_end(chunk: int) -> None:
    past, ids = PressedCache(TOVAPress(budget_tokens=5), chunk_tokens=chunk), tokens(1, 20)
    with pytest.raises(CacheError, match=r"chunk_tokens=\d and was given a single token first.*coldpress.prefill"):
        tiny("llama").generate(ids, **cache_argument(past), prefill_chunk_size=1, max_new_tokens=4, do_sample=False)
    assert past.seen_tokens == 0
    prefill(tiny("llama"), ids, past)
    assert past.stored_lengths() == [5, 5]
    tiny("llama")(ids[:, :1], **cache_argument(past))
    assert past.stored_lengths() == [6, 6]
    unpressed = PressedCache(chunk_tokens=chunk)  # all is kept, so it does not matter
    tiny("llama")(ids[:, :1], **cache_argument(unpressed))
    one = PressedCache(TOVAPress(budget_tokens=5), chunk_tokens=chunk)
    prefill(tiny("llama"), ids[:, :1], one)
    tiny("llama")(ids[:, :1], **cache_argument(one))
    assert one.stored_lengths() == [2, 2]


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[4, 4], [5, 8], [7, 2]])
def test_pieces_that_are_too_small_are_refused(cuts: list[int]) -> None:
    past = PressedCache(KnormPress(0.5), chunk_tokens=8)
    tiny("llama")(tokens(1, cuts[0]), **cache_argument(past))
    with pytest.raises(CacheError, match=rf"first call of {cuts[0]} tokens.*and {cuts[1]} more came right after"):
        tiny("llama")(tokens(1, cuts[1]), **cache_argument(past))
    assert past.seen_tokens == cuts[0]
    tiny("llama")(tokens(1, 1), **cache_argument(past))  # an answer has begun, so a turn may follow
    tiny("llama")(tokens(1, 4), **cache_argument(past))
    assert past.seen_tokens == cuts[0] + 5
    past.reset()
    prefill(tiny("llama"), tokens(1, 5), past)
    tiny("llama")(tokens(1, 4), **cache_argument(past))
    assert past.stored_lengths() == [2 + 4] * 2


def test_a_prompt_longer_than_a_piece_says_what_to_do() -> None:
    past = PressedCache(KnormPress(0.5), chunk_tokens=CHUNK)
    with torch.no_grad(), pytest.raises(CacheError, match=r"in one call.*coldpress.prefill.*prefill_chunk_size=12"):
        tiny("llama")(tokens(1, 13), **cache_argument(past))
    assert past.seen_tokens == 0
    prefill(tiny("llama"), tokens(1, 24), past)
    assert past.stored_lengths() == [12, 12]


def test_later_turns_are_stored_whole() -> None:
    past = prefilled("llama", KnormPress(0.5), tokens(1, 2 * CHUNK))
    for piece in (1, CHUNK, 3, 2 * CHUNK):
        before = past.stored_lengths()
        with torch.no_grad():
            tiny("llama")(tokens(1, piece, seed=piece), **cache_argument(past))
        assert past.stored_lengths() == [n + piece for n in before]
    assert past.chunk_tokens == CHUNK and f"chunk_tokens={CHUNK}" in repr(past)


def test_a_cache_is_used_again_forked_and_pickled() -> None:
    past = prefilled("llama", KnormPress(0.5), tokens(1, 40))
    expected, fork = held(past), past.fork()
    assert fork.chunk_tokens == CHUNK
    copied = pickle.loads(pickle.dumps(past))
    for other in (fork, copied):
        answer("llama", other)
        assert other.stored_lengths() == [25, 25] and held(past) == expected
    past.reset()
    prefill(tiny("llama"), tokens(1, 40), past)
    assert held(past) == expected
    fork.reset()
    prefill(tiny("llama"), tokens(1, 40), fork)
    assert held(fork) == expected


def test_a_schedule_takes_over_after_the_last_piece() -> None:
    schedule = DecodingPress(StreamingLLMPress(n_sink=2), 4, 16, 8)
    past = prefilled("llama", PrefillDecodingPress(StreamingLLMPress(0.5, n_sink=2), schedule), tokens(1, 50))
    assert past.stored_lengths() == [25, 25]
    for i in range(4):
        with torch.no_grad():
            tiny("llama")(tokens(1, 1, seed=i), **cache_argument(past))
    assert held(past) == [[[0, 1, *range(40, 54)]] * 2] * 2


def test_inside_a_block() -> None:
    model, press = tiny("llama"), SnapKVPress(0.5, window_size=4)
    past = PressedCache(chunk_tokens=CHUNK)
    with press(model):
        prefill(model, tokens(1, N), past)
    assert held(past) == held(prefilled("llama", press, tokens(1, N)))
    with ChunkKVPress(press)(model), pytest.raises(PressError, match="again and again"):
        prefill(model, tokens(1, N), PressedCache(chunk_tokens=CHUNK))


@pytest.mark.parametrize("model", ["gpt_neox", "llama"])
def test_keys_move_up_after_each_piece(model: str) -> None:
    """As they do under a schedule that cuts back to as many tokens after as many."""
    ids, inner = tokens(2, 100), KeyDiffPress(budget_tokens=20)
    own = PressedCache(inner, chunk_tokens=16, positions="rerotate")
    twin = PressedCache(DecodingPress(KeyDiffPress(), 16, 20), positions="rerotate")
    with torch.no_grad():
        for piece in ids.split(16, dim=1):
            torch.testing.assert_close(*(tiny(model)(piece, **cache_argument(past)).logits for past in (own, twin)))
    assert own.stored_lengths() == [20] * len(own.layers)


def test_a_backbone_without_a_head_and_a_model_with_one() -> None:
    past, other = PressedCache(KnormPress(0.5), chunk_tokens=CHUNK), PressedCache(KnormPress(0.5), chunk_tokens=CHUNK)
    output = prefill(tiny("llama"), tokens(1, N), past)
    prefill(tiny("llama").model, tokens(1, N), other)
    assert output.logits.shape[:2] == (1, 1) and not output.logits.requires_grad
    assert held(past) == held(other)


class Breaks(KnormPress):
    def score(self, view: LayerView) -> Tensor:
        if view.end > 2 * CHUNK:
            raise ValueError("no more of this")
        return super().score(view)


def test_a_press_that_fails_at_a_later_piece_breaks_its_cache() -> None:
    past = PressedCache(Breaks(0.5), chunk_tokens=CHUNK)
    with pytest.raises(ValueError, match="no more of this"):
        prefill(tiny("llama"), tokens(1, N), past)
    with pytest.raises(ValueError, match="no more of this"):
        answer("llama", past)
    past.reset()
    prefill(tiny("llama"), tokens(1, 20), past)


# What is refused


@pytest.mark.parametrize(
    "press",
    [
        ChunkKVPress(SnapKVPress(0.5)),
        CompactorPress(0.5),
        ObservedAttentionPress(0.5),
        SimLayerKVPress(),
        DMSPress(KnormPress(), threshold=0.0),
        PrefillDecodingPress(CompactorPress(0.5), DecodingPress(KnormPress())),
    ],
    ids=lambda press: type(press).__name__,
)
def test_a_press_that_chooses_once_is_refused(press: BasePress) -> None:
    with pytest.raises(PressError, match="again and again"):
        PressedCache(press, chunk_tokens=CHUNK)
    assert not press.chooses_again


def test_a_press_that_begins_after_the_prompt_is_refused() -> None:
    schedule = DecodingPress(KnormPress())
    with pytest.raises(PressError, match=r"DecodingPress begins after it; give PrefillDecodingPress\(.* None in the"):
        PressedCache(schedule, chunk_tokens=CHUNK)
    assert PressedCache(PrefillDecodingPress(None, schedule), chunk_tokens=CHUNK).chunk_tokens == CHUNK


@pytest.mark.parametrize("chunk", [0, -3, 1.5, True, "512"])
def test_sizes_of_pieces(chunk: Any) -> None:
    with pytest.raises(CacheError, match="chunk_tokens must be an integer >= 1"):
        PressedCache(KnormPress(0.5), chunk_tokens=chunk)


def test_prefill_refuses_what_it_cannot_mean() -> None:
    model, past = tiny("llama"), prefilled("llama", KnormPress(0.5), tokens(1, 20))
    with pytest.raises(CacheError, match="empty cache"):
        prefill(model, tokens(1, 20), past)
    with pytest.raises(InputError, match="at least one"):
        prefill(model, tokens(1, 0), PressedCache())
    with pytest.raises(InputError, match="attention_mask has the shape"):
        prefill(model, tokens(1, 9), PressedCache(), torch.ones(1, 8))
    with pytest.raises(CacheError, match="in one piece"):
        PressedCache(chunk_tokens=4).branches([KnormPress(0.5)])
    with pytest.raises(coldpress.errors.ModelError, match="never ran"):
        prefill(tiny("llama", "sdpa"), tokens(1, 9), PressedCache())


def test_the_presses_that_take_pieces() -> None:
    """A change here is a change of what the documents say."""
    assert {"knorm", "keydiff", "snapkv", "pyramidkv", "streaming_llm", "tova", "expected_attention"} <= set(CHUNKED)
    assert AdaKVPress(TOVAPress(0.5)).chooses_again and not ChunkKVPress(TOVAPress(0.5)).chooses_again
    assert WINDOW < N - CHUNK  # the sliding windows of these tests are left behind on the way
