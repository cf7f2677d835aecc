"""KeyRerotation: what is computed with it is what a model computes whose kept tokens stood side by side."""

from __future__ import annotations

import pytest
import torch
from tests.contract.architectures import ROTARY_VARIANTS, tiny, tokens
from tests.presses.views import MODELS, rotary_width, rotated, unrotated, views_of
from torch import Tensor
from transformers import DynamicCache

from coldpress import (
    AdaKVPress,
    Kept,
    KeyRerotationPress,
    KnormPress,
    PressedCache,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument

CONTEXT, MORE = 40, 6
every_model = pytest.mark.parametrize("model", MODELS)


def compressed(model: str, press: ScorerPress, ids: Tensor) -> PressedCache:
    past = PressedCache(press)
    with torch.no_grad():
        tiny(model)(ids, **cache_argument(past))
    return past


@every_model
@pytest.mark.parametrize("inner", [StreamingLLMPress(0.6), KnormPress(0.6), SnapKVPress(0.3, window_size=4)], ids=repr)
def test_next_tokens_follow_the_kept_ones_without_a_gap(model: str, inner: ScorerPress) -> None:
    """The oracle: keys of the kept tokens before rotation, rotated to 0 .. n - 1, in a cache of length n."""
    ids = tokens(2, CONTEXT + MORE)
    past = compressed(model, KeyRerotationPress(inner), ids[:, :CONTEXT])
    side_by_side = DynamicCache()
    for i, layer in enumerate(past.pressed_layers()):
        _, keys = unrotated(model, ids[:, :CONTEXT], i)
        kept = layer.positions()
        n_batch, n_heads, n_kept = kept.shape
        placed = torch.stack([
            torch.stack([
                torch.stack([rotated(model, keys[b, h, kept[b, h, j]], j) for j in range(n_kept)])
                for h in range(n_heads)
            ])
            for b in range(n_batch)
        ])  # fmt: skip
        side_by_side.update(placed, layer.values, i)
    assert side_by_side.get_seq_length() == past.stored_lengths()[0] < CONTEXT
    with torch.no_grad():
        expected = tiny(model)(ids[:, CONTEXT:], **cache_argument(side_by_side)).logits
        actual = tiny(model)(ids[:, CONTEXT:], **cache_argument(past)).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    plain = tiny(model)(ids[:, CONTEXT:], **cache_argument(compressed(model, inner, ids[:, :CONTEXT]))).logits
    assert (plain - expected).abs().max() > 1e-2  # without it they are something else
    assert past.seen_tokens == CONTEXT + MORE  # positions are still those of the text


@every_model
def test_heads_of_different_length_end_side_by_side(model: str) -> None:
    ids = tokens(2, CONTEXT)
    inner = AdaKVPress(KnormPress(0.6), alpha_safeguard=0.0)
    past, plain = compressed(model, KeyRerotationPress(inner), ids), compressed(model, inner, ids)
    for i, layer in enumerate(past.pressed_layers()):
        _, keys = unrotated(model, ids, i)
        assert torch.equal(layer.positions(), plain.positions(i))
        lengths = set()
        for b, row in enumerate(layer.positions().tolist()):
            for h, head in enumerate(row):
                kept = [t for t in head if t >= 0]
                lengths.add(len(kept))
                expected = [rotated(model, keys[b, h, t], CONTEXT - len(kept) + j) for j, t in enumerate(kept)]
                torch.testing.assert_close(layer.keys[b, h, : len(kept)], torch.stack(expected), atol=1e-4, rtol=0)
        assert len(lengths) > 1


def test_only_the_rotary_dimensions_change() -> None:
    ids = tokens(1, CONTEXT)
    for dtype in (torch.float32, torch.bfloat16):
        view = views_of("gpt_neox", ids, dtype)[1]
        inner = KnormPress(0.5)
        before, after = inner.compress(view), KeyRerotationPress(inner).compress(view)
        width = rotary_width("gpt_neox", view.keys.shape[3])
        assert torch.equal(after.keys[..., width:], before.keys[..., width:])
        assert not torch.equal(after.keys[..., :width], before.keys[..., :width])
        assert torch.equal(after.values, before.values) and after.keys.dtype == dtype


@pytest.mark.parametrize("name", [a.name for a in ROTARY_VARIANTS])
def test_scaled_rotary_embeddings(name: str) -> None:
    """Keys moved to where they are stay; one token further, they are what rotating by one more gives."""
    view = views_of(name, tokens(1, CONTEXT))[1]
    chosen = torch.tensor([0, 3, 17, 18, 30]).expand(*view.keys.shape[:2], -1)
    kept = view.take(chosen)
    torch.testing.assert_close(view.moved_keys(kept, chosen), kept.keys, atol=1e-5, rtol=0)
    moved = view.moved_keys(kept, chosen + 5)
    back = view.moved_keys(Kept(moved, kept.values, chosen + 5), chosen)
    torch.testing.assert_close(back, kept.keys, atol=1e-5, rtol=0)
    recent = StreamingLLMPress(0.5, n_sink=0)  # what it keeps stands side by side already
    plain, after = recent.compress(view), KeyRerotationPress(recent).compress(view)
    torch.testing.assert_close(after.keys, plain.keys, atol=1e-5, rtol=0)


def test_layers_without_rotation_keep_their_keys() -> None:
    ids = tokens(1, CONTEXT)
    past = compressed("gpt2", KeyRerotationPress(KnormPress(0.5)), ids)
    plain = compressed("gpt2", KnormPress(0.5), ids)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(past.layers, plain.layers, strict=True))
    first, second = compressed("smollm3", KeyRerotationPress(KnormPress(0.5)), ids).layers
    plain = compressed("smollm3", KnormPress(0.5), ids)
    same = [torch.equal(a.keys, b.keys) for a, b in zip((first, second), plain.layers, strict=True)]
    assert sorted(same) == [False, True]  # one of its two layers does not rotate


def test_generate_and_a_padded_row() -> None:
    """Positions are the model's own, so generate needs to know nothing; a padded row gives what it gives alone."""
    model, press = tiny("llama"), KeyRerotationPress(StreamingLLMPress(0.5))
    row = tokens(1, 30)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    alone = model.generate(row, attention_mask=torch.ones_like(row), **cache_argument(PressedCache(press)), **options)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), row], dim=1)
    both = torch.cat([padded, tokens(1, 39, seed=5)])
    mask = torch.cat([(torch.arange(39) >= 9)[None], torch.ones(1, 39, dtype=torch.bool)]).long()
    batch = model.generate(both, attention_mask=mask, **cache_argument(PressedCache(press)), **options)
    for a, b in zip(alone.logits, batch.logits, strict=True):
        torch.testing.assert_close(b[:1], a, atol=1e-4, rtol=0)
    past = PressedCache(press)
    model(row, **cache_argument(past))
    steps = [model(token[None, None], **cache_argument(past)).logits[:, -1] for token in alone.sequences[0, 30:-1]]
    for a, b in zip(alone.logits[1:], steps, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=0)
