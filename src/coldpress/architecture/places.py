"""Where a layer stands among those that are compressed."""

from __future__ import annotations

from typing import Any

__all__ = ["place_of"]


def place_of(config: Any, index: int) -> tuple[int, int, bool]:
    """A layer's place among the layers that are compressed, their number, and whether it is a local one itself."""
    places = [i for i, kind in enumerate(getattr(config, "layer_types", None) or ()) if kind == "full_attention"]
    if not places:
        return index, config.num_hidden_layers, False
    return (places.index(index) if index in places else 0), len(places), index not in places
