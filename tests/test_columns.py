"""Columns that presses declare: their fill, what is refused, and that they follow pairs through a cache."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    ComposedPress,
    DecodingPress,
    Kept,
    KnormPress,
    LayerView,
    PressedCache,
    ScorerPress,
    compiled,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.column import Column
from coldpress.errors import CacheError, PressError


@dataclass(frozen=True)
class Counts(KnormPress):
    """Each pair carries how many calls it has been in, counted from -1, and two numbers that are always 3."""

    columns: ClassVar[tuple[Column, ...]] = (Column("calls", -1, torch.int32), Column("threes", 3, torch.float16, 2))

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        assert (view.columns["threes"] == 3).all()
        return {"calls": view.columns["calls"] + 1}


@dataclass(frozen=True)
class Undeclared(ScorerPress):
    """Says more than it declares, or something of another shape."""

    columns: ClassVar[tuple[Column, ...]] = (Column("known"),)
    name: str = "unknown"
    extra: int = 0

    def score(self, view: LayerView) -> Tensor:
        return view.value_norms()

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        return {self.name: torch.zeros(*view.keys.shape[:2], view.n_tokens + self.extra)}


@dataclass(frozen=True)
class Marks(KnormPress):
    """Gives the pairs it keeps a column in compress."""

    columns: ClassVar[tuple[Column, ...]] = (Column("mark", 7),)
    name: str = "mark"

    def compress(self, view: LayerView) -> Kept | None:
        kept = super().compress(view)
        assert kept is not None
        return kept._replace(columns={self.name: torch.zeros(kept.positions.shape)})


def read(press: BasePress, *lengths: int, rows: int = 1) -> PressedCache:
    past = PressedCache(press)
    with torch.no_grad():
        for i, n in enumerate(lengths):
            tiny("llama")(tokens(rows, n, seed=i), **cache_argument(past))
    return past


@pytest.mark.parametrize("wrapped", [False, True])
def test_new_pairs_have_the_fill_that_was_declared(wrapped: bool) -> None:
    press = Counts(0.5)
    past = read(AdaKVPress(press, 0.0) if wrapped else press, 30, 4, 1, 1, rows=2)
    for layer in past.pressed_layers():
        calls, is_held = layer.columns()["calls"], layer.positions() >= 0
        assert calls.dtype == torch.int32
        expected = torch.tensor([2, 2, 2, 2, 1, 0], dtype=torch.int32)  # since they came
        assert torch.equal(calls[..., -6:], expected.expand_as(calls[..., -6:]))
        assert (calls[..., :-6][is_held[..., :-6]] == 3).all()


def test_what_compress_gives_pairs_is_a_column_too() -> None:
    past = read(Marks(0.5), 30, 2)
    for layer in past.pressed_layers():
        mark = layer.columns()["mark"]
        assert (mark[..., :15] == 0).all() and (mark[..., 15:] == 7).all() and mark.shape[2] == 17


@dataclass(frozen=True)
class Renewed(KnormPress):
    """Each pair carries how many evictions it has survived."""

    columns: ClassVar[tuple[Column, ...]] = (Column("survived", 0, torch.int32),)
    name: str = "survived"

    def renew(self, view: LayerView) -> Mapping[str, Tensor]:
        return {self.name: view.columns["survived"] + 1}


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_survives_an_eviction_is_renewed_and_nothing_else(wrapped: bool) -> None:
    """In a padded batch each row by itself: the second one gets its third token later."""
    base = AdaKVPress(Renewed(), 0.0) if wrapped else Renewed()
    past, press = PressedCache(DecodingPress(base, 3, 20)), tiny("llama")
    mask, ids = torch.ones(2, 30, dtype=torch.long), tokens(2, 30)
    mask[1, 24:27] = 0
    with torch.no_grad():
        for start, stop in [(0, 22), *((t, t + 1) for t in range(22, 30))]:
            at = (mask[:, :stop].cumsum(-1) - 1)[:, start:]
            how = {"attention_mask": mask[:, :stop], "position_ids": at}
            press(ids[:, start:stop], **how, **cache_argument(past))
    for layer in past.pressed_layers():
        at, survived = layer.positions(), layer.columns()["survived"]
        for row, first, second in [(0, 25, 28), (1, 28, 0)]:  # evictions come before these tokens
            assert (survived[row] == (at[row] < first).int() + (at[row] < second))[at[row] >= 0].all()
    assert "survived" not in read(DecodingPress(base, 3, 200), 22, 1, 1, 1, 1).layer(0).columns()
    assert "survived" not in read(base, 22).layer(0).columns()


def test_what_is_not_declared_is_refused() -> None:
    with pytest.raises(PressError, match=r"observe returned 'unknown', which is not among its columns"):
        read(Undeclared(0.5), 20)
    with pytest.raises(PressError, match=r"'known' of shape \[1, 2, 22\], not \[1, 2, 20\]"):
        read(Undeclared(0.5, name="known", extra=2), 20)
    with pytest.raises(PressError, match=r"a column 'other' that it does not declare: add Column\('other'\)"):
        read(Marks(0.5, name="other"), 20)
    with pytest.raises(PressError, match=r"renew returned 'other', which is not among its columns"):
        read(Renewed(0.5, name="other"), 20)


@pytest.mark.parametrize("name", ["bias", "carried", "pinned", "rounding_residual", "stays"])
def test_names_of_the_cache_are_refused(name: str) -> None:
    class Takes(Counts):
        columns = (Column(name),)

    with pytest.raises(PressError, match=f"a column '{name}' is the cache's own"):
        read(Takes(0.5), 20)


def test_two_presses_do_not_mean_different_things_by_a_name() -> None:
    class Other(Counts):
        columns = (Column("calls", 0.0),)

    read(ComposedPress([Counts(0.2), Counts(0.5)]), 20, 1)
    with pytest.raises(PressError, match="declare a column 'calls', and not the same one"):
        read(ComposedPress([Counts(0.2), Other(0.5)]), 20)


class Newest(KnormPress):
    """Has each query read the newest 9 slots."""

    def select(self, view: LayerView) -> Tensor | None:
        return torch.arange(view.n_tokens - 9, view.n_tokens).expand(*view.keys.shape[:2], -1)


@pytest.mark.parametrize("backend", ["coldpress", "coldpress_eager"])
def test_a_row_that_brings_padding_reads_what_it_has(backend: str) -> None:
    """Also one that has nothing at all yet; nothing is NaN, and other rows do not notice."""
    model = tiny("llama", backend)
    mask = torch.tensor([[1] * 24, [1] * 20 + [0] * 4, [0] * 24])
    ids, past, alone = tokens(3, 24), PressedCache(Newest()), PressedCache(Newest())
    with torch.no_grad():
        for end in (20, 21, 22, 23, 24):
            start = 0 if end == 20 else end - 1
            at = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
            how = {"attention_mask": mask[:, :end], "position_ids": at}
            logits = model(ids[:, start:end], **how, **cache_argument(past)).logits
            own = model(ids[:1, start:end], **cache_argument(alone)).logits
            assert torch.isfinite(logits).all()
            torch.testing.assert_close(logits[:1], own, atol=1e-5, rtol=0)
    assert past.read_ratio() < 1


@dataclass(frozen=True)
class Biased(KnormPress):
    """Has each kept pair stand for two."""

    def compress(self, view: LayerView) -> Kept | None:
        kept = super().compress(view)
        return kept and kept._replace(bias=torch.full(kept.positions.shape, 2.0).log())


def test_a_compiled_step_would_not_ask_what_a_query_reads() -> None:
    past, model = read(Newest(0.5), 30), BY_NAME["llama"].build()
    with compiled(model), torch.no_grad(), pytest.raises(CacheError, match="chooses what each query reads"):
        model(tokens(1, 1), **cache_argument(past))


@pytest.mark.slow
def test_a_compiled_step_shows_a_press_what_it_observes() -> None:
    found = []
    for block in (nullcontext(), None):
        past, model = read(Counts(0.5), 30), BY_NAME["llama"].build()
        with compiled(model) if block is None else block, torch.no_grad():
            for _ in range(3):
                logits = model(tokens(1, 1), **cache_argument(past)).logits
        found.append((logits, [layer.columns()["calls"] for layer in past.pressed_layers()]))
    (ours, calls), (theirs, expected) = found
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert all(map(torch.equal, calls, expected))


def test_a_query_that_would_read_nothing_reads_its_own_token() -> None:
    class Nothing(Newest):
        def select(self, view: LayerView) -> Tensor | None:
            return torch.full((*view.keys.shape[:2], 1), -1)

    class Own(Newest):
        def select(self, view: LayerView) -> Tensor | None:
            return torch.full((*view.keys.shape[:2], 1), view.n_tokens - 1)

    found = []
    for press in (Nothing(), Own()):
        past = read(press, 20)
        with torch.no_grad():
            found.append(tiny("llama", "coldpress_eager")(tokens(1, 1), **cache_argument(past)).logits)
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


def test_two_presses_do_not_choose_what_a_query_reads() -> None:
    """The second one would never be asked."""
    with pytest.raises(PressError, match="Newest and Newest both choose which pairs a decoding query reads"):
        PressedCache(ComposedPress([Newest(0.5), Newest(0.25)]))
