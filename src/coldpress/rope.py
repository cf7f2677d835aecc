"""Rotary position embedding: rotate, rotate back, and rotate by the mean of many positions.

Nothing here knows a model. The frequencies come from the rotary class, and the layout (halves or interleaved pairs, full
or partial width) from the ``apply_rotary_pos_emb`` of the module's own modeling file, so that undoing the rotation is
running the model's own function with ``-sin``.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coldpress.errors import ModelError

__all__ = ["Rope"]


class Rope:
    """The rotary embedding of one attention layer.

    Args:
        embed: the model's rotary embedding; ``embed(x, position_ids)`` gives ``cos, sin`` of ``[1, T, Drot]``.
        apply: the model's own ``apply_rotary_pos_emb(q, k, cos, sin)``.
        layer_type: what ``embed`` wants to be told where it serves several kinds of layers, else None.
    """

    def __init__(self, embed: nn.Module, apply: Callable[..., Any], layer_type: str | None):
        self._embed, self._apply, self._layer_type = embed, apply, layer_type

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> Rope | None:
        """The rotary embedding that ``module`` (an attention layer) uses, or None if it uses none.

        Raises:
            ModelError: the model rotates in a way that cannot be undone from outside, as multi-head latent attention does.
        """
        source = sys.modules[type(module).__module__]
        apply = getattr(source, "apply_rotary_pos_emb", None)
        classes = [
            c
            for name, c in vars(source).items()
            if name.endswith("RotaryEmbedding") and inspect.isclass(c) and c.__module__ == source.__name__
        ]
        if apply is None or not classes or not _rotates(module):
            return None
        config = module.config
        if hasattr(module, "qk_rope_head_dim"):
            raise ModelError(
                f"{type(module).__name__} keeps rotated and unrotated dimensions apart (latent attention), which "
                "presses that undo the rotation do not support. Use a press that needs keys only, such as KnormPress."
            )
        try:
            embed = _build(classes[0], config, module).to(device)
        except (TypeError, AttributeError, KeyError) as error:
            raise ModelError(
                f"The rotary embedding of {type(module).__name__} could not be built from its configuration ({error}). "
                "Use a press that does not need queries before rotation, such as SnapKVPress."
            ) from error
        takes_type = "layer_type" in inspect.signature(embed.forward).parameters
        return cls(embed, apply, _layer_type(module) if takes_type else None)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 ``[1, T, Drot]``, of integer positions ``[T]``."""
        x = torch.empty(0, dtype=torch.float32, device=positions.device)
        args = (x, positions[None]) if self._layer_type is None else (x, positions[None], self._layer_type)
        cos, sin = self._embed(*args)
        return cos, sin

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first ``Drot`` dimensions of float32 ``[B, H, T, D]`` by ``cos``, ``sin`` of ``[1, T or 1, Drot]``."""
        width = cos.shape[-1]
        rotated, _ = self._apply(states[..., :width], states[..., :width], cos, sin)
        return rotated if width == states.shape[-1] else torch.cat([rotated, states[..., width:]], dim=-1)

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """States ``[B, H, T, D]`` as they were before they were rotated to integer positions ``[T]``, in float32."""
        cos, sin = self.cos_sin(positions)
        scale = cos[:, :1].square() + sin[:, :1].square()  # 1, or attention_scaling**2 with YaRN and its relatives
        return self.rotate(states.float(), cos / scale, -sin / scale)

    def mean_rotation(self, start: int, n_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``cos, sin`` of ``[1, 1, Drot]`` that rotate by the mean over positions ``start .. start + n_positions - 1``.

        Rotation is linear in (cos, sin), so rotating by their means is the mean of the rotations.
        """
        cos, sin = self.cos_sin(torch.arange(start, start + n_positions, device=device))
        return cos.mean(1, keepdim=True), sin.mean(1, keepdim=True)


def _layer_type(module: nn.Module) -> str:
    return "sliding_attention" if _is_local(module) else "full_attention"


def _is_local(module: nn.Module) -> bool:
    return bool(getattr(module, "is_sliding", getattr(module, "sliding_window", None) is not None))


def _rotates(module: nn.Module) -> bool:
    """Whether this layer rotates at all: some models leave the rotation out in some of their layers."""
    if not getattr(module, "use_rope", True):
        return False
    model_type = getattr(module.config, "model_type", "")
    if model_type in ("cohere2", "exaone4") and getattr(module.config, "sliding_window", None) is not None:
        return _is_local(module)
    return True


def _build(rotary: type[nn.Module], config: Any, module: nn.Module) -> nn.Module:
    """A fresh rotary embedding of the model's own class; the model's is not reachable from an attention module."""
    local_base = getattr(config, "rope_local_base_freq", None)
    if local_base is not None and _is_local(module):  # gemma3 before transformers 5
        config = copy.deepcopy(config)
        config.rope_theta, config.rope_scaling = local_base, {"rope_type": "default"}
    return rotary(config=config)
