"""Batches with padding, wherever it stands."""

from __future__ import annotations

import torch
from tests.contract.architectures import tokens
from torch import Tensor
from transformers import PreTrainedModel

QUESTION = 4


class Batch:
    """Rows of random tokens with padding before and after them, as (before, after) says."""

    def __init__(self, length: int, pads: list[tuple[int, int]]):
        self.ids = torch.zeros(len(pads), length, dtype=torch.long)
        self.mask = torch.zeros(len(pads), length, dtype=torch.long)
        self.rows = []
        for i, (before, after) in enumerate(pads):
            row = tokens(length - before - after, seed=i)
            self.rows.append(row)
            self.ids[i, before : length - after] = row
            self.mask[i, before : length - after] = 1
        self.question = tokens(len(pads), QUESTION, seed=99)

    def positions(self) -> Tensor:
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def add(self, new: Tensor) -> Tensor:
        """Position ids of ``new [B, n]`` tokens, which join the batch."""
        start = self.mask.sum(-1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=-1)
        return start + torch.arange(new.shape[1])


def is_local(model: PreTrainedModel, layer: int) -> bool:
    """Whether a layer is bounded by its window and so not compressed."""
    types = getattr(model.config, "layer_types", None) or []
    return "full_attention" in types and types[layer] != "full_attention"
