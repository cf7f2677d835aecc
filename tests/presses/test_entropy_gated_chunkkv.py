"""Entropy-gated ChunkKV against a slow version of what it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median_low

import pytest
import torch
from tests.presses.views import MODELS, view_of

from coldpress import ChunkKVPress, EntropyGatedChunkKVPress, KeyDiffPress, LayerView, SnapKVPress
from coldpress.core.counts import keep_count
from coldpress.errors import PressError

N_TOKENS = 37


def entropy(scores: list[float]) -> float:
    if len(scores) == 1:
        return 0.0
    lowest = min(0.0, *scores)
    weights = [s - lowest for s in scores]
    if sum(weights) == 0:
        return 1.0
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w > 0) / math.log(len(scores))


def greedy(scores: list[float], n_keep: int, length: int, low: int, always: list[int]) -> list[int]:
    """Chunk after chunk, as the docstring says."""
    text = range(len(scores))
    chunks = [[t for t in text[a : a + length] if t not in always] for a in text[::length]]
    chunks = [chunk for chunk in chunks if chunk]
    means = [sum(scores[t] for t in chunk) / len(chunk) for chunk in chunks]
    entropies = [entropy([scores[t] for t in chunk]) for chunk in chunks]
    kept, left = list(always), n_keep - len(always)
    for i in sorted(range(len(chunks)), key=lambda i: -means[i]):
        is_spiky = means[i] >= median_low(means) and entropies[i] < median_low(entropies)
        take = min(len(chunks[i]), left, low if is_spiky else length)
        kept += sorted(chunks[i], key=lambda t: -scores[t])[:take]
        left -= take
    rest = [t for t in range(len(scores)) if t not in kept]
    return sorted(kept + sorted(rest, key=lambda t: -scores[t])[:left])


def check(view: LayerView, press: EntropyGatedChunkKVPress, n_window: int) -> None:
    n_keep = keep_count(N_TOKENS, press.compression_ratio)
    positions = press.choose(view)
    assert positions is not None
    for row, scores in enumerate(press.press.score(view).mean(1).tolist()):
        always = list(range(N_TOKENS - n_window, N_TOKENS))
        expected = greedy(scores, n_keep, press.chunk_length, press.low_entropy_chunk_length, always)
        for head in range(view.keys.shape[1]):
            assert positions[row, head].tolist() == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
@pytest.mark.parametrize(("length", "low"), [(10, 4), (5, 1), (4, 3), (6, 2), (100, 4)])
def test_entropy_gated_chunkkv(model: str, ratio: float, length: int, low: int) -> None:
    view = view_of(model, rows=3)
    check(view, EntropyGatedChunkKVPress(SnapKVPress(ratio, window_size=4), length, low), 4)
    check(view, EntropyGatedChunkKVPress(KeyDiffPress(ratio), length, low), 0)  # negative scores


def test_a_spiky_chunk_gives_its_room_to_others() -> None:
    """One token with all the attention: ChunkKV keeps its neighbours, and the gate does not."""
    view = view_of("gpt_neox", rows=1)
    keys = torch.randn(view.keys.shape, generator=torch.Generator().manual_seed(0))
    spiky = replace(view, keys=keys, _memo={})
    scores = torch.ones(1, 4, N_TOKENS)
    scores[..., 12] = 30.0

    class Given(KeyDiffPress):
        def score(self, view: LayerView) -> torch.Tensor:
            return scores + torch.linspace(0.4, 0, N_TOKENS) * (torch.arange(N_TOKENS) % 2)

    whole = set(ChunkKVPress(Given(0.5), 10).choose(spiky)[0, 0].tolist())
    gated = set(EntropyGatedChunkKVPress(Given(0.5)).choose(spiky)[0, 0].tolist())
    assert {*range(10, 20)} <= whole
    assert len(gated & {*range(10, 20)}) == 4 and 12 in gated
    assert len(gated) == len(whole)


def test_the_best_half_of_equal_tokens() -> None:
    view = view_of("llama", rows=1)
    flat = replace(view, keys=torch.ones_like(view.keys), _memo={})
    press = EntropyGatedChunkKVPress(KeyDiffPress(0.5))
    assert press.choose(flat)[0, 0].tolist() == list(range(keep_count(N_TOKENS, 0.5)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"chunk_length": 0}, "chunk_length must be an integer >= 1"),
        ({"low_entropy_chunk_length": 0}, "low_entropy_chunk_length must be an integer >= 1"),
        ({"chunk_length": 4}, "low_entropy_chunk_length=4 must be less than chunk_length=4"),
    ],
)
def test_impossible_parameters(parameters: dict[str, int], message: str) -> None:
    with pytest.raises(PressError, match=message):
        EntropyGatedChunkKVPress(SnapKVPress(0.5), **parameters)
