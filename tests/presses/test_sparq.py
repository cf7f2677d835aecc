"""SparQ: the pairs that are read, against loops; its logits, and that nothing is lost where all is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tokens
from tests.examples.contract import CHECKS, Case, every_check, later, read
from tests.oracles.readers import sparq
from tests.presses.test_quest import newest_view
from tests.presses.views import MODELS, view_of

from coldpress import AdaKVPress, PressedCache, SparQPress
from coldpress.errors import PressError


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("channels", "share", "local", "n_read"), [(3, 0.5, 5, 18), (1, 0.2, 0, 7), (8, 0.1, 9, 9), (99, 0.3, 2, 11)]
)
def test_sparq(model: str, channels: int, share: float, local: int, n_read: int) -> None:
    view = newest_view(view_of(model))
    found = SparQPress(channels, share, local).select(view)
    assert found is not None and found.shape[2] == n_read
    for row, head in ((b, h) for b in range(2) for h in range(view.keys.shape[1])):
        group = slice(head * view.group_size, (head + 1) * view.group_size)
        own = view.queries[row, group, 0].tolist(), view.keys[row, head].tolist()
        assert {*found[row, head].tolist()} == sparq(*own, channels, n_read, local, view.scaling)


@pytest.mark.parametrize("model", MODELS)
def test_all_channels_give_the_logits(model: str) -> None:
    view = newest_view(view_of(model))
    queries = view.queries[:, :, 0].unflatten(1, (-1, view.group_size))
    expected = queries @ view.keys.mT * view.scaling
    torch.testing.assert_close(SparQPress(view.keys.shape[3]).logits(view), expected, atol=1e-5, rtol=1e-5)
    few = SparQPress(view.keys.shape[3] // 2).logits(view)
    assert 0 < float((few - expected).abs().mean()) < float(expected.abs().mean())


def test_heads_that_hold_fewer_read_their_own_newest() -> None:
    view = newest_view(view_of("llama"))
    held = torch.tensor([[37, 9], [20, 6]])
    positions = torch.arange(37).expand(2, 2, 37).where(torch.arange(37) < held[..., None], -1)
    view = replace(view, positions=positions, counts=held, _memo={})
    found = SparQPress(4, 0.2, 4).select(view)  # 7 pairs, of which one head has 6
    assert found is not None
    for row, head in ((b, h) for b in range(2) for h in range(2)):
        n, own = int(held[row, head]), {*found[row, head].tolist()} - {-1}
        assert len(own) == min(7, n) and {*range(n - 4, n)} <= own <= {*range(n)}


def test_all_pairs_are_the_whole_cache() -> None:
    whole, every, local = PressedCache(), PressedCache(SparQPress(2, 1.0)), PressedCache(SparQPress(2, 0.1, 99))
    logits = [read(Case(None), past, tokens(1, 50), *later()) for past in (whole, every, local)]
    assert all(torch.equal(own, logits[0]) for own in logits[1:])
    assert every.read_ratio() == local.read_ratio() == 1


def test_a_query_of_zeros_reads_something() -> None:
    view = newest_view(view_of("llama"))
    found = SparQPress(2, 0.2, 0).select(replace(view, queries=torch.zeros_like(view.queries), _memo={}))
    assert found is not None and found[0, 0].tolist() == [*range(7)]


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"channels": 4.0}, {"read": 0.0}, {"read": 1.5}, {"local": -1}])
def test_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(PressError, match=f"SparQPress: {next(iter(wrong))} must be"):
        SparQPress(**wrong)
    with pytest.raises(PressError, match="SparQPress has no budget"):
        AdaKVPress(SparQPress())  # type: ignore[arg-type]


CASES = {
    "llama": Case(SparQPress(3, 0.3, 4), evicts=False, lacks=("chunks", "ragged")),
    "neox": Case(SparQPress(5, 0.3, 4), model="gpt_neox", evicts=False, lacks=("chunks", "ragged")),
}


@pytest.mark.thinned(3)
@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)
