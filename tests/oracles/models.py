"""GPT-NeoX and Llama, one token and one head at a time, over pairs of which some may be left out."""

from __future__ import annotations

import math

import torch
from tests.contract.architectures import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldpress import PressedCache

BASE = 10_000.0  # of the rotary frequencies


def rotate(state: Tensor, position: int, n_rotary: int) -> Tensor:
    """The first ``n_rotary`` dimensions of ``state [D]``, rotated by halves."""
    out, half = state.clone(), n_rotary // 2
    for d in range(half):
        angle = position * BASE ** (-2 * d / n_rotary)
        a, b = state[d], state[d + half]
        out[d] = a * math.cos(angle) - b * math.sin(angle)
        out[d + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend(query: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    weights = torch.stack([query @ key / math.sqrt(len(query)) for key, _ in pairs]).softmax(0)
    return sum(weight * value for weight, (_, value) in zip(weights, pairs, strict=True))


class Neox:
    """GPT-NeoX, one token at a time."""

    def __init__(self, model: PreTrainedModel):
        self.layers, self.norm = list(model.gpt_neox.layers), model.gpt_neox.final_layer_norm
        self.n_heads = self.n_kv_heads = model.config.num_attention_heads
        self.dim = model.config.hidden_size // self.n_heads
        self.n_rotary = {"gpt_neox": self.dim // 4, "gpt_neox_full_rotary": self.dim}
        self.is_parallel = model.config.use_parallel_residual

    def project(self, layer: nn.Module, hidden: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        fused = layer.attention.query_key_value(layer.input_layernorm(hidden))
        heads = fused.split(3 * self.dim)
        return tuple(list(part) for part in zip(*(head.split(self.dim) for head in heads), strict=True))

    def combine(self, layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
        attended = layer.attention.dense(attended)
        if self.is_parallel:
            return hidden + attended + layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = hidden + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class Llama:
    """Llama, one token at a time."""

    def __init__(self, model: PreTrainedModel):
        self.layers, self.norm = list(model.model.layers), model.model.norm
        self.n_heads, self.n_kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.dim = model.config.hidden_size // self.n_heads
        self.n_rotary = {"llama": self.dim}

    def project(self, layer: nn.Module, hidden: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        hidden, attention = layer.input_layernorm(hidden), layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return tuple(list(projection(hidden).split(self.dim)) for projection in projections)

    def combine(self, layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(attended)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def oracle_logits(name: str, ids: Tensor, full: PressedCache, kept: list[list[list[int]]]) -> Tensor:
    """Logits ``[Q, V]`` of ``ids [Q]`` after the context that ``full`` holds, of which ``kept[layer][head]`` stays."""
    model = tiny(name)
    twin = (Neox if name.startswith("gpt_neox") else Llama)(model)
    n_rotary, group = twin.n_rotary[name], twin.n_heads // twin.n_kv_heads
    pairs = [
        [[(layer.keys[0, head, t], layer.values[0, head, t]) for t in kept[i][head]] for head in range(twin.n_kv_heads)]
        for i, layer in enumerate(full.pressed_layers())
    ]
    logits = []
    for offset, token in enumerate(ids):
        hidden, position = model.get_input_embeddings()(token), full.seen_tokens + offset
        for layer, heads in zip(twin.layers, pairs, strict=True):
            queries, keys, values = twin.project(layer, hidden)
            for head in range(twin.n_kv_heads):
                heads[head].append((rotate(keys[head], position, n_rotary), values[head]))
            attended = [attend(rotate(query, position, n_rotary), heads[i // group]) for i, query in enumerate(queries)]
            hidden = twin.combine(layer, hidden, torch.cat(attended))
        logits.append(model.get_output_embeddings()(twin.norm(hidden)))
    return torch.stack(logits)
