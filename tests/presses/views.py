"""What presses see of tiny models, and what the models' own projections gave before rotation."""

from __future__ import annotations

from functools import cache

import torch
from tests.contract.architectures import tiny, tokens
from torch import Tensor

from coldpress import BasePress, Kept, LayerView, PressedCache
from coldpress.architecture.cache_argument import cache_argument

MODELS = ("gpt_neox", "gpt_neox_full_rotary", "llama")  # rotary_pct 0.25 and 1.0; grouped queries


class Probe(BasePress):
    """Keeps everything and remembers the views."""

    def __init__(self) -> None:
        self.views: list[LayerView] = []

    def compress(self, view: LayerView) -> Kept | None:
        self.views.append(view)
        return None


def views_of(
    name: str,
    ids: Tensor,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> list[LayerView]:
    """One view per layer, and per group of rows with as many tokens."""
    probe = Probe()
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        tiny(name, "coldpress", dtype)(
            ids, attention_mask=mask, position_ids=positions, **cache_argument(PressedCache(probe))
        )
    return probe.views


@cache
def view_of(name: str, n_tokens: int = 37, layer: int = 1, rows: int = 2) -> LayerView:
    """The view of all rows of one layer, the same object every time: presses do not change it."""
    return views_of(name, tokens(rows, n_tokens))[layer]


def unrotated(name: str, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Queries ``[B, Hq, T, D]`` and keys ``[B, Hkv, T, D]`` as the layer's projections give them."""
    model, seen = tiny(name, "coldpress", torch.float32), {}
    modules = dict(model.named_modules())

    def keep(key: str) -> object:
        return modules[key].register_forward_hook(lambda module, args, output: seen.__setitem__(key, output))

    if name.startswith("gpt_neox"):
        path = f"gpt_neox.layers.{layer}.attention.query_key_value"
        handles = [keep(path)]
    else:
        path = f"model.layers.{layer}.self_attn."
        handles = [keep(path + "q_proj"), keep(path + "k_proj")]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    n_batch, n_tokens = ids.shape
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    if name.startswith("gpt_neox"):
        q, k, _ = seen[path].view(n_batch, n_tokens, config.num_attention_heads, 3, dim).transpose(1, 2).unbind(3)
        return q, k
    q, k = (seen[path + part].view(n_batch, n_tokens, -1, dim).transpose(1, 2) for part in ("q_proj", "k_proj"))
    return q, k


def rotary_width(name: str, dim: int) -> int:
    return dim // 4 if name == "gpt_neox" else dim


def rotated(name: str, vector: Tensor, position: int) -> Tensor:
    """A vector ``[D]`` rotated to a position, written out: pairs (i, i + width / 2) turn by position * theta_i."""
    out, width = vector.clone(), rotary_width(name, vector.shape[0])
    for i in range(width // 2):
        angle = torch.tensor(position * 10_000.0 ** (-2 * i / width), dtype=torch.float64)
        a, b = vector[i].double(), vector[i + width // 2].double()
        out[i] = a * angle.cos() - b * angle.sin()
        out[i + width // 2] = b * angle.cos() + a * angle.sin()
    return out
