"""LayerCall: one call of the attention function, and the facts of its layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["LayerCall"]


@dataclass(frozen=True)
class LayerCall:
    """What one call of the attention function knows about its layer.

    Attributes are those of :class:`LayerView`; ``query`` has all rows of the batch, padding included. ``is_local``:
    the layer sees a sliding window only while other layers of the model see everything; such layers are bounded
    already and are not compressed.
    """

    module: nn.Module
    query: Tensor  # [B, Hq, Q, D]
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    sliding_window: int | None
    layer_idx: int
    n_layers: int
    is_local: bool
    hidden_states: Tensor | None = None  # [B, Q, hidden]
    rotation: tuple[Tensor, Tensor] | None = None  # cosines and sines [B or 1, Q, Drot], of a compiled step
