"""DuoAttention against a slow version of what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import BY_NAME, tiny, tokens
from tests.presses.views import MODELS, rotated, unrotated, view_of

from coldpress import DuoAttentionPress, LUKVPress, PressedCache, make_press
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.io.artefacts import Artefact, artefact_path
from coldpress.learned.calibration import calibrate

N_TOKENS = 37
NAME = "meta-llama/Meta-Llama-3.1-8B-Instruct"


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
    """K: evicted pairs were masked, and the ratio that was reported for a short text was -1."""
    gates = [[0.1, 0.2], [0.9, 0.8]]
    press = DuoAttentionPress(0.5, pattern=torch.tensor(gates), sink_size=16, recent_size=64)
    sizes = {}
    for n_tokens, ratio in ((240, 0.5 * (1 - 80 / 240)), (60, 0.0)):
        past, full = PressedCache(press), PressedCache()
        for each in (past, full):
            tiny("llama")(tokens(1, n_tokens), **cache_argument(each))
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
        with pytest.raises(PressError, match=r"coldpress calibrate duo_attention --model MODEL --dataset wikitext"):
            tiny("llama")(tokens(1, 9), **cache_argument(PressedCache(press)))
    assert DuoAttentionPress().compress(view_of("llama")) is None  # nothing to remove, nothing needed


def test_a_pattern_of_another_model_is_refused() -> None:
    press = DuoAttentionPress(0.5, pattern=gates_of(3))
    with pytest.raises(PressError, match="has 2 layers with 3 KV heads; the model compresses 2 layers with 2"):
        press.compress(view_of("llama"))


@pytest.mark.parametrize("model", MODELS)
def test_what_is_measured(model: str) -> None:
    samples, n_positions = [tokens(1, n, seed=n)[0] for n in (40, 33)], 500
    gates = calibrate(DuoAttentionPress(), tiny(model), samples)["gates"]
    for layer in range(2):
        expected = torch.zeros(gates.shape[1], dtype=torch.float64)
        for ids in samples:
            queries, keys = (states[0].double().mean(1) for states in unrotated(model, ids[None], layer))  # [H, D]
            group, dim = len(queries) // len(keys), keys.shape[1]
            for head, key in enumerate(keys):
                turned = torch.stack([rotated(model, key, p) for p in range(n_positions)])
                for query in queries[head * group : (head + 1) * group]:
                    logits = turned @ rotated(model, query, n_positions - 1) / dim**0.5
                    expected[head] += logits.softmax(0).cumsum(0).mean() / group / len(samples)
        torch.testing.assert_close(gates[layer].double(), expected, atol=1e-4, rtol=0)
    assert 0 < gates.min() < gates.max() < 1


def test_a_measured_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path))
    model = BY_NAME["llama"].build()
    model.config._name_or_path = NAME
    gates = torch.tensor(gates_of(2, seed=3))
    path = artefact_path("duo_attention", NAME)
    Artefact("duo_attention", {"gates": gates}).save(path)
    kept = []
    for press in (
        DuoAttentionPress(0.5, pattern=gates, sink_size=2, recent_size=5),
        DuoAttentionPress(0.5, pattern=path, sink_size=2, recent_size=5),
        DuoAttentionPress(0.5, sink_size=2, recent_size=5),
        DuoAttentionPress(0.5, on_the_fly_scoring=True, sink_size=2, recent_size=5),
    ):
        past = PressedCache(press)
        with press(model):
            model(tokens(1, 30), **cache_argument(past))
        kept.append([past.positions(i) for i in range(2)])
    assert all(torch.equal(a, b) for each in kept[1:] for a, b in zip(kept[0], each, strict=True))
    with pytest.raises(PressError, match="is for duo_attention, not for lukv"):
        LUKVPress(curves=path)
    with pytest.raises(PressError, match=r"nothing.safetensors' cannot be read \(No such file"):
        DuoAttentionPress(0.5, pattern=tmp_path / "nothing.safetensors")


def test_the_published_pattern_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    files = {"config.json": '{"sink_size": 3, "recent_size": 7}', "full_attention_heads.tsv": "0.9\t0.1\n0.8\t1.3\n"}

    def fetch(url: str, copy: Path) -> Path | None:
        asked.append(url)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(files[copy.name])
        return copy if files[copy.name] else None

    monkeypatch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path))
    monkeypatch.setattr("coldpress.presses.duo_attention.fetch_url", fetch)
    model = BY_NAME["llama"].build()
    model.config._name_or_path = NAME
    past = PressedCache(DuoAttentionPress(0.25))
    model(tokens(1, 30), **cache_argument(past))
    assert [(past.positions(i) >= 0).sum(-1).tolist() for i in range(2)] == [[[30, 10]], [[30, 30]]]
    base = "https://raw.githubusercontent.com/mit-han-lab/duo-attention/refs/heads/main/attn_patterns"
    folder = "Meta-Llama-3.1-8B-Instruct/lr=0.02-reg=0.05-ctx=1000_128000-multi_passkey10"
    assert asked[:2] == [f"{base}/{folder}/config.json", f"{base}/{folder}/full_attention_heads.tsv"]
    assert DuoAttentionPress(0.25, on_the_fly_scoring=True).published(NAME) is None
    assert DuoAttentionPress(0.25).published("EleutherAI/pythia-70m") is None
    files["config.json"] = ""
    with pytest.raises(
        PressError, match=r"and none are published for this model\. Make them with coldpress calibrate duo"
    ):
        model(tokens(1, 30), **cache_argument(PressedCache(DuoAttentionPress(0.25))))


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
