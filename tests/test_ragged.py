"""Heads that hold different numbers of pairs: the memory of these pairs and no more, and the attention over them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.oracles.all_pairs import AllPairs
from tests.presses.others import duo, lukv
from tests.presses.words import Words
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    CriticalAdaKVPress,
    DecodingPress,
    DMSPress,
    KnormPress,
    KVzipPress,
    PressedCache,
    SnapKVPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.stores.ragged import RaggedStore

N = 200
HEAD_WISE: dict[str, BasePress] = {
    "adakv": AdaKVPress(SnapKVPress(0.6, window_size=8)),
    "critical_adakv": CriticalAdaKVPress(SnapKVPress(0.6, window_size=8)),
    "dms": DMSPress(KnormPress(), threshold=-4.0, sliding_window_size=16),
    "duo": duo(2, 4),
    "kvzip": KVzipPress(0.6),
    "lukv": lukv(2, 4),
}


def pairs_of(past: PressedCache) -> int:
    return sum(int((layer.positions() >= 0).sum()) for layer in past.pressed_layers())


@pytest.mark.parametrize("name", HEAD_WISE)
def test_bytes_are_those_of_the_pairs(name: str) -> None:
    """Evicted pairs take no memory in any head: what is left of the bytes is what is left of the pairs."""
    model, press = tiny("gpt_neox"), HEAD_WISE[name].prepared(tiny("gpt_neox"), Words())
    full, past = PressedCache(), PressedCache()
    model(tokens(1, N), **cache_argument(full))
    with press(model):
        model(tokens(1, N), **cache_argument(past))
    assert any(layer.is_ragged for layer in past.pressed_layers())
    assert 0.2 < past.achieved_ratio() < 0.95
    assert past.kv_bytes() * pairs_of(full) == full.kv_bytes() * pairs_of(past)
    assert past.kv_bytes() == pytest.approx((1 - past.achieved_ratio()) * full.kv_bytes(), rel=1e-9)


def test_rows_of_different_lengths_take_what_they_need() -> None:
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :150] = 0
    past = PressedCache(KnormPress(0.5))
    tiny("llama")(tokens(2, N), attention_mask=mask, **cache_argument(past))
    assert (past.positions(0) >= 0).sum(-1).tolist() == [[100, 100], [25, 25]]
    assert past.kv_bytes() == 2 * 2 * (100 + 25) * 2 * 8 * 4  # layers, heads, pairs, keys and values, float32


def test_heads_of_one_length_stay_in_one_tensor() -> None:
    past = PressedCache(SnapKVPress(0.6, window_size=8))
    tiny("gpt_neox")(tokens(2, N), **cache_argument(past))
    assert not any(layer.is_ragged for layer in past.pressed_layers())


def test_new_tokens_do_not_move_the_others() -> None:
    """A segment has room for later tokens, an eighth of what it holds at least; then all move at once."""
    model, past = tiny("gpt_neox"), PressedCache(HEAD_WISE["adakv"])
    model(tokens(1, N), **cache_argument(past))
    exact = past.kv_bytes()
    places = []
    for i in range(200):
        model(tokens(1, 1, seed=i), **cache_argument(past))
        places.append(past.layer(0).tensors()[0].data_ptr())
    moves = sum(a != b for a, b in itertools.pairwise(places))
    assert 1 <= moves <= 3
    held = exact * (pairs_of(past) / (pairs_of(past) - 200 * 2 * 4))
    assert past.kv_bytes() < 1.8 * held  # 80 pairs a head at first: room for 64 more is much of it


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("attention", ["coldpress", "coldpress_eager"])
def test_logits_are_those_of_all_pairs_with_a_mask(name: str, attention: str) -> None:
    """Questions of several tokens and single ones, against attention to every pair that masks the evicted ones."""
    if name not in BY_NAME:
        pytest.skip(f"no {name} in this version of transformers")
    model, ids = tiny(name, attention), tokens(2, 60)
    past, masked = PressedCache(AdaKVPress(KnormPress(0.6), 0.0)), AllPairs(name)
    model(ids, **cache_argument(past)), masked.read(ids)
    assert any(layer.is_ragged for layer in past.pressed_layers())
    masked.keep(past)
    for i, n in enumerate((3, 1, 1, 70, 1, 2)):
        piece = tokens(2, n, seed=i)
        actual = model(piece, **cache_argument(past)).logits
        torch.testing.assert_close(actual, masked.read(piece), atol=2e-5, rtol=0)


def test_question_with_padding() -> None:
    """Rows whose question is shorter are padded, and see what they would see alone."""
    model, press = tiny("llama"), AdaKVPress(KnormPress(0.6), 0.0)
    ids, question = tokens(2, 60), tokens(2, 5, seed=1)
    past = PressedCache(press)
    model(ids, **cache_argument(past))
    mask = torch.ones(2, 66, dtype=torch.long)
    mask[1, 60:63] = 0
    at = (mask[:, :65].cumsum(-1) - 1)[:, 60:]
    model(question, attention_mask=mask[:, :65], **cache_argument(past), position_ids=at)
    answer = model(question[:, :1], attention_mask=mask, **cache_argument(past), position_ids=mask.sum(-1)[:, None] - 1)
    alone = PressedCache(press)
    model(ids[1:], **cache_argument(alone))
    model(question[1:, 3:], **cache_argument(alone))
    expected = model(question[1:, :1], **cache_argument(alone)).logits
    torch.testing.assert_close(answer.logits[1:], expected, atol=1e-5, rtol=0)


def test_beams_and_forks() -> None:
    model, ids = tiny("llama"), tokens(1, 60)
    press = AdaKVPress(KnormPress(0.6), 0.0)
    past = PressedCache(press)
    model(ids, **cache_argument(past))
    other, rest = past.fork(), tokens(3, 6, seed=5)
    expected = []
    for row in rest:  # each continuation alone
        own = past.fork()
        expected.append(model(row[None], **cache_argument(own)).logits)
        assert own.layer(0).is_ragged
    past.batch_repeat_interleave(3)
    logits = [model(rest[:, :2], **cache_argument(past)).logits]
    past.reorder_cache(torch.tensor([2, 0, 1]))
    logits.append(model(rest[[2, 0, 1], 2:], **cache_argument(past)).logits[[1, 2, 0]])
    torch.testing.assert_close(torch.cat(logits, dim=1), torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(rest[:1], **cache_argument(other)).logits, expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["coldpress", "coldpress_eager"])
def test_the_longest_row_may_go(attention: str) -> None:
    """What is left is no longer than its own longest head, with and without a mask."""
    model, ids, question = tiny("llama", attention), tokens(2, 60), tokens(1, 3, seed=5)
    past = PressedCache(AdaKVPress(SnapKVPress(0.7, window_size=2), 0.0))
    model(ids, **cache_argument(past))
    lengths = (past.positions(0) >= 0).sum(-1).amax(-1)
    assert lengths[0] != lengths[1]
    for row in range(2):
        own, alone = past.fork(), PressedCache(past.press)
        own.batch_select_indices(torch.tensor([row]))
        model(ids[row : row + 1], **cache_argument(alone))
        assert own.positions(0).shape == own.layer(0).keys.shape[:3] == alone.layer(0).keys.shape[:3]
        mask = torch.ones(1, 63, dtype=torch.long)
        mask[0, 60] = 0
        for mask_and_positions in ({}, {"attention_mask": mask, "position_ids": torch.tensor([[59, 60, 61]])}):
            actual, expected = (
                model(question, **cache_argument(c.fork()), **mask_and_positions).logits for c in (own, alone)
            )
            torch.testing.assert_close(actual[:, 1:], expected[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["coldpress", "coldpress_eager"])
def test_beams_under_a_schedule(attention: str) -> None:
    """Rows come and go while heads are cut back: the tokens are those of beams that have a cache each."""
    press = DecodingPress(AdaKVPress(SnapKVPress(window_size=4)), compression_interval=5, target_size=20)
    ids, model, past = tokens(1, 40), tiny("llama", attention), PressedCache(press)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=20, **cache_argument(past)
    )
    assert past.achieved_ratio() > 0.5 and past.layer(0).is_ragged
    beams = [(0.0, ids[0].tolist(), PressedCache(press))]
    for n in range(20):
        longer = []
        for total, said, own in beams:
            given = torch.tensor([said if n == 0 else said[-1:]])
            losses = model(given, **cache_argument(own)).logits[0, -1].log_softmax(-1)
            longer += [(total + float(loss), [*said, token], own) for token, loss in enumerate(losses)]
        beams = [(total, said, own.fork()) for total, said, own in sorted(longer, key=lambda beam: -beam[0])[:3]]
    assert found.tolist() == [beams[0][1]]


@pytest.mark.parametrize(
    "press",
    [
        AdaKVPress(SnapKVPress(0.5, window_size=4)),
        DMSPress(KnormPress(), threshold=-5.0, sliding_window_size=4, decoding=True),
        DecodingPress(AdaKVPress(KnormPress()), compression_interval=2, target_size=8),
    ],
)
@pytest.mark.parametrize("attention", ["coldpress", "coldpress_eager"])
def test_with_gradients(press: BasePress, attention: str) -> None:
    """Parameters that want gradients change nothing."""
    model, logits = BY_NAME["gpt_neox"].build(attention).requires_grad_(True), []
    for with_gradients in (False, True):
        past = PressedCache(press)
        with torch.set_grad_enabled(with_gradients):
            pieces = (tokens(1, n, seed=i) for i, n in enumerate((40, 1, 1, 1, 3)))
            logits.append(torch.cat([model(piece, **cache_argument(past)).logits for piece in pieces], dim=1))
    torch.testing.assert_close(logits[1].detach(), logits[0], atol=1e-5, rtol=0)


def test_compressing_again_while_decoding() -> None:
    past = PressedCache(DecodingPress(AdaKVPress(KnormPress(), 0.0), compression_interval=8, target_size=20))
    model = tiny("gpt_neox")
    model(tokens(1, 40), **cache_argument(past))
    for i in range(40):
        assert model(tokens(1, 1, seed=i), **cache_argument(past)).logits.isfinite().all()
    assert pairs_of(past) <= 2 * 4 * (20 + 8) and any(layer.is_ragged for layer in past.pressed_layers())


# -- the store by itself ------------------------------------------------------------------------------------------


class Segments:
    """The twin: a list of pairs for every row and head."""

    def __init__(self, keys: Tensor, counts: list[list[int]]):
        self.held = [[list(keys[b, h, :n]) for h, n in enumerate(row)] for b, row in enumerate(counts)]
        self.n_first = counts

    def append(self, keys: Tensor) -> None:
        for b, row in enumerate(self.held):
            for h, head in enumerate(row):
                head.extend(keys[b, h])

    def crop(self, dropped: int) -> None:
        for row in self.held:
            for head in row:
                del head[len(head) - dropped :]

    def index_rows(self, rows: list[int]) -> None:
        self.held = [[list(head) for head in self.held[row]] for row in rows]
        self.n_first = [self.n_first[row] for row in rows]

    def attention(self, query: Tensor) -> Tensor:
        """``[B, Hq, Q, D] -> [B, Q, Hq, D]``, keys and values being the same."""
        out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
        group = query.shape[1] // len(self.held[0])
        for b in range(query.shape[0]):
            for h in range(query.shape[1]):
                pairs = torch.stack(self.held[b][h // group])
                for q in range(query.shape[2]):
                    seen = pairs[: len(pairs) - (query.shape[2] - 1 - q)]
                    out[b, q, h] = ((seen @ query[b, h, q] / 4.0).softmax(0)[:, None] * seen).sum(0)
        return out


@settings(max_examples=40)
@given(st.data())
def test_store_against_lists(data: st.DataObject) -> None:
    """Whatever is done to it, in whatever order, a store holds what lists would hold."""
    n_rows, n_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    counts = [[data.draw(st.integers(0, 9)) for _ in range(n_heads)] for _ in range(n_rows)]
    counts[0][0] = max(1, counts[0][0])
    longest = max(map(max, counts))
    torch.manual_seed(data.draw(st.integers(0, 99)))

    def new(n: int, heads: int = n_heads) -> Tensor:
        return torch.randn(len(twin.held) if n else n_rows, heads, n or longest, 4)

    keys = torch.randn(n_rows, n_heads, longest, 4)
    twin = Segments(keys, counts)
    store = RaggedStore(keys, keys.clone(), torch.arange(longest) < torch.tensor(counts)[..., None])
    n_later, others = 0, []
    for action in data.draw(st.lists(st.sampled_from(["append", "append", "crop", "rows", "share"]), max_size=8)):
        if action == "append":
            part = new(data.draw(st.sampled_from([1, 1, 3, 70])))
            store.append(part, part)
            twin.append(part)
            n_later += part.shape[2]
        elif action == "crop":
            dropped = data.draw(st.integers(0, n_later))
            store.crop(store.n - dropped)
            twin.crop(dropped)
            n_later -= dropped
        elif action == "rows":
            rows = data.draw(st.lists(st.integers(0, len(twin.held) - 1), min_size=1, max_size=3))
            store.index_rows(torch.tensor(rows))
            twin.index_rows(rows)
        else:
            others.append((store.shared(), store.keys))
    longest = max(map(max, twin.n_first))
    assert store.n == longest + n_later and store.keys.shape == (len(twin.held), n_heads, store.n, 4)
    for b, row in enumerate(twin.held):
        for h, head in enumerate(row):
            n, expected = twin.n_first[b][h], torch.zeros(store.n, 4)
            expected[:n] = torch.stack([*head[:n], torch.zeros(4)])[:-1]
            expected[longest:] = torch.stack([*head[n:], torch.zeros(4)])[:-1]
            assert torch.equal(store.keys[b, h], expected) and torch.equal(store.values[b, h], expected)
    for other, held in others:
        assert torch.equal(other.keys, held)  # what came later is not in it
    if n_later:
        query = torch.randn(len(twin.held), n_heads * group, data.draw(st.integers(1, n_later)), 4)
        torch.testing.assert_close(store.attend(query, None, 0.25), twin.attention(query), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype, group: int) -> None:
    """As precise as scaled_dot_product_attention: sums and weights in float32."""
    counts = torch.tensor([[5, 300], [40, 1]])
    keys = torch.randn(2, 2, 300, 16).to(dtype)
    store = RaggedStore(keys, keys, torch.arange(300) < counts[..., None])
    for n in (1, 4):
        new = torch.randn(2, 2, n, 16).to(dtype)
        store.append(new, new)
        query = torch.randn(2, 2 * group, n, 16).to(dtype)
        own: Any = store.attend(query, None, 0.25)
        wide = RaggedStore(store.keys.float(), store.values.float(), held(store, counts))
        wide.append(new[:, :, :0].float(), new[:, :, :0].float())
        twin = RaggedStore.attend(wide, query.float(), None, 0.25)
        assert own.dtype == dtype and (own.float() - twin).abs().max() < 0.02


def held(store: RaggedStore, counts: Tensor) -> Tensor:
    slots = torch.arange(store.n)
    return (slots < counts[..., None]) | (slots >= 300)
