"""Finishing: presses that choose when the prefill is over compress its cache, in the best codec of its storage."""

from __future__ import annotations

from torch import Tensor, nn

from coldpress.cache.pressed import PressedCache
from coldpress.cache.slots import CARRIED
from coldpress.core.press import Press
from coldpress.errors import NoRoomError

__all__ = ["finish"]


def finish(press: Press, cache: PressedCache, model: nn.Module, token_ids: Tensor | None) -> None:
    """Have ``press`` compress ``cache``, which stores all of the prefill, and encode what is left.

    Where the storage has several codecs, each is tried out on a fork, and the one with the smallest sum of the layers'
    errors is taken for the whole cache.

    Args:
        model: without its head.
        token_ids: int64 ``[B, T]`` of the prefill; a press with ``needs_model`` needs them.
    """
    layers = [layer for layer in cache.pressed_layers() if layer.trials]
    if not layers:
        _finish(press, cache, model, token_ids)
        return
    storage = cache.session.storage
    assert storage is not None
    best: tuple[float, int, PressedCache] | None = None
    refusal: NoRoomError | None = None
    for index, codec in enumerate(storage.codecs):
        if not all(index in layer.trials for layer in layers):
            continue
        tried = cache.fork()
        tried.session.storage = codec
        for layer in layers:
            own, trial = tried.layer(layer.index), layer.trials[index]
            own.slots.put(CARRIED, trial.carried)
            own.references = list(trial.references)
        try:
            _finish(press, tried, model, token_ids)
        except NoRoomError as why:  # for what is pinned, in so many bits
            refusal = why
            continue
        error = sum(layer.error_of(tried.layer(layer.index).slots) for layer in layers)
        if best is None or error < best[0]:
            best = error, index, tried
    if best is None:
        raise refusal or NoRoomError("No candidate of the storage has room for the pinned tokens: pin fewer.")
    for layer in layers:
        own = best[2].layer(layer.index)
        layer.take(best[1], own.slots, own.n_pairs)
    for layer in cache.pressed_layers():
        layer.encode()


def _finish(press: Press, cache: PressedCache, model: nn.Module, token_ids: Tensor | None) -> None:
    if press.needs_model:
        assert token_ids is not None
        press.finish(cache, model, token_ids)
    if press.chooses_together:
        press.choose_together(cache)
    for layer in cache.pressed_layers():
        layer.encode()
