"""Caches to save, and whether two of them are the same and go on alike."""

from __future__ import annotations

import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.others import block
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    CompressionRatioDecodingPress,
    DecodingPress,
    DMSPress,
    ExpectedAttentionPress,
    KnormPress,
    MassCAMPress,
    PrefillDecodingPress,
    PressedCache,
    QFilterPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.masks import additive_mask

N = 53
IDS = tokens(1, N)
FURTHER = tokens(1, 90, seed=1)


def prefilled(press: BasePress | None = None, model: PreTrainedModel | None = None, ids: Tensor = IDS) -> PressedCache:
    model, past = model or tiny("llama"), PressedCache(press)
    with torch.no_grad():
        if press is None:
            model(ids, **cache_argument(past))
        else:
            with block(model, press):
                model(ids, **cache_argument(past))
    return past


def go_on(past: PressedCache, model: PreTrainedModel | None = None) -> Tensor:
    """Logits of a turn of 5 tokens and of 20 that come one by one."""
    model = model or tiny("llama")
    with torch.no_grad():
        steps = [model(part, **cache_argument(past)).logits for part in FURTHER[:, :25].split([5] + [1] * 20, dim=1)]
    return torch.cat(steps, dim=1)


def check_same(loaded: PressedCache, past: PressedCache) -> None:
    """Everything that can be asked of a cache."""
    assert repr(loaded) == repr(past)
    assert loaded.get_seq_length() == past.get_seq_length()
    assert loaded.achieved_ratio() == past.achieved_ratio()
    for ours, theirs in zip(loaded.pressed_layers(), past.pressed_layers(), strict=True):
        assert torch.equal(ours.positions(), theirs.positions())
        if theirs.is_initialized:
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
            assert ours.is_ragged == theirs.is_ragged and ours.was_compressed == theirs.was_compressed
            assert [part.dtype for part in ours.tensors()] == [part.dtype for part in theirs.tensors()]
            sees, seen = (additive_mask(each.slots, 1, None, None) for each in (ours, theirs))
            assert sees is seen is None or torch.equal(sees, seen)


SCHEDULES = {
    "decoding": DecodingPress(SnapKVPress(window_size=4), 7, 20, hidden_states_buffer_size=6),
    "ratio": CompressionRatioDecodingPress(ExpectedAttentionPress(n_future_positions=8), 4),
    "adakv": DecodingPress(AdaKVPress(KnormPress()), 5, 20),
    "cam": CAMPress(StreamingLLMPress(n_sink=2), 5, 20),
    "mass_cam": MassCAMPress(StreamingLLMPress(n_sink=2), 5, 20),
    "random": DecodingPress(RandomPress(), 5, 20),
    "calibrated": DecodingPress(QFilterPress(), 5, 20),
    "both": PrefillDecodingPress(SnapKVPress(0.5, window_size=8), DecodingPress(KnormPress(), 5, 20)),
    "dms": DMSPress(KnormPress(), threshold=-3.0, sliding_window_size=8, decoding=True),
}
