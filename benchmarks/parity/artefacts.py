"""Files that a press needs and that kvpress would take from a hub: random ones in the published form, for both.

Each function makes the files for the shape of a model once in a process, and always the same ones.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

_FILES = tempfile.TemporaryDirectory(prefix="parity-")  # removed when the process ends
_GATE_DIM, _GATE_SINK = 16, 16  # of FastKVzip's published gates
_PERCENTS = 99  # LU-KV's curves are for 1 to 99 percent


class Shape(NamedTuple):
    """What the files of a model depend on."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_hidden: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        config = model.config
        sizes = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
        return cls(*sizes, model.model.layers[0].self_attn.head_dim, config.hidden_size)


def query_statistics(model: PreTrainedModel) -> str:
    """A folder with mean and covariance of every query head, for ``ExpectedAttentionStatsPress``."""
    return _query_statistics(Shape.of(model))


@cache
def _query_statistics(shape: Shape) -> str:
    draw, size = _draws(5), (shape.n_layers, shape.n_heads, shape.head_dim)
    mean, factor = draw(*size), draw(*size, shape.head_dim) / shape.head_dim**0.5
    covariance = (factor @ factor.transpose(-1, -2)).contiguous()
    facts = {"num_layers": shape.n_layers, "num_heads": shape.n_heads, "head_dim": shape.head_dim}
    sampling = {"dataset_name": "kmfoda/booksum", "num_samples": 100, "sample_seq_len": 1000, "n_sink": 4}
    return _folder({"query_mean": mean, "query_cov": covariance}, facts | sampling | {"model_name": "parity"})


def query_filters(model: PreTrainedModel) -> str:
    """A folder with a direction for every KV head, for ``QFilterPress``."""
    return _query_filters(Shape.of(model))


@cache
def _query_filters(shape: Shape) -> str:
    filters = torch.nn.functional.normalize(_draws(6)(shape.n_layers, shape.n_kv_heads, shape.head_dim), dim=-1)
    facts = {"num_layers": shape.n_layers, "num_kv_heads": shape.n_kv_heads, "kv_head_dim": shape.head_dim}
    return _folder({"q_filters": filters}, facts)


def predictors(model: PreTrainedModel, model_type: str) -> str:
    """A folder with a linear map or a network of two for every layer, for ``KVzapPress``."""
    return _predictors(Shape.of(model), model_type)


@cache
def _predictors(shape: Shape, model_type: str) -> str:
    draw, n_between = _draws(7), None if model_type == "linear" else 24
    tensors: dict[str, Tensor] = {}
    for layer in range(shape.n_layers):
        sizes = [shape.n_hidden, *([] if n_between is None else [n_between]), shape.n_kv_heads]
        names = [f"layers.{layer}"] if n_between is None else [f"layers.{layer}.0", f"layers.{layer}.2"]
        for name, n_in, n_out in zip(names, sizes, sizes[1:], strict=False):
            tensors |= {f"{name}.weight": draw(n_out, n_in) / n_in**0.5, f"{name}.bias": draw(n_out)}
    facts = {"input_dim": shape.n_hidden, "output_dim": shape.n_kv_heads, "hidden_dim": n_between}
    return _folder(tensors, facts | {"n_modules": shape.n_layers, "model_type": "kvzap"})


def gates(model: PreTrainedModel) -> str:
    """A folder with the file of all layers' gates, for ``FastKVzipPress``."""
    return _gates(Shape.of(model))


@cache
def _gates(shape: Shape) -> str:
    draw, n_heads, group = _draws(8), shape.n_kv_heads, shape.n_heads // shape.n_kv_heads
    folder = _new_folder()
    layers = [
        {
            "q_proj.weight": draw(shape.n_heads * _GATE_DIM, shape.n_hidden) / shape.n_hidden**0.5,
            "q_proj.bias": draw(shape.n_heads * _GATE_DIM),
            "k_proj.weight": draw(n_heads * _GATE_DIM, shape.n_hidden) / shape.n_hidden**0.5,
            "q_norm.weight": 1 + 0.1 * draw(_GATE_DIM),
            "k_norm.weight": 1 + 0.1 * draw(_GATE_DIM),
            "k_base": draw(n_heads, 1, _GATE_SINK, _GATE_DIM),
            "b": draw(n_heads, 1, group),
        }
        for _ in range(shape.n_layers)
    ]
    torch.save({"module": layers}, folder / f"q{group}_dim{_GATE_DIM}_sink{_GATE_SINK}.pt")
    return str(folder)


def budget_curves(model: PreTrainedModel, step: float) -> str:
    """An .npy file with the share that every head loses at 1 to 99 percent, for ``LUKVPress``.

    Args:
        step: how far apart two possible shares are. Their mean over all heads is the percentage asked for, and that of
            each layer is a possible share too.
    """
    return _budget_curves(Shape.of(model), step)


@cache
def _budget_curves(shape: Shape, step: float) -> str:
    percents = np.arange(1, _PERCENTS + 1)[:, None, None] / 100
    draw = np.random.default_rng(9)
    layers, heads = (draw.uniform(-1, 1, (1, shape.n_layers, n)) for n in (1, shape.n_kv_heads))
    layers, heads = layers - layers[:, ::-1], heads - heads[:, :, ::-1]  # what one keeps more, another keeps less
    most = 0.1 * np.minimum(percents, 1 - percents)
    curves = percents + (np.round(most * layers / step) + np.round(most * heads / step)) * step
    path = _new_folder() / "curves.npy"
    np.save(path, curves.clip(0, 1))
    return str(path)


def head_pattern(model: PreTrainedModel, sink_size: int, recent_size: int) -> str:
    """A folder with a gate for every KV head and the sizes of the ends, for ``DuoAttentionPress``."""
    return _head_pattern(Shape.of(model), sink_size, recent_size)


@cache
def _head_pattern(shape: Shape, sink_size: int, recent_size: int) -> str:
    folder = _new_folder()
    gates = np.random.default_rng(10).uniform(0, 1, (shape.n_layers, shape.n_kv_heads))
    np.savetxt(folder / "full_attention_heads.tsv", gates, delimiter="\t")
    sizes = {"sink_size": sink_size, "recent_size": recent_size}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return str(folder)


def _draws(seed: int) -> Any:
    """Normal numbers of any shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator)


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_FILES.name))


def _folder(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """A folder as models and their like are published in."""
    folder = _new_folder()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return str(folder)
