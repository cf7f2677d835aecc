"""The compiled kernel: made once, right in all kinds of numbers, and left alone where there is none or it is slower."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coldpress import RotatedBits
from coldpress.stores import packed_part
from coldpress.stores.native import Kind, attend_native, kernel
from coldpress.stores.packed import PackedStore
from coldpress.stores.segments import Segments

USUAL = Kind(torch.float32, (8, 4), (64, 64))
needs_compiler = pytest.mark.skipif(kernel(USUAL) is None, reason="needs a C++ compiler")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is compiled yet; where files come and go meanwhile."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for made in (kernel, packed_part.fastest):
        made.cache_clear()
    yield tmp_path
    for made in (kernel, packed_part.fastest):
        made.cache_clear()


def a_store(kind: Kind, n: int = 300) -> PackedStore:
    """Three heads with different numbers of pairs, one of which has none in codes."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 3, n, dim, generator=generator).to(kind.dtype) for dim in kind.channels)
    return PackedStore(RotatedBits(*kind.bits, newest=16), keys, values, torch.tensor([[n, n - 131, 12]]), 0)


def held(store: PackedStore) -> tuple[Any, Any, Any]:
    return store._exact, store._codes, store._n_front


def exactly(store: PackedStore, queries: Tensor, biases: list[Tensor | None]) -> Tensor:
    """Attention over unpacked pairs, in float64."""
    own = zip(queries, store._segments(0), store._segments(1), biases, strict=True)
    return torch.stack(
        [
            (query.double() @ keys.double().T + (0 if bias is None else bias.double())).softmax(-1) @ values.double()
            for query, keys, values, bias in own
        ]
    )


@needs_compiler
@pytest.mark.parametrize(
    "kind",
    [
        USUAL,
        Kind(torch.float32, (2, 8), (7, 9)),
        Kind(torch.bfloat16, (4, 4), (64, 64)),
        Kind(torch.float16, (4, 2), (80, 64)),
    ],
    ids=str,
)
def test_attention_is_that_over_unpacked_pairs(kind: Kind) -> None:
    store, generator = a_store(kind), torch.Generator().manual_seed(1)
    queries = torch.randn(3, 5, kind.channels[0], generator=generator) / kind.channels[0] ** 0.5
    hides = [torch.zeros(1, n).masked_fill_(torch.rand(1, n, generator=generator) < 0.3, -torch.inf) for n in
             (300, 169, 12)]  # fmt: skip
    biases: list[Tensor | None]
    for biases in ([None] * 3, [hides[0], None, hides[2]]):
        library = kernel(kind)
        assert library is not None
        found = attend_native(library, queries, *held(store), biases)
        rounding = torch.finfo(kind.dtype).eps if kind.dtype != torch.float32 else 1e-5  # of unpacked pairs
        torch.testing.assert_close(found.double(), exactly(store, queries, biases), atol=4 * rounding, rtol=0)


@needs_compiler
@pytest.mark.parametrize("dim", [64, 9])
def test_the_same_pairs_give_the_same_bits_wherever_they_lie(dim: int) -> None:
    kind = Kind(torch.float32, (8, 4), (dim, dim))
    store, queries, library = a_store(kind), torch.ones(3, 5, dim) / 8, kernel(kind)
    assert library is not None
    expected = attend_native(library, queries, *held(store), [None] * 3)
    for offset in range(1, 5):
        moved = {}
        for name in ("keys", "values"):
            part = store._exact.buffer(name)
            moved[name] = torch.empty(part.numel() + offset)[offset:].view(part.shape).copy_(part)
        exact = Segments(moved, store._exact.counts)
        found = attend_native(library, queries, exact, store._codes, store._n_front, [None] * 3)
        assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.usefixtures("anew")
def test_what_the_caller_has_set_changes_nothing() -> None:
    store, queries, library = a_store(USUAL), torch.ones(3, 2, 64) / 8, kernel(USUAL)
    assert library is not None
    expected = attend_native(library, queries, *held(store), [None] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend_native(library, queries, *held(store), [None] * 3), expected)
        again = a_store(USUAL)
        packed_part.fastest(USUAL)
    assert all(map(torch.equal, again.tensors(), store.tensors()))
    packed_part.fastest.cache_clear()
    with torch.device("meta"):
        packed_part.fastest(USUAL)


@needs_compiler
def test_what_is_no_number_stays_none() -> None:
    store, queries = a_store(USUAL), torch.ones(3, 1, 64)
    queries[1, 0, 5] = torch.nan
    library = kernel(USUAL)
    assert library is not None
    found = attend_native(library, queries, *held(store), [None] * 3)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    hidden = attend_native(library, torch.ones(3, 1, 64), *held(store), [torch.full((1, 300), -torch.inf), None, None])
    assert hidden[0].isnan().all() and hidden[1:].isfinite().all()


@needs_compiler
def test_a_kernel_is_made_once_in_a_process_and_leaves_no_file(anew: Path) -> None:
    library = kernel(USUAL)
    assert library is not None and kernel(Kind(*USUAL)) is library
    assert not list(anew.iterdir())


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("compiler", ["", "no-such-compiler", "false", "true"])
def test_without_a_compiler_torch_attends(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    if compiler not in ("false", "true"):  # which make nothing
        monkeypatch.setenv("PATH", "")
    assert kernel(USUAL) is None
    store, queries = a_store(USUAL), torch.ones(3, 2, 64) / 8
    found = packed_part.attend_packed(store.codec, queries, *held(store), [None] * 3)
    torch.testing.assert_close(found.double(), exactly(store, queries, [None] * 3), atol=2e-4, rtol=0)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("fault", ["wrong", "slow"])
def test_a_kernel_that_is_wrong_or_slow_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(library: object, *given: Any) -> Tensor:
        found = packed_part._attend_by_torch(RotatedBits(8, 4), *given)
        if fault == "wrong":
            return found + 0.1
        for _ in range(9):
            packed_part._attend_by_torch(RotatedBits(8, 4), *given)
        return found

    monkeypatch.setattr(packed_part, "kernel", lambda kind: ctypes.CDLL(None))
    monkeypatch.setattr(packed_part, "attend_native", attend)
    assert packed_part.fastest(USUAL) is None


def test_keys_and_values_in_two_types_are_not_read_by_the_kernel() -> None:
    keys, values = (torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    store = PackedStore(RotatedBits(8, 4, newest=16), keys, values.bfloat16(), torch.tensor([[300, 300]]), 0)
    assert packed_part.kernel_for(store.codec, store._exact) is None
    queries = torch.ones(2, 2, 64) / 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed_part.attend_packed(store.codec, queries, *held(store), [None] * 2)
    torch.testing.assert_close(found.double(), exactly(store, queries, [None] * 2), atol=0.02, rtol=0)


def test_a_codec_that_stores_otherwise_is_not_read_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Doubled(RotatedBits):
        def decode_values(self, blocks: Any, out: Tensor) -> None:
            super().decode_values(blocks, out)
            out.mul_(2)

        def sums(self, *given: Any) -> Tensor:
            return 2 * super().sums(*given)

    def never(kind: Kind) -> None:
        raise AssertionError("the kernel does not know this codec")

    monkeypatch.setattr(packed_part, "fastest", never)
    store = a_store(USUAL)
    store.codec = Doubled(8, 4, newest=16)
    queries = torch.ones(3, 2, 64) / 8
    found = packed_part.attend_packed(store.codec, queries, *held(store), [None] * 3)
    torch.testing.assert_close(found.double(), exactly(store, queries, [None] * 3), atol=4e-4, rtol=0)
