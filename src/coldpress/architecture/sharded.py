"""Models whose heads are shared out among processes (tensor parallelism, ``tp_plan="auto"``).

Every process has some of the KV heads, of every layer, and compresses these. A press that looks at each head alone
chooses there as it would in one process; one that compares heads, or gives them one budget to share, would choose
something else in each, so it is refused.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["is_sharded"]


def is_sharded(module: nn.Module, n_heads: int) -> bool:
    """Whether ``module``, an attention layer that was given ``n_heads`` query heads, has but some of its model's."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    wanted = getattr(getattr(module, "config", None), "num_attention_heads", n_heads)
    return isinstance(wanted, int) and n_heads < wanted
