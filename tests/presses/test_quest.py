"""Quest: the pages that are read, against loops; bounds, and that nothing is lost where all is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tokens
from tests.examples.contract import CHECKS, Case, every_check, later, read
from tests.oracles.readers import quest
from tests.presses.views import MODELS, view_of

from coldpress import (
    AdaKVPress,
    KnormPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    QuestPress,
    SparQPress,
    press_names,
)
from coldpress.errors import PressError

N = 37


def newest_view(view: LayerView) -> LayerView:
    """As a decoding step sees it."""
    at = torch.arange(view.n_tokens).expand(view.keys.shape[:3])
    return replace(view, queries=view.queries[:, :, -1:], positions=at, _memo={})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("page", "share", "n_read"), [(4, 0.5, 5), (1, 0.2, 7), (7, 0.1, 3), (5, 0.4, 3)])
def test_quest(model: str, page: int, share: float, n_read: int) -> None:
    view = newest_view(view_of(model))
    found = QuestPress(page, share, dense_layers=0).select(view)
    assert found is not None and found.shape[2] == n_read * page
    for row, head in ((b, h) for b in range(2) for h in range(view.keys.shape[1])):
        group = slice(head * view.group_size, (head + 1) * view.group_size)
        expected = quest(view.queries[row, group, 0].tolist(), view.keys[row, head].tolist(), page, n_read)
        assert {*found[row, head].tolist()} - {-1} == expected


@pytest.mark.parametrize("press", [QuestPress(4, 0.1, dense_layers=0), SparQPress(4, 0.1, 2)])
@pytest.mark.parametrize("n_pinned", [2, 30])
def test_pinned_pairs_are_read(press: Any, n_pinned: int) -> None:
    view = newest_view(view_of("llama"))
    pinned = (torch.arange(view.n_tokens) < n_pinned).expand(view.keys.shape[:3])
    found = press.select(replace(view, columns={"pinned": pinned}, _memo={}))
    assert found is not None and found.shape[2] < view.n_tokens + 4
    assert all({*range(n_pinned)} <= {*own.tolist()} for own in found.flatten(0, 1))


@pytest.mark.parametrize("page", [1, 3, 16])
def test_no_product_is_beyond_its_bound(page: int) -> None:
    """Of 10,000 pages: queries of both signs, large and zero keys, last pages that are short, empty slots."""
    torch.manual_seed(page)
    view, n = newest_view(view_of("llama")), 5 * page - page // 2
    for _ in range(2000 // 4):
        keys = torch.randn(2, 2, n, 8) * torch.randint(0, 3, (2, 2, 1, 8)) + torch.randn(2, 2, 1, 8)
        held = torch.randint(1, n + 1, (2, 2, 1))
        positions = torch.arange(n).expand(2, 2, n).where(torch.arange(n) < held, -1)
        own = replace(view, keys=keys, queries=torch.randn(2, 4, 1, 8), positions=positions, counts=held[..., 0])
        bounds = QuestPress(page).bounds(own)
        products = (own.queries.unflatten(1, (2, 2))[:, :, :, 0] @ keys.mT).amax(2)  # [B, Hkv, n]
        products = products.masked_fill(positions < 0, -torch.inf)
        best = torch.stack([part.amax(-1) for part in products.split(page, dim=2)], dim=2)
        assert bounds.shape == best.shape and torch.equal(bounds == -torch.inf, best == -torch.inf)
        assert (bounds >= best - 1e-4).all()
        if page == 1:
            torch.testing.assert_close(bounds, best, atol=1e-4, rtol=1e-5)


def test_all_pages_are_the_whole_cache() -> None:
    case = Case(None)
    whole, paged, dense = PressedCache(), PressedCache(QuestPress(4, 1.0, 0)), PressedCache(QuestPress(4, 0.1, 2))
    short = PressedCache(QuestPress(30, 0.01, 0))  # as many pages as are read at least
    logits = [read(case, past, tokens(1, 50), *later()) for past in (whole, paged, dense, short)]
    assert all(torch.equal(own, logits[0]) for own in logits[1:])
    assert paged.read_ratio() == dense.read_ratio() == short.read_ratio() == 1


def test_what_is_read_grows_with_the_text() -> None:
    past = PressedCache(QuestPress(4, 0.25, 0))
    read(Case(None), past, tokens(1, 160), *tokens(1, 8, seed=5).split(1, dim=1))
    assert past.achieved_ratio() == 0 and 0.24 < past.read_ratio() < 0.28


def test_it_has_no_name_and_goes_alone() -> None:
    assert not {"quest", "sparq"} & {*press_names()}
    with pytest.raises(PressError, match="QuestPress has no budget"):
        AdaKVPress(QuestPress())  # type: ignore[arg-type]
    with pytest.raises(PressError, match="QuestPress does nothing while decoding"):
        PrefillDecodingPress(KnormPress(0.5), QuestPress())


@pytest.mark.parametrize("wrong", [{"page": 0}, {"page": 4.0}, {"read": 0.0}, {"read": 1.5}, {"dense_layers": -1}])
def test_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(PressError, match=f"QuestPress: {next(iter(wrong))} must be"):
        QuestPress(**wrong)


CASES = {
    "llama": Case(QuestPress(4, 0.3, 0), evicts=False, lacks=("chunks", "ragged")),
    "neox": Case(QuestPress(3, 0.3, 1), model="gpt_neox", evicts=False, lacks=("chunks", "ragged")),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)
