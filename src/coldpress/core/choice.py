"""Which pairs are kept, given their scores: the best ones, ties to the earlier token."""

from __future__ import annotations

import torch
from torch import Tensor

from coldpress.errors import PressError

__all__ = ["best", "checked", "ends", "pack", "protect", "select", "select_counts", "shrink_protected"]


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
    n_batch, n_heads, _ = scores.shape
    n_sink, n_window = shrink_protected(n_keep, n_sink, n_window)
    keep = best(protect(checked(scores), n_sink, n_window), n_keep)
    return keep.nonzero()[:, -1].view(n_batch, n_heads, n_keep)


def protect(scores: Tensor, n_sink: int, n_window: int) -> Tensor:
    """``scores`` ``[B, Hkv, T]`` with infinity at the first ``n_sink`` and the last ``n_window`` tokens."""
    if n_sink or n_window:
        scores = scores.clone()
        scores[..., :n_sink] = torch.inf
        scores[..., scores.shape[-1] - n_window :] = torch.inf
    return scores


def best(scores: Tensor, n: int | Tensor) -> Tensor:
    """Where the ``n`` largest entries of the last dimension are, the earlier one among equals.

    Args:
        scores: ``[..., T]`` without NaN.
        n: how many, in 0 .. T: the same everywhere, or int64 ``[...]``.

    Returns:
        bool ``[..., T]``.
    """
    if isinstance(n, Tensor):
        n = n[..., None]
        threshold = scores.sort(dim=-1, descending=True).values.gather(-1, (n - 1).clamp(min=0))
    elif n:
        threshold = scores.topk(n, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    else:
        return torch.zeros_like(scores, dtype=torch.bool)
    above = scores > threshold
    ties = scores == threshold
    return above | (ties & (ties.cumsum(-1) <= n - above.sum(-1, keepdim=True)))


def select_counts(scores: Tensor, counts: Tensor) -> Tensor:
    """:func:`select` with a number of its own for every head.

    Args:
        scores: ``[B, Hkv, T]``; infinite where protected.
        counts: int64 ``[B, Hkv]``.

    Returns:
        int64 ``[B, Hkv, n]`` with n the largest count; ascending, then -1 in heads that keep fewer.
    """
    keep = best(checked(scores), counts)
    positions = counts.new_full((*counts.shape, int(counts.max())), -1)
    is_kept = torch.arange(positions.shape[-1], device=counts.device) < counts[..., None]
    positions[is_kept] = keep.nonzero()[:, -1]  # both go through the heads in order
    return positions


def ends(n_tokens: int, n_sink: int, n_window: int, device: torch.device | None = None) -> Tensor:
    """Which of ``n_tokens`` tokens are among the first ``n_sink`` or the last ``n_window``: bool ``[T]``."""
    token = torch.arange(n_tokens, device=device)
    return (token < n_sink) | (token >= n_tokens - n_window)


def pack(is_kept: Tensor) -> Tensor:
    """Positions of what is kept, as :class:`~coldpress.core.kept.Kept` holds them.

    Args:
        is_kept: bool ``[B, Hkv, T]``; some head keeps something.

    Returns:
        int64 ``[B, Hkv, n]`` with n the largest number that a head keeps; ascending, then -1 in heads that keep fewer.
    """
    n_tokens = is_kept.shape[-1]
    token = torch.arange(n_tokens, device=is_kept.device)
    positions = token.where(is_kept, n_tokens).sort(-1).values[..., : int(is_kept.sum(-1).max())]
    return positions.masked_fill(positions == n_tokens, -1)


def checked(scores: Tensor) -> Tensor:
    """``scores`` in float32; raise :class:`PressError` if one is NaN."""
    if torch.isnan(scores).any():
        raise PressError("A score is NaN: the model produced NaN keys, values or queries (try float32 or bfloat16).")
    return scores.float()
