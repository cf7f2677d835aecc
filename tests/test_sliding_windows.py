"""Layers with a sliding window free what no later token can see, and compute the same as before."""

from __future__ import annotations

import pytest
import torch
from tests.contract.architectures import BY_NAME, WINDOW, Look, tiny, tokens
from torch import Tensor

from coldpress import ExpectedAttentionPress, KnormPress, PressedCache, StreamingLLMPress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import CacheError

FURTHER = tokens(1, 90, seed=1)
SLACK = 64  # more tokens than the window reaches stay, so that as many can be cropped


def add(past: PressedCache, ids: Tensor, name: str) -> Tensor:
    return tiny(name)(ids, **cache_argument(past)).logits


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "cohere2", "gpt_oss"])
@pytest.mark.parametrize("chunk", [1, 7, 150])
@pytest.mark.thinned(3)
def test_sliding_layers_forget_and_compute_the_same(name: str, chunk: int) -> None:
    ids, architecture, past = tokens(1, 450, seed=2), BY_NAME[name], PressedCache()
    expected = tiny(name, architecture.own)(ids, use_cache=False).logits
    answers = [add(past, ids[:, :40], name)]
    lengths = [past.stored_lengths()]
    for start in range(40, 450, chunk):
        answers.append(add(past, ids[:, start : start + chunk], name))
        lengths.append(past.stored_lengths())
    torch.testing.assert_close(torch.cat(answers, dim=1), expected, atol=2e-4, rtol=0)
    bounded = [i for i in range(len(past.layers)) if name == "mistral" or i % 2 == 0]
    for i, last in enumerate(lengths[-1]):
        assert (last < WINDOW + SLACK + 64 + chunk) if i in bounded else (last == 450)
    assert past.seen_tokens == 450


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_compressed_pairs_are_freed_when_the_window_has_passed_them(ratio: float) -> None:
    ids, past = tokens(1, 300, seed=2), PressedCache(KnormPress(ratio))
    model = tiny("mistral")
    model(ids[:, :60], **cache_argument(past))
    for t in range(60, 299):
        model(ids[:, t : t + 1], **cache_argument(past))
        assert max(past.stored_lengths()) < WINDOW + SLACK + 64
    expected = tiny("mistral", "sdpa")(ids, use_cache=False).logits[:, -1:]
    answer = model(ids[:, -1:], **cache_argument(past)).logits
    if ratio == 0:
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)
    assert torch.isfinite(answer).all() and past.achieved_ratio() == pytest.approx(ratio, abs=0.03)


def test_crop_of_a_sliding_layer_that_has_forgotten() -> None:
    ids = tokens(1, 300)
    past = PressedCache()
    add(past, ids, "gemma3")
    assert past.stored_lengths() == [WINDOW - 1 + SLACK, 300] * 2
    with pytest.raises(CacheError, match="Crop to 236 or more"):
        past.crop(-65)
    assert past.stored_lengths() == [WINDOW - 1 + SLACK, 300] * 2  # in all layers or in none
    past.crop(-SLACK)
    expected = tiny("gemma3")(torch.cat([ids[:, :236], FURTHER[:, :3]], dim=1)).logits[:, -3:]
    torch.testing.assert_close(add(past, FURTHER[:, :3], "gemma3"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_short", [3, 30, 77, 150])
def test_a_short_row_does_not_make_the_others_keep_everything(n_short: int) -> None:
    """Padding before a text shorter than the window is nothing that its row looks back to."""
    ids, mask, past, n = tokens(2, 200), torch.ones(2, 200, dtype=torch.long), PressedCache(), 40
    mask[1, : 200 - n_short] = 0
    model, further = tiny("gemma3"), tokens(2, n, seed=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, **cache_argument(past))
    assert past.stored_lengths() == [WINDOW - 1 + SLACK, 200] * 2
    whole = torch.cat([mask, torch.ones(2, n, dtype=torch.long)], dim=1)
    found = []
    for t in range(200, 200 + n):
        at = {"attention_mask": whole[:, : t + 1], "position_ids": whole[:, : t + 1].sum(-1, keepdim=True) - 1}
        found.append(model(further[:, t - 200 : t - 199], **at, **cache_argument(past)).logits)
    for row, start in ((0, 0), (1, 200 - n_short)):
        alone = torch.cat([ids[row : row + 1, start:], further[row : row + 1]], dim=1)
        expected = tiny("gemma3", "sdpa")(alone, use_cache=False).logits[:, -n:]
        torch.testing.assert_close(torch.cat(found, dim=1)[row : row + 1], expected, atol=2e-4, rtol=0)


def test_first_tokens_out_of_reach_are_no_sinks() -> None:
    """The first tokens of what a window still reaches are ordinary ones."""
    ids, look, past = tokens(1, 60), Look(), PressedCache(StreamingLLMPress(0.5, n_sink=4))
    add(past, ids, "mistral")
    assert past.positions()[0, 0].tolist() == list(range(60 - 11, 60))
    add(PressedCache(look), ids, "mistral")
    for view in look.views:
        assert (view.n_tokens, view.first_position) == (WINDOW - 1, 60 - WINDOW + 1)
        found, expected = (ExpectedAttentionPress(0.5, n_sink=n).score(view) for n in (4, 0))
        assert torch.equal(found, expected)
