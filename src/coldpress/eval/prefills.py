"""One prefill for many presses, or with a prompt in pieces one for each, and what is noted of the caches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pins import Spans
from coldpress.cache.pressed import PressedCache
from coldpress.eval.checks import release
from coldpress.eval.perplexity import forward
from coldpress.eval.points import Point
from coldpress.models.block import prefilling
from coldpress.models.prompts import prefill

__all__ = ["prefilled", "sizes_of"]


def prefilled(
    model: PreTrainedModel,
    context: Tensor,
    points: Sequence[Point],
    chunk_tokens: int | None = None,
    n_pinned: int = 0,
) -> tuple[PressedCache, Iterator[PressedCache]]:
    """The uncompressed cache of ``context [B, C]``, and that of each point.

    A press that fails leaves a cache that raises the error when it is used. The caches are handed out one by one, so
    that the memory of one is free before the next one grows.

    Args:
        n_pinned: tokens at the beginning that nothing may evict.
    """
    pin = [(0, n_pinned)] if n_pinned else None
    full = PressedCache(chunk_tokens=chunk_tokens, pin=pin)
    if chunk_tokens is not None:  # what is computed of the second piece depends on what was kept of the first
        prefill(model, context, full)
        return full, (_alone(model, context, point, chunk_tokens, pin) for point in points)
    branches = full.branches([point.press for point in points], [point.kv_bits for point in points])
    with prefilling(model, full, *branches):
        forward(model, context, full, keep=1)
    branches.reverse()
    return full, (branches.pop() for _ in points)


def _alone(model: PreTrainedModel, context: Tensor, point: Point, chunk_tokens: int, pin: Spans | None) -> PressedCache:
    cache = PressedCache(point.press, chunk_tokens=chunk_tokens, kv_bits=point.kv_bits, pin=pin)
    try:
        with prefilling(model, cache):
            prefill(model, context, cache)
    except Exception as error:
        cache.session.error = release(error)
    return cache


def sizes_of(cache: PressedCache, with_hash: bool = False) -> dict[str, Any]:
    """Sizes of the first row's cache, and a fingerprint of which pairs it keeps."""
    positions = [layer.positions() for layer in cache.pressed_layers() if layer.is_initialized]
    digest = hashlib.sha256(b"".join(p[0].cpu().numpy().tobytes() for p in positions)) if with_hash else None
    return {
        "kv_bytes": cache.kv_bytes() // positions[0].shape[0],
        "kv_lengths": cache.stored_lengths(),
        "achieved_ratio": cache.achieved_ratio(),
        "kept_hash": None if digest is None else digest.hexdigest()[:16],
    }
