"""RestoreKV: random adapters in PEFT's files against models with merged weights that run one token at a time."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contract.architectures import BY_NAME, ROTARY_VARIANTS, tiny, tokens
from tests.oracles.models import Llama, Neox, attend, rotate
from tests.oracles.replays import Twin, best_of_all, kvzip_scores
from tests.presses.weights import write_restorekv
from tests.presses.words import Words
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coldpress import (
    AdaKVPress,
    DecodingPress,
    KnormPress,
    KVzipPress,
    PrefillDecodingPress,
    PressedCache,
    RestoreKVPress,
    catalogue,
    make_press,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import PressError, UnreachableError
from coldpress.learned.lora import Lora
from coldpress.models.block import prefilling
from coldpress.presses.restorekv import _moved_back

MODELS = ["gpt_neox", "gpt_neox_full_rotary", "llama"]
N, N_NEW = 21, 3
IDS, QUESTION = tokens(1, N), tokens(1, 5, seed=4)
SMALL: dict[str, Any] = {"chunk_size": 9, "n_sink": 2, "tokenizer": Words()}
FILES = ("restore_embeddings.safetensors", "adapter_config.json", "adapter_model.safetensors")


def run(model: PreTrainedModel, press: Any, ids: Tensor = IDS) -> PressedCache:
    past = PressedCache()
    with torch.no_grad(), press(model):
        model(ids, **cache_argument(past))
    return past


def kept(past: PressedCache) -> list[list[list[int]]]:
    layers = [layer.positions()[0].tolist() for layer in past.pressed_layers()]
    return [[[t for t in head if t >= 0] for head in layer] for layer in layers]


def net_of(name: str, model: PreTrainedModel) -> Neox | Llama:
    return (Neox if name.startswith("gpt_neox") else Llama)(model)


class Restored(Twin):
    """The text token by token, and then the trained embeddings by a model with the adapter in its weights."""

    def __init__(self, name: str, ids: list[int], embeddings: Tensor, parts: dict[str, Any], scale: float):
        super().__init__(name, ids)
        merged = BY_NAME[name].build()
        for module, (a, b) in parts.items():
            merged.get_submodule(module).weight.add_(scale * b @ a)
        net, n_rotary = net_of(name, merged), self.net.n_rotary[name]
        for position, hidden in enumerate(embeddings, start=len(ids)):
            for module, layer in zip(net.layers, self.layers, strict=True):
                queries, keys, values = net.project(module, hidden)
                layer.keys.append([rotate(k, position, n_rotary) for k in keys])
                layer.values.append(values)
                pairs = [
                    [(k[i], v[i]) for k, v in zip(layer.keys, layer.values, strict=True)] for i in range(net.n_kv_heads)
                ]
                attended = [
                    attend(rotate(q, position, n_rotary), pairs[i // self.group]) for i, q in enumerate(queries)
                ]
                hidden = net.combine(module, hidden, torch.cat(attended))

    def logits_after(self, name: str, question: Tensor, slots: list[list[list[int]]], start: int) -> Tensor:
        """Logits ``[Q, V]`` of ``question`` at positions from ``start`` on, after the pairs in slots[layer][head]."""
        n_rotary, logits = self.net.n_rotary[name], []
        pairs = [
            [[(layer.keys[t][j], layer.values[t][j]) for t in head] for j, head in enumerate(heads)]
            for layer, heads in zip(self.layers, slots, strict=True)
        ]
        for position, token in enumerate(question, start=start):
            hidden = self.model.get_input_embeddings()(token)
            for module, heads in zip(self.net.layers, pairs, strict=True):
                queries, keys, values = self.net.project(module, hidden)
                for own, key, value in zip(heads, keys, values, strict=True):
                    own.append((rotate(key, position, n_rotary), value))
                attended = [
                    attend(rotate(q, position, n_rotary), heads[i // self.group]) for i, q in enumerate(queries)
                ]
                hidden = self.net.combine(module, hidden, torch.cat(attended))
            logits.append(self.model.get_output_embeddings()(self.net.norm(hidden)))
        return torch.stack(logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["attention", "plus"])
@pytest.mark.thinned(2)
def test_what_is_stored(name: str, kind: str, tmp_path: Path) -> None:
    model, is_plus = tiny(name), kind == "plus"
    embeddings, parts = write_restorekv(tmp_path, model, N_NEW)
    past = run(model, RestoreKVPress(0.5, kvzip_plus_normalization=is_plus, weights=str(tmp_path), **SMALL))
    scores = kvzip_scores(name, IDS[0].tolist(), chunk_size=9, n_sink=2, kind=kind)
    expected = best_of_all([[[math.inf] * 2 + head[2:] for head in layer] for layer in scores], 10 - N_NEW, 2)
    assert kept(past) == [[[*head, *[N - 1] * N_NEW] for head in layer] for layer in expected]
    assert past.achieved_ratio() == 1 - 10 / N and past.seen_tokens == N

    twin = Restored(name, IDS[0].tolist(), embeddings, parts, scale=3 / 2)
    slots = [[[*head, *range(N, N + N_NEW)] for head in layer] for layer in expected]
    n_rotary = twin.net.n_rotary[name]
    for own, layer, heads in zip(past.pressed_layers(), twin.layers, slots, strict=True):
        for j, head in enumerate(heads):
            keys = torch.stack([rotate(layer.keys[t][j], -N_NEW, n_rotary) for t in head])
            torch.testing.assert_close(own.keys[0, j, : len(head)], keys, atol=1e-4, rtol=1e-4)  # type: ignore[index]
            values = torch.stack([layer.values[t][j] for t in head])
            torch.testing.assert_close(own.values[0, j, : len(head)], values, atol=1e-4, rtol=1e-4)  # type: ignore[index]
        assert own.stored_length == max(map(len, heads))  # the rest is freed
    full = run(model, KVzipPress(0.0))
    n_held, n_all = (sum(int((c.positions(i) >= 0).sum()) for i in range(2)) for c in (past, full))
    assert past.kv_bytes() == full.kv_bytes() * n_held // n_all

    # the question comes after the restored tokens
    logits = model(QUESTION, **cache_argument(past)).logits[0]
    after = twin.logits_after(name, QUESTION[0], slots, N + N_NEW)
    torch.testing.assert_close(logits, after, atol=2e-4, rtol=0)
    assert (twin.logits_after(name, QUESTION[0], slots, N) - after).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*(a.name for a in ROTARY_VARIANTS), "gpt_neox", "phi", "glm", "cohere", "gpt2"])
def test_keys_move_back_by_the_models_own_rotation(name: str) -> None:
    """Keys of the first layer depend on nothing but the token and its position."""
    model, here, later = BY_NAME[name].build(), PressedCache(), PressedCache()
    model(IDS, **cache_argument(here))
    keys = here.layer(0).keys
    assert keys is not None
    if name != "gpt2":  # which does not rotate
        model(IDS, **cache_argument(later), position_ids=torch.arange(N_NEW, N_NEW + N)[None])
        moved = later.layer(0).keys
        assert moved is not None and not torch.allclose(moved, keys, atol=1e-2)
    else:
        moved = keys
    attention = next(m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__)
    rope = here.session.rope(attention, IDS.device)
    torch.testing.assert_close(_moved_back(moved, rope, N_NEW, N + N_NEW), keys, atol=1e-5, rtol=1e-4)


def test_generate_goes_on_after_the_text(tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.cat([IDS, QUESTION], dim=1)
    write_restorekv(tmp_path, model, N_NEW)
    press = RestoreKVPress(0.5, weights=str(tmp_path), **SMALL)
    answers = []
    for options in (cache_argument(run(model, press)), cache_argument(run(model, press).fork())):
        mask = torch.ones_like(ids)
        answers.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options))
    past, found = run(model, press), ids
    logits = model(QUESTION, **cache_argument(past)).logits
    for _ in range(6):
        token = logits[:, -1:].argmax(-1)
        found = torch.cat([found, token], dim=1)
        logits = model(token, **cache_argument(past)).logits
    assert torch.equal(answers[0], found) and torch.equal(answers[1], found)


def test_without_a_difference_the_adapter_changes_nothing(tmp_path: Path) -> None:
    """With B = 0 the restored pairs are those of the embeddings as the model itself reads them."""
    model = tiny("llama")
    embeddings, _ = write_restorekv(tmp_path, model, N_NEW)
    press = RestoreKVPress(0.5, weights=str(tmp_path), **SMALL)
    with_adapter = run(model, press)
    held = load_file(tmp_path / FILES[2])
    save_file({k: v * ("lora_A" in k) for k, v in held.items()}, tmp_path / FILES[2])
    plain, full = run(model, press), PressedCache()
    model(IDS, **cache_argument(full))
    with torch.no_grad():
        model.model(inputs_embeds=embeddings[None], **cache_argument(full))
    for own, other, layer in zip(
        plain.pressed_layers(), with_adapter.pressed_layers(), full.pressed_layers(), strict=True
    ):
        for j, n in enumerate((own.positions()[0] >= 0).sum(-1)):
            torch.testing.assert_close(own.values[0, j, n - N_NEW : n], layer.values[0, j, -N_NEW:])  # type: ignore[index]
            assert not torch.allclose(own.values[0, j, n - N_NEW : n], other.values[0, j, n - N_NEW : n])  # type: ignore[index]


@pytest.mark.parametrize("ratio", [0.8, 0.9, 0.99])
def test_a_budget_without_room_is_kvzips_alone(ratio: float, tmp_path: Path) -> None:
    model = tiny("llama")
    write_restorekv(tmp_path, model, 4)
    past = run(model, RestoreKVPress(ratio, weights=str(tmp_path), **SMALL))
    assert kept(past) == kept(run(model, KVzipPress(ratio, **SMALL)))
    past = run(model, RestoreKVPress(budget_tokens=5, weights=str(tmp_path), **SMALL))  # one more than there are
    assert kept(past) == [[[0, *[N - 1] * 4] for _ in range(2)] for _ in range(2)]
    assert kept(run(model, RestoreKVPress(0.0, weights=str(tmp_path)))) == [[list(range(N))] * 2] * 2


def test_layerwise_and_budgets(tmp_path: Path) -> None:
    model = tiny("llama")
    write_restorekv(tmp_path, model, N_NEW)
    past = run(model, RestoreKVPress(0.5, layerwise=True, weights=str(tmp_path), **SMALL))
    assert [sum(map(len, layer)) for layer in kept(past)] == [2 * 10] * 2
    past = run(model, RestoreKVPress(budget_bytes=9 * 2 * 2 * 16 * 4 + 5, weights=str(tmp_path), **SMALL))
    assert sum(len(head) for layer in kept(past) for head in layer) == 4 * 9


def test_text_beside_sliding_windows(tmp_path: Path) -> None:
    model = tiny("gemma3")
    write_restorekv(tmp_path, model, N_NEW)
    past = run(model, RestoreKVPress(0.5, weights=str(tmp_path), **SMALL))
    assert [[head[-N_NEW:] == [N - 1] * N_NEW for head in layer] for layer in kept(past)] == [
        [False] * 2,
        [True] * 2,
    ] * 2
    logits = model(QUESTION, **cache_argument(past)).logits
    assert torch.isfinite(logits).all()


def test_a_shared_prefill(tmp_path: Path) -> None:
    model, full = tiny("llama"), PressedCache()
    write_restorekv(tmp_path, model, N_NEW)
    presses = [RestoreKVPress(ratio, weights=str(tmp_path), **SMALL) for ratio in (0.0, 0.3, 0.6)]
    branches = full.branches([*presses, KnormPress(0.5)])
    with torch.no_grad(), prefilling(model, full, *branches):
        model(IDS, **cache_argument(full))
    assert branches[0].achieved_ratio() == full.achieved_ratio() == 0
    for press, branch in zip(presses[1:], branches[1:], strict=False):
        alone = run(model, press)
        assert kept(branch) == kept(alone)
        for layer, own in zip(branch.pressed_layers(), alone.pressed_layers(), strict=True):
            assert torch.equal(layer.keys, own.keys) and torch.equal(layer.values, own.values)  # type: ignore[arg-type]


def test_a_schedule_goes_on_after_it(tmp_path: Path) -> None:
    model = tiny("llama")
    write_restorekv(tmp_path, model, N_NEW)
    press = RestoreKVPress(0.5, weights=str(tmp_path), **SMALL)
    both = PrefillDecodingPress(press, DecodingPress(KnormPress(), compression_interval=4, target_size=8))
    past, expected = PressedCache(), kept(run(model, press))
    with both(model):
        model(IDS, **cache_argument(past))
        assert kept(past) == expected
        model(tokens(1, 4), **cache_argument(past))
    assert past.stored_lengths() == [8, 8]


# -- what is left of it ----------------------------------------------------------------------------------------------


def traces(model: PreTrainedModel) -> Any:
    """What an adapter or a hook that stays would show in."""
    hooks = [(name, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()]
    weights = {name: (id(w), w._version) for name, w in model.named_parameters()}
    return hooks, weights, list(model.state_dict()), sorted(vars(model))


def test_no_adapter_stays_on_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: the adapter stayed on the model, under other names of its modules."""
    model = BY_NAME["llama"].build()
    write_restorekv(tmp_path, model, N_NEW)
    press = RestoreKVPress(0.5, weights=str(tmp_path), **SMALL)
    before, logits = traces(model), model(IDS).logits
    run(model, press)
    assert traces(model) == before and torch.equal(model(IDS).logits, logits)
    seen: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> None:
        seen.extend(len(m._forward_hooks) for m in model.modules() if isinstance(m, torch.nn.Linear))
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(RestoreKVPress, "run", fails)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        run(model, press)
    assert sum(seen) == 14  # every linear layer but the head had one
    assert traces(model) == before and torch.equal(model(IDS).logits, logits)


def test_other_threads_run_the_model_as_it_is(tmp_path: Path) -> None:
    model, found = tiny("llama"), []
    write_restorekv(tmp_path, model, N_NEW)
    press = RestoreKVPress(0.5, weights=str(tmp_path))
    expected = model(IDS).logits
    with press.restorer(model)[1].added(press, model):
        thread = threading.Thread(target=lambda: found.append(model(IDS).logits))
        thread.start()
        thread.join()
        assert not torch.allclose(model(IDS).logits, expected, atol=0.1)
    assert torch.equal(found[0], expected)
    assert torch.equal(model(IDS).logits, expected)


def test_inference_mode_and_other_dtypes(tmp_path: Path) -> None:
    model, past = BY_NAME["gpt_neox"].build(dtype=torch.bfloat16), []
    write_restorekv(tmp_path, model, N_NEW)
    press = RestoreKVPress(0.5, weights=str(tmp_path), **SMALL)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        past.append(DynamicCache())
        with mode(), press(model):
            model(IDS, **cache_argument(past[-1]))
            model(QUESTION, **cache_argument(past[-1]))
    for layers in zip(*(cache.layers for cache in past), strict=True):
        assert all(layer.keys.dtype == torch.bfloat16 for layer in layers)
        assert all(torch.equal(layer.keys, layers[0].keys) for layer in layers)


# -- what cannot work ------------------------------------------------------------------------------------------------


def test_batches_and_padding_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model, past = tiny("llama"), PressedCache()
    write_restorekv(tmp_path, model, N_NEW)
    press = RestoreKVPress(0.5, weights=str(tmp_path), **SMALL)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with press(model):
        with pytest.raises(PressError, match=r"RestoreKVPress shows the model one text.*a batch of 2"):
            model(tokens(2, N), **cache_argument(past))
        with pytest.raises(PressError, match="a padded text"):
            model(IDS, attention_mask=mask, **cache_argument(past))
    assert past.seen_tokens == 0
    with pytest.raises(PressError, match=r"inside 'with press\(model\):', with input_ids"):
        model(IDS, **cache_argument(PressedCache(press)))


def test_what_it_says_of_itself() -> None:
    (info,) = [info for info in catalogue() if info.name == "restorekv"]
    assert (info.kind, info.can_rechoose, info.per_head, info.per_layer) == ("trained", False, True, True)
    assert make_press("restorekv", 0.5, layerwise=True) == RestoreKVPress(0.5, True)
    assert replace(RestoreKVPress(0.5), weights="here") != RestoreKVPress(0.5)
    with pytest.raises(PressError, match="one layer at a time, and RestoreKVPress chooses"):
        AdaKVPress(RestoreKVPress(0.5))  # type: ignore[arg-type]
    with pytest.raises(PressError, match="n_sink must be an integer >= 0"):
        RestoreKVPress(n_sink=-1)


@pytest.mark.parametrize(("is_plus", "ending"), [(False, ""), (True, "_plus")])
def test_published_weights_are_found_by_name(
    is_plus: bool, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = BY_NAME["llama"].build(), []
    write_restorekv(tmp_path, model, N_NEW)

    def fetch(repo: str, name: str) -> Path:
        asked.append((repo, name))
        return tmp_path / name

    press = RestoreKVPress(0.5, kvzip_plus_normalization=is_plus, **SMALL)
    with pytest.raises(PressError, match=r"give the weights: RestoreKVPress\(weights=FOLDER\)"):
        run(model, press)
    model.config._name_or_path = "somebody/Tiny-1B"
    monkeypatch.setattr("coldpress.learned.published.fetch_hub_file", fetch)
    assert kept(run(model, press)) == kept(run(model, replace(press, weights=str(tmp_path))))
    assert set(asked) == {(f"higokri/RestoreKV-Tiny-1B{ending}", name) for name in FILES}


def test_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["llama"].build()
    model.config._name_or_path = "somebody/Tiny-1B"
    for name in FILES:
        write_restorekv(tmp_path, model, N_NEW)
        (tmp_path / name).unlink()
        with pytest.raises(PressError, match=rf"has no file {name}; give the folder with the files of higokri"):
            run(model, RestoreKVPress(0.5, weights=str(tmp_path), **SMALL))
    monkeypatch.setattr("coldpress.learned.published.fetch_hub_file", lambda *_: None)
    with pytest.raises(PressError, match="RestoreKVPress has no published weights for this model"):
        run(model, RestoreKVPress(0.5, **SMALL))

    def unreachable(*_: str) -> None:
        raise UnreachableError("the hub could not be reached")

    monkeypatch.setattr("coldpress.learned.published.fetch_hub_file", unreachable)
    with pytest.raises(UnreachableError, match=r"hf download higokri/RestoreKV-Tiny-1B restore_embeddings.safetensors"):
        run(model, RestoreKVPress(0.5, **SMALL))
    run(model, RestoreKVPress(0.0))  # nothing to restore


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"nothing", b"[3]"])
def test_damaged_files(name: str, content: bytes, tmp_path: Path) -> None:
    model = tiny("llama")
    write_restorekv(tmp_path, model, N_NEW)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PressError, match=rf"{name} is damaged or holds something else .*fetch it again"):
        run(model, RestoreKVPress(0.5, weights=str(tmp_path), **SMALL))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x.lora_A.weight": torch.ones(2, 3)}, "lora_A and lora_B of x do not fit together"),
        (
            {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 4)},
            "lora_A and lora_B of x do not fit",
        ),
        ({"x.lora_A.weight": torch.ones(2)}, r"x.lora_A.weight \(2,\) is no matrix of LoRA"),
        ({"x.lora_magnitude_vector": torch.ones(2, 2)}, "x.lora_magnitude_vector .* is no matrix of LoRA"),
        (None, "it holds no LoRA"),
    ],
)
def test_adapters_that_do_not_add_up(changed: dict[str, Tensor] | None, message: str, tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / FILES[2]
    write_restorekv(tmp_path, model, N_NEW)
    held = {} if changed is None else {k: v.clone() for k, v in load_file(path).items()} | changed
    save_file(held, path)
    with pytest.raises(PressError, match=rf"{path.name} is damaged or holds something else \({message}"):
        run(model, RestoreKVPress(0.5, weights=str(tmp_path), **SMALL))


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"use_dora": True}, "says use_dora=True"),
        ({"bias": "all", "alpha_pattern": {"q_proj": 4}}, r"says alpha_pattern={'q_proj': 4}, bias='all'"),
        ({"init_lora_weights": "pissa"}, "says init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "says peft_type='IA3'"),
        ({"something_new": 1}, "says something_new=1"),
    ],
)
def test_other_adapters_than_lora(says: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / FILES[1]
    write_restorekv(tmp_path, model, N_NEW)
    path.write_text(json.dumps(json.loads(path.read_text()) | says))
    with pytest.raises(PressError, match=rf"adapter_config.json {message}, and coldpress adds plain LoRA only"):
        run(model, RestoreKVPress(0.5, weights=str(tmp_path), **SMALL))


def test_weights_of_another_model(tmp_path: Path) -> None:
    press = RestoreKVPress(0.5, weights=str(tmp_path), **SMALL)
    write_restorekv(tmp_path, tiny("gpt_neox"), N_NEW)
    with pytest.raises(PressError, match=r"its embeddings have 64 dimensions, and those of this model 32"):
        run(tiny("llama"), press)
    write_restorekv(tmp_path, tiny("gpt_neox_full_rotary"), N_NEW)
    with pytest.raises(PressError, match=r"adds to a linear layer base_model.*attention.dense of .* it has none"):
        run(tiny("llama"), press)
    write_restorekv(tmp_path, tiny("gemma"), N_NEW)  # which has other heads
    with pytest.raises(PressError, match=r"o_proj of \(64, 32\) inputs and outputs, and .* a Linear of \(32, 32\)"):
        run(tiny("llama"), press)
    save_file({"other": torch.ones(2, 32)}, tmp_path / FILES[0])
    with pytest.raises(PressError, match=r"restore_embeddings.safetensors is damaged .*no matrix restore_embeddings"):
        run(tiny("llama"), press)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model.model."])
def test_names_with_and_without_a_prefix(prefix: str, tmp_path: Path) -> None:
    model, press = tiny("llama"), RestoreKVPress(0.5, weights=str(tmp_path))
    write_restorekv(tmp_path, model, N_NEW, prefix)
    for part in (model, model.model):
        found = press.restorer(part)[1].modules(press, part)
        assert {name.removeprefix(prefix): module for name, module in found.items()} == {
            name: model.get_submodule(name) for name in (key.removeprefix(prefix) for key in found)
        }
        assert len(found) == 14


@pytest.mark.parametrize(("says", "scale"), [({}, 3 / 2), ({"use_rslora": True}, 3 / math.sqrt(2))])
def test_how_much_is_added(says: dict[str, Any], scale: float, tmp_path: Path) -> None:
    model, press = tiny("gpt2"), RestoreKVPress(0.5, weights=str(tmp_path))  # whose layers keep weights transposed
    _, parts = write_restorekv(tmp_path, model, N_NEW, **says)
    lora = Lora.read(press, tmp_path / FILES[1], tmp_path / FILES[2])
    merged = BY_NAME["gpt2"].build()
    for name, (a, b) in parts.items():
        merged.get_submodule(name).weight.add_(scale * (b @ a).T)
    with lora.added(press, model):
        torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, atol=1e-4, rtol=1e-4)
