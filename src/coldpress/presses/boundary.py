"""BoundaryPress: both ends of the prompt stay, also while decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coldpress.bases.checks import check_between
from coldpress.bases.wrapper import WrapperPress, require_forced
from coldpress.core.column import Column
from coldpress.core.counts import share_of
from coldpress.core.forced import positions_of
from coldpress.core.requirements import CHOICE, OUTSIDE
from coldpress.core.view import LayerView

_LENGTH = Column("prompt_tokens", fill=0, dtype=torch.int32)  # of the prompt that a pair belongs to; 0: to none


@dataclass(frozen=True)
class BoundaryPress(WrapperPress):
    """Keep the first and the last tokens of the prompt, and of the rest what the inner press keeps.

    When a head keeps n pairs, the floor(share * n) first and as many last tokens of the prompt are among them, as long
    as they are stored; the inner press chooses the others, and its sinks and window shrink to what the two ends leave.
    Once text is generated the end of the prompt is not that of the text: each pair carries the length of the prompt
    that it came with. Pins come first, and the end of the prompt before its start, where not all fit in.

    Source: arXiv:2605.18053: with 10 % of the cache at each end of the prompt, presses that cut back a cache while
    decoding do nearly as well as with a larger cache. Differs from the paper: any scorer, and shares of what the
    layer keeps. A later turn of a chat is no prompt.

    Needs: what the inner press needs. Cost: of the inner press, one int32 for each pair.

    Args:
        press: a scorer, or AdaKVPress and its relatives around one, with the compression ratio.
        share: of the budget, at each end, in [0, 0.5].
    """

    columns: ClassVar[tuple[Column, ...]] = (_LENGTH,)
    observes_later = False
    offers_scores = True
    needs_inside = CHOICE

    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 0.5, "share")
        # a choice that is not given what must stay would leave out the ends
        require_forced(self, self.press, OUTSIDE)

    @property
    def estimates_attention(self) -> bool:
        return self.press.estimates_attention

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        if view.positions is not None and view.n_counted is None:
            return {}  # the prompt is over
        return {_LENGTH.name: torch.full(view.keys.shape[:3], view.end, dtype=_LENGTH.dtype, device=view.keys.device)}

    def reserved(self, view: LayerView, n_keep: int) -> Tensor | None:
        n = min(share_of(n_keep, self.share), (n_keep - 1) // 2)  # so that a place is left
        at, length = positions_of(view), view.columns.get(_LENGTH.name)
        if view.positions is None and length is None:
            length = torch.full_like(at, view.end)
        own = None if length is None else (at >= 0) & (at < length) & ((at < n) | (at >= length - n))
        inner = super().reserved(view, n_keep)
        return own if inner is None else inner if own is None else own | inner

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor | None:
        return self.press.chosen(view, n_keep, must)
