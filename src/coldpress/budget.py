"""The only place that decides how many pairs are kept, and which ones given their scores.

Everything is in integers: ``int(1000 * (1 - 0.9))`` is 99 in floating point, and 100 here. ``compression_ratio`` is the
fraction *removed*, in [0, 1), read as the decimal number its user wrote.
"""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from coldpress.errors import PressError

__all__ = ["check_ratio", "keep_count", "pyramid_counts", "select", "shrink_protected"]


def check_ratio(ratio: object, name: str = "compression_ratio") -> None:
    """Raise :class:`PressError` unless ``ratio`` is a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 <= float(ratio) < 1:
        raise PressError(f"{name} is the fraction of pairs to remove: a number in [0, 1), such as 0.5; got {ratio!r}.")


def keep_count(n_tokens: int, ratio: float) -> int:
    """Tokens kept of ``n_tokens``: ``floor(n_tokens * (1 - ratio))`` without rounding error, at least 1."""
    removed = math.ceil(Fraction(repr(float(ratio))) * n_tokens)
    return max(1, n_tokens - removed) if n_tokens else 0


def pyramid_counts(n_tokens: int, ratio: float, n_layers: int, *, window: int, beta: int) -> list[int]:
    """Tokens kept by each layer when the first layer keeps most and the last one least.

    A straight line from ``max`` (layer 0) to ``min = keep / beta`` (last layer) with mean ``keep``, where ``keep`` is
    the uniform count. If ``max`` does not fit beside the window, the line is flattened until it does; if the last layer
    would fall below the window, every layer keeps ``keep``. Rounded so that the total is exactly ``n_layers * keep``.

    Source: Cai et al. 2024, arXiv:2406.02069, equations 2 and 3.
    """
    keep = keep_count(n_tokens, ratio)
    uniform = [keep] * n_layers
    low = keep / beta
    high = 2 * keep - low
    if high >= n_tokens - window:
        high = n_tokens - window
        low = 2 * keep - high
    if n_layers < 2 or not (n_tokens >= high >= low >= window):
        return uniform
    line = [high - i * (high - low) / (n_layers - 1) for i in range(n_layers)]
    counts = [math.floor(x) for x in line]
    by_remainder = sorted(range(n_layers), key=lambda i: (counts[i] - line[i], i))
    for i in by_remainder[: n_layers * keep - sum(counts)]:
        counts[i] += 1
    return counts


def shrink_protected(n_keep: int, n_sink: int, n_window: int) -> tuple[int, int]:
    """Sinks and window tokens that are protected when only ``n_keep`` tokens are kept.

    Both are kept whole while they fit. When they do not, the window is cut to half of the budget (at least one token)
    and the sinks to what the window leaves, so that a small budget still has room for what the scores ask for.
    """
    if n_sink + n_window <= n_keep:
        return n_sink, n_window
    n_window = min(n_window, max(1, n_keep // 2))
    return min(n_sink, n_keep - n_window), n_window


def select(scores: Tensor, n_keep: int, *, n_sink: int = 0, n_window: int = 0) -> Tensor:
    """Indices of the ``n_keep`` best scores of every head, in position order.

    Args:
        scores: ``[B, Hkv, T]``, float32, larger = keep.
        n_keep: how many to keep, ``1 <= n_keep <= T``.
        n_sink: first tokens that are kept whatever their score.
        n_window: last tokens that are kept whatever their score.

    Returns:
        ``[B, Hkv, n_keep]``, int64, ascending along the last dimension. Among equal scores the earlier token is kept.

    Raises:
        PressError: a score is NaN.
    """
    n_batch, n_heads, n_tokens = scores.shape
    if torch.isnan(scores).any():
        raise PressError("A score is NaN: the model produced NaN keys, values or queries (try float32 or bfloat16).")
    n_sink, n_window = shrink_protected(n_keep, n_sink, n_window)
    scores = scores.float()
    if n_sink or n_window:
        scores = scores.clone()
        scores[..., :n_sink] = torch.inf
        if n_window:
            scores[..., n_tokens - n_window :] = torch.inf
    threshold = scores.topk(n_keep, dim=-1).values[..., -1:]  # [B, Hkv, 1]
    above = scores > threshold
    ties = scores == threshold
    free = n_keep - above.sum(-1, keepdim=True)
    keep = above | (ties & (ties.cumsum(-1) <= free))
    return keep.nonzero()[:, -1].view(n_batch, n_heads, n_keep)
