"""ModelCall: one call of the model as all layers see it. additive_mask: what its queries see of one layer's slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.cache.newest import newest_from
from coldpress.cache.slots import BIAS, STAYS, Slots

__all__ = ["ModelCall", "additive_mask", "leaving", "ranks"]


@dataclass(eq=False)
class ModelCall:
    """How many tokens a call of the model brings, and what its mask hides.

    Kept pairs are of tokens that were shown. So as long as masks hide what was never shown, no layer has to look up
    which of its kept pairs a mask hides.

    Attributes:
        seen: tokens seen before the call.
        n_new: tokens of the call.
        shown: bool ``[B, seen + n_new]``, False for tokens that no call so far was shown (padding); None: all were.
        hides_shown: whether its mask hides tokens that an earlier call was shown.
        hides_new: whether it hides tokens of its own.
        hidden_end: column after the last token that its mask hides in some row; 0: it hides none.
        is_as_before: ``shown`` of the call before is what its mask says of these tokens.
        first: the layer that was updated first.
    """

    seen: int
    n_new: int
    shown: Tensor | None = None
    hides_shown: bool = False
    hides_new: bool = False
    hidden_end: int = 0
    is_as_before: bool = False
    first: int | None = None

    @classmethod
    def of(cls, seen: int, n_new: int, mask: Tensor | None, shown: Tensor | None) -> ModelCall:
        """A call that begins.

        Args:
            mask: bool ``[B, seen + n_new]``, False where a token is hidden; None if it hides none.
            shown: of the call before, ``[B, seen]``.
        """
        if mask is None:
            return cls(seen, n_new)
        before = mask.new_ones(mask.shape[0], seen)
        if shown is not None:
            before[:, : shown.shape[1]] = shown[:, :seen]
        now, column = mask[:, :seen], torch.arange(1, mask.shape[1] + 1, device=mask.device)
        found = torch.stack([(~mask * column).amax(), (before & ~now).any(), (before != now).any()])
        end, hides_shown, differs = found.tolist()  # here the host waits for the device, and nowhere else
        if not end:
            return cls(seen, n_new)
        now = torch.cat([before | now, mask[:, seen:]], dim=1)  # the mask itself may change later
        return cls(seen, n_new, now, bool(hides_shown), end > seen, end, not differs)

    @cached_property
    def n_real(self) -> list[int]:
        """How many of its tokens are none of padding, in each row; where some are."""
        assert self.shown is not None
        if not self.hides_new:
            return [self.n_new] * len(self.shown)
        return self.shown[:, self.seen :].sum(-1).tolist()


def additive_mask(
    slots: Slots,
    n_queries: int,
    mask: Tensor | None,
    sliding_window: int | None,
    call: ModelCall | None = None,
    leaving: Tensor | None = None,
    by_head: bool = False,
) -> Tensor | None:
    """A bias for the logits of the last ``n_queries`` tokens: float32 ``[B or 1, Hkv or 1, Q or 1, T]``.

    Minus infinity where a query does not see a slot, and the bias of its key elsewhere.

    Args:
        slots: what the layer stores; the tokens of this call are the last slots.
        n_queries: Q, the tokens of this call.
        mask: bool ``[B, seen]``, False where a token is hidden; None if none is.
        sliding_window: how many tokens back a query sees (itself included), or None.
        call: what is known of the mask.
        leaving: bool ``[B, Hkv, m]``, of the first m tokens after the kept ones, those that only other rows still need.
        by_head: the store attends to what each head stores, in causal order, by itself.

    Returns:
        None where every query sees every slot, or where plain causal order says it all (nothing stored before).
    """
    device, n_stored = slots.filled.device, slots.n
    before = n_stored - n_queries
    if sliding_window is not None and slots.seen <= sliding_window:
        sliding_window = None
    bias = slots.column(BIAS.name)
    all_seen = mask is None or (by_head and _hides_none_later(mask, slots.tail_start, call))
    is_causal = by_head or (not slots.has_gaps and (n_queries == 1 or before == 0))
    if is_causal and all_seen and sliding_window is None and leaving is None and bias is None:
        return None
    slot = torch.arange(n_stored, device=device)
    query_slot = torch.arange(before, n_stored, device=device)[:, None]
    visible = (slot <= query_slot)[None, None]  # [1, 1, Q, T]
    n_kept, shown = slots.n_kept, None if call is None or call.shown is None else call.shown.to(device)
    if slots.has_gaps and slots.kept is not None:
        visible = visible & pad(slots.kept >= 0, (0, n_stored - n_kept), value=True)[:, :, None]
    if leaving is not None:
        visible = visible & ~pad(leaving, (n_kept, n_stored - n_kept - leaving.shape[2]))[:, :, None]
    if mask is not None:
        hidden = shown & ~mask if call is not None and call.hides_shown and shown is not None else None
        visible = visible & _unhidden(slots, mask, hidden)[:, :, None]
    if sliding_window is not None:
        position, query_at = ranks(slots, shown)
        visible = visible & (position[:, :, None] > query_at[..., -n_queries:, None] - sliding_window)
    if mask is not None and call is not None and call.hides_new:  # no softmax of nothing: who sees nothing sees itself
        visible = visible | ((slot == query_slot) & ~visible.any(-1, keepdim=True))
    added = torch.zeros(visible.shape, device=device).masked_fill_(~visible, -torch.inf)
    return added if bias is None else added + bias[:, :, None]


def _hides_none_later(mask: Tensor, start: int, call: ModelCall | None) -> bool:
    """Whether a mask hides no token from ``start`` on, and none before that some call was shown."""
    if call is None:
        return bool(mask[:, start:].all())
    return call.hidden_end <= start and not call.hides_shown


def leaving(slots: Slots, shown: Tensor | None, n_waiting: int, n_new: int) -> Tensor | None:
    """Which tokens after the kept ones have left their row's window and are stored for other rows only.

    A row alone would have freed them.

    Args:
        shown: bool ``[B, seen]``, False for padding.
        n_waiting: newest real tokens of a row that are kept whatever the press has said of them.
        n_new: newest tokens that are not counted.

    Returns:
        bool ``[B, Hkv, m]`` of the first m tokens after the kept ones, or None.
    """
    stays = slots.column(STAYS.name)
    if shown is None or stays is None:
        return None
    stops = newest_from(shown[:, : slots.seen - n_new], n_waiting).to(stays.device)
    m = int(stops.max()) - slots.tail_start
    if m <= 0:
        return None
    token = torch.arange(slots.tail_start, slots.tail_start + m, device=stays.device)
    return ~stays[:, :, slots.n_kept : slots.n_kept + m] & (token < stops[:, None])[:, None]


def _unhidden(slots: Slots, mask: Tensor, hidden: Tensor | None) -> Tensor:
    """Which slots ``mask`` (bool ``[B, seen]``) does not hide: bool ``[B, Hkv or 1, T]``.

    Args:
        hidden: bool ``[B, seen]``, tokens that were shown and are hidden now; None if there are none.
    """
    tail = mask[:, None, slots.tail_start :]
    if slots.kept is None:
        return tail
    if hidden is None:
        return pad(tail, (slots.n_kept, 0), value=True)
    n_heads = slots.kept.shape[1]
    kept = ~hidden[:, None].expand(-1, n_heads, -1).gather(2, slots.kept.clamp(min=0).long())
    return torch.cat([kept, tail.expand(-1, n_heads, -1)], dim=-1)


def ranks(slots: Slots, shown: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions of the slots ``[B or 1, Hkv or 1, T]`` and of all tokens seen ``[B or 1, 1, seen]``.

    Sliding windows count real tokens, as they would in each row alone: padding takes no position. A token that only
    some calls hide keeps its own.
    """
    if shown is None:
        rank = torch.arange(slots.seen, device=slots.filled.device).expand(1, 1, -1)
    else:
        rank = (shown.cumsum(-1) - 1)[:, None]
    tail = rank[..., slots.tail_start :]
    if slots.kept is None:
        return tail, rank
    n_batch, n_heads = slots.kept.shape[:2]
    kept = rank.expand(n_batch, n_heads, -1).gather(2, slots.kept.clamp(min=0).long())
    return torch.cat([kept, tail.expand(n_batch, n_heads, -1)], dim=-1), rank
