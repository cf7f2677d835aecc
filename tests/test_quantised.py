"""Pairs in few bits: the arithmetic against a slow twin, what stays exact, bytes, and caches that are used as any."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.architectures import tiny, tokens
from tests.presses.others import IN_BLOCK, OTHERS, WITH_RATIO, block, small_press
from tests.presses.words import Words
from torch import Tensor
from transformers import QuantizedCache

import coldpress
from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    DMSPress,
    FastKVzipPress,
    KnormPress,
    KVBits,
    KVzipPress,
    LayerDefensiveKVPress,
    PrefillDecodingPress,
    PressedCache,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.layer import PressedLayer
from coldpress.errors import CacheError
from coldpress.models.pipeline_options import check_options
from coldpress.stores.codes import Codes

N = 90  # tokens of the prompt
G, R = 8, 16  # group size and residual tokens of the tests
IDS, FURTHER = tokens(2, N), tokens(2, 60, seed=1)
DENSE, RAGGED = SnapKVPress(0.4, window_size=8), AdaKVPress(SnapKVPress(0.4, window_size=8))
PRESSES: dict[str, BasePress | None] = {"none": None, "snapkv": DENSE, "adakv": RAGGED}


def how(bits: int, group_size: int = G, residual_tokens: int = R) -> KVBits:
    return KVBits(bits, group_size, residual_tokens)


def filled(press: BasePress | None, kv_bits: KVBits | None, ids: Tensor = IDS, name: str = "llama") -> PressedCache:
    past, model = PressedCache(press, kv_bits=kv_bits), tiny(name)
    with block(model, press) if press is not None else torch.no_grad():
        model(ids, **cache_argument(past))
    return past


def both(press: BasePress | None, kv_bits: KVBits, name: str = "llama") -> tuple[PressedCache, PressedCache]:
    """The same pairs as they are and in few bits: two branches of one prefill, or of two where it has to be."""
    return filled(press, None, name=name), filled(press, kv_bits, name=name)


def in_few_bits(layer: PressedLayer) -> bool:
    """Whether some of what a layer holds are codes."""
    return any(tensor.dtype == torch.uint8 for tensor in layer.tensors())


def twin(numbers: Tensor, bits: int) -> Tensor:
    """What is known of a group of numbers when they are held in few bits: one number after the other."""
    kind = torch.bfloat16 if numbers.dtype == torch.float32 else numbers.dtype
    low, high = float(numbers.min()), float(numbers.max())
    step: Any = (torch.tensor(high) - torch.tensor(low)) / (2**bits - 1)
    step = float((step * (1 + torch.finfo(kind).eps)).to(kind))
    out = []
    for number in numbers.tolist():
        code = min(2**bits - 1, max(0, round((number - low) / step))) if step > 0 else 0
        out.append(low + step * code)
    return torch.tensor(out, dtype=numbers.dtype)


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_channels", [16, 7])
def test_keys_and_values_are_those_of_the_slow_twin(bits: int, dtype: torch.dtype, n_channels: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    numbers = (torch.randn(3, G, n_channels, generator=generator) * 5 + 2).to(dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
    found = Codes.of(numbers, bits, None).numbers(dtype, n_channels)
    size = KVBits(bits, 8).channels(n_channels)
    by_channels = Codes.of(numbers, bits, size).numbers(dtype, n_channels)
    for n in range(3):
        for channel in range(n_channels):
            torch.testing.assert_close(found[n, :, channel], twin(numbers[n, :, channel], bits), **tolerance)
        for token in range(G):
            for first in range(0, n_channels, size):
                own = numbers[n, token, first : first + size]
                torch.testing.assert_close(by_channels[n, token, first : first + size], twin(own, bits), **tolerance)


@settings(max_examples=60)
@given(
    st.sampled_from([8, 4, 2]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.floats(-50, 50),
    st.floats(1e-3, 20),
    st.integers(0, 2**31),
)
def test_no_number_is_off_by_more_than_half_a_step(
    bits: int, dtype: torch.dtype, is_by_token: bool, offset: float, spread: float, seed: int
) -> None:
    numbers = (torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(seed)) * spread + offset).to(dtype)
    groups = numbers.float().unflatten(-1, (3, 8)) if is_by_token else numbers.float()
    dim = -1 if is_by_token else 1
    step = (groups.amax(dim, keepdim=True) - groups.amin(dim, keepdim=True)) / (2**bits - 1)
    found = Codes.of(numbers, bits, 8 if is_by_token else None).numbers(dtype, 24).float()
    error = (found.view_as(groups) - groups).abs()
    rounding = torch.finfo(dtype).eps * groups.abs().amax(dim, keepdim=True)  # of the number itself
    kind = torch.bfloat16 if dtype == torch.float32 else dtype
    assert bool((error <= step / 2 * (1 + 3 * torch.finfo(kind).eps) + rounding + 1e-7).all())


def test_equal_numbers_come_back_as_they_were() -> None:
    numbers = torch.full((1, G, 8), 3.1415)
    for bits in (8, 4, 2):
        assert torch.equal(Codes.of(numbers, bits, None).numbers(torch.float32, 8), numbers)


# -- what a cache holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", PRESSES)
def test_each_head_holds_its_pairs_quantised_in_groups_from_its_first_on(name: str, bits: int) -> None:
    plain, past = both(PRESSES[name], how(bits))
    for own, layer in zip(past.pressed_layers(), plain.pressed_layers(), strict=True):
        assert torch.equal(own.positions(), layer.positions())
        counts = (layer.positions() >= 0).sum(-1)
        for row, head in ((row, head) for row in range(2) for head in range(counts.shape[1])):
            n = int(counts[row, head])
            n_coded = max(0, (n - R) // G) * G
            keys, values = layer.keys[row, head, :n].clone(), layer.values[row, head, :n].clone()
            for first in range(0, n_coded, G):
                for channel in range(keys.shape[1]):
                    keys[first : first + G, channel] = twin(keys[first : first + G, channel], bits)
            for token in range(n_coded):
                values[token] = twin(values[token], bits)  # 8 channels
            torch.testing.assert_close(own.keys[row, head, :n], keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(own.values[row, head, :n], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PRESSES)
def test_the_newest_pairs_are_exact_whenever_one_looks(name: str) -> None:
    """Fed the same tokens a layer of its own could differ; the first layer's pairs depend on nothing but the tokens."""
    plain, past = both(PRESSES[name], how(2))
    start = 0
    for n in (3, 1, 1, 20, 1, 1, 1, 25, 1, 1):
        for each in (plain, past):
            tiny("llama")(FURTHER[:, start : start + n], **cache_argument(each))
        start += n
        own, layer = past.layer(0), plain.layer(0)
        newest = R if start >= R or name != "adakv" else start
        torch.testing.assert_close(own.keys[:, :, -newest:], layer.keys[:, :, -newest:], atol=0, rtol=0)
        torch.testing.assert_close(own.values[:, :, -newest:], layer.values[:, :, -newest:], atol=0, rtol=0)
        error = (own.keys - layer.keys).abs().amax()
        assert 0 < error < 5
        assert torch.equal(own.positions(), layer.positions())


def numbers_by_position(past: PressedCache, layer: int) -> list[dict[int, list[float]]]:
    """Key and value of each pair, for each row and head."""
    own = past.layer(layer)
    states = torch.cat([own.keys, own.values], dim=-1).flatten(0, 1).tolist()
    heads = own.positions().flatten(0, 1).tolist()
    return [{t: pair for t, pair in zip(*head, strict=True) if t >= 0} for head in zip(heads, states, strict=True)]


@pytest.mark.parametrize("name", PRESSES)
def test_a_group_is_quantised_once(name: str) -> None:
    """The numbers of a pair change at most once in its life, and those of the newest never."""
    past = filled(PRESSES[name], how(4))
    before, n_changes = numbers_by_position(past, 1), [dict.fromkeys(range(N + 60), 0) for _ in range(4)]
    for t in range(60):
        tiny("llama")(FURTHER[:, t : t + 1], **cache_argument(past))
        now = numbers_by_position(past, 1)
        for old, new, changes in zip(before, now, n_changes, strict=True):
            assert new.keys() - old.keys() == {N + t} and not old.keys() - new.keys()
            for position, pair in old.items():
                changes[position] += pair != new[position]
        before = now
    for changes in n_changes:
        changed = [position for position, n in changes.items() if n]
        assert set(changes.values()) == {0, 1} and max(changed) < N + 60 - R and len(changed) >= 60 - R


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes_are_those_of_codes_steps_and_newest_pairs(bits: int) -> None:
    """llama: 2 layers, 2 KV heads of 8 channels, float32; a step takes 2 bytes, a least number 4."""
    past = filled(None, how(bits))
    n_blocks = (N - R) // G
    tail = N - n_blocks * G
    keys = n_blocks * (G * math.ceil(8 * bits / 8) + 8 * (2 + 4))
    values = n_blocks * G * (math.ceil(8 * bits / 8) + (2 + 4))
    assert past.kv_bytes() == 2 * 2 * 2 * (keys + values + tail * 2 * 8 * 4)


def test_bytes_of_heads_of_different_lengths() -> None:
    past = filled(RAGGED, how(4))
    expected = 0
    for layer in past.pressed_layers():
        assert layer.is_ragged and in_few_bits(layer)
        for n in (layer.positions() >= 0).sum(-1).flatten().tolist():
            n_blocks = max(0, (n - R) // G)
            expected += n_blocks * (G * 4 + 8 * 6 + G * (4 + 6)) + (n - n_blocks * G) * 2 * 8 * 4
    assert past.kv_bytes() == expected


@torch.no_grad()
@pytest.mark.parametrize("press", [SnapKVPress(budget_tokens=12), AdaKVPress(SnapKVPress(budget_tokens=12))], ids=repr)
def test_few_pairs_take_no_more_bytes_for_bits_that_none_is_in(press: BasePress) -> None:
    """Room for all of the newest pairs was made with the first of them."""
    plain, few = filled(press, None), filled(press, KVBits(4, residual_tokens=1000))
    rooms = []
    for token in tokens(2, 300, seed=2).split(1, dim=1):
        for past in (plain, few):
            tiny("llama")(token, **cache_argument(past))
        rooms.append(few.pressed_layers()[0].slots.filled.room)
        assert few.kv_bytes() <= plain.kv_bytes()
    assert sum(now > before for before, now in itertools.pairwise(rooms)) <= 300 // 60  # copies are rare


def test_room_for_new_tokens_is_no_more_than_a_group() -> None:
    """Of the pairs that are held as they are: keys and values of 2 layers, 2 rows and 2 heads of 8 channels."""
    for press in (None, RAGGED):
        past = filled(press, how(4))
        for t in range(40):
            tiny("llama")(FURTHER[:, t : t + 1], **cache_argument(past))
            exact = [part for layer in past.pressed_layers() for part in layer.tensors() if part.dtype == torch.float32]
            held = sum(part.numel() for part in exact if part.shape[-2:] != (1, 8) and part.shape[-1] == 8)
            assert held <= 2 * 2 * 2 * 2 * 8 * (R + G) * (1 if press is None else 2)


# -- caches that are used as any --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("attention", ["coldpress", "coldpress_eager"])
def test_logits_are_those_of_the_numbers_that_are_held(name: str, attention: str) -> None:
    """Attention head by head, at once, and with weights, against a plain cache that was given the same numbers."""
    model, past = tiny("llama", attention), filled(PRESSES[name], how(4))
    plain = filled(PRESSES[name], None)
    for own, layer in zip(past.pressed_layers(), plain.pressed_layers(), strict=True):
        layer.store(own.keys.clone(), own.values.clone(), layer.positions())
        assert layer.slots.filled.name in ("dense", "ragged")
    for n in (3, 1, 30):
        piece = FURTHER[:, :n]
        found, expected = (model(piece, **cache_argument(each.fork())).logits for each in (past, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PRESSES)
def test_rows_with_padding_are_what_they_are_alone(name: str) -> None:
    """In 8 bits: a number on the border of two levels may fall to either side, and in 4 bits that shows."""
    model, press, lengths = tiny("llama"), PRESSES[name], (N, 61)
    past = PressedCache(press, kv_bits=how(8))
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, : N - lengths[1]] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    model(IDS, attention_mask=mask, position_ids=places, **cache_argument(past))
    alone = [PressedCache(press, kv_bits=how(8)) for _ in lengths]
    for row, (own, n) in enumerate(zip(alone, lengths, strict=True)):
        model(IDS[row : row + 1, N - n :], **cache_argument(own))
    for t in range(30):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = FURTHER[:, t : t + 1]
        found = model(step, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1, **cache_argument(past))
        for row, own in enumerate(alone):
            expected = model(step[row : row + 1], **cache_argument(own)).logits[0]
            torch.testing.assert_close(found.logits[row], expected, atol=2e-3, rtol=0)
    assert past.kv_bytes() < 2 * 2 * 2 * 120 * 2 * 8 * 4


@pytest.mark.parametrize("name", PRESSES)
def test_forks_beams_and_copies(name: str) -> None:
    past, model = filled(PRESSES[name], how(4)), tiny("llama")
    before = [layer.keys.clone() for layer in past.pressed_layers()]
    fork, again = past.fork(), pickle.loads(pickle.dumps(past))
    deep = copy.deepcopy(past)
    expected = model(FURTHER[:, :30], **cache_argument(fork)).logits
    for layer, keys in zip(past.pressed_layers(), before, strict=True):
        assert torch.equal(layer.keys, keys)
    assert fork.kv_bits == past.kv_bits == how(4)
    for other in (past, again, deep):
        assert torch.equal(model(FURTHER[:, :30], **cache_argument(other)).logits, expected)
    rows = torch.tensor([1, 0, 1])
    past.reorder_cache(rows)
    for own, layer in zip(past.pressed_layers(), fork.pressed_layers(), strict=True):
        assert torch.equal(own.keys, layer.keys[rows]) and torch.equal(own.values, layer.values[rows])
    fork.batch_repeat_interleave(2)
    reference = model(FURTHER[:, 30:45], **cache_argument(again)).logits
    for each, chosen in ((past, rows), (fork, torch.tensor([0, 0, 1, 1]))):
        found = model(FURTHER[chosen, 30:45], **cache_argument(each)).logits
        torch.testing.assert_close(found, reference[chosen], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PRESSES)
def test_the_newest_tokens_can_be_cropped_and_no_others(name: str) -> None:
    past, model = filled(PRESSES[name], how(4)), tiny("llama")
    model(FURTHER[:, :40], **cache_argument(past))
    other = past.fork()
    keys = past.layer(0).keys
    model(FURTHER[:, 40:43], **cache_argument(past))
    past.crop(N + 40 - 5)
    assert past.seen_tokens == N + 35
    assert torch.equal(past.layer(0).positions(), other.layer(0).positions()[..., :-5])
    torch.testing.assert_close(past.layer(0).keys[:, :, -R + 8 :], keys[:, :, -R + 3 : -5], atol=0, rtol=0)
    other.crop(N + 35)
    for each in (past, other):
        model(FURTHER[:, 50:52], **cache_argument(each))
    newest = [each.layer(0).keys[:, :, -2:] for each in (past, other)]
    torch.testing.assert_close(*newest, atol=0, rtol=0)
    with pytest.raises(CacheError, match="stored in few bits, in groups"):
        past.crop(N + 2)
    assert past.seen_tokens == N + 37  # nothing has changed


def test_generate_and_reset() -> None:
    model = tiny("llama")
    for press in (None, DENSE, RAGGED):
        past = PressedCache(press, kv_bits=how(8))
        for _ in range(2):
            ids = model.generate(IDS, **cache_argument(past), max_new_tokens=40, do_sample=False)
            assert ids.shape[1] == N + 40 and past.seen_tokens == N + 39
            assert in_few_bits(past.layer(0))
            past.reset()
        beams = model.generate(
            IDS, **cache_argument(PressedCache(press, kv_bits=how(8))), max_new_tokens=12, num_beams=2, do_sample=False
        )
        assert beams.shape == (2, N + 12)


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("given_artefacts", "given_weights")
@pytest.mark.parametrize("name", [*WITH_RATIO, *IN_BLOCK, *OTHERS])
def test_every_press_keeps_what_it_keeps_and_holds_it_in_few_bits(name: str) -> None:
    press, model, ids = small_press(name, "llama"), tiny("llama"), tokens(1, 48)
    kv_bits = how(8, 4, 4)
    if getattr(press, "key_channel_compression_ratio", 0):
        with pytest.raises(CacheError, match="fewer channels"):
            PressedCache(press, kv_bits=kv_bits)
        return
    press = press.prepared(model, Words())
    plain, past = PressedCache(), PressedCache(kv_bits=kv_bits)
    for each in (plain, past):
        torch.manual_seed(0)
        with press(model):
            model(ids, **cache_argument(each))
    assert [layer.positions().tolist() for layer in past.pressed_layers()] == [
        layer.positions().tolist() for layer in plain.pressed_layers()
    ]  # scored as it was
    for own, layer in zip(past.pressed_layers(), plain.pressed_layers(), strict=True):
        assert in_few_bits(own)
        torch.testing.assert_close(own.keys, layer.keys, atol=0.1, rtol=0)
        torch.testing.assert_close(own.values, layer.values, atol=0.1, rtol=0)
    longest = max(int((layer.positions() >= 0).sum(-1).max()) for layer in plain.pressed_layers())
    assert past.kv_bytes() < plain.kv_bytes() or longest < 12


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_layers_with_a_sliding_window(name: str) -> None:
    """They forget whole groups; the newest tokens that they can see are there."""
    plain, past = both(None, how(8), name)
    for t in range(60):
        found, expected = (tiny(name)(FURTHER[:, t : t + 1], **cache_argument(each)).logits for each in (past, plain))
        torch.testing.assert_close(found, expected, atol=0.25, rtol=0)
    for own, layer in zip(past.pressed_layers(), plain.pressed_layers(), strict=True):
        assert own.stored_length <= layer.stored_length + 40
        assert torch.equal(own.positions()[..., -8:], layer.positions()[..., -8:])


def test_branches_of_one_prefill_each_in_its_bits() -> None:
    full = PressedCache()
    branches = full.branches([None, DENSE, DENSE, RAGGED], [how(4), how(4), None, how(2)])
    tiny("llama")(IDS, **cache_argument(full))
    assert full.layer(0).keys.equal(filled(None, None).layer(0).keys)
    for branch, press, bits in zip(branches, (None, DENSE, DENSE, RAGGED), (4, 4, None, 2), strict=True):
        expected = filled(press, None if bits is None else how(bits))
        assert torch.equal(branch.layer(1).keys, expected.layer(1).keys)
        assert branch.kv_bytes() == expected.kv_bytes()
    with pytest.raises(CacheError, match="empty cache without a press"):
        PressedCache(kv_bits=4).branches([None])


def test_gradients_of_the_prefill_do_not_stand_in_the_way() -> None:
    past = PressedCache(kv_bits=how(4))
    with torch.enable_grad():
        tiny("llama")(IDS, **cache_argument(past))
        tiny("llama")(FURTHER, **cache_argument(past))
    assert past.kv_bytes() > 0


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [3, 16, 0, True, "4", 4.0, -2])
def test_bits_that_there_are_not(wrong: Any) -> None:
    with pytest.raises(CacheError, match="8, 4 or 2"):
        PressedCache(kv_bits=wrong)
    with pytest.raises(CacheError, match="8, 4 or 2"):
        KVBits(wrong)


@pytest.mark.parametrize("wrong", [{"group_size": 0}, {"residual_tokens": -1}, {"group_size": 2.5}])
def test_sizes_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match="must be an integer of at least"):
        KVBits(4, **wrong)


@pytest.mark.parametrize(
    "press",
    [
        DecodingPress(KnormPress(), 8, 40),
        DMSPress(KnormPress(), threshold=-4.0, decoding=True),
        PrefillDecodingPress(SnapKVPress(0.5), DecodingPress(KnormPress(), 8, 40)),
    ],
)
def test_presses_that_go_on_while_decoding_are_refused(press: BasePress) -> None:
    """They would take groups apart, and quantise survivors again and again."""
    with pytest.raises(CacheError, match="while decoding"):
        PressedCache(press, kv_bits=4)
    with press(tiny("llama")), pytest.raises(CacheError, match="while decoding"):
        tiny("llama")(IDS, **cache_argument(PressedCache(kv_bits=4)))


def test_fewer_channels_are_refused() -> None:
    with pytest.raises(CacheError, match="fewer channels"):
        PressedCache(ThinKPress(0.5, press=StreamingLLMPress(0.5)), kv_bits=4)
    PressedCache(ThinKPress(0.0, press=StreamingLLMPress(0.5)), kv_bits=4)  # removes none


def test_presses_that_choose_when_the_prefill_is_over_see_full_precision() -> None:
    model, press = tiny("llama"), KVzipPress(0.5).prepared(tiny("llama"), Words())
    caches = PressedCache(), PressedCache(kv_bits=how(2))
    for past in caches:
        with press(model):
            model(tokens(1, N), **cache_argument(past))
    for own, layer in zip(caches[1].pressed_layers(), caches[0].pressed_layers(), strict=True):
        assert torch.equal(own.positions(), layer.positions())
    assert caches[1].kv_bytes() < 0.6 * caches[0].kv_bytes()


@pytest.mark.parametrize("press", [KVzipPress(0.0), FastKVzipPress(0.0), LayerDefensiveKVPress(0.0)], ids=repr)
def test_what_evicts_nothing_is_in_few_bits_after_the_prefill(press: BasePress) -> None:
    """Such a press waits for its block to have it choose; where there is no block, nothing is waited for."""
    model, plain, past = tiny("llama"), PressedCache(kv_bits=how(2)), PressedCache(press, kv_bits=how(2))
    for cache in (plain, past):
        model(tokens(1, N), **cache_argument(cache))
    assert past.kv_bytes() == plain.kv_bytes() and all(in_few_bits(layer) for layer in past.pressed_layers())


def test_the_pipeline_says_what_to_give_instead_of_a_quantised_cache() -> None:
    quantized = QuantizedCache.__new__(QuantizedCache)  # without the packages that quantise
    with pytest.raises(CacheError, match=r"not QuantizedCache\. To store what is kept in few bits, give kv_bits=4"):
        check_options({"cache": quantized})
    quantized.layers = [SimpleNamespace(nbits=2, q_group_size=32, residual_length=64)]
    with pytest.raises(CacheError, match=r"KVBits\(2, group_size=32, residual_tokens=64\)"):
        check_options({"cache": quantized})
    with pytest.raises(CacheError, match="give kv_bits to the PressedCache"):
        check_options({"cache": PressedCache(), "kv_bits": 4})
    check_options({"cache": PressedCache(kv_bits=4), "kv_bits": 4})


@pytest.mark.parametrize("inner", [None, KnormPress(budget_tokens=40), AdaKVPress(KnormPress(budget_tokens=40))])
def test_a_prompt_in_pieces_is_quantised_at_its_end(inner: Any) -> None:
    """What is left when the last piece has come, as of a prompt whose pairs stay as they are."""
    own, plain = (PressedCache(inner, chunk_tokens=16, kv_bits=bits) for bits in (KVBits(8, 4, 8), None))
    with torch.no_grad():
        for past in (own, plain):
            coldpress.prefill(tiny("llama"), tokens(1, 100), past)
        answers = [tiny("llama")(tokens(1, 3, seed=4), **cache_argument(past)).logits for past in (own, plain)]
    if inner is not None:
        for a, b in zip(own.pressed_layers(), plain.pressed_layers(), strict=True):
            assert torch.equal(a.positions(), b.positions())
    assert own.kv_bytes() < 0.6 * plain.kv_bytes()
    torch.testing.assert_close(*answers, atol=0.05, rtol=0)
    assert not torch.equal(*answers)
