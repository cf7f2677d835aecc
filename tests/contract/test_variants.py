"""Ways to hold a cache, on every architecture: in pieces, moved up, in few bits, head by head, and all at once."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from tests.contract.architectures import ARCHITECTURES, Architecture, tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    KVBits,
    PrefillDecodingPress,
    PressedCache,
    ScorerPress,
    SnapKVPress,
    prefill,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import ModelError

CONTEXT, PADDING = 45, 17  # of the second row; more than a piece
LEARNED = ("gpt2", "opt", "gpt_bigcode")  # positions: nothing can be moved
RECURRENT = ("lfm2", "qwen3_next")  # what their states make of padding is the model's own business
BITS = KVBits(8, group_size=4, residual_tokens=8)
SCHEDULE = DecodingPress(
    SnapKVPress(window_size=4), compression_interval=4, target_size=20, hidden_states_buffer_size=9
)


def snapkv(ratio: float) -> ScorerPress:
    return SnapKVPress(ratio, window_size=4)


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "chunked": (snapkv, {"chunk_tokens": 12}),
    "rerotated": (snapkv, {"positions": "rerotate"}),
    "quantised": (snapkv, {"kv_bits": BITS}),
    "ragged": (lambda ratio: AdaKVPress(snapkv(ratio)), {}),
    "chunked, ragged, rerotated, quantised": (
        lambda ratio: AdaKVPress(snapkv(ratio)),
        {"chunk_tokens": 12, "positions": "rerotate", "kv_bits": BITS},
    ),
    "chunked, ragged, rerotated, going on": (
        lambda ratio: PrefillDecodingPress(AdaKVPress(snapkv(ratio)), SCHEDULE) if ratio else AdaKVPress(snapkv(0.0)),
        {"chunk_tokens": 12, "positions": "rerotate"},
    ),
    "ragged, quantised": (lambda ratio: AdaKVPress(KnormPress(ratio)), {"kv_bits": BITS}),
}
# two variants on each architecture, all of them on GPT-NeoX; the other pairs are slow tests
every_pair = pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        pytest.param(
            architecture,
            variant,
            id=f"{variant}-{architecture}",
            marks=() if i == 0 or (j - 2 * i) % len(VARIANTS) < 2 else pytest.mark.slow,
        )
        for j, variant in enumerate(VARIANTS)
        for i, architecture in enumerate(ARCHITECTURES)
    ],
)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


def read(model: PreTrainedModel, past: PressedCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of a question and of single tokens after the context."""
    n = past.seen_tokens
    logits = []
    for start, stop in [(n, n + 7), *((i, i + 1) for i in range(n + 7, ids.shape[1]))]:
        given = {}
        if mask is not None:
            given = {
                "attention_mask": mask[:, :stop],
                "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop],
            }
        logits.append(model(ids[:, start:stop], **cache_argument(past), **given).logits)
    return torch.cat(logits, 1)


def made(architecture: Architecture, variant: str, ratio: float) -> tuple[PreTrainedModel, BasePress, dict[str, Any]]:
    make, options = VARIANTS[variant]
    model: PreTrainedModel = tiny(architecture.name)
    if "positions" in options and architecture.name in LEARNED:
        with pytest.raises(ModelError, match="has no rotary embedding"):
            model(tokens(1, 5), **cache_argument(PressedCache(make(ratio), **options)))
        pytest.skip("refused")
    return model, make(ratio), options


@every_architecture
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "ragged" not in name or name.endswith("on")])
@torch.no_grad()
@pytest.mark.thinned(7)
def test_ratio_0(architecture: Architecture, variant: str) -> None:
    """The model's own logits, or nearly those where pairs are rounded."""
    model, press, options = made(architecture, variant, 0.0)
    past, ids = PressedCache(press, **options), tokens(1, CONTEXT + 12)
    prefill(model, ids[:, :CONTEXT], past)
    logits = read(model, past, ids)
    expected = tiny(architecture.name, architecture.own)(ids, use_cache=False).logits[:, CONTEXT:]
    if "kv_bits" in options:
        assert (logits - expected).abs().mean() < 0.03 * expected.abs().mean()
    else:
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


@every_pair
@torch.no_grad()
@pytest.mark.thinned(5)
def test_compressed(architecture: Architecture, variant: str) -> None:
    """Rows of a batch are what they are alone; forks and copies go on as their original does."""
    model, press, options = made(architecture, variant, 0.5)
    n_padding = 0 if architecture.name in RECURRENT else PADDING
    ids, mask = tokens(2, CONTEXT + 12), torch.ones(2, CONTEXT + 12, dtype=torch.long)
    mask[1, :n_padding] = 0
    past = PressedCache(press, **options)
    prefill(model, ids[:, :CONTEXT], past, attention_mask=mask[:, :CONTEXT])
    assert 0 < past.achieved_ratio() < 1
    fork, copied = past.fork(), pickle.loads(pickle.dumps(past))
    logits = read(model, past, ids, mask)
    assert torch.isfinite(logits).all()
    for other in (fork, copied):
        torch.testing.assert_close(read(model, other, ids, mask), logits, atol=1e-4, rtol=0)
    for row, first in enumerate([0, n_padding]):
        alone, own = PressedCache(press, **options), ids[row : row + 1, first:]
        prefill(model, own[:, : CONTEXT - first], alone)
        off = (read(model, alone, own)[0] - logits[row]).abs()
        if "kv_bits" in options:  # a number between two codes may get either
            assert off.mean() < 0.05 * logits.abs().mean()
        else:
            assert off.max() < (2e-3 if "positions" in options else 5e-4)
