"""Outlines of the first slots: they hold while pairs are appended, and go with whatever else is done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from torch import Tensor

from coldpress import KVBits, LayerView, PressedCache, QuestPress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.outlines import Outlines

PAGE = 2  # so that 32 slots are kept together


@dataclass(frozen=True)
class FreshQuest(QuestPress):
    """Quest that works everything out again at each step."""

    per_head_independent = True

    def select(self, view: LayerView) -> Tensor | None:
        return super().select(replace(view, _memo={}))


def numbers(asked: list[tuple[int, int]]) -> Callable[[int, int], Tensor]:
    def compute(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.arange(start, stop).view(1, 1, -1)

    return compute


def test_what_is_known_is_not_asked_for_again() -> None:
    own, asked = Outlines(), []  # type: Outlines, list[tuple[int, int]]
    for n in (4, 4, 7, 7, 3):
        assert own.of_first("a", n, numbers(asked)).flatten().tolist() == [*range(n)]
    assert asked == [(0, 4), (4, 7), (0, 3)]
    own.of_first("b", 3, numbers(asked))
    assert asked[-1] == (0, 3) and len(own.tensors()) == 2


def test_a_crop_leaves_what_is_about_slots_that_stay() -> None:
    own, asked = Outlines(), []  # type: Outlines, list[tuple[int, int]]
    own.of_first("short", 4, numbers(asked))
    own.of_first("long", 8, numbers(asked))
    other = own.shared()
    own.crop(7)
    assert len(own.tensors()) == 1 and len(other.tensors()) == 2
    assert own.of_first("long", 6, numbers(asked)).flatten().tolist() == [*range(6)]
    assert other.of_first("long", 8, numbers(asked)).shape[2] == 8 and asked[-1] == (0, 6)
    own.forget()
    assert not own.tensors() and other.tensors()


def test_numbers_of_inference_mode_are_made_again_outside_of_it() -> None:
    own, asked = Outlines(), []  # type: Outlines, list[tuple[int, int]]
    with torch.inference_mode():
        own.of_first("a", 4, numbers(asked))
    assert not own.of_first("a", 6, numbers(asked)).is_inference()
    assert asked == [(0, 4), (0, 6)]


# -- in a cache: the same logits, bit for bit, as when all is worked out again at each step ----------------------------


def decode(model: Any, past: PressedCache, n: int, seed: int, mask: Tensor | None = None) -> Tensor:
    rows, logits = past.pressed_layers()[0].slots.filled.n_rows, []
    for token in tokens(rows, n, seed=seed).split(1, dim=1):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        logits.append(model(token, attention_mask=mask, **cache_argument(past)).logits)
    return torch.cat(logits, dim=1)


def appended(model: Any, past: PressedCache) -> Tensor:
    return decode(model, past, 40, 1)


def cropped(model: Any, past: PressedCache) -> Tensor:
    before = decode(model, past, 20, 1)
    past.crop(past.get_seq_length() - 15)
    short = decode(model, past, 3, 2)
    past.crop(70)
    return torch.cat([before, short, decode(model, past, 40, 3)], dim=1)


def forked(model: Any, past: PressedCache) -> Tensor:
    before = decode(model, past, 20, 1)
    other = past.fork()
    found = [decode(model, one, 12, seed) for one, seed in ((past, 2), (other, 3), (past, 4), (other, 5))]
    return torch.cat([before, *found], dim=1)


def reordered(model: Any, past: PressedCache) -> Tensor:
    before = decode(model, past, 5, 1)
    past.batch_select_indices(torch.tensor([1, 0]))
    after = decode(model, past, 5, 2)
    past.batch_select_indices(torch.tensor([1]))
    return torch.cat([torch.cat([before, after], dim=1)[:1], decode(model, past, 30, 3)], dim=1)


def evicted(model: Any, past: PressedCache) -> Tensor:
    before = decode(model, past, 5, 1)
    n_heads = past.pressed_layers()[0].slots.filled.n_heads
    for layer in past.pressed_layers():
        layer.keep(torch.arange(layer.stored_length)[1::2].expand(2, n_heads, -1))
    even = decode(model, past, 10, 2)
    for layer in past.pressed_layers():  # heads that store different numbers
        kept = torch.arange(layer.stored_length).expand(2, n_heads, -1).clone()
        kept[0, 1, 40:] = -1
        layer.keep(kept)
    return torch.cat([before, even, decode(model, past, 10, 3)], dim=1)


def emptied(model: Any, past: PressedCache) -> Tensor:
    before = decode(model, past, 5, 1)
    past.reset()
    model(tokens(2, 90, seed=8), **cache_argument(past))
    return torch.cat([before, decode(model, past, 10, 2)], dim=1)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("use", [appended, cropped, forked, reordered, evicted, emptied])
def test_what_is_kept_is_what_would_be_worked_out(
    architecture: str, use: Callable[[Any, PressedCache], Tensor]
) -> None:
    model = tiny(architecture)
    found, kept = [], 0
    for press in (QuestPress(PAGE, 0.3, 0), FreshQuest(PAGE, 0.3, 0)):
        past = PressedCache(press)
        with torch.no_grad():
            model(tokens(2, 90), **cache_argument(past))
            found.append(use(model, past))
        kept += sum(len(layer.slots.outlines.tensors()) for layer in past.pressed_layers())
        assert past.read_ratio() < 0.5
    assert torch.equal(*found)
    assert bool(kept) == (use is not evicted)  # heads that differ are copied out at each step, and nothing is kept


def test_padding_keeps_nothing_and_reads_the_same() -> None:
    model = tiny("llama")
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :13] = 0
    past, alone = PressedCache(QuestPress(PAGE, 0.3, 0)), PressedCache(QuestPress(PAGE, 0.3, 0))
    with torch.no_grad():
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=place, **cache_argument(past))
        model(ids[:1, 13:], **cache_argument(alone))
        new = tokens(2, 20, seed=1)
        for i, token in enumerate(new.split(1, dim=1)):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            place = mask.cumsum(-1)[:, -1:] - 1
            both = model(token, attention_mask=mask, position_ids=place, **cache_argument(past)).logits
            own = model(token[:1], **cache_argument(alone)).logits
            torch.testing.assert_close(both[0], own[0], atol=1e-4, rtol=1e-4, msg=f"token {i}")
    assert not any(layer.slots.outlines.tensors() for layer in past.pressed_layers())
    assert all(layer.slots.outlines.tensors() for layer in alone.pressed_layers())


def test_what_is_kept_is_memory_and_is_no_part_of_a_file(tmp_path: Any) -> None:
    model = tiny("llama")
    past = PressedCache(QuestPress(PAGE, 0.3, 0))
    with torch.no_grad():
        model(tokens(1, 90), **cache_argument(past))
        decode(model, past, 1, 1)
        layer = past.pressed_layers()[0]
        assert [list(part.shape[2:]) for part in layer.slots.outlines.tensors()] == [
            [64 // PAGE, layer.keys.shape[3]]
        ] * 2
        more = sum(part.nbytes for one in past.pressed_layers() for part in one.slots.outlines.tensors())
        before = past.kv_bytes()
        past.save(tmp_path / "saved", model)
        other = PressedCache.load(tmp_path / "saved", model)
        assert not any(one.slots.outlines.tensors() for one in other.pressed_layers()) and before > more > 0
        assert torch.equal(decode(model, past, 8, 2), decode(model, other, 8, 2))


def test_pairs_in_few_bits_keep_nothing() -> None:
    """What is stored in few bits is other keys than those that the limits were taken of."""
    model, found = tiny("llama"), []
    for press in (QuestPress(PAGE, 0.3, 0), FreshQuest(PAGE, 0.3, 0)):
        past = PressedCache(press, kv_bits=KVBits(8, residual_tokens=32))
        with torch.no_grad():
            model(tokens(1, 90), **cache_argument(past))
            found.append(decode(model, past, 80, 1))
    assert torch.equal(*found)
