"""JoinedCache: one new token of each of several texts in one call of a model, each text in a cache of its own.

To the linear layers the texts are the rows of a batch, so the weights are read once for all of them. Attention goes row
by row, over the pairs of that row's own cache: nothing is copied and nothing is padded, whatever the lengths, presses
and stores of the rows are, and rows come and go from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from coldpress.cache.layer import Arithmetic, PressedLayer
from coldpress.cache.pressed import PressedCache
from coldpress.cache.session import THREAD, uncompiled
from coldpress.core.call import LayerCall

__all__ = ["JoinedCache", "can_join"]


class JoinedCache(Cache):
    """The caches of several texts, for one call of the model that brings one token of each.

    ``position_ids``, int64 ``[rows, 1]``, have to be given to the model: those of each row are its own.

    Args:
        caches: one for each row, of as many layers; see :func:`can_join`.
    """

    def __init__(self, caches: Sequence[PressedCache]):
        super().__init__(
            layers=[_JoinedLayer(rows) for rows in zip(*(c.pressed_layers() for c in caches), strict=True)]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one pair to one layer of every row."""
        updated: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return updated

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        sizes: tuple[int, int] = self.layers[layer_idx].get_mask_sizes(query)
        return sizes


def can_join(cache: PressedCache) -> bool:
    """Whether a cache can be a row of a :class:`JoinedCache`: nothing in it depends on how a token was rotated.

    That leaves out presses that move keys or go on while decoding, prompts that are not whole yet, padding, layers with
    a state, and models whose rotary frequencies change with the length of a text.
    """
    layers, session = cache.pressed_layers(), cache.session
    return (
        cache.seen_tokens > 0
        and len(layers) == len(cache.layers)
        and cache.attention_mask is None
        and session.switch_at is None
        and not session.joins_calls
        and not any(layer.has_padding for layer in layers)
    )


class _JoinedLayer(CacheLayerMixin):
    """One layer of all rows: what transformers and coldpress's attention ask of a layer of a cache."""

    is_sliding = is_compileable = False

    def __init__(self, rows: Sequence[PressedLayer]):
        super().__init__()
        self.rows, self.index = rows, rows[0].index
        self._offered: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the rows store the pairs."""

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.24

    @uncompiled
    def get_seq_length(self, *args: Any) -> int:
        return max(row.slots.seen for row in self.rows)

    @uncompiled
    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        THREAD.masks_for = self
        return self.get_seq_length() + 1, 0

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for i, row in enumerate(self.rows):
            row.update(key_states[i : i + 1], value_states[i : i + 1])
        self._offered = key_states, value_states
        THREAD.updated = self
        return self._offered

    def is_offered(self, keys: Tensor, values: Tensor) -> bool:
        """As :meth:`PressedLayer.is_offered`."""
        return self._offered is not None and self._offered[0] is keys and self._offered[1] is values

    def begin(self, n_new: int, mask: Tensor | None) -> Tensor | None:
        """As :meth:`PressedLayer.begin`, for every row."""
        mask = None if mask is None or bool(mask.all()) else mask
        for row in self.rows:
            row.begin(n_new, mask)
        return mask

    def run(
        self, call: LayerCall, mask: Tensor | None, arithmetic: Arithmetic, is_plain: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`PressedLayer.run`, row by row: ``[rows, 1, Hq, Dv]``."""
        states, outputs = call.hidden_states, []
        for i, row in enumerate(self.rows):
            own = replace(
                call, query=call.query[i : i + 1], hidden_states=None if states is None else states[i : i + 1]
            )
            outputs.append(row.run(own, mask, arithmetic, is_plain)[0])
        return torch.cat(outputs), None
