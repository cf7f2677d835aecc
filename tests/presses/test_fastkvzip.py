"""FastKVzip: random gates in the published format against loops over tokens, heads and keys."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.architectures import ARCHITECTURES, Architecture, tiny, tokens
from tests.presses.hidden import views_of
from tests.presses.weights import write_gates
from torch import Tensor

from coldpress import (
    AdaKVPress,
    DecodingPress,
    FastKVzipPress,
    KnormPress,
    LayerView,
    PrefillDecodingPress,
    PressedCache,
    catalogue,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError
from coldpress.models.block import prefilling

N = 23
IDS = tokens(1, N)
Scores = list[list[list[float]]]  # by layer, head and token


def gates_for(name: str, folder: Path) -> tuple[str, list[dict[str, Tensor]], list[LayerView]]:
    """Gates for a tiny model in ``folder``, and what its layers are shown of IDS."""
    views = views_of(name, IDS)
    view = views[0]
    path = folder / f"q{view.group_size}_dim16_sink16.pt"
    return str(folder), write_gates(path, view.hidden_states.shape[-1], view.keys.shape[1], view.group_size, 4), views  # type: ignore[union-attr]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / math.sqrt(float(x.square().mean()) + 1e-6) * weight


def expected_scores(view: LayerView, gate: dict[str, Tensor]) -> list[list[float]]:
    """What the gate says of each token of the first row: by head and token."""
    n_heads, group = view.keys.shape[1], view.group_size
    scores: list[list[float]] = [[] for _ in range(n_heads)]
    for x in view.hidden_states[0]:  # type: ignore[index]
        q = (gate["q_proj.weight"] @ x + gate["q_proj.bias"]).view(n_heads, group, 16)
        k = (gate["k_proj.weight"] @ x).view(n_heads, 16)
        for h in range(n_heads):
            key, total = normed(k[h], gate["k_norm.weight"]), 0.0
            for g in range(group):
                query = normed(q[h, g], gate["q_norm.weight"])
                own = float(key @ query) / 4 + float(gate["b"][h, 0, g])
                total += 1 / (1 + sum(math.exp(float(s @ query) / 4 - own) for s in gate["k_base"][h, 0]))
            scores[h].append(total / group)
    return scores


def best(scores: Scores, n_keep: int, n_sink: int, n_window: int) -> list[list[list[int]]]:
    """The protected tokens, and the best of what is left in any layer and head."""
    n = len(scores[0][0])
    is_protected = [t < n_sink or t >= n - n_window for t in range(n)]
    pairs = sorted(
        (not is_protected[t], -s, i, h, t)
        for i, layer in enumerate(scores)
        for h, head in enumerate(layer)
        for t, s in enumerate(head)
    )
    kept: list[list[list[int]]] = [[[] for _ in layer] for layer in scores]
    for _, _, i, h, t in pairs[: n_keep * sum(len(layer) for layer in scores)]:
        kept[i][h].append(t)
    return [[sorted(head) for head in layer] for layer in kept]


def run(name: str, press: Any, ids: Tensor = IDS, mask: Tensor | None = None) -> PressedCache:
    past = PressedCache()
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with press(tiny(name)):
        tiny(name)(ids, attention_mask=mask, position_ids=positions, **cache_argument(past))
    return past


def kept(past: PressedCache, row: int = 0) -> list[list[list[int]]]:
    """Positions by compressed layer and head."""
    layers = [layer.positions()[row].tolist() for layer in past.pressed_layers() if layer.was_compressed]
    return [[[t for t in head if t >= 0] for head in layer] for layer in layers]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_scores_and_what_is_kept(architecture: Architecture, tmp_path: Path) -> None:
    folder, gates, views = gates_for(architecture.name, tmp_path)
    press = FastKVzipPress(0.5, n_sink=2, window_ratio=0.15, weights=folder)
    scores = [expected_scores(view, gates[int(view.module.layer_idx)]) for view in views]  # type: ignore[arg-type]
    for view, own in zip(views, scores, strict=True):
        torch.testing.assert_close(press.score(view)[0], torch.tensor(own), atol=1e-4, rtol=1e-4)
    past = run(architecture.name, press)
    assert kept(past) == best(scores, 11, 2, 3)
    compressed = [layer for layer in past.pressed_layers() if layer.was_compressed]
    for layer, heads in zip(compressed, kept(past), strict=True):  # and it is really gone
        assert layer.stored_length == max(map(len, heads))
        assert layer.keys.shape[2] == layer.stored_length  # type: ignore[union-attr]
    assert past.achieved_ratio() == pytest.approx(1 - 11 / N)
    logits = tiny(architecture.name)(tokens(1, 3, seed=5), **cache_argument(past)).logits
    assert torch.isfinite(logits).all() and past.seen_tokens == N + 3


def test_layerwise(tmp_path: Path) -> None:
    folder, gates, views = gates_for("llama", tmp_path)
    scores = [expected_scores(view, gate) for view, gate in zip(views, gates[:2], strict=True)]
    past = run("llama", FastKVzipPress(0.5, layerwise=True, weights=folder))
    assert kept(past) == [best([layer], 11, 4, 1)[0] for layer in scores]
    assert kept(past) != kept(run("llama", FastKVzipPress(0.5, weights=folder)))


def test_what_follows_is_attention_over_what_is_kept(tmp_path: Path) -> None:
    """The kept keys and values are the model's own, in their places."""
    folder, *_ = gates_for("llama", tmp_path)
    past, full = run("llama", FastKVzipPress(0.5, weights=folder)), PressedCache()
    tiny("llama")(IDS, **cache_argument(full))
    for own, layer in zip(past.pressed_layers(), full.pressed_layers(), strict=True):
        for h, head in enumerate(own.positions()[0]):
            at = head[head >= 0]
            assert torch.equal(own.keys[0, h, : len(at)], layer.keys[0, h, at])  # type: ignore[index]
            assert torch.equal(own.values[0, h, : len(at)], layer.values[0, h, at])  # type: ignore[index]


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gemma3", "mistral"])
def test_rows_of_a_padded_batch_have_budgets_of_their_own(name: str, tmp_path: Path) -> None:
    folder, *_ = gates_for(name, tmp_path)
    press = FastKVzipPress(0.6, n_sink=1, weights=folder)
    ids, mask, pads = tokens(4, N), torch.ones(4, N, dtype=torch.long), [(0, 0), (9, 0), (2, 6), (0, 0)]
    for row, (left, right) in enumerate(pads):
        mask[row, :left] = 0
        mask[row, N - right :] = 0
    past = run(name, press, ids, mask)
    for row, (left, right) in enumerate(pads):
        alone = run(name, press, ids[row : row + 1, left : N - right])
        assert kept(past, row) == [[[t + left for t in head] for head in layer] for layer in kept(alone)]


def test_a_row_that_is_shorter_than_the_budget_keeps_all_of_it(tmp_path: Path) -> None:
    """Its pairs carry no scores: all of its places went to the first head, and the last one was left with nothing."""
    folder, *_ = gates_for("llama", tmp_path)
    mask = (torch.arange(N) >= torch.tensor([[0], [N - 9]])).long()
    past = run("llama", FastKVzipPress(budget_tokens=14, weights=folder), tokens(2, N), mask)
    assert kept(past, 1) == [[[*range(N - 9, N)]] * 2] * 2
    assert sum(len(head) for layer in kept(past) for head in layer) == 4 * 14


def test_a_shared_prefill(tmp_path: Path) -> None:
    folder, *_ = gates_for("llama", tmp_path)
    presses = [FastKVzipPress(ratio, weights=folder) for ratio in (0.0, 0.3, 0.8)]
    full = PressedCache()
    branches = full.branches([*presses, KnormPress(0.5)])
    with prefilling(tiny("llama"), full, *branches):
        tiny("llama")(IDS, **cache_argument(full))
    assert branches[0].achieved_ratio() == full.achieved_ratio() == 0
    for press, branch in zip(presses[1:], branches[1:], strict=False):
        assert kept(branch) == kept(run("llama", press))


def test_budgets(tmp_path: Path) -> None:
    folder, *_ = gates_for("llama", tmp_path)
    past = run("llama", FastKVzipPress(budget_tokens=7, weights=folder))
    assert sum(len(head) for layer in kept(past) for head in layer) == 4 * 7
    past = run("llama", FastKVzipPress(budget_bytes=9 * 2 * 2 * 16 * 4 + 5, weights=folder))
    assert sum(len(head) for layer in kept(past) for head in layer) == 4 * 9


@pytest.mark.parametrize(("n_tokens", "ratio"), [(1, 0.5), (2, 0.9), (5, 0.8), (N, 0.99), (N, 0.0)])
def test_short_texts_and_high_ratios(n_tokens: int, ratio: float, tmp_path: Path) -> None:
    folder, *_ = gates_for("llama", tmp_path)
    past = run("llama", FastKVzipPress(ratio, weights=folder), tokens(1, n_tokens))
    n_keep = max(1, n_tokens - math.ceil(round(ratio * n_tokens, 9)))
    assert sum(int((layer.positions() >= 0).sum()) for layer in past.pressed_layers()) == 4 * n_keep
    for layer in past.pressed_layers():
        assert (layer.positions()[..., 0] >= 0).all()  # no head is empty


def test_inputs_may_be_embeddings(tmp_path: Path) -> None:
    folder, *_ = gates_for("llama", tmp_path)
    press, past, model = FastKVzipPress(0.5, weights=folder), PressedCache(), tiny("llama")
    with press(model):
        model(inputs_embeds=model.get_input_embeddings()(IDS), **cache_argument(past))
    assert kept(past) == kept(run("llama", press))


def test_a_schedule_goes_on_after_it(tmp_path: Path) -> None:
    folder, *_ = gates_for("llama", tmp_path)
    press = FastKVzipPress(0.5, weights=folder)
    both = PrefillDecodingPress(press, DecodingPress(KnormPress(), compression_interval=4, target_size=8))
    past, expected = PressedCache(), kept(run("llama", press))
    with both(tiny("llama")):
        tiny("llama")(IDS, **cache_argument(past))
        assert kept(past) == expected
        tiny("llama")(tokens(1, 4), **cache_argument(past))
    assert all(int((layer.positions() >= 0).sum()) <= 2 * 8 for layer in past.pressed_layers())


def test_long_texts_have_a_window_of_a_fixed_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = gates_for("llama", tmp_path)
    monkeypatch.setattr("coldpress.presses.fastkvzip._LONG_TEXT", N)
    past = run("llama", FastKVzipPress(0.5, window_size=6, weights=folder))
    assert all(head[-6:] == list(range(N - 6, N)) for layer in kept(past) for head in layer)
    monkeypatch.setattr("coldpress.presses.fastkvzip._LONG_TEXT", N + 1)
    past = run("llama", FastKVzipPress(0.5, window_size=6, weights=folder))
    assert not all(head[-6:] == list(range(N - 6, N)) for layer in kept(past) for head in layer)


def test_what_it_says_of_itself() -> None:
    (info,) = [info for info in catalogue() if info.name == "fastkvzip"]
    assert (info.kind, info.can_rechoose, info.per_head, info.per_layer) == ("trained", False, True, True)
    assert make_press("fastkvzip", 0.5, layerwise=True) == FastKVzipPress(0.5, True)
    with pytest.raises(PressError, match="FastKVzipPress chooses among the pairs of all layers"):
        AdaKVPress(FastKVzipPress(0.5))  # type: ignore[arg-type]


def test_outside_the_block(tmp_path: Path) -> None:
    with pytest.raises(PressError, match=r"FastKVzipPress looks at hidden states.*inside 'with press\(model\):'"):
        tiny("llama")(IDS, **cache_argument(PressedCache(FastKVzipPress(0.5))))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_sink": -1}, "n_sink must be an integer >= 0"),
        ({"window_size": 0}, "window_size must be an integer >= 1"),
        ({"window_ratio": 1.5}, r"window_ratio must be a number in \[0, 1\]"),
        ({"compression_ratio": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_impossible_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(PressError, match=message):
        FastKVzipPress(**parameters)


# -- gates that cannot be used -----------------------------------------------------------------------------------------


def test_published_gates_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = gates_for("llama", tmp_path)
    asked: list[tuple[str, str]] = []

    def fetch(repo: str, name: str) -> Path:
        asked.append((repo, name))
        return tmp_path / "q2_dim16_sink16.pt"

    press = FastKVzipPress(0.5)
    with pytest.raises(PressError, match=r"give the weights: FastKVzipPress\(weights=FOLDER\)"):
        run("llama", press)
    monkeypatch.setattr(tiny("llama").config, "_name_or_path", "meta/Tiny-1B")
    monkeypatch.setattr("coldpress.learned.published.fetch_hub_file", fetch)
    assert kept(run("llama", press)) == kept(run("llama", FastKVzipPress(0.5, weights=folder)))
    assert set(asked) == {("Jang-Hyun/Fast-KVzip", "tiny-1b/q2_dim16_sink16.pt")}


def test_gates_of_another_model(tmp_path: Path) -> None:
    write_gates(tmp_path / "q2_dim16_sink16.pt", 33, 2, 2, 2)
    with pytest.raises(
        PressError, match=r"gate of another shape: q_proj.weight is \(64, 33\), and layer 0 .* \(64, 32\)"
    ):
        run("llama", FastKVzipPress(0.5, weights=str(tmp_path)))
    write_gates(tmp_path / "q2_dim16_sink16.pt", 32, 2, 2, 1)
    with pytest.raises(PressError, match="no gate for layer 1"):
        run("llama", FastKVzipPress(0.5, weights=str(tmp_path)))
    with pytest.raises(PressError, match=r"has no file q1_dim16_sink16.pt"):
        run("gpt_neox", FastKVzipPress(0.5, weights=str(tmp_path)))


def test_files_written_with_either_numpy(tmp_path: Path) -> None:
    """The published ones say numpy.core, which later versions call numpy._core."""
    folder, *_ = gates_for("llama", tmp_path)
    expected, path = kept(run("llama", FastKVzipPress(0.5, weights=folder))), tmp_path / "q2_dim16_sink16.pt"
    names = []
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in parts.items():
                names += [new] if old in content else []
                file.writestr(name, content.replace(old, new) if name.endswith(".pkl") else content)
        assert kept(run("llama", FastKVzipPress(0.5, weights=folder))) == expected
    assert b"numpy._core." in names


@pytest.mark.parametrize("content", [b"", b"nothing", {"module": 3}, {"other": []}, {"module": [{"b": np.zeros(2)}]}])
def test_damaged_files(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "q2_dim16_sink16.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(PressError, match=r"q2_dim16_sink16.pt is damaged or holds something else .*fetch it again"):
        run("llama", FastKVzipPress(0.5, weights=str(tmp_path)))


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"module": Evil()}, tmp_path / "q2_dim16_sink16.pt")
    with pytest.raises(PressError, match="damaged"):
        run("llama", FastKVzipPress(0.5, weights=str(tmp_path)))
    assert not (tmp_path / "ran").exists()
