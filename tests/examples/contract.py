"""The contract of a method: what holds of whatever is put into a cache. Each check takes a case and asks one thing.

A row of a padded batch is what the row is alone; a prompt may come in pieces; a crop, a fork, other rows and a file
leave a cache that goes on as it would have; heads of different length are what each is by itself. A new method is one
more case, and passes with no line written for it here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import Look, tiny, tokens
from torch import Tensor

from coldpress import BasePress, KeyRerotationPress, LayerView, PressedCache, ScorerPress, prefill
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases import registry
from coldpress.cache.layer import PressedLayer
from coldpress.core.data import as_data, from_data
from coldpress.models.block import prefilling

N = 50  # tokens of a prompt
LENGTHS = (N, 37, 44)  # of the rows of a padded batch
Check = Callable[["Case", Path], None]


@dataclass(frozen=True)
class Case:
    """A method and what goes with it.

    Attributes:
        press, options: of the cache.
        model: of tests/contract/architectures.py.
        rows: options of a cache for the rows ``rows`` of the batch alone, where they have some of their own.
        evicts: whether pairs go, so that fewer bytes are held.
        n_most: pairs that a head holds at most after a prompt in pieces, on average; None: any number.
        exact_crop: whether what came and was cropped leaves no trace.
        rounding: how far logits may be off for what a codec has encoded early.
        lacks: checks that do not apply, by name.
        solves: how far a padded row may be off what it is alone: a method that solves equations makes more of rounding.
    """

    press: BasePress | None
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    rows: Callable[[Sequence[int]], dict[str, Any]] = lambda rows: {}
    evicts: bool = True
    n_most: int | None = None
    exact_crop: bool = True
    rounding: float = 1e-5
    lacks: tuple[str, ...] = ()
    solves: float = 1e-4

    def cache(self, rows: Sequence[int] = (0,), **options: Any) -> PressedCache:
        """A cache for these rows."""
        return PressedCache(self.press, **(self.options | self.rows(rows) | options))


@contextmanager
def no_new_names() -> Iterator[None]:
    """Names that are registered inside are none afterwards: other tests list them all."""
    before = dict(registry._BY_NAME)
    yield
    registry._BY_NAME.clear()
    registry._BY_NAME.update(before)


def text(rows: int = 1, n: int = N, seed: int = 0) -> Tensor:
    return tokens(rows, n, seed=seed)


def read(case: Case, cache: PressedCache, *parts: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of one call after the other; ``mask`` is of all tokens, those that the cache has seen too."""
    model, logits = tiny(case.model), []
    with torch.no_grad(), watched(case, cache):
        for part in parts:
            seen, given = cache.seen_tokens, {}
            if mask is not None:
                now = mask[:, : seen + part.shape[1]]
                position_ids = (now.cumsum(-1) - 1).clamp(min=0)[:, seen:]
                given = {"attention_mask": now, "position_ids": position_ids}
            logits.append(model(part, **given, **cache_argument(cache)).logits)
    return torch.cat(logits, dim=1)


def watched(case: Case, cache: PressedCache) -> AbstractContextManager[Any]:
    """What has to be around the prefill of ``cache``."""
    waits = case.press is not None and case.press.chooses_together and not cache.seen_tokens
    return prefilling(tiny(case.model), cache) if waits else nullcontext()


def later(rows: int = 1, seed: int = 7) -> tuple[Tensor, ...]:
    """A turn of 3 tokens, and 7 that come one by one."""
    return tokens(rows, 10, seed=seed).split([3] + [1] * 7, dim=1)


def states(cache: PressedCache) -> list[Tensor]:
    """What a cache holds."""
    return [
        part
        for layer in cache.pressed_layers()
        for part in (layer.positions(), layer.keys, layer.values, *(own for _, own in sorted(layer.columns().items())))
    ]


def check_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for own, other in zip(actual, expected, strict=True):
        assert torch.equal(own.nan_to_num(), other.nan_to_num()), (own - other).abs().max()


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# -- the checks -----------------------------------------------------------------------------------------------------


def padded_rows(case: Case, folder: Path) -> None:
    """Rows of a padded batch hold and compute what each does alone."""
    ids, parts, past = text(len(LENGTHS)), later(len(LENGTHS)), case.cache(range(3))
    mask = torch.stack([(torch.arange(N + 10) >= N - n).long() for n in LENGTHS])
    logits = read(case, past, ids, *parts, mask=mask)
    for row, n in enumerate(LENGTHS):
        alone = case.cache([row])
        own = read(case, alone, ids[row : row + 1, N - n :], *(part[row : row + 1] for part in parts))
        close(logits[row : row + 1, N - n :], own, case.solves)
        for ours, theirs in zip(past.pressed_layers(), alone.pressed_layers(), strict=True):
            check_row(ours.positions()[row], theirs.positions()[0], N - n)
            for name, column in theirs.columns().items():
                at = ours.positions()[row] >= N - n
                close(ours.columns()[name][row][at].float(), column[0][theirs.positions()[0] >= 0].float())


def check_row(positions: Tensor, alone: Tensor, n_padding: int) -> None:
    for head, own in zip(positions, alone, strict=True):
        assert (head[head >= n_padding] - n_padding).tolist() == own[own >= 0].tolist()


def chunks(case: Case, folder: Path) -> None:
    """A prompt in pieces runs, stays within its budget, and rows of a batch are read as they are alone."""
    past, mask = case.cache(range(3), chunk_tokens=16), torch.ones(len(LENGTHS), N, dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        mask[row, : N - n] = 0
    prefill(tiny(case.model), text(len(LENGTHS)), past, attention_mask=mask)
    for row, n in enumerate(LENGTHS):
        alone = case.cache([row], chunk_tokens=16)
        prefill(tiny(case.model), text(len(LENGTHS))[row : row + 1, N - n :], alone)
        for ours, theirs in zip(past.pressed_layers(), alone.pressed_layers(), strict=True):
            check_row(ours.positions()[row], theirs.positions()[0], N - n)
            held = (theirs.positions() >= 0).sum(-1).float().mean()
            assert case.n_most is None or held <= case.n_most
    assert torch.isfinite(read(case, past, *later(len(LENGTHS)), mask=torch.cat([mask, mask.new_ones(3, 10)], 1))).all()


def crop(case: Case, folder: Path) -> None:
    """What was generated and cropped was never there; at least until the next eviction, where a press watches."""
    past, plain = case.cache(), case.cache()
    for cache in (past, plain):
        read(case, cache, text())
    aside = text(n=2, seed=3).split(1, dim=1)
    read(case, past, *aside)
    past.crop(N)
    check_equal([layer.positions() for layer in past.pressed_layers()], [x.positions() for x in plain.pressed_layers()])
    parts = later() if case.exact_crop else aside[::-1]
    close(read(case, past, *parts), read(case, plain, *parts), case.rounding)


def fork(case: Case, folder: Path) -> None:
    """A fork goes on as the original does, and neither notices what the other reads."""
    past = case.cache()
    read(case, past, text(), *later(seed=3)[:5])
    before, other, aside = states(past), past.fork(), past.fork()
    read(case, aside, *later(seed=5))
    check_equal(states(past), before)
    assert torch.equal(read(case, other, *later()), read(case, past, *later()))
    check_equal(states(other), states(past))


def rows(case: Case, folder: Path) -> None:
    """Rows that change places go on as a batch that had them in these places; so do those that are repeated."""
    ids, order = text(3), [2, 0, 0]
    past, other = case.cache(range(3)), case.cache(order)
    read(case, past, ids, *later(3, seed=3)[:3])
    past.reorder_cache(torch.tensor(order))
    read(case, other, ids[order], *(part[order] for part in later(3, seed=3)[:3]))
    close(read(case, past, *later(3)), read(case, other, *later(3)), 1e-4)
    for ours, theirs in zip(past.pressed_layers(), other.pressed_layers(), strict=True):
        for row in range(3):
            check_row(ours.positions()[row], theirs.positions()[row], 0)
    past.batch_select_indices(torch.tensor([1]))
    past.batch_repeat_interleave(2)
    assert torch.isfinite(read(case, past, *later(2))).all()


def beams(case: Case, folder: Path) -> None:
    """``generate`` gives what it gives step by step, and runs with beams."""
    model, ids, past = tiny(case.model), text(), case.cache()
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    with watched(case, past):
        found = model.generate(ids, **how, **cache_argument(past))
    plain, expected = case.cache(), ids
    for _ in range(6):
        logits = read(case, plain, expected[:, plain.seen_tokens :])
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)
    past = case.cache([0, 0])
    with watched(case, past):
        assert model.generate(ids, num_beams=2, **how, **cache_argument(past)).shape == expected.shape
    assert past.pressed_layers()[0].positions().shape[0] == 2


def file(case: Case, folder: Path) -> None:
    """A saved cache goes on bit for bit, whether the prompt was just read or tokens have come since."""
    for parts in ((), later(2, seed=3)[:5]):
        past = case.cache([0, 1])
        mask = torch.ones(2, N + sum(part.shape[1] for part in parts) + 10, dtype=torch.long)
        mask[1, :6] = 0
        read(case, past, text(2), *parts, mask=mask)
        past.save(folder / "cache", tiny(case.model), attention_mask=mask[:, :-10])
        loaded = PressedCache.load(folder / "cache", tiny(case.model))
        check_equal(states(loaded), states(past))
        assert loaded.press == past.press and loaded.storage == past.storage
        assert loaded.session.pins == past.session.pins
        assert torch.equal(read(case, loaded, *later(2), mask=mask), read(case, past, *later(2), mask=mask))
        check_equal(states(loaded), states(past))


def ragged(case: Case, folder: Path) -> None:
    """Heads of different length attend to what they do side by side, with a mask of their empty slots."""
    past, side_by_side = case.cache([0, 1]), case.cache([0, 1])
    logits = read(case, past, text(2), *later(2))
    with pytest.MonkeyPatch.context() as patch:
        run = PressedLayer.run
        patch.setattr(PressedLayer, "run", lambda self, *given: run(self, *given[:3], is_plain=False))
        expected = read(case, side_by_side, text(2), *later(2))
    assert any(layer.is_ragged for layer in past.pressed_layers())
    close(logits, expected)
    for ours, theirs in zip(past.pressed_layers(), side_by_side.pressed_layers(), strict=True):
        assert torch.equal(ours.positions(), theirs.positions())


def rerotated(case: Case, folder: Path) -> None:
    """Keys that are left as they are can be moved up: of rows of a batch, and of a prompt as by KeyRerotationPress."""
    moving = replace(case, options={**case.options, "positions": "rerotate"})
    padded_rows(moving, folder)
    if isinstance(case.press, ScorerPress):
        past, other = moving.cache([0, 1]), replace(case, press=KeyRerotationPress(case.press)).cache([0, 1])
        close(read(case, past, text(2), *later(2)), read(case, other, text(2), *later(2)), 1e-3)
        for ours, theirs in zip(past.pressed_layers(), other.pressed_layers(), strict=True):
            assert torch.equal(ours.positions(), theirs.positions())


def data(case: Case, folder: Path) -> None:
    """A press is what its repr and its JSON say."""
    assert case.press is not None
    assert from_data(json.loads(json.dumps(as_data(case.press)))) == case.press
    assert repr(case.press).startswith(type(case.press).__name__) and hash(case.press) is not None


def memory(case: Case, folder: Path) -> None:
    """Fewer bytes are held, or fewer pairs are read."""
    past, whole = case.cache([0, 1]), PressedCache()
    parts = tokens(2, 40, seed=4).split(1, dim=1)
    for cache in (past, whole):
        read(case, cache, text(2, 200), *parts)
    assert (past.kv_bytes() < 0.8 * whole.kv_bytes()) == case.evicts
    assert (past.read_ratio() < 0.9) == past.reads_part
    assert case.evicts or past.achieved_ratio() == 0


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (padded_rows, chunks, crop, fork, rows, beams, file, ragged, rerotated, data, memory)
}


def seen_by(model: str, ids: Tensor) -> list[LayerView]:
    """What a press is shown of each layer after one call, to work out by hand what it does with it."""
    look = Look()
    read(Case(None, model=model), PressedCache(look), ids)
    return look.views


def every_check(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """The parameters ``name`` and ``check`` of a test: each check of each case that applies to it.

    The first case meets all of them; of each other one a third is fast, another third from case to case.
    """
    return pytest.mark.parametrize(
        ("name", "check"),
        [
            pytest.param(name, check, marks=() if i == 0 or (i + j) % 3 == 0 else pytest.mark.slow)
            for i, (name, case) in enumerate(cases.items())
            for j, check in enumerate(CHECKS)
            if check not in case.lacks
        ],
    )
