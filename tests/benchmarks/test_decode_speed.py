"""The profile of a decoding step: what is coldpress's, and what is transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.decode_speed.shares import OURS, PYTHON, SHOWN, THEIRS, shares, table
from benchmarks.decoding import Decoder
from tests.contract.architectures import tiny, tokens
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coldpress import PressedCache, SnapKVPress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.layer import PressedLayer


@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_a_profile_says_whose_an_operation_is() -> None:
    model, cache = tiny("llama"), PressedCache(SnapKVPress(0.5, window_size=8))
    with torch.no_grad():
        model(tokens(1, 100), **cache_argument(cache))
    functions = model.forward, PressedLayer.update, ALL_ATTENTION_FUNCTIONS["coldpress"]
    found = shares(Decoder(model, cache, "coldpress", 100), 2, is_compiled=False)
    assert functions == (model.forward, PressedLayer.update, ALL_ATTENTION_FUNCTIONS["coldpress"])
    own = {(row["operation"], row["of"]): row["calls"] for row in found}
    assert own["scaled_dot_product_attention", OURS] == 2 and own["linear", THEIRS] == 2 * 7 + 1  # two layers
    assert ("linear", OURS) not in own and ("scaled_dot_product_attention", THEIRS) not in own
    assert {(PYTHON, OURS), (PYTHON, THEIRS)} <= own.keys()
    assert sum(row["share"] for row in found) == pytest.approx(1, abs=0.01)
    assert [row["share"] for row in found] == sorted((row["share"] for row in found), reverse=True)
    text = table({"settings": SETTINGS, "samples": found})
    assert len(text.splitlines()) == 2 + SHOWN + 1 + 2 and f"| {len(found) - SHOWN} others |" in text


SETTINGS: dict[str, Any] = {
    **{"profile": "a cache", "model": "tiny", "layers": 2, "weights": "random", "dtype": "float32", "tokens": 100},
    **{"threads": 1, "versions": {"torch": "2"}},
}
