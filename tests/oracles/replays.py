"""What presses that replay a text have to compute, one token and one head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from tests.contract.architectures import tiny
from tests.oracles.models import Llama, Neox, attend, rotate
from tests.presses.words import BREAK, FIRST, LATER
from torch import Tensor, nn


@dataclass
class Layer:
    """What one layer made of each token; lists over tokens, then over heads."""

    inputs: list[Tensor] = field(default_factory=list)
    queries: list[list[Tensor]] = field(default_factory=list)
    keys: list[list[Tensor]] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)
    bumps: list[Tensor] = field(default_factory=list)  # zeros that were added to what the attention wrote

    def weights(self, query: int, head: int, group: int, slots: list[int]) -> list[float]:
        """Attention of a query over the pairs in ``slots`` alone."""
        q = self.queries[query][head]
        logits = [float((q @ self.keys[t][head // group]).detach()) / math.sqrt(len(q)) for t in slots]
        highest = max(logits)
        sizes = [math.exp(x - highest) for x in logits]
        return [x / sum(sizes) for x in sizes]


class Twin:
    """A tiny model run over ``ids`` one token at a time, with all that its layers compute on the way."""

    def __init__(self, name: str, ids: list[int]):
        self.model = tiny(name)
        self.net = (Neox if name.startswith("gpt_neox") else Llama)(self.model)
        self.group = self.net.n_heads // self.net.n_kv_heads
        self.layers = [Layer() for _ in self.net.layers]
        n_rotary = self.net.n_rotary[name]
        handles = [
            self.output(module).register_forward_hook(lambda module, args, out, layer=layer: self.bump(layer, out))
            for module, layer in zip(self.net.layers, self.layers, strict=True)
        ]
        self.last: list[Tensor] = []  # hidden states before the final norm
        for position, token in enumerate(ids):
            hidden = self.model.get_input_embeddings()(torch.tensor(token))
            for module, layer in zip(self.net.layers, self.layers, strict=True):
                layer.inputs.append(module.input_layernorm(hidden))
                queries, keys, values = self.net.project(module, hidden)
                layer.queries.append([rotate(q, position, n_rotary) for q in queries])
                layer.keys.append([rotate(k, position, n_rotary) for k in keys])
                layer.values.append(values)
                pairs = [
                    [(k[i], v[i]) for k, v in zip(layer.keys, layer.values, strict=True)]
                    for i in range(self.net.n_kv_heads)
                ]
                attended = [attend(q, pairs[i // self.group]) for i, q in enumerate(layer.queries[-1])]
                hidden = self.net.combine(module, hidden, torch.cat(attended))
            self.last.append(hidden)
        for handle in handles:
            handle.remove()

    @staticmethod
    def output(module: nn.Module) -> nn.Linear:
        return module.attention.dense if hasattr(module, "attention") else module.self_attn.o_proj

    @staticmethod
    def bump(layer: Layer, out: Tensor) -> Tensor:
        layer.bumps.append(torch.zeros_like(out).requires_grad_(torch.is_grad_enabled()))
        return out + layer.bumps[-1]

    def projected_norm(self, layer: int, head: int, token: int) -> float:
        """||W_O v||_2 of the value that query head ``head`` reads at ``token``."""
        dim = self.net.dim
        weight = self.output(self.net.layers[layer]).weight[:, head * dim : (head + 1) * dim]
        return float((weight @ self.layers[layer].values[token][head // self.group]).norm().detach())


def kvzip_scores(
    name: str, ids: list[int], chunk_size: int, n_sink: int, kind: str = "attention"
) -> list[list[list[float]]]:
    """Scores by layer, KV head and token; ``kind`` is attention, plus or gradient."""
    scores: list[list[list[float]]] = []
    for start in range(0, len(ids), chunk_size):
        stop = min(start + chunk_size, len(ids))
        lead = FIRST if start == 0 else LATER + ids[max(0, start - 8) : start]
        with torch.set_grad_enabled(kind == "gradient"):
            twin = Twin(name, ids + lead + BREAK + ids[start:stop])
        scores = scores or [[[0.0] * len(ids) for _ in range(twin.net.n_kv_heads)] for _ in twin.layers]
        replay = range(len(ids), len(twin.last))
        if kind == "gradient":
            phi = sum(twin.last[p].square().sum() for p in replay)
            phi.backward()
        sinks = list(range(min(n_sink, start)))
        for i, layer in enumerate(twin.layers):
            for p in replay:
                slots = [*sinks, *range(start, stop), *range(len(ids), p + 1)]
                weight = 1.0
                if kind == "plus":
                    weight = 1 / float(layer.inputs[p].norm())
                elif kind == "gradient":
                    weight = float(layer.bumps[p].grad.norm())
                for head in range(twin.net.n_heads):
                    attention = layer.weights(p, head, twin.group, slots)[len(sinks) :]
                    for t, a in zip(range(start, stop), attention, strict=False):
                        value = 1.0 if kind == "attention" else twin.projected_norm(i, head, t)
                        own = scores[i][head // twin.group]
                        own[t] = max(own[t], a * weight * value)
    return scores


def best_of_all(scores: list[list[list[float]]], n_keep: int, n_safe: int) -> list[list[list[int]]]:
    """Positions by layer and head: ``n_safe`` of each head, then the best of what is left anywhere."""
    order = [[sorted(range(len(head)), key=lambda t, h=head: -h[t]) for head in layer] for layer in scores]
    kept = [[head[:n_safe] for head in layer] for layer in order]
    rest = [
        (-scores[i][j][t], i, j, t)
        for i, layer in enumerate(order)
        for j, head in enumerate(layer)
        for t in head[n_safe:]
    ]
    n_heads = sum(len(layer) for layer in scores)
    for _, i, j, t in sorted(rest)[: n_heads * (n_keep - n_safe)]:
        kept[i][j].append(t)
    return [[sorted(head) for head in layer] for layer in kept]
