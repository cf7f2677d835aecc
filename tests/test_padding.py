"""A row of a padded batch gives what the row alone gives, wherever the padding stands."""

from __future__ import annotations

import pytest
import torch
from tests.batches import Batch, is_local
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.presses.others import OTHERS, WITH_RATIO, other_press
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import BasePress, DMSPress, KnormPress, PressedCache, SnapKVPress, make_press
from coldpress.architecture.cache_argument import cache_argument

pytestmark = pytest.mark.usefixtures("given_artefacts")

MODELS = ["gpt_neox", "llama", "mistral"]
PARAMETERS = {"snapkv": {"window_size": 8}, "pyramidkv": {"window_size": 4}, "random": {"seed": 3}}
LAYOUTS = {
    "left": [(23, 0), (0, 0), (48, 0)],
    "right": [(0, 23), (0, 0), (0, 48)],
    "mixed": [(23, 0), (0, 0), (0, 48)],
    "both_sides": [(11, 12), (0, 0), (40, 8)],
}


def press_of(name: str, ratio: float) -> BasePress:
    press = make_press(name, ratio, **PARAMETERS.get(name, {}))
    assert press is not None
    return press


def check(model: PreTrainedModel, batch: Batch, press: BasePress | None, n_decoded: int = 3) -> PressedCache:
    """Prefill, a question of several tokens and some single ones: the batch against each row alone."""
    past, mask = PressedCache(press), batch.mask.bool()
    prefill = model(batch.ids, attention_mask=batch.mask, position_ids=batch.positions(), **cache_argument(past)).logits
    after_prefill = [layer.positions() for layer in past.pressed_layers()]
    pieces = [batch.question, *tokens(n_decoded, len(batch.rows), 1, seed=7)]
    answers = []
    for piece in pieces:
        positions = batch.add(piece)
        out = model(piece, attention_mask=batch.mask, position_ids=positions, **cache_argument(past))
        answers.append(out.logits)
    assert torch.isfinite(torch.cat(answers, dim=1)).all()
    for i, row in enumerate(batch.rows):
        alone = PressedCache(press)
        torch.testing.assert_close(
            prefill[i, mask[i]], model(row[None], **cache_argument(alone)).logits[0], atol=1e-4, rtol=0
        )
        real = mask[i].cumsum(-1) - 1  # [T] slot in the batch -> position in the row
        for j, (layer, positions) in enumerate(zip(alone.pressed_layers(), after_prefill, strict=True)):
            for kept, expected in zip(positions[i], layer.positions()[0], strict=True):
                kept, expected = kept[kept >= 0], expected[expected >= 0]  # heads of a layer may keep different numbers
                assert is_local(model, j) or press is None or torch.equal(real[kept], expected)
        for piece, answer in zip(pieces, answers, strict=True):
            expected = model(piece[i : i + 1], **cache_argument(alone)).logits[0]
            torch.testing.assert_close(answer[i], expected, atol=1e-4, rtol=0)
    return past


@pytest.mark.parametrize(
    ("name", "layout"),
    [*(("gpt_neox", layout) for layout in LAYOUTS), ("llama", "mixed"), ("mistral", "right"), ("mistral", "mixed")],
)
@pytest.mark.parametrize("press", [None, *WITH_RATIO, *OTHERS])
@pytest.mark.thinned(9)
def test_row_of_a_batch_is_the_row_alone(name: str, layout: str, press: str | None) -> None:
    made = None if press is None else other_press(press, name) if press in OTHERS else press_of(press, 0.5)
    check(tiny(name), Batch(60, LAYOUTS[layout]), made)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("press", WITH_RATIO)
@pytest.mark.thinned(7)
def test_ratio_0_drops_the_padding_only(name: str, press: str) -> None:
    past = check(tiny(name), Batch(20, [(3, 0), (0, 0), (0, 15)]), press_of(press, 0.0))
    assert past.achieved_ratio() == 0
    assert (past.positions()[0, :, :17] == torch.arange(3, 20)).all()
    assert (past.positions()[0, :, 17:20] == -1).all()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["coldpress", "coldpress_eager"])
@pytest.mark.parametrize("press", [SnapKVPress(0.5), SnapKVPress(0.9), press_of("streaming_llm", 0.9)], ids=repr)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_very_different_length(name: str, backend: str, press: BasePress, side: str) -> None:
    pads = [(59, 0), (57, 0), (0, 0)]
    check(tiny(name, backend), Batch(60, pads if side == "left" else [pad[::-1] for pad in pads]), press)


@pytest.mark.parametrize(
    ("name", "press"),
    [("mistral", None), ("mistral", "expected_attention"), ("gemma3", None), ("gemma3", "knorm"), ("gpt_oss", "knorm")],
)
@pytest.mark.thinned(5)
def test_sliding_windows_count_real_tokens(name: str, press: str | None) -> None:
    """Long enough that sliding layers free what is out of reach, which differs from row to row."""
    batch = Batch(260, [(0, 0), (200, 0), (0, 200), (30, 30), (0, 259)])
    check(tiny(name), batch, None if press is None else press_of(press, 0.5), n_decoded=70)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("press", [None, "snapkv", "pyramidkv", "expected_attention", "streaming_llm"])
def test_generate(name: str, press: str | None) -> None:
    model = tiny(name)
    batch = Batch(40, [(20, 0), (0, 0), (33, 0)])
    options = {"max_new_tokens": 12, "do_sample": False}

    def generate(ids: Tensor, mask: Tensor) -> Tensor:
        past = PressedCache(None if press is None else press_of(press, 0.5))
        return model.generate(ids, attention_mask=mask, **cache_argument(past), **options)[:, ids.shape[1] :]

    together = generate(batch.ids, batch.mask)
    for i, row in enumerate(batch.rows):
        assert torch.equal(together[i], generate(row[None], torch.ones_like(row)[None])[0])
    own = tiny(name, "sdpa").generate(batch.ids, attention_mask=batch.mask, **options)
    assert press is not None or torch.equal(together, own[:, batch.ids.shape[1] :])


@pytest.mark.parametrize("press", [None, press_of("knorm", 0.5)])
def test_one_padded_row(press: BasePress | None) -> None:
    """Whether a single row has padding is looked up at the prompt, not again for every token."""
    check(tiny("llama"), Batch(30, [(11, 0)]), press)
    check(tiny("llama"), Batch(30, [(3, 4)]), press)


def test_a_row_of_padding_only_is_harmless() -> None:
    model = tiny("llama")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1] = 0
    past, alone = PressedCache(press_of("knorm", 0.5)), PressedCache(press_of("knorm", 0.5))
    model(ids, attention_mask=mask, **cache_argument(past))
    model(ids[:1], **cache_argument(alone))
    assert torch.equal(past.positions()[:1], alone.positions()) and (past.positions()[1] == -1).all()
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    logits = model(ids[:, :1], attention_mask=mask, **cache_argument(past)).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[:1], model(ids[:1, :1], **cache_argument(alone)).logits, atol=1e-5, rtol=0)


def test_padding_of_a_later_turn() -> None:
    """Turns of different length in one batch: the second turn is padded on the right, the third follows."""
    model = BY_NAME["llama"].build()
    press, turns = press_of("snapkv", 0.5), [tokens(2, 20), tokens(2, 6, seed=1), tokens(2, 3, seed=2)]
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, 23:26] = 0  # the second row's second turn has 3 tokens
    positions, past, logits, end = mask.cumsum(-1) - 1, PressedCache(press), [], 0
    for turn in turns:
        start, end = end, end + turn.shape[1]
        at = positions[:, start:end]
        out = model(turn, attention_mask=mask[:, :end], position_ids=at, **cache_argument(past))
        logits.append(out.logits)
    for i in range(2):
        alone = PressedCache(press)
        for turn, answer, real in zip(turns, logits, mask[i].bool().split([20, 6, 3]), strict=True):
            expected = model(turn[i : i + 1, real], **cache_argument(alone)).logits[0]
            torch.testing.assert_close(answer[i, real], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("press", [None, KnormPress(0.5), DMSPress(KnormPress(), -5.0, 4, decoding=True)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_fork_of_a_padded_row_goes_on_without_its_padding(press: BasePress | None, side: str) -> None:
    """One row and one token: nobody looks at the mask again, so that the fork has to know."""
    model, ids, mask = tiny("llama"), tokens(1, 41), torch.ones(1, 41, dtype=torch.long)
    mask[0, slice(0, 10) if side == "left" else slice(28, 40)] = 0
    at, past = (mask.cumsum(-1) - 1).clamp(min=0), PressedCache(press)
    source = PressedCache() if press is None else past
    branch = source.branches([None])[0] if press is None else None
    model(ids[:, :40], attention_mask=mask[:, :40], position_ids=at[:, :40], **cache_argument(source))
    others = [source.fork(), *([branch] if branch is not None else [])]
    given = {"attention_mask": mask, "position_ids": at[:, 40:]}
    expected = model(ids[:, 40:], **cache_argument(source), **given).logits
    for other in others:
        torch.testing.assert_close(
            model(ids[:, 40:], **cache_argument(other), **given).logits, expected, atol=1e-5, rtol=0
        )
