"""KVzap: scores of random weights in the published format against loops over tokens and heads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tests.contract.architectures import ARCHITECTURES, Architecture, tiny, tokens
from tests.presses.hidden import projected, views_of
from tests.presses.weights import write_kvzap
from torch import Tensor

from coldpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    ChunkPress,
    DecodingPress,
    Kept,
    KVzapPress,
    LayerView,
    PressedCache,
    catalogue,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.choice import select_counts
from coldpress.errors import PressError, UnreachableError
from coldpress.models.block import prefilling

KINDS = {"linear": None, "mlp": 12}


@pytest.fixture
def views() -> list[LayerView]:
    return views_of("llama", tokens(2, 19))


def of(view: LayerView, folder: Path, kind: str = "mlp") -> tuple[str, dict[str, Tensor]]:
    """Weights for the model of ``view`` in ``folder``."""
    weights = write_kvzap(folder, view.hidden_states.shape[-1], view.keys.shape[1], 8, KINDS[kind])  # type: ignore[union-attr]
    return str(folder), weights


def expected(view: LayerView, weights: dict[str, Tensor], kind: str) -> Tensor:
    """The formula, one token and one head at a time."""
    i, scores = view.module.layer_idx, torch.zeros(view.keys.shape[:3])
    for row, sequence in enumerate(view.hidden_states):  # type: ignore[arg-type]
        for t, x in enumerate(sequence):
            if kind == "mlp":
                inner = [
                    float(w @ x + b)
                    for w, b in zip(weights[f"layers.{i}.0.weight"], weights[f"layers.{i}.0.bias"], strict=True)
                ]
                x = torch.tensor([z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in inner])
            name = f"layers.{i}.2" if kind == "mlp" else f"layers.{i}"
            for head in range(view.keys.shape[1]):
                scores[row, head, t] = weights[f"{name}.weight"][head] @ x + weights[f"{name}.bias"][head]
    return scores


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_scores(architecture: Architecture, kind: str, tmp_path: Path) -> None:
    views = views_of(architecture.name, tokens(1, 5))
    folder, weights = of(views[0], tmp_path, kind)
    press = KVzapPress(model_type=kind, weights=folder)
    for view in views:
        torch.testing.assert_close(press.scores(view), expected(view, weights, kind), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gemma3", "mistral", "lfm2"])
def test_keeps_the_best_of_every_head(name: str, tmp_path: Path) -> None:
    if name not in {a.name for a in ARCHITECTURES}:
        pytest.skip("needs a newer transformers")
    views = views_of(name, tokens(2, 19))
    folder, weights = of(views[0], tmp_path)
    press, past = KVzapPress(0.6, weights=folder), PressedCache()
    with press(tiny(name)):
        tiny(name)(tokens(2, 19), **cache_argument(past))
    layers = [layer for layer in past.pressed_layers() if layer.was_compressed]
    for layer, view in zip(layers, views, strict=True):
        best = expected(view, weights, "mlp").topk(7).indices.sort().values
        assert torch.equal(layer.positions(), best)


def test_a_padded_row_keeps_what_it_keeps_alone(views: list[LayerView], tmp_path: Path) -> None:
    press = KVzapPress(0.5, weights=of(views[0], tmp_path)[0])
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    past, alone = PressedCache(), PressedCache()
    with press(tiny("llama")):
        tiny("llama")(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **cache_argument(past))
        tiny("llama")(ids[:1, 6:], **cache_argument(alone))
    kept = past.positions()[0]
    assert torch.equal(kept[kept >= 0].view(2, -1), alone.positions()[0] + 6)


def test_the_newest_tokens_alone_can_be_scored(views: list[LayerView], tmp_path: Path) -> None:
    view, press = views[1], KVzapPress(weights=of(views[0], tmp_path)[0])
    whole = press.scores(view)
    torch.testing.assert_close(press.score(view.part(12, 19)), whole[:, :, 12:])
    torch.testing.assert_close(press.score(view.of_head(1, 0)), whole[1:, :1])
    later = replace(
        view,
        queries=view.queries[:, :, -4:],
        hidden_states=view.hidden_states[:, -4:],
        _memo={},  # type: ignore[index]
    )
    torch.testing.assert_close(press.score(later.part(15, 19)), whole[:, :, 15:])
    with pytest.raises(PressError, match="those of 15 of 19 are gone"):
        press.score(later)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_the_dtype_of_the_model(views: list[LayerView], tmp_path: Path, dtype: torch.dtype) -> None:
    press = KVzapPress(weights=of(views[0], tmp_path)[0])
    low = replace(views[0], hidden_states=views[0].hidden_states.to(dtype), _memo={})  # type: ignore[union-attr]
    assert press.score(low).dtype == torch.float32
    torch.testing.assert_close(press.score(low), press.score(views[0]), atol=0.2, rtol=0.05)


def test_inside_wrappers(views: list[LayerView], tmp_path: Path) -> None:
    press = KVzapPress(0.5, weights=of(views[0], tmp_path)[0])
    for outer in (AdaKVPress(press), ChunkPress(press, chunk_length=7)):
        past = PressedCache()
        with outer(tiny("llama")):
            tiny("llama")(tokens(1, 20), **cache_argument(past))
        assert past.achieved_ratio() == 0.5
    with pytest.raises(PressError, match="needs those of all"):
        BlockPress(press)
    with pytest.raises(PressError, match=r"KVzapPress chooses *once"):
        DecodingPress(KVzapPress())


def test_changed_weights_are_read_again(views: list[LayerView], tmp_path: Path) -> None:
    folder, _ = of(views[0], tmp_path)
    press = KVzapPress(weights=folder)
    with torch.inference_mode():
        before = press.score(views[0]).clone()
    x = views[0].hidden_states
    assert x is not None
    write_kvzap(tmp_path, x.shape[-1], views[0].keys.shape[1], 4, 9)
    assert not torch.allclose(press.score(views[0]), before)


def test_what_it_says_of_itself() -> None:
    (info,) = [info for info in catalogue() if info.name == "kvzap"]
    assert (info.kind, info.can_rechoose) == ("trained", False)
    assert make_press("kvzap", 0.5, model_type="linear") == KVzapPress(0.5, model_type="linear")
    with pytest.raises(PressError, match="model_type must be 'mlp' or 'linear', got 'cnn'"):
        KVzapPress(model_type="cnn")


def test_outside_the_block() -> None:
    with pytest.raises(PressError, match=r"KVzapPress looks at hidden states.*inside 'with press\(model\):'"):
        tiny("llama")(tokens(1, 9), **cache_argument(PressedCache(KVzapPress(0.5))))


# -- weights that cannot be used ---------------------------------------------------------------------------------------


def test_a_model_without_a_name(views: list[LayerView]) -> None:
    with pytest.raises(PressError, match=r"not loaded from anywhere; give the weights: KVzapPress\(weights=FOLDER\)"):
        KVzapPress().score(views[0])


def test_a_folder_without_the_files(views: list[LayerView], tmp_path: Path) -> None:
    with pytest.raises(
        PressError, match=r"has no file config.json; give the folder with the files of nvidia/KVzap-mlp"
    ):
        KVzapPress(weights=str(tmp_path)).score(views[0])
    of(views[0], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PressError, match=r"has no file model.safetensors"):
        KVzapPress(weights=str(tmp_path)).score(views[0])


@pytest.mark.parametrize(
    "change", [{"input_dim": 31}, {"output_dim": 5}, {"n_modules": 1}], ids=lambda change: next(iter(change))
)
def test_weights_of_another_model(views: list[LayerView], tmp_path: Path, change: dict[str, int]) -> None:
    folder, _ = of(views[0], tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(PressError, match=r"KVzapPress: .* holds weights for .* layer 1 of this model has 2 KV heads"):
        KVzapPress(weights=folder).score(views[1])


def test_weights_of_the_other_kind(views: list[LayerView], tmp_path: Path) -> None:
    folder, _ = of(views[0], tmp_path, "linear")
    with pytest.raises(PressError, match="holds weights of model_type='linear'"):
        KVzapPress(weights=folder).score(views[0])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\x00\x01", bytes(100)])
def test_damaged_files(views: list[LayerView], tmp_path: Path, name: str, content: bytes) -> None:
    folder, _ = of(views[0], tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PressError, match=rf"KVzapPress: .*{name} is damaged.*fetch it again"):
        KVzapPress(weights=folder).score(views[0])


def test_files_that_contradict_each_other(views: list[LayerView], tmp_path: Path) -> None:
    folder, _ = of(views[0], tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_dim": 13}))
    with pytest.raises(PressError, match=r"the shapes of layer 0 are not those in config\.json"):
        KVzapPress(weights=folder).score(views[0])


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(views: list[LayerView], monkeypatch: pytest.MonkeyPatch) -> LayerView:
    monkeypatch.setattr(views[0].module.config, "_name_or_path", "meta/Tiny-1B")
    return views[0]


def test_published_weights_are_found_by_name(named: LayerView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    _, weights = of(named, tmp_path)

    def fetch(repo: str, name: str) -> Path:
        asked.append((repo, name))
        return tmp_path / name

    monkeypatch.setattr("coldpress.learned.published.fetch_hub_file", fetch)
    torch.testing.assert_close(KVzapPress().score(named), expected(named, weights, "mlp"), atol=1e-4, rtol=1e-4)
    assert asked == [("nvidia/KVzap-mlp-Tiny-1B", name) for name in ("config.json", "model.safetensors")]


def test_an_unreachable_hub(named: LayerView, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo: str, name: str) -> Path:
        raise UnreachableError(f"the Hugging Face hub could not be reached for {repo} (no route)")

    monkeypatch.setattr("coldpress.learned.published.fetch_hub_file", fetch)
    message = r"KVzapPress: config.json is not .* reached for nvidia/KVzap-linear-Tiny-1B \(no route\).*weights=FOLDER"
    with pytest.raises(UnreachableError, match=message):
        KVzapPress(model_type="linear").score(named)


def test_no_published_weights(named: LayerView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldpress.learned.published.fetch_hub_file", lambda repo, name: None)
    with pytest.raises(
        PressError, match=r"no published weights for this model: there is no config.json in nvidia/KVzap"
    ):
        KVzapPress().score(named)


# -- while decoding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold(BasePress):
    """Evicts what scores too low and is not among the last four, every three tokens; remembers what it went by."""

    press: KVzapPress
    log: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list, compare=False)

    @property
    def n_recent_queries(self) -> int:
        return 1

    def is_due(self, n_new: int) -> bool:
        return n_new >= 3

    def compress(self, view: LayerView) -> Kept:
        positions = view.positions
        if positions is None:
            positions = torch.arange(view.n_tokens).expand(view.keys.shape[:3])
        scores = self.press.scores(view)
        self.log.append((view.layer_idx, view.keys.shape[0], positions, scores))
        is_kept = (scores > 0) | (positions >= view.end - 4)
        slots = select_counts(is_kept & (positions >= 0), is_kept.sum(-1))
        return view.take(slots)._replace(carry=scores.gather(2, slots.clamp(min=0)))

    compress_again = compress


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_a_press_around_it_can_go_on_while_decoding(name: str, tmp_path: Path) -> None:
    """Every score it goes by is that of the hidden state with which the token came, whatever has gone since."""
    model = tiny(name)
    view = views_of(name, tokens(1, 5))[0]
    folder, weights = of(view, tmp_path)
    press, past = Threshold(KVzapPress(weights=folder)), PressedCache()
    with projected(model) as seen, press(model):
        for i, n in enumerate((19, 1, 1, 1, 5, 2, 1)):
            model(tokens(2, n, seed=i), **cache_argument(past))
    hidden = [torch.cat(states, dim=1) for states in seen.values()]
    assert past.seen_tokens == 30
    for layer in (
        0,
        1,
    ):  # at the prefill and three times after it, rows that differ one by one
        assert sum(entry[1] for entry in press.log if entry[0] == layer) == 2 * 4
    n_held = sum(int((layer.positions() >= 0).sum()) for layer in past.pressed_layers())
    assert n_held < 0.8 * 2 * view.keys.shape[1] * 2 * 30
    for layer, n_rows, positions, scores in press.log:
        twin = replace(view, module=list(seen)[layer], keys=torch.zeros(2, view.keys.shape[1], 30, 1))
        twins = expected(replace(twin, hidden_states=hidden[layer]), weights, "mlp")  # [2, Hkv, 30]
        is_empty, at = positions < 0, positions.clamp(min=0)
        assert any(
            torch.allclose(scores.masked_fill(is_empty, 0), own.gather(2, at).masked_fill(is_empty, 0), atol=1e-4)
            for own in ([twins] if n_rows == 2 else [twins[:1], twins[1:]])
        )


def test_decoding_outside_the_block_says_so(tmp_path: Path) -> None:
    view = views_of("llama", tokens(1, 5))[0]
    past = PressedCache(Threshold(KVzapPress(weights=of(view, tmp_path)[0])))
    with prefilling(tiny("llama"), past):
        tiny("llama")(tokens(1, 19), **cache_argument(past))
    with pytest.raises(PressError, match=r"looks at hidden states.*inside 'with press\(model\):'"):
        tiny("llama")(tokens(1, 3), **cache_argument(past))


@pytest.mark.parametrize("dropped", [1, 2])
def test_cropped_tokens_are_forgotten(tmp_path: Path, dropped: int) -> None:
    model, view = tiny("llama"), views_of("llama", tokens(1, 5))[0]
    logs = []
    for first in (tokens(1, 2, seed=3)[:, : 2 - dropped], tokens(1, 2, seed=3)):
        press, past = Threshold(KVzapPress(weights=of(view, tmp_path)[0])), PressedCache()
        with press(model):
            model(tokens(1, 19), **cache_argument(past))
            if first.shape[1]:
                model(first, **cache_argument(past))
            past.crop(19 + 2 - dropped)
            model(tokens(1, 4, seed=4), **cache_argument(past))
        logs.append([entry[3] for entry in press.log])
    assert len(logs[0]) == 4
    for own, other in zip(*logs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
