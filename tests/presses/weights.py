"""Random weights for the tiny models, in the files in which trained ones are published."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coldpress import FastKVzipPress, KVzapPress, LayerView, RestoreKVPress

N_RESTORED = 3  # of the random weights for RestoreKV


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 2


def write_kvzap(folder: Path, n_in: int, n_out: int, n_layers: int, n_hidden: int | None) -> dict[str, Tensor]:
    """config.json and model.safetensors of a KVzap model; returns what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"input_dim": n_in, "output_dim": n_out, "hidden_dim": n_hidden, "n_modules": n_layers}
    (folder / "config.json").write_text(json.dumps({"model_type": "kvzap", "architectures": ["KVzapModel"]} | sizes))
    shapes = {"": (n_out, n_in)} if n_hidden is None else {".0": (n_hidden, n_in), ".2": (n_out, n_hidden)}
    weights = {}
    for i in range(n_layers):
        for name, shape in shapes.items():
            weights[f"layers.{i}{name}.weight"] = _random(*shape, seed=2 * i)
            weights[f"layers.{i}{name}.bias"] = _random(shape[0], seed=2 * i + 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights


def write_gates(
    path: Path, n_in: int, n_heads: int, group: int, n_layers: int, dim: int = 16
) -> list[dict[str, Tensor]]:
    """The gates of a FastKVzip model; returns them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {
        "q_proj.weight": (n_heads * group * dim, n_in),
        "q_proj.bias": (n_heads * group * dim,),
        "k_proj.weight": (n_heads * dim, n_in),
        "q_norm.weight": (dim,),
        "k_norm.weight": (dim,),
        "k_base": (n_heads, 1, 3, dim),
        "b": (n_heads, 1, group),
    }
    gates = [
        {name: _random(*shape, seed=10 * i + j) for j, (name, shape) in enumerate(shapes.items())}
        for i in range(n_layers)
    ]
    torch.save({"module": gates, "loss": torch.tensor(0.5).double().numpy()}, path)
    return gates


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those in decoder layers, by name."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
    return {name: m for name, m in found if any(part.isdigit() for part in name.split("."))}


def write_restorekv(
    folder: Path, model: nn.Module, n: int, prefix: str = "base_model.model.", **config: Any
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Embeddings and an adapter for all linear layers of ``model``; returns the embeddings, and A and B by module."""
    folder.mkdir(parents=True, exist_ok=True)
    embeddings = _random(n, model.get_input_embeddings().weight.shape[1], seed=3)  # type: ignore[operator]
    save_file({"restore_embeddings": embeddings}, folder / "restore_embeddings.safetensors")
    parts, tensors, rank = {}, {}, 2
    for i, (name, module) in enumerate(linear_layers(model).items()):
        n_in, n_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        parts[name] = _random(rank, n_in, seed=2 * i), _random(n_out, rank, seed=2 * i + 1)
        for letter, weight in zip("AB", parts[name], strict=True):
            tensors[f"{prefix}{name}.lora_{letter}.weight"] = weight
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    says = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "bias": "none", "target_modules": ["all of them"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(says | {"use_dora": False, "modules_to_save": None}))
    return embeddings, parts


@pytest.fixture
def given_weights(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presses that were given no weights read random ones of the right shape, wherever their model comes from."""
    folder = tmp_path_factory.getbasetemp() / "weights"
    of_kvzap, of_gates, of_restorer = KVzapPress.score, FastKVzipPress.score, RestoreKVPress.restorer

    def sizes(view: LayerView) -> tuple[int, int] | None:
        """Of the hidden states, and how many KV heads; None where there are no hidden states, which the press says."""
        whole = view if view.whole is None else view.whole
        return None if view.hidden_states is None else (view.hidden_states.shape[-1], whole.keys.shape[1])

    def kvzap(press: KVzapPress, view: LayerView) -> Tensor:
        n_hidden, found = 12 if press.model_type == "mlp" else None, sizes(view)
        if press.weights is None and found is not None:
            own = folder / f"kvzap-{found[0]}-{found[1]}-{n_hidden}"
            if not own.exists():
                write_kvzap(own, *found, 4, n_hidden)
            press = replace(press, weights=str(own))
        return of_kvzap(press, view)

    def gates(press: FastKVzipPress, view: LayerView) -> Tensor:
        found = sizes(view)
        if press.weights is None and found is not None:
            own = folder / f"gates-{found[0]}-{found[1]}" / f"q{view.group_size}_dim16_sink16.pt"
            if not own.exists():
                write_gates(own, *found, view.group_size, 4)
            press = replace(press, weights=str(own.parent))
        return of_gates(press, view)

    def restorer(press: RestoreKVPress, model: nn.Module) -> Any:
        shapes = [(name, tuple(module.weight.shape)) for name, module in linear_layers(model).items()]
        own = folder / f"restorekv-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}"
        if not own.exists():
            write_restorekv(own, model, N_RESTORED)
        return of_restorer(press if press.weights else replace(press, weights=str(own)), model)

    monkeypatch.setattr(RestoreKVPress, "restorer", restorer)
    monkeypatch.setattr(KVzapPress, "score", kvzap)
    monkeypatch.setattr(FastKVzipPress, "score", gates)
