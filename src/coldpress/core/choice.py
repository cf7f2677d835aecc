"""Which pairs are kept, given their scores: the best ones, ties to the earlier token."""

from __future__ import annotations

import torch
from torch import Tensor

from coldpress.errors import PressError

__all__ = ["best", "checked", "pack", "protect", "select", "select_counts", "unpack"]


def select(scores: Tensor, n_keep: int, must: Tensor | None = None) -> Tensor:
    """Indices of the ``n_keep`` best scores of every head, in position order.

    Args:
        scores: ``[B, Hkv, T]``, float32, larger = keep.
        n_keep: how many to keep, ``1 <= n_keep <= T``.
        must: bool ``[B or 1, Hkv or 1, T]``, tokens that are kept whatever their score: no more than ``n_keep``.

    Returns:
        ``[B, Hkv, n_keep]``, int64, ascending along the last dimension. Among equal scores the earlier token is kept.

    Raises:
        PressError: a score is NaN.
    """
    n_batch, n_heads, _ = scores.shape
    keep = best(protect(checked(scores), must), n_keep)
    return keep.nonzero()[:, -1].view(n_batch, n_heads, n_keep)


def protect(scores: Tensor, must: Tensor | None) -> Tensor:
    """``scores`` ``[B, Hkv, T]`` with infinity at the tokens that must be kept."""
    return scores if must is None else scores.masked_fill(must, torch.inf)


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


def pack(is_kept: Tensor) -> Tensor:
    """Positions of the kept pairs, in the form of :class:`~coldpress.core.kept.Kept`.

    Args:
        is_kept: bool ``[B, Hkv, T]``; some head keeps something.

    Returns:
        int64 ``[B, Hkv, n]`` with n the largest number that a head keeps; ascending, then -1 in heads that keep fewer.
    """
    n_tokens = is_kept.shape[-1]
    token = torch.arange(n_tokens, device=is_kept.device)
    positions = token.where(is_kept, n_tokens).sort(-1).values[..., : int(is_kept.sum(-1).max())]
    return positions.masked_fill(positions == n_tokens, -1)


def unpack(positions: Tensor, n_tokens: int) -> Tensor:
    """Which of ``n_tokens`` are at ``positions``, int64 ``[B, Hkv, n]``, -1 for none: bool ``[B, Hkv, n_tokens]``."""
    found = torch.zeros(*positions.shape[:2], n_tokens + 1, dtype=torch.bool, device=positions.device)
    return found.scatter_(2, positions.where(positions >= 0, n_tokens), True)[..., :-1]


def checked(scores: Tensor) -> Tensor:
    """``scores`` in float32; raise :class:`PressError` if one is NaN."""
    if torch.isnan(scores).any():
        raise PressError(
            "A score is NaN: the press made it so, or the model's keys, values or queries are NaN (try float32 or "
            "bfloat16)."
        )
    return scores.float()
