"""A budget in bytes over pairs and bits: each layer, or the cache, holds what the best of its candidates holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, check_equal, every_check, later, read, states, text
from torch import Tensor

import coldpress
from coldpress import (
    AdaKVPress,
    AttentionMatchingPress,
    BasePress,
    DecodingPress,
    KeyRerotationPress,
    KnormPress,
    LayerDefensiveKVPress,
    Mixed,
    PressedCache,
    PyramidKVPress,
    RandomPress,
    RotatedBits,
    SnapKVPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.file import _digest
from coldpress.core.call import LayerCall
from coldpress.errors import CacheError, NoRoomError
from coldpress.models.block import prefilling
from coldpress.stores.codec import codec_of

BUDGET = 4_000  # bytes, of 12,800 that 50 tokens take
MIXED = Mixed(((8, 8), (8, 4), (4, 2)), sinks=2, newest=8)
BY_LAYER: dict[str, BasePress] = {
    "snapkv": SnapKVPress(window_size=4, budget_bytes=BUDGET),
    "adakv": AdaKVPress(KnormPress(budget_bytes=BUDGET)),
    "random": RandomPress(budget_bytes=BUDGET),
    "fitted": AttentionMatchingPress(SnapKVPress(window_size=4, budget_bytes=BUDGET)),
}
TOGETHER: dict[str, BasePress] = {
    "layer_defensive": LayerDefensiveKVPress(window_size=4, budget_bytes=BUDGET),
    "fitted together": AttentionMatchingPress(LayerDefensiveKVPress(window_size=4, budget_bytes=BUDGET)),
}


def filled(press: BasePress, storage: RotatedBits | Mixed, ids: Tensor, *, seed: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    case = Case(press, {"storage": storage, **options})
    past = case.cache()
    read(case, past, ids)
    return past


# -- what is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BY_LAYER, *TOGETHER])
def test_it_is_the_cache_of_the_codec_that_was_taken(name: str) -> None:
    press, ids = (BY_LAYER | TOGETHER)[name], text()
    past = filled(press, MIXED, ids)
    assert len(set(past.codecs())) == 1 or name in BY_LAYER
    for index, codec in enumerate(past.codecs()):
        plain = filled(press, codec, ids)
        own, other = past.layer(index), plain.layer(index)
        assert own.n_pairs == other.n_pairs and own.was_compressed
        check_equal([own.positions(), own.keys, own.values], [other.positions(), other.keys, other.values])
        check_equal(own.slots.tensors(), other.slots.tensors())
        assert sum(map(Tensor.nbytes.__get__, own.tensors())) == sum(map(Tensor.nbytes.__get__, other.tensors()))
    assert past.kv_bytes() <= max(filled(press, codec, ids).kv_bytes() for codec in MIXED.codecs)


def test_a_budget_holds_where_heads_keep_the_same() -> None:
    past = filled(BY_LAYER["snapkv"], MIXED, text())
    assert 0.8 * BUDGET < past.kv_bytes() <= BUDGET


def errors_of(press: BasePress, ids: Tensor, n: int = 64) -> list[list[float]]:
    """By candidate and layer: what attention to the stored pairs is off, computed plainly in float64."""
    calls: dict[int, LayerCall] = {}
    whole = PressedCache()
    whole.session.on_attention = lambda layer, call: calls.__setitem__(layer.index, call)
    with torch.no_grad():
        tiny("llama")(ids, **cache_argument(whole))
    found = []
    for codec in MIXED.codecs:
        past, own = filled(press, codec, ids), []
        for layer, full in zip(past.pressed_layers(), whole.pressed_layers(), strict=True):
            call = calls[layer.index]
            query = call.query[:, :, -n:].double()
            outputs = []
            for one in (full, layer):
                bias = one.columns().get("bias", torch.zeros(one.positions().shape))
                outputs.append(attended(query, one.keys, one.values, one.positions(), bias, ids.shape[1], call.scaling))
            own.append(float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()))
        found.append(own)
    return found


def attended(query: Tensor, keys: Any, values: Any, at: Tensor, bias: Tensor, end: int, scaling: float) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    outputs = []
    for head in range(query.shape[1]):
        own = head // group
        logits = query[:, head] @ keys[:, own].double().mT * scaling + bias[:, own, None].double()
        place = torch.arange(end - query.shape[2], end)[:, None]
        hidden = (at[:, own, None] > place) | (at[:, own, None] < 0)
        outputs.append(logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num() @ values[:, own].double())
    return torch.stack(outputs)


@pytest.mark.parametrize("name", [*BY_LAYER, *TOGETHER])
def test_the_smallest_error_is_taken(name: str) -> None:
    press, ids = (BY_LAYER | TOGETHER)[name], text()
    errors = torch.tensor(errors_of(press, ids))  # [candidates, layers]
    assert float(errors.amin()) > 0
    best = errors.argmin(0).tolist()
    if name in TOGETHER:
        best = [int(errors.sum(1).argmin())] * errors.shape[1]
    assert filled(press, MIXED, ids).codecs() == [MIXED.codecs[index] for index in best]


def test_the_choice_depends_on_the_budget() -> None:
    taken = set()
    for n_bytes in (2_000, 4_000, 20_000):
        past = filled(SnapKVPress(window_size=4, budget_bytes=n_bytes), MIXED, text())
        taken |= set(past.codecs())
    assert len(taken) > 1
    assert set(past.codecs()) == {MIXED.codecs[0]}  # all pairs fit in the most bits, and lose least in them


def test_all_rows_of_a_batch_share_the_codec_of_a_layer() -> None:
    ids, mask = text(3), torch.ones(3, 50, dtype=torch.long)
    mask[1, :13] = 0
    case = Case(BY_LAYER["adakv"], {"storage": MIXED})
    past = case.cache()
    read(case, past, ids, mask=mask)
    for index, codec in enumerate(past.codecs()):
        plain = Case(BY_LAYER["adakv"], {"storage": codec})
        other = plain.cache()
        read(plain, other, ids, mask=mask)
        check_equal([past.layer(index).positions()], [other.layer(index).positions()])
        check_equal(past.layer(index).tensors(), other.layer(index).tensors())


@pytest.mark.parametrize("name", ["snapkv", "layer_defensive"])
def test_branches_take_what_a_cache_of_their_own_takes(name: str) -> None:
    press, ids = (BY_LAYER | TOGETHER)[name], text()
    full = PressedCache()
    (branch,) = full.branches([press], [MIXED])
    with torch.no_grad(), prefilling(tiny("llama"), full, branch):
        tiny("llama")(ids, **cache_argument(full))
    alone = filled(press, MIXED, ids)
    assert branch.codecs() == alone.codecs() and full.codecs() == [None, None]
    check_equal(states(branch), states(alone))


def test_a_press_that_reads_again_reads_for_each_candidate() -> None:
    ids = text()
    press = coldpress.KVzipPress(budget_bytes=BUDGET, tokenizer=Tokenizer())
    past = PressedCache(press, storage=MIXED)
    with torch.no_grad(), press(tiny("llama")):
        tiny("llama")(ids, **cache_argument(past))
    (codec,) = set(past.codecs())
    plain = PressedCache(press, storage=codec)
    with torch.no_grad(), press(tiny("llama")):
        tiny("llama")(ids, **cache_argument(plain))
    check_equal(states(past), states(plain))


class Tokenizer:
    """Enough of one for a second pass."""

    def encode(self, text: str, **options: Any) -> Any:
        ids = [5, 6, 7]
        return torch.tensor([ids]) if options.get("return_tensors") == "pt" else ids


def test_candidates_without_room_for_pins_are_left_out() -> None:
    ids, pin = text(), [(0, 30)]
    press = SnapKVPress(window_size=4, budget_bytes=4_600)
    with pytest.raises(NoRoomError):
        filled(press, MIXED.codecs[0], ids, pin=pin)
    past = filled(press, MIXED, ids, pin=pin)
    assert MIXED.codecs[0] not in past.codecs()
    together = LayerDefensiveKVPress(window_size=4, budget_bytes=4_600)
    assert MIXED.codecs[0] not in filled(together, MIXED, ids, pin=pin).codecs()
    for small in (press.with_budget(budget_bytes=2_000), together.with_budget(budget_bytes=2_000)):
        with pytest.raises(NoRoomError, match="pin fewer"):
            filled(small, MIXED, ids, pin=pin)


def test_layers_with_a_window_are_in_the_first_candidate() -> None:
    case = Case(SnapKVPress(window_size=4, budget_bytes=1_500), {"storage": MIXED}, model="gemma2")
    past = case.cache()
    read(case, past, text(), *later())
    local = [layer for layer in past.pressed_layers() if layer.window is not None]
    assert local and all(layer.codec == MIXED.codecs[0] for layer in local)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_windows_soft_caps_and_sinks_of_a_model(name: str) -> None:
    """What is compared is the model's own attention: stored whole, in 8 bits, it is what it was but for rounding."""
    press, ids, found = SnapKVPress(window_size=4, budget_bytes=60_000), tokens(2, 120), []
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for storage in (Mixed(((8, 8), (2, 2)), 2, 8), RotatedBits(8, 8, 2, 8)):
        case = Case(press, {"storage": storage}, model=name)
        past = case.cache()
        read(case, past, ids, mask=mask)
        found.append(past)
    assert set(found[0].codecs()) == {RotatedBits(8, 8, 2, 8)}
    check_equal(states(found[0]), states(found[1]))


# -- what is done with it ---------------------------------------------------------------------------------------------

LACKS = ("padded_rows", "chunks", "rerotated")  # rows share the bits; pieces and moved keys are refused
CASES = {
    name: Case(press, {"storage": MIXED}, rounding=0.3, lacks=LACKS)
    for name, press in {"snapkv": BY_LAYER["snapkv"], "adakv": BY_LAYER["adakv"]}.items()
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


def saved(folder: Path) -> Path:
    past = filled(SnapKVPress(window_size=4, budget_bytes=40_000), Mixed(((2, 2), (8, 8)), 2, 8), text(n=100))
    assert {codec.key_bits for codec in past.codecs()} == {8}
    path = folder / "cache.safetensors"
    past.save(path, tiny("llama"))
    again = PressedCache.load(path, tiny("llama"))
    assert again.storage == past.storage and again.codecs() == past.codecs()
    assert again.fork().codecs() == past.codecs()
    check_equal(states(again), states(past))
    return path


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    said = json.loads(metadata["cache"])
    change(said)
    metadata["cache"] = json.dumps(said)
    save_file(load_file(path), path, metadata | {"sha256": _digest(metadata["cache"])})


@pytest.mark.parametrize("codec", [2, -1, 1.0, True, "1", None])
def test_a_codec_that_a_file_has_not_is_damage(codec: Any, tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewritten(path, lambda said: next(one for one in said["layers"] if "codec" in one).update(codec=codec))
    with pytest.raises(CacheError, match=r"damaged or was altered .*codec"):
        PressedCache.load(path, tiny("llama"))


def test_another_codec_of_the_same_storage_does_not_fit_the_codes(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewritten(path, lambda said: [one.pop("codec", None) for one in said["layers"]])
    with pytest.raises(CacheError, match="damaged or was altered"):
        PressedCache.load(path, tiny("llama"))


def test_gradients_of_the_prefill_do_not_stand_in_the_way() -> None:
    past = PressedCache(BY_LAYER["snapkv"], storage=MIXED)
    tiny("llama")(text(), **cache_argument(past))
    assert past.codecs() == filled(BY_LAYER["snapkv"], MIXED, text()).codecs()


def test_a_new_text_is_another_choice() -> None:
    case = Case(BY_LAYER["snapkv"], {"storage": MIXED})
    past = case.cache()
    read(case, past, text())
    past.reset()
    assert past.codecs() == []
    read(case, past, tokens(2, 60, seed=5))
    assert len(past.codecs()) == 2


# -- what there is not ------------------------------------------------------------------------------------------------


def test_what_a_mixed_storage_takes() -> None:
    assert Mixed([[8, 4], [4, 2]]) == Mixed(((8, 4), (4, 2))) != Mixed()
    assert Mixed().codecs == tuple(RotatedBits(keys, values, 4, 32) for keys, values in ((8, 4), (4, 4), (4, 2)))
    assert codec_of(json.loads(json.dumps(MIXED.described()))) == MIXED


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"candidates": ()}, "different pairs of bits"),
        ({"candidates": ((8, 4), (8, 4))}, "different pairs of bits"),
        ({"candidates": (8, 4)}, "different pairs of bits"),
        ({"candidates": ((3, 4),)}, "key_bits must be 8, 4 or 2, got 3"),
        ({"sinks": -1}, "sinks must be an integer"),
        ({"newest": 0.5}, "newest must be an integer"),
    ],
)
def test_parameters_that_there_are_not(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(CacheError, match=said):
        Mixed(**wrong)


@pytest.mark.parametrize(
    ("press", "options", "said"),
    [
        (SnapKVPress(0.5), {}, "needs a budget in bytes, .* SnapKVPress has none; give budget_bytes"),
        (SnapKVPress(budget_tokens=9), {}, "SnapKVPress has none"),
        (DecodingPress(KnormPress()), {}, "stops after the prefill, and DecodingPress goes on .* say the bits"),
        (KeyRerotationPress(KnormPress(budget_bytes=BUDGET)), {}, "keys as the model made them"),
        (AdaKVPress(PyramidKVPress(budget_bytes=BUDGET)), {}, "how much each layer keeps, and PyramidKVPress does so"),
        (BY_LAYER["snapkv"], {"chunk_tokens": 8}, "not with chunk_tokens: leave that out"),
        (BY_LAYER["snapkv"], {"positions": "rerotate"}, "not with positions='rerotate'"),
        (None, {"chunk_tokens": 8}, "not with chunk_tokens"),
    ],
)
def test_what_does_not_go_together(press: BasePress | None, options: dict[str, Any], said: str) -> None:
    with pytest.raises(CacheError, match=said):
        PressedCache(press, storage=Mixed(), **options)


def test_a_cache_without_a_press_is_refused_when_it_is_filled() -> None:
    with pytest.raises(CacheError, match=r"this cache has none: give it one, such as SnapKVPress\(budget_bytes"):
        tiny("llama")(text(), **cache_argument(PressedCache(storage=Mixed())))
    press = StreamingLLMPress(0.5)
    with pytest.raises(CacheError, match="needs a budget in bytes"), press(tiny("llama")):
        tiny("llama")(text(), **cache_argument(PressedCache(storage=Mixed())))
    press = SnapKVPress(window_size=4, budget_bytes=BUDGET)
    past = PressedCache(storage=MIXED)
    with torch.no_grad(), press(tiny("llama")):
        tiny("llama")(text(), **cache_argument(past))
    check_equal(states(past), states(filled(press, MIXED, text())))
