"""Weights by columns: one row times a matrix, read as fast as memory is.

One row on the CPU is a product of each weight matrix with a vector, which takes as long as the weights are read. A
matrix whose columns are contiguous is read faster than one whose rows are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import PreTrainedModel

__all__ = ["OneRow", "by_columns"]

_DTYPES = (torch.float32, torch.bfloat16)  # of float16 torch reads rows faster than embedding_bag reads columns


class OneRow(TorchFunctionMode):
    """A linear layer of one row, whose weights lie by columns, is a sum of these columns with weights.

    ``embedding_bag`` is the operation of torch that reads them fastest: it fetches ahead.
    """

    def __init__(self, n_parts: int):
        super().__init__()
        self.n_parts = n_parts  # each bag is added up by one thread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear and self.n_parts and not kwargs:
            return self.linear(*args)
        return func(*args, **kwargs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = weight.shape[1]
        if x.numel() != n or x.dtype != weight.dtype or weight.dtype not in _DTYPES or weight.stride(0) != 1:
            return linear(x, weight, bias)
        starts = torch.arange(self.n_parts) * (n // self.n_parts)
        sums = embedding_bag(torch.arange(n), weight.t(), starts, mode="sum", per_sample_weights=x.reshape(n))
        output = sums.sum(0) if self.n_parts > 1 else sums[0]
        output = output if bias is None else output + bias
        return output.reshape(*x.shape[:-1], weight.shape[0])


@contextmanager
def by_columns(model: PreTrainedModel) -> Iterator[None]:
    """Store the weights of linear layers by columns inside the block; afterwards as before."""
    weights = {id(m.weight): m.weight for m in model.modules() if type(m) is nn.Linear and m.weight.dtype in _DTYPES}
    moved = []
    try:
        for weight in weights.values():
            if weight.is_contiguous():
                weight.data = weight.data.t().contiguous().t()
                moved.append(weight)
        yield
    finally:
        for weight in moved:
            weight.data = weight.data.contiguous()
