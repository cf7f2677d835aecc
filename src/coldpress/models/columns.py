"""Weights by columns where that is faster: one row times a matrix, read as fast as memory is.

One row on the CPU is a product of each weight matrix with a vector, which takes as long as the weights are read. Torch
reads a matrix whose rows are contiguous, or adds up contiguous columns: which one is faster differs between dtypes,
shapes and processors, by up to half, so both are tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import PreTrainedModel

__all__ = ["OneRow", "by_columns"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRIED_BYTES = 1 << 26  # of the weights of one shape: more than a core's own memory holds
_ROUNDS = 4  # of which the first is not counted
_VERDICTS: dict[tuple[torch.Size, torch.dtype, int], bool] = {}  # for how many threads, of the trials of this process


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
    """Store weights of linear layers by columns inside the block, where that is faster; afterwards as before."""
    alike: dict[Any, dict[int, Tensor]] = {}
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in _DTYPES and module.weight.is_contiguous():
            alike.setdefault((module.weight.shape, module.weight.dtype), {})[id(module.weight)] = module.weight
    moved: list[Tensor] = []
    try:
        for group in alike.values():
            weights = list(group.values())
            if _verdict(weights):
                for weight in weights:
                    weight.data = _columns(weight)
                    moved.append(weight)
        yield
    finally:
        for weight in moved:
            with torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.contiguous()


def _columns(weight: Tensor) -> Tensor:
    with torch.inference_mode(weight.is_inference()):  # so that the model can be trained afterwards if it could before
        return weight.data.t().contiguous().t()


def _verdict(weights: list[Tensor]) -> bool:
    """Whether columns are faster, once and for all: where weights lie otherwise, torch compiles a step again."""
    kind = weights[0].shape, weights[0].dtype, torch.get_num_threads()
    if kind not in _VERDICTS:
        _VERDICTS[kind] = _columns_are_faster(weights)
    return _VERDICTS[kind]


def _columns_are_faster(weights: list[Tensor]) -> bool:
    """Whether sums of columns are, of weights of one shape and dtype."""
    with torch.inference_mode():
        n = sum(total <= _TRIED_BYTES for total in accumulate(weight.nbytes for weight in weights)) or 1
        rows = [weight.data for weight in weights[:n]]
        columns, x = [_columns(weight) for weight in rows], rows[0].new_ones(1, rows[0].shape[1])
        took = []
        for _ in range(_ROUNDS):
            took.append((_seconds(linear, x, rows), _seconds(OneRow(torch.get_num_threads()).linear, x, columns)))
    by_rows, by_sums = zip(*took[1:], strict=True)
    return min(by_sums) < min(by_rows)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        product(x, weight)
    return time.perf_counter() - start
