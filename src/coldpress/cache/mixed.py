"""MixedCache: layers with a state beside those with pairs, for models that have both kinds (transformers 5)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from coldpress.cache.layer import PressedLayer, next_layer
from coldpress.cache.session import Session

__all__ = ["MixedCache"]


class MixedCache(Cache):
    """A cache whose layers are made at their first use, with pairs or with a state."""

    session: Session

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if all(isinstance(layer, PressedLayer) for layer in self.layers):
            return False
        if layer_idx is not None and isinstance(self.layers[layer_idx], PressedLayer):
            return False
        return super().has_previous_state(layer_idx, state_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return super().get_conv_state(self._state_layer(layer_idx), state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        states = super().update_conv_state(conv_states, self._state_layer(layer_idx), state_idx, **kwargs)
        self._copy_state(layer_idx)
        return states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return super().get_recurrent_state(self._state_layer(layer_idx), state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        states = super().update_recurrent_state(recurrent_states, self._state_layer(layer_idx), state_idx, **kwargs)
        self._copy_state(layer_idx)
        return states

    def _state_layer(self, layer_idx: int) -> int:
        """Make layer ``layer_idx`` one with a state, if it is an empty one for pairs; returns its index."""
        from transformers.cache_utils import LinearAttentionLayer  # before version 5 there is none, and nobody asks

        self._grow(layer_idx)
        layer = self.layers[layer_idx]
        if isinstance(layer, PressedLayer) and not layer.is_initialized:
            self.layers[layer_idx] = LinearAttentionLayer()
        return layer_idx

    def _copy_state(self, layer_idx: int) -> None:
        """Copy a state of the prefill to the branches."""
        for branch in self.session.live_branches():
            branch._grow(layer_idx)
            branch.layers[layer_idx] = copy.deepcopy(self.layers[layer_idx])

    def _grow(self, layer_idx: int) -> None:
        while len(self.layers) <= layer_idx:
            self.layers.append(next_layer(self.session))
