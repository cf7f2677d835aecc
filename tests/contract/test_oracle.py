"""The logits after a compressed context, against a forward written out in loops over layers, heads and tokens.

The oracle takes every pair of the context from an uncompressed run, leaves out those that were evicted, head by head,
and computes the tokens that follow one by one at their positions in the text.
"""

from __future__ import annotations

import pytest
import torch
from tests.contract.architectures import BY_NAME, tokens
from tests.oracles.models import oracle_logits

from coldpress import BasePress, ExpectedAttentionPress, KnormPress, PressedCache, PyramidKVPress, SnapKVPress
from coldpress.architecture.cache_argument import cache_argument

CONTEXT, QUESTION = 40, 6


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox_full_rotary", "llama"])
@pytest.mark.parametrize(
    "press",
    [
        None,
        KnormPress(0.5),
        SnapKVPress(0.7, window_size=8),
        PyramidKVPress(0.5, window_size=4),
        ExpectedAttentionPress(0.3),
    ],
    ids=lambda press: type(press).__name__,
)
def test_logits_after_a_compressed_context(name: str, press: BasePress | None) -> None:
    model, ids = BY_NAME[name].build(), tokens(1, CONTEXT + QUESTION)
    full, pressed = PressedCache(), PressedCache(press)
    for past in (full, pressed):
        model(ids[:, :CONTEXT], **cache_argument(past))
    kept = [layer.positions()[0].tolist() for layer in pressed.pressed_layers()]
    assert press is None or all(len(head) < CONTEXT for layer in kept for head in layer)
    expected = oracle_logits(name, ids[0, CONTEXT:], full, kept)
    together = model(ids[:, CONTEXT:], **cache_argument(pressed.fork())).logits[0]
    one_by_one = [model(token[None, None], **cache_argument(pressed)).logits[0, 0] for token in ids[0, CONTEXT:]]
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(one_by_one), expected, atol=1e-4, rtol=0)
