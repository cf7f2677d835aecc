"""Files that a press needs and that kvpress would take from a hub: random ones in the same form, for both libraries."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


def query_statistics(model: PreTrainedModel) -> str:
    """A folder with mean and covariance of every query head, as ``ExpectedAttentionStatsPress`` reads it."""
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    return _query_statistics(config.num_hidden_layers, config.num_attention_heads, head_dim)


@cache
def _query_statistics(n_layers: int, n_heads: int, head_dim: int) -> str:
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(n_layers, n_heads, head_dim, generator=generator)
    factor = torch.randn(n_layers, n_heads, head_dim, head_dim, generator=generator) / head_dim**0.5
    tensors = {"query_mean": mean, "query_cov": (factor @ factor.transpose(-1, -2)).contiguous()}
    save_file(tensors, folder / "model.safetensors")
    facts = {"num_layers": n_layers, "num_heads": n_heads, "head_dim": head_dim, "model_name": "parity"}
    sampling = {"dataset_name": "kmfoda/booksum", "num_samples": 100, "sample_seq_len": 1000, "n_sink": 4}
    (folder / "config.json").write_text(json.dumps(facts | sampling), encoding="utf-8")
    return str(folder)
