"""The output projection of an attention layer, from the heads' outputs to the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coldpress.architecture.offloaded import weight_of
from coldpress.errors import ModelError

__all__ = ["output_weight", "weight_of_heads"]

# llama and most others; opt, phi and others; gpt_neox, phi, falcon; gpt2 and gpt_bigcode; the rest
_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj_out", "output_proj", "proj")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def output_weight(module: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix ``[hidden, width]`` that ``module``, an attention layer, multiplies its heads' outputs with.

    The weight itself where the projection is a plain linear layer, in either orientation; else (quantised layers,
    adapters) what the projection makes of the unit vectors.

    Args:
        module: an attention layer.
        width: query heads times the dimension of their values.
        dtype, device: of what the layer's projection is given.

    Raises:
        ModelError: no projection of that width is found.
    """
    for name in _NAMES:
        projection = getattr(module, name, None)
        if not isinstance(projection, nn.Module):
            continue
        weight = getattr(projection, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta:
            weight = weight_of(projection, "weight").to(device)
        if (
            isinstance(projection, (nn.Linear, Conv1D))
            and isinstance(weight, Tensor)
            and weight.dtype in _FLOATS
            and weight.dim() == 2
        ):
            matrix = weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
            if matrix.shape[1] == width:
                return matrix
            continue  # a linear layer of another width is something else
        with torch.no_grad():
            units = torch.eye(width, dtype=dtype, device=device)
            outputs: Tensor = projection(units) - projection(torch.zeros_like(units[:1]))
        return outputs.T
    raise ModelError(
        f"{type(module).__name__} has no output projection that coldpress knows (it looks for {', '.join(_NAMES)} with "
        f"an input of {width}). Use a press that does not weigh values, such as SnapKVPress or AdaKVPress."
    )


def weight_of_heads(module: nn.Module, n_heads: int, values: Tensor) -> Tensor:
    """:func:`output_weight` in float32, by head: ``[Hkv, G, Dv, hidden]``.

    Args:
        n_heads: query heads, Hkv * G.
        values: ``[B, Hkv, T, Dv]``.
    """
    n_kv_heads, dim = values.shape[1], values.shape[3]
    weight = output_weight(module, n_heads * dim, values.dtype, values.device).float()
    return weight.view(-1, n_kv_heads, n_heads // n_kv_heads, dim).permute(1, 2, 3, 0)
