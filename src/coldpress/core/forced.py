"""Which tokens must be kept, as one boolean mask: sinks, window, newest tokens and pins.

What chooses gets scores and this mask. A press declares how many tokens it protects at the two ends of the text
(``protected``); all that follows from these two numbers is worked out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coldpress.core.column import PINNED
from coldpress.core.view import LayerView
from coldpress.errors import NoRoomError

__all__ = ["as_far_as", "ends", "forced", "must_keep", "positions_of", "shrink_protected"]


def shrink_protected(n_keep: int, n_sink: int, n_window: int) -> tuple[int, int]:
    """Sinks and window tokens that are protected when only ``n_keep`` tokens are kept.

    Both are kept whole while they fit. When they do not, the window is cut to half of the budget (at least one token)
    and the sinks to what the window leaves, so that a small budget still has room for what the scores ask for.
    """
    if n_sink + n_window <= n_keep:
        return n_sink, n_window
    n_window = min(n_window, max(1, n_keep // 2))
    return min(n_sink, n_keep - n_window), n_window


def forced(
    view: LayerView,
    protected: tuple[int, int],
    n_keep: int | None = None,
    *,
    grace: int = 0,
    reserved: Tensor | None = None,
) -> Tensor:
    """Which tokens of ``view`` are kept whatever their score: bool ``[B or 1, Hkv or 1, T]``; never an empty slot.

    Args:
        view: its ``pinned`` column, where it has one, is part of the mask.
        protected: how many of the first and of the last tokens of the text are kept.
        n_keep: pairs that a head keeps, which shrink what is protected unless something is pinned; None: any number.
        grace: how many of the newest tokens are too new to be judged, and kept.
        reserved: bool ``[B or 1, Hkv or 1, T]``, fewer than ``n_keep`` tokens of each head that are kept too: what is
            protected has what they leave of ``n_keep``. Where something is pinned, the last of them are, as they fit.

    Raises:
        PressError: pinned and protected tokens are more than ``n_keep`` in some head.
    """
    at, n_gone = positions_of(view), _n_gone(view)
    n_sink, n_window = protected
    pinned = view.columns.get(PINNED)
    ends = n_sink, max(n_window, grace)
    if reserved is None or n_keep is None:
        return must_keep(at, view.end, ends, n_keep, pinned, n_gone=n_gone)
    room = n_keep if pinned is not None else max(1, n_keep - int(reserved.sum(-1).max()))
    return as_far_as(must_keep(at, view.end, ends, room, pinned, n_gone=n_gone), reserved, n_keep)


def must_keep(
    at: Tensor,
    end: int,
    protected: tuple[int, int],
    n_keep: int | None = None,
    pinned: Tensor | None = None,
    *,
    n_gone: int = 0,
) -> Tensor:
    """:func:`forced` of tokens at positions ``at``, int64 ``[B or 1, Hkv or 1, T]``, of a text of ``end`` tokens.

    Args:
        n_gone: first tokens of the text that a sliding window has left behind; no sinks any more.
    """
    n_sink, n_window = max(0, protected[0] - n_gone), min(protected[1], at.shape[-1])
    if n_keep is not None and pinned is None:
        n_sink, n_window = shrink_protected(n_keep, n_sink, n_window)
    is_end = ((at >= 0) & (at < n_gone + n_sink)) | (at >= end - n_window)
    if pinned is None:
        return is_end
    mask = (pinned & (at >= 0)) | is_end
    n_most = int(mask.sum(-1).max())
    if n_keep is not None and n_most > n_keep:
        raise NoRoomError(
            f"{int(pinned.sum(-1).max())} pinned tokens, {n_sink} sinks and a window of {n_window} are {n_most} tokens "
            f"that must stay, and the budget keeps {n_keep} of each head: pin fewer, or keep more, with a smaller "
            f"ratio or with budget_tokens={n_most} or more."
        )
    return mask


def ends(view: LayerView, protected: tuple[int, int], n_keep: int | None = None) -> Tensor:
    """:func:`forced` without what is pinned."""
    at, n_gone = positions_of(view), _n_gone(view)
    return must_keep(at, view.end, protected, n_keep, n_gone=n_gone)


def as_far_as(must: Tensor | None, more: Tensor, n_keep: int | Tensor) -> Tensor:
    """``must``, and of ``more`` the last tokens, as far as they fit in beside it: bool ``[B or 1, Hkv or 1, T]``.

    Args:
        must: None for nothing, where ``more`` fits in.
        n_keep: places of each head, or int64 ``[B, Hkv]``.
    """
    if must is None:
        return more
    added = more & ~must
    room = (n_keep[..., None] if isinstance(n_keep, Tensor) else n_keep) - must.sum(-1, keepdim=True)
    return must | (added & (added.flip(-1).cumsum(-1).flip(-1) <= room))


def positions_of(view: LayerView) -> Tensor:
    """Where the tokens of ``view`` are in the text: int64 ``[B or 1, Hkv or 1, T]``, -1 in empty slots."""
    if view.positions is not None:
        return view.positions
    return torch.arange(view.first_position, view.end, device=view.keys.device).view(1, 1, -1)


def _n_gone(view: LayerView) -> int:
    """How many tokens before those of ``view`` its rows have left behind."""
    return view.first_position if view.positions is None else 0
