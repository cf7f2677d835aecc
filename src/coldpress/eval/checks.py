"""What more than one measurement does about a press that goes wrong."""

from __future__ import annotations

import traceback
from typing import TypeVar

from coldpress.cache import PressedCache
from coldpress.errors import SelfCheckError
from coldpress.presses.base import BasePress, BudgetPress
from coldpress.view import Place

__all__ = ["check_stored_pairs", "release"]

_E = TypeVar("_E", bound=BaseException | None)


def check_stored_pairs(
    press: BasePress | None, cache: PressedCache, n_tokens: int, source: PressedCache | None = None
) -> None:
    """As many pairs are stored as the ratio asks for; layers and heads may share them out among themselves.

    After a prefill in pieces no more than that: where a budget grows faster than the text does (a layer of PyramidKV, a
    head of AdaKV), what it could hold now is gone. Not checked where layers with a sliding window choose among the
    pairs in its reach.

    Args:
        press: what compressed the cache.
        cache: right after the prefill.
        n_tokens: of the prefill.
        source: the cache whose prefill it was; None if its own.

    Raises:
        SelfCheckError: more or fewer are stored.
    """
    windows = [layer._window for layer in (source or cache).pressed_layers()]
    if not isinstance(press, BudgetPress) or any(window is not None for window in windows):
        return
    layers = [layer for layer in cache.pressed_layers() if layer.is_initialized]
    positions = [layer.positions() for layer in layers]  # [B, Hkv, T]
    stored = sum(int((p >= 0).sum()) for p in positions)
    wanted = 0
    for i, layer in enumerate(layers):
        assert layer.keys is not None and layer.values is not None
        n_heads, dims = layer.keys.shape[1], layer.keys.shape[-1] + layer.values.shape[-1]
        place = Place(i, len(layers), n_heads * dims * layer.keys.element_size())
        wanted += press.keep_of(n_tokens, place) * positions[i].shape[:2].numel()
    if stored > wanted or (stored < wanted and cache.chunk_tokens is None):
        raise SelfCheckError(f"{press}: {wanted} pairs should have been stored, {stored} were.")


def release(error: _E) -> _E:
    """The same error, without the memory that the variables of its frames hold: the next press may need it."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    return error
