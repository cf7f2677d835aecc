"""The place of a layer among the others, with what its pairs take: for presses that choose after the prefill."""

from __future__ import annotations

from coldpress.cache.costs import stored_bytes
from coldpress.cache.layer import PressedLayer
from coldpress.core.kept import Place

__all__ = ["place_of_layer"]


def place_of_layer(layer: PressedLayer, rank: int, n_layers: int) -> Place:
    """The place of a layer whose pairs its press chooses when the prefill is over.

    Args:
        rank, n_layers: this layer among the layers that are compressed, counted from 0.
    """
    keys, values, session = layer.keys, layer.values, layer.session
    assert keys is not None and values is not None
    token_bytes = keys.shape[1] * (keys.shape[3] + values.shape[3]) * keys.element_size()
    press = session.press or session.earlier_press
    return Place(rank, n_layers, token_bytes, stored_bytes(press, layer.codec, keys, values))
