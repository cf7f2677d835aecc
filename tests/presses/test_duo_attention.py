"""DuoAttention against a slow version of what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.presses.views import MODELS, view_of

from coldpress import DuoAttentionPress, PressedCache, make_press
from coldpress.errors import PressError

N_TOKENS = 37


def gates_of(n_heads: int, seed: int = 0) -> list[list[float]]:
    return torch.rand(2, n_heads, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 0.99])
def test_streaming_heads_keep_both_ends(model: str, layer: int, ratio: float) -> None:
    view = view_of(model, layer=layer)
    n_heads = view.keys.shape[1]
    gates = gates_of(n_heads)
    heads = sorted((gates[i][j], i, j) for i in range(2) for j in range(n_heads))
    streaming = [(i, j) for _, i, j in heads[: round(ratio * 2 * n_heads)]]
    kept = DuoAttentionPress(ratio, pattern=gates, sink_size=3, recent_size=8).compress(view)
    if not any(i == layer for i, _ in streaming):
        assert kept is None
        return
    assert kept is not None
    for row in range(view.keys.shape[0]):
        for head in range(n_heads):
            expected = list(range(N_TOKENS))
            if (layer, head) in streaming:
                expected = [0, 1, 2, *range(N_TOKENS - 8, N_TOKENS)]
            slots = kept.positions[row, head].tolist()
            assert slots == expected + [-1] * (len(slots) - len(expected))
            assert torch.equal(kept.keys[row, head, : len(expected)], view.keys[row, head, expected])
            assert torch.equal(kept.values[row, head, : len(expected)], view.values[row, head, expected])


def test_the_ratio_of_the_pairs_is_an_outcome_and_memory_is_freed() -> None:
    """kvpress masks, and reports a ratio of -1 for short prompts."""
    gates = [[0.1, 0.2], [0.9, 0.8]]
    press = DuoAttentionPress(0.5, pattern=torch.tensor(gates), sink_size=16, recent_size=64)
    sizes = {}
    for n_tokens, ratio in ((240, 0.5 * (1 - 80 / 240)), (60, 0.0)):
        past, full = PressedCache(press), PressedCache()
        for each in (past, full):
            tiny("llama")(tokens(1, n_tokens), past_key_values=each)
        assert past.achieved_ratio() == pytest.approx(ratio)
        sizes[n_tokens] = past.kv_bytes() / full.kv_bytes()
    assert sizes == {240: (80 + 240) / 480, 60: 1.0}
    assert not hasattr(press, "compression_ratio")


def test_published_patterns(tmp_path: Path) -> None:
    gates = [[0.5, 1.2, 0.0, 0.25], [-0.1, 0.75, 0.3, 0.1]]
    (tmp_path / "full_attention_heads.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in gates))
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 2, "recent_size": 5, "lr": 0.02}))
    view = view_of("gpt_neox")
    read = DuoAttentionPress(0.5, pattern=str(tmp_path)).compress(view)
    file = DuoAttentionPress(0.5, pattern=tmp_path / "full_attention_heads.tsv").compress(view)
    given = DuoAttentionPress(0.5, pattern=gates, sink_size=2, recent_size=5).compress(view)
    assert read is not None and file is not None and given is not None
    assert torch.equal(read.positions, given.positions) and torch.equal(file.positions, given.positions)
    own = DuoAttentionPress(0.5, pattern=tmp_path, sink_size=0, recent_size=3).compress(view)
    assert own is not None and own.positions[0, 0, :4].tolist() == [34, 35, 36, -1]
    assert make_press("duo_attention", 0.0, head_compression_ratio=0.5, pattern=str(tmp_path)) == DuoAttentionPress(
        0.5, pattern=str(tmp_path)
    )


def test_without_a_pattern_it_says_how_to_make_one() -> None:
    for press in (DuoAttentionPress(0.5), DuoAttentionPress(0.5, on_the_fly_scoring=True)):
        with pytest.raises(PressError, match=r"coldpress calibrate duo_attention --model .* --dataset DATASET"):
            tiny("llama")(tokens(1, 9), past_key_values=PressedCache(press))
    assert DuoAttentionPress().compress(view_of("llama")) is None  # nothing to remove, nothing needed


def test_a_pattern_of_another_model_is_refused() -> None:
    press = DuoAttentionPress(0.5, pattern=gates_of(3))
    with pytest.raises(PressError, match="has 2 layers with 3 KV heads; the model compresses 2 layers with 2"):
        press.compress(view_of("llama"))


def test_presses_with_the_same_pattern_are_equal() -> None:
    gates = gates_of(2)
    same = [
        DuoAttentionPress(0.5, pattern=given) for given in (gates, torch.tensor(gates), torch.tensor(gates).numpy())
    ]
    assert same[0] == same[1] == same[2] and len(set(same)) == 1
    assert same[0] != DuoAttentionPress(0.5, pattern=gates_of(2, seed=1))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"head_compression_ratio": 1.0}, "head_compression_ratio is the fraction"),
        ({"on_the_fly_scoring": 1}, "on_the_fly_scoring must be True or False"),
        ({"on_the_fly_scoring": True, "pattern": [[0.5]]}, "not both"),
        ({"sink_size": -1}, "sink_size must be an integer >= 0"),
        ({"recent_size": 0}, "recent_size must be an integer >= 1"),
        ({"pattern": [0.5, 0.2]}, "pattern must be a tensor or lists of finite numbers with 2 dimensions"),
        ({"pattern": [[0.5], [0.2, 0.1]]}, "with 2 dimensions"),
        ({"pattern": [[float("nan")]]}, "of finite numbers"),
        ({"pattern": "no/such/folder"}, "cannot read the pattern no/such/folder"),
    ],
)
def test_impossible_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PressError, match=message):
        DuoAttentionPress(**parameters)
