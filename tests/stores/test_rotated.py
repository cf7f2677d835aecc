"""Pairs in few bits, one by one: codes against loops, attention on codes against unpacked pairs, and caches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check, no_new_names, read
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    DMSPress,
    H2OPress,
    KnormPress,
    PrefillDecodingPress,
    PressedCache,
    RotatedBits,
    SnapKVPress,
    TokenCodec,
)
from coldpress.attend import packed
from coldpress.attend.segments import attend_segments, segment_bias
from coldpress.errors import CacheError, ColdpressError
from coldpress.stores import kernels, packed_part, rows
from coldpress.stores.bits import BITS, ROTATED, KVBits, bits_from, bits_name, storage_of
from coldpress.stores.hadamard import hadamard, rotated
from coldpress.stores.kernels import VERDICTS, Verdict
from coldpress.stores.native import Kind, kernel
from coldpress.stores.packed import PackedStore
from coldpress.stores.packed_part import attend_packed
from coldpress.stores.rows import code_bytes, least_and_step, packed_codes, row_bytes, rows_of, unpacked_codes
from coldpress.stores.segments import Segments

with no_new_names():
    from examples.extend.merging import MassMergingPress

NEWEST, SINKS = 8, 2
OFTEN: dict[str, Any] = {"target_size": 24, "compression_interval": 3, "hidden_states_buffer_size": 8}


@dataclass(frozen=True)
class Early(RotatedBits):
    """Encodes four pairs at a time, so that short texts have codes."""

    batch_tokens: ClassVar[int] = 4  # type: ignore[misc]


EIGHT, FOUR = Early(8, 8, SINKS, NEWEST), Early(8, 4, SINKS, NEWEST)


def numbers(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Random numbers, one channel of which may be far from zero, as it is in keys."""
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    found[..., min(1, shape[-1] - 1)] += offset
    return found


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("n", [1, 7, 64, 80])
def test_codes_are_packed_as_integers_in_a_loop_are(bits: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = packed_codes(codes, bits)
    for row, own in zip(codes.tolist(), packed.tolist(), strict=True):
        whole = sum(code << (i * bits) for i, code in enumerate(row))  # the first channel in the lowest bits
        assert own == list(whole.to_bytes(code_bytes(n, bits), "little"))
    assert torch.equal(unpacked_codes(packed, bits, n), codes.float())
    monkeypatch.setattr(rows, "_can_unpack", lambda bits: False)
    assert torch.equal(unpacked_codes(packed, bits, n), codes.float())


@pytest.mark.parametrize("n", [1, 2, 7, 64, 80, 96, 128])
def test_a_hadamard_matrix_twice_is_nothing(n: int) -> None:
    matrix = hadamard(n)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(n), atol=1e-6, rtol=0)
    states = numbers(5, n)
    torch.testing.assert_close(rotated(rotated(states)), states, atol=1e-5, rtol=0)


def test_channels_that_are_no_power_of_two_are_mixed_in_blocks() -> None:
    for n, blocks in ((80, [64, 16]), (96, [64, 32]), (7, [4, 2, 1]), (64, [64])):
        matrix, start = hadamard(n), 0
        for size in blocks:
            stop = start + size
            torch.testing.assert_close(matrix[start:stop, start:stop].abs(), torch.full((size, size), size**-0.5))
            assert not matrix[start:stop, :start].any() and not matrix[start:stop, stop:].any()
            start = stop
        assert start == n
    torch.testing.assert_close(hadamard(2) * 2**0.5, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 3e4])
def test_no_number_is_off_by_more_than_half_a_step(bits: int, kind: torch.dtype, size: float) -> None:
    given = numbers(200, 16, offset=9.0) * size / 12
    codes, least, step = least_and_step(given, bits, kind)
    assert least.dtype == step.dtype == kind and int(codes.max()) <= 2**bits - 1
    error = least.double()[:, None] + step.double()[:, None] * codes - given.double()
    assert bool((error.abs() <= step.double()[:, None] / 2 * (1 + 1e-5) + 1e-6 * given.abs().amax()).all())
    wanted = (given.amax(-1) - given.amin(-1)) / (2**bits - 1)
    if size >= 1e-3:
        assert bool((step.float() <= wanted * 1.01 + 1e-3 * size).all())  # and no step is much larger than it must be


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_equal_numbers_come_back_as_they_were(bits: int) -> None:
    for number in (0.0, 3.140625, -0.5):
        codes, least, step = least_and_step(torch.full((1, 8), number), bits, torch.float16)
        assert float(step) == 0 and not codes.any() and float(least) == number


def test_numbers_beyond_the_range_of_a_step_are_refused() -> None:
    with pytest.raises(CacheError, match=r"1e\+06, which 4 bits with steps in float16 cannot hold"):
        least_and_step(torch.tensor([[0.0, 1e6]]), 4, torch.float16)
    with pytest.raises(CacheError, match="nan"):
        least_and_step(torch.tensor([[0.0, torch.nan]]), 8, torch.float32)


def a_store(bits: tuple[int, int], n: int = 1500, dim: int = 64, is_ragged: bool | str = False) -> PackedStore:
    """Two rows of two heads; of as many pairs, or of different numbers ("rows": the same in the heads of a row).

    Of different numbers, one has none in codes.
    """
    first = torch.full((2, 2), n)
    if is_ragged:
        first = torch.tensor([[n, n], [n - 300, n - 300]] if is_ragged == "rows" else [[n, n - 13], [30, n - 300]])
    keys, values = numbers(2, 2, n + 5, dim, offset=9.0), numbers(2, 2, n + 5, dim, seed=1)
    return PackedStore(RotatedBits(*bits), keys, values, first, 5)


def decided(patch: pytest.MonkeyPatch, least: int | None) -> None:
    """Kernels are used from so many products of a head on, or never, whatever a trial would find here."""
    patch.setattr(kernels, "verdict", lambda side, bits: Verdict(None if (side, bits) == ("keys", 2) else least, {}))


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 4), (4, 2), (2, 8)])
@pytest.mark.parametrize("least", [0, 4096, None])
def test_products_and_sums_on_codes_are_those_of_unpacked_pairs(
    bits: tuple[int, int], least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(monkeypatch, least)
    if least is None:
        monkeypatch.setattr(rows, "_can_unpack", lambda bits: False)
    store, query = a_store(bits, is_ragged=True), numbers(4, 3, 64, seed=2)
    codec, held = store.codec, store._codes
    weights = [torch.rand(3, n, generator=torch.Generator().manual_seed(n)).softmax(-1) for n in held.counts]
    logits, sums = codec.logits(query, held), codec.sums(weights, held, 64)
    plain_logits, plain_sums = TokenCodec.logits(codec, query, held), TokenCodec.sums(codec, weights, held, 64)
    torch.testing.assert_close(sums, plain_sums, atol=1e-5 if bits[1] > 2 else 2e-5, rtol=0)
    for i, (own, plain) in enumerate(zip(logits, plain_logits, strict=True)):
        step = held.segment("keys.step", i).float()
        # a query in two digits: in each channel off by so much, times codes of 8 bits less 128, or of fewer bits
        off = rotated(query)[i].abs().amax(-1, keepdim=True) / 127 / 508 * step * 64 * (128 if bits[0] == 8 else 15)
        bound = 1e-4 + (0 * off if least is None else off)
        assert bool(((own - plain).abs() <= bound).all())


KERNELS = [("keys", 8), ("keys", 4), ("values", 8), ("values", 4), ("values", 2)]


@pytest.mark.parametrize(("side", "bits"), KERNELS)
@pytest.mark.parametrize(
    ("kernel", "unpacked", "least"),
    [
        ((1, 1), (2, 2), 0),
        ((2, 1), (1, 2), 2304),  # half way between the two sizes
        ((2, 2), (1, 1.5), 7680),  # the lines cross beyond them
        ((2, 2), (1, 1), None),
        ((1, 2), (2, 1), None),
    ],
)
def test_the_slower_way_is_not_used(
    side: str, bits: int, kernel: Any, unpacked: Any, least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried once, and used where the time that it takes is the shorter one."""
    took = iter(zip(kernel, unpacked, strict=True))
    monkeypatch.setattr(kernels, "_least_ms", lambda *ways: next(took))
    monkeypatch.setattr(kernels, "VERDICTS", {})
    found = kernels.verdict(side, bits)
    assert found == Verdict(least, dict(zip((512, 4096), zip(kernel, unpacked, strict=True), strict=True)))
    assert kernels.VERDICTS[side, bits, 1] is found and kernels.verdict(side, bits) is found
    for n in (1, 2303, 2304, 9999):
        assert kernels._is_faster(side, bits, n) == (least is not None and n >= least)
    assert not kernels._is_faster(side, bits, 0)


@pytest.mark.parametrize(("side", "bits"), [*KERNELS, ("keys", 2)])
def test_a_kernel_is_tried_on_this_machine(side: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller has set, without one of its random numbers, and with what torch has of kernels."""
    monkeypatch.setattr(kernels, "VERDICTS", {})
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        found = kernels.verdict(side, bits)
    assert torch.equal(torch.get_rng_state(), state)
    is_right = {"keys": packed.products_are_right, "values": packed.sums_are_right}[side](bits)
    assert bool(found.ms) == is_right
    for ms in found.ms.values():
        assert len(ms) == 2 and min(ms) > 0


@pytest.mark.parametrize("fault", [AttributeError, 1])
def test_a_kernel_that_is_missing_or_wrong_is_never_used(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(*given: Any, **options: Any) -> Tensor:
        if fault is AttributeError:
            raise AttributeError("torch has no such operation")
        found: Tensor = torch_product(*given, **options)
        return found.add_(fault)

    torch_product, bags = torch._int_mm, dict(packed._OPERATIONS)
    monkeypatch.setattr(torch, "_int_mm", product)
    for bits, own in bags.items():
        wrong = product if fault is AttributeError else lambda *given, own=own: own(*given) + fault
        monkeypatch.setitem(packed._OPERATIONS, bits, wrong)
    monkeypatch.setattr(kernels, "VERDICTS", {})
    assert all(kernels.verdict(side, bits) == Verdict(None, {}) for side, bits in KERNELS)


def test_a_compiled_step_finds_its_verdicts_there() -> None:
    """They are made with the parts of the layers, before torch is given a step."""
    VERDICTS.clear()
    store = a_store((8, 4))
    assert not VERDICTS
    store.part(1)
    assert set(VERDICTS) == {("keys", 8, 1), ("values", 4, 1)}


def slowly(store: PackedStore, query: Tensor, bias: Tensor | None) -> Tensor:
    """Attention over the unpacked pairs."""
    biases: list[Tensor | None] = [None] * 4
    keys, values = store._segments(0), store._segments(1)
    if bias is not None:
        own = bias.expand(2, 2, -1, -1).flatten(0, 1)
        first = torch.tensor(store._n_first)
        own = segment_bias(own, first, int(first.max()), 5, max(map(len, keys)))
        biases = [part[:, : len(key)] for part, key in zip(own, keys, strict=True)]
    return attend_segments(query, keys, values, biases, 64**-0.5)


@pytest.fixture(params=["kernel", "torch"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on codes by the compiled kernel, and by torch's operations."""
    if request.param == "kernel" and kernel(Kind(torch.float32, (8, 4), (64, 64))) is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(packed_part, "fastest", kernel if request.param == "kernel" else lambda kind: None)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_ragged", [False, True, "rows"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_step_on_codes_is_attention_to_unpacked_pairs(
    dtype: torch.dtype, is_ragged: bool | str, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, query = a_store((8, 4), is_ragged=is_ragged), numbers(2, 6, 1, 64, seed=3)
    bias = torch.randn(1, 2, 1, store.n, generator=torch.Generator().manual_seed(4)) if has_bias else None
    expected = slowly(store, query, bias)
    for least, atol in ((0, 2e-4), (4096, 2e-4), (None, 1e-5)):
        with monkeypatch.context() as patch:
            decided(patch, least)
            assert store._reads_codes(query)
            torch.testing.assert_close(store.attend(query, bias, 64**-0.5), expected, atol=atol, rtol=0)
    own = PackedStore(
        store.codec, store.keys.to(dtype), store.values.to(dtype), torch.tensor(store._n_first).view(2, 2), 5
    )
    found = own.attend(query.to(dtype), bias, 64**-0.5)
    wanted = slowly(own, query.to(dtype), bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, atol=2e-4 if dtype == torch.float32 else 0.03, rtol=0)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("first", [[[400, 400], [60, 60]], [[60, 60], [400, 400]], [[400, 400], [400, 400]]])
@pytest.mark.parametrize("n_exact", [0, 4])
@pytest.mark.parametrize("later", [1, 5])
def test_rows_without_codes_or_with_nothing_but_codes(first: list[list[int]], n_exact: int, later: int) -> None:
    keys, values = (numbers(2, 2, 400 + later, 64, seed=seed) for seed in (0, 1))
    codec = RotatedBits(8, 4, sinks=n_exact, newest=32 * n_exact)
    store, query = PackedStore(codec, keys, values, torch.tensor(first), later), numbers(2, 6, 1, 64, seed=2)
    assert store._reads_codes(query)
    torch.testing.assert_close(store.attend(query, None, 64**-0.5), slowly(store, query, None), atol=2e-4, rtol=0)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("is_ragged", [False, True, "rows"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_soft_caps_and_sinks_on_codes_are_those_on_unpacked_pairs(is_ragged: bool | str, has_bias: bool) -> None:
    store, queries, sinks = (
        a_store((8, 4), n=400, is_ragged=is_ragged),
        numbers(4, 3, 64, seed=3),
        numbers(4, 3, seed=5),
    )
    lengths = [n + 5 for n in store._n_first]
    biases = [numbers(1, n, seed=i) if has_bias else None for i, n in enumerate(lengths)]
    found = attend_packed(store.codec, queries, store._exact, store._codes, store._n_front, biases, 3.0, sinks)
    own = zip(queries, store._segments(0), store._segments(1), biases, sinks, found, strict=True)
    for query, keys, values, bias, sink, output in own:
        logits = 3 * (query @ keys.T / 3).tanh() + (0 if bias is None else bias)
        weights = torch.cat([logits, sink[:, None]], dim=1).softmax(1)[:, :-1]
        torch.testing.assert_close(output, weights @ values, atol=2e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_ragged", [False, True])
def test_a_device_gives_what_the_cpu_does(is_ragged: bool) -> None:
    store, query = a_store((8, 4), is_ragged=is_ragged), numbers(2, 6, 1, 64, seed=3)
    first = torch.tensor(store._n_first).view(2, 2)
    own = PackedStore(store.codec, store.keys.cuda(), store.values.cuda(), first.cuda(), 5)
    torch.testing.assert_close(
        own.attend(query.cuda(), None, 0.125).cpu(), store.attend(query, None, 0.125), atol=1e-3, rtol=0
    )


# -- segments ---------------------------------------------------------------------------------------------------------


def test_segments_are_lists_of_rows() -> None:
    """Appended, cropped, dropped, taken and shared, against lists of numbers."""
    generator, lists = torch.Generator().manual_seed(0), [[1, 2, 3], [4], [5, 6]]
    held = Segments({"a": torch.tensor([[n] for own in lists for n in own])}, [3, 1, 2])
    for step in range(40):
        m = torch.randint(0, 4, (3,), generator=generator).tolist()
        m = [m[0]] * 3 if step % 3 else m
        other, before = held.shared(), [list(own) for own in lists]
        new = [[100 * step + 10 * i + j for j in range(n)] for i, n in enumerate(m)]
        held.append({"a": torch.tensor([n for own in new for n in own])[:, None].long()}, m)
        lists = [own + more for own, more in zip(lists, new, strict=True)]
        stays = [[bool(flag) for flag in (torch.rand(min(len(own), 4), generator=generator) < 0.7)] for own in lists]
        held.drop(stays)
        for own, flags in zip(lists, stays, strict=True):
            own[len(own) - len(flags) :] = [
                n for n, flag in zip(own[len(own) - len(flags) :], flags, strict=True) if flag
            ]
        if step % 7 == 6:
            held = held.take([torch.arange(0, len(own), 2) for own in lists])
            lists = [own[::2] for own in lists]
        if step % 11 == 10 and min(map(len, lists)) > 1:
            held.crop(1)
            lists = [own[:-1] for own in lists]
        if step % 13 == 12:
            held, lists = held.of([2, 0, 0]), [list(lists[i]) for i in (2, 0, 0)]
        assert held.flat("a")[:, 0].tolist() == [n for own in lists for n in own]
        assert other.flat("a")[:, 0].tolist() == [n for own in before for n in own]
        if held.is_even:
            assert held.even("a")[..., 0].tolist() == lists


# -- the contract of stores -------------------------------------------------------------------------------------------

MOVED = ("rerotated",)  # refused: keys in few bits would be quantised again whenever they move
CASES = {
    "none": Case(None, {"storage": EIGHT}, rounding=0.05, lacks=("data", "ragged")),
    "snapkv": Case(SnapKVPress(0.5, 4), {"storage": EIGHT}, rounding=0.05, n_most=25),
    "adakv": Case(AdaKVPress(H2OPress(0.5, 4)), {"storage": EIGHT}, rounding=0.05, n_most=25),
    "decoding": Case(DecodingPress(KnormPress(), **OFTEN), {"storage": EIGHT}, rounding=0.05, lacks=("chunks", *MOVED)),
    "decoding adakv": Case(
        DecodingPress(AdaKVPress(KnormPress()), **OFTEN),
        {"storage": EIGHT},
        model="gpt_neox",
        rounding=0.05,
        lacks=("chunks", *MOVED),
    ),
    "both": Case(
        PrefillDecodingPress(SnapKVPress(0.3, 4), DecodingPress(KnormPress(), **OFTEN)),
        {"storage": EIGHT},
        rounding=0.05,
        n_most=35,
        lacks=MOVED,
    ),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)


# -- what a cache holds -----------------------------------------------------------------------------------------------

PRESSES: dict[str, BasePress | None] = {
    "none": None,
    "knorm": KnormPress(0.4),
    "adakv": AdaKVPress(KnormPress(0.4)),
    "decoding": DecodingPress(KnormPress(), **OFTEN),
    "decoding adakv": DecodingPress(AdaKVPress(KnormPress()), **OFTEN),
    "dms": DMSPress(KnormPress(), threshold=-2.6, sliding_window_size=12, decoding=True),
    "merging": DecodingPress(MassMergingPress(KnormPress(), 0.9), **OFTEN),
}


def pairs(past: PressedCache, layer: int) -> list[dict[int, tuple[float, ...]]]:
    """Key and value of each pair by position, for each row and head."""
    own = past.layer(layer)
    assert own.keys is not None and own.values is not None
    states = torch.cat([own.keys, own.values], dim=-1).flatten(0, 1).tolist()
    heads = own.positions().flatten(0, 1).tolist()
    return [
        {t: tuple(pair) for t, pair in zip(*head, strict=True) if t >= 0} for head in zip(heads, states, strict=True)
    ]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", PRESSES)
def test_no_pair_is_quantised_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in what is encoded, and seen in numbers: a pair that stays changes once at most, when it ages."""
    encoded: Counter[bytes] = Counter()
    encode = RotatedBits.encode

    def counting(self: RotatedBits, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        if len(keys) > 1 or keys.any():  # a form is of zeros
            encoded.update(row.numpy().tobytes() for row in torch.cat([keys, values], dim=-1)[:, 0])
        return dict(encode(self, keys, values))

    monkeypatch.setattr(RotatedBits, "encode", counting)
    case = Case(PRESSES[name], {"storage": FOUR})
    past = case.cache()
    ids = tokens(2, 110)
    read(case, past, ids[:, :50])
    before = pairs(past, 0)
    changes: list[Counter[int]] = [Counter() for _ in before]
    evicted = 0
    for t in range(50, 110):
        read(case, past, ids[:, t : t + 1])
        now = pairs(past, 0)
        for old, new, count in zip(before, now, changes, strict=True):
            evicted += len(old.keys() - new.keys())
            count.update(position for position, pair in old.items() if position in new and pair != new[position])
        before = now
    assert bool(evicted) == (name not in ("none", "knorm", "adakv"))
    assert sum(layer.slots.filled._codes.total for layer in past.pressed_layers()) > 50  # type: ignore[attr-defined]
    if name != "merging":  # which makes pairs of its own each time
        assert set(encoded.values()) == {1}
        assert all(set(count.values()) <= {1} for count in changes) and any(changes)
        assert all(position < 110 - NEWEST for count in changes for position in count)


@pytest.mark.parametrize("name", [name for name in PRESSES if name != "merging"])
def test_pairs_are_those_of_a_plain_cache_but_for_rounding(name: str) -> None:
    """In the first layer, whose pairs depend on the tokens alone: first and newest ones exactly."""
    ids, found = tokens(2, 100), []
    for storage in (None, EIGHT):
        case = Case(PRESSES[name], {"storage": storage})
        past = case.cache()
        read(case, past, ids[:, :60], *ids[:, 60:].split([3] + [1] * 37, dim=1))
        found.append((past, pairs(past, 0)))
    (plain, exact), (coded, own) = found
    n_same = 0
    for ours, theirs in zip(own, exact, strict=True):
        assert len(ours) == len(theirs) or "adakv" in name
        common = ours.keys() & theirs.keys()
        assert len(common) >= 0.9 * len(theirs)  # norms of rounded keys may order two of them otherwise
        for position in common:
            off = max(abs(a - b) for a, b in zip(ours[position], theirs[position], strict=True))
            assert off < 0.03 and (off < 1e-6 or position < 100 - NEWEST)
            n_same += off < 1e-6
    assert n_same >= 4 * NEWEST and coded.kv_bytes() < plain.kv_bytes()


def test_first_and_newest_pairs_are_exact_and_others_take_what_they_say() -> None:
    past, plain = PressedCache(storage=FOUR), PressedCache()
    case = Case(None)
    for cache in (past, plain):
        read(case, cache, tokens(1, 90))
    n_codes = (90 - SINKS - NEWEST) // 4 * 4
    for own, layer in zip(past.pressed_layers(), plain.pressed_layers(), strict=True):
        for ours, theirs in ((own.keys, layer.keys), (own.values, layer.values)):
            assert ours is not None and theirs is not None
            is_same = (ours == theirs).all(-1)[0, 0]
            assert is_same[:SINKS].all() and is_same[SINKS + n_codes :].all()
            assert not is_same[SINKS : SINKS + n_codes].any()
    row = 8 + 4 + row_bytes(8, 4)  # 8 channels: a key in 8 bits, its step and least number; a value in 4
    assert row_bytes(8, 4) == rows_of(torch.zeros(1, 8), 4).shape[1] == 8
    assert past.kv_bytes() == 2 * 2 * (n_codes * row + (90 - n_codes) * 2 * 8 * 4)


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt_oss", "phi"])
def test_windows_soft_caps_and_sinks_of_a_model(name: str) -> None:
    case, plain = Case(None, {"storage": EIGHT}, model=name), Case(None, model=name)
    past, whole = case.cache(), plain.cache()
    parts = tokens(2, 100).split([40] + [1] * 60, dim=1)
    found, expected = read(case, past, *parts), read(plain, whole, *parts)
    off = (found - expected).abs()
    assert float(off.max()) < (1.0 if name == "gpt_oss" else 0.25) and float(off.median()) < 0.02  # experts may change
    for own, layer in zip(past.pressed_layers(), whole.pressed_layers(), strict=True):
        assert torch.equal(own.positions()[..., -NEWEST:], layer.positions()[..., -NEWEST:])


@pytest.mark.parametrize(
    ("press", "length"),
    [(None, 107), (None, 75), (None, 3), (None, 1), (AdaKVPress(H2OPress(0.5, 4)), 55), (SnapKVPress(0.5, 4), 40)],
)
def test_tokens_are_cropped_whether_they_are_encoded_or_not(press: BasePress | None, length: int) -> None:
    """What is left is what it was, and in a fork everything is; later tokens are encoded as ever, nothing twice."""
    case = Case(press, {"storage": EIGHT})
    past = case.cache()
    read(case, past, tokens(2, 40), *tokens(2, 70, seed=3).split(1, dim=1))
    fork, before = past.fork(), stored(past)
    past.crop(length)
    n = before[0].shape[2] - (110 - length)
    for _ in range(2):
        assert all(torch.equal(own[:, :, :n], old[:, :, :n]) for own, old in zip(stored(past), before, strict=True))
        assert all(torch.equal(own, old) for own, old in zip(stored(fork), before, strict=True))
        n = min(n, SINKS + past.layer(0).slots.filled._codes.counts[0])  # type: ignore[attr-defined]
        assert torch.isfinite(read(case, past, *tokens(2, 30, seed=4).split(1, dim=1))).all()
    assert past.seen_tokens == length + 60 and stored(past)[0].shape[2] == before[0].shape[2] - 50 + length
    one = case.cache()
    read(case, one, tokens(2, 40))
    assert past.layer(0).slots.filled._codes.total > one.layer(0).slots.filled._codes.total  # type: ignore[attr-defined]


def stored(past: PressedCache) -> tuple[Tensor, ...]:
    """Positions, keys and values of the first layer."""
    layer = past.layer(0)
    assert layer.keys is not None and layer.values is not None
    return layer.positions().clone(), layer.keys.clone(), layer.values.clone()


def test_gradients_of_the_prefill_do_not_stand_in_the_way() -> None:
    past, model = PressedCache(storage=EIGHT), tiny("llama")
    from coldpress.architecture.cache_argument import cache_argument

    with torch.enable_grad():
        for part in tokens(1, 60).split([50, 1, 9], dim=1):
            model(part, **cache_argument(past))
    assert past.kv_bytes() > 0


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"key_bits": 3}, "key_bits must be 8, 4 or 2"),
        ({"value_bits": "4"}, "value_bits must be 8, 4 or 2"),
        ({"key_bits": True}, "key_bits must be 8, 4 or 2"),
        ({"sinks": -1}, "sinks must be an integer of at least 0"),
        ({"newest": 1.0}, "newest must be an integer of at least 0"),
    ],
)
def test_parameters_that_there_are_not(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(CacheError, match=said):
        RotatedBits(**wrong)


def test_what_does_not_go_together() -> None:
    decoding = DecodingPress(KnormPress(), **OFTEN)
    with pytest.raises(ColdpressError, match="quantised again whenever they move"):
        PressedCache(decoding, storage=EIGHT, positions="rerotate")
    with pytest.raises(CacheError, match=r"give kv_bits k8v4 or k4v4, which are RotatedBits"):
        PressedCache(decoding, kv_bits=4)
    for bits in (8, 4):
        assert PressedCache(decoding, kv_bits=f"k{bits}v4").storage == RotatedBits(bits, 4)
    with pytest.raises(CacheError, match="no kv_bits beside it"):
        PressedCache(kv_bits=4, storage=EIGHT)


@pytest.mark.parametrize("name", [*BITS, *ROTATED])
def test_names_of_bits(name: int | str) -> None:
    """A number of bits is KIVI's, keys and values apart are rotated; a record's fields make the same again."""
    codec = storage_of(name, newest=32)
    bits = int(str(name)[1:2] or name)
    expected = KVBits(bits, residual_tokens=32) if name in BITS else RotatedBits(bits, int(str(name)[3:]), newest=32)
    assert codec is not None and codec == expected and bits_name(codec) == name
    assert bits_from(dict(vars(codec))) == codec


def test_names_that_there_are_not() -> None:
    for name in ("k8v3", "k16v4", "8", "", True, 3, 8.0):
        with pytest.raises(CacheError, match="8, 4 or 2, a name such as 'k8v4'"):
            PressedCache(kv_bits=name)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="k8v4 encodes pairs one by one, so there are no groups"):
        storage_of("k8v4", group_size=32)
