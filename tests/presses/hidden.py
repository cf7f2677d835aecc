"""What presses see that ask for hidden states, and what the projections were given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tests.contract.architectures import Look, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldpress import LayerView, PressedCache
from coldpress.architecture.cache_argument import cache_argument

PROJECTIONS = ("q_proj", "qkv_proj", "query_key_value", "c_attn")


class LookDeeper(Look):
    """Keeps everything and remembers the views, whose hidden states it asks for."""

    needs_hidden_states = True


@contextmanager
def projected(model: PreTrainedModel) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """What the query projection of each attention module is given, by module."""
    seen: dict[nn.Module, list[Tensor]] = {}
    handles = []
    for module in model.modules():
        found = [getattr(module, name) for name in PROJECTIONS if hasattr(module, name)]
        if found:
            handles.append(
                found[0].register_forward_pre_hook(
                    lambda _, args, module=module: seen.setdefault(module, []).append(args[0])
                )
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def views_of(name: str, ids: Tensor, **options: Any) -> list[LayerView]:
    look = LookDeeper()
    with torch.no_grad(), look(tiny(name)):
        tiny(name)(ids, **cache_argument(PressedCache()), **options)
    return look.views
