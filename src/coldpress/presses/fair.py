"""FairPress: each span of the text keeps its share of the budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import best, checked, select_counts
from coldpress.core.forced import positions_of
from coldpress.core.requirements import CHOICE, SCORER, require
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.adakv import AdaKVPress


@dataclass(frozen=True)
class FairPress(WrapperPress):
    """Keep of each span of the text its share of the budget, such as of each of several instructions in one prompt.

    With n the number that a head keeps, and len[s] the tokens of span s in the text so far, the head keeps at least
    quota[s] = floor(n * len[s] / sum of len) pairs of span s, the best by the inner press's scores; the places that are
    left go to the best of all spans. Tokens outside of all spans are a span of their own. What must stay (pins, sinks,
    window) counts towards the quota of its span. Where it is more than that, it stays, and the other spans share the
    rest of the budget in the same way. A span that holds fewer pairs than its quota, as may be while decoding, keeps
    them all. Around AdaKVPress, n is what AdaKV gives to the head.

    Source: fair eviction, arXiv:2510.00231, where it is for two spans, of instructions. Differs from the paper: any
    number of spans; tokens outside count as one; what rounding leaves goes by score.

    Needs: what the inner press needs. Cost: of the inner press, and a search for the best scores of each span.

    Args:
        press: the scorer inside, with the compression ratio, or AdaKVPress around one.
        spans: ``(first, stop)`` of each span, positions of tokens in the text, padding not counted; they must not
            overlap, and are the same in all rows of a batch.
    """

    needs_inside = CHOICE

    spans: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.press if self._adaptive is None else self._adaptive.press, *SCORER)
        object.__setattr__(self, "spans", _checked(self.spans))

    @property
    def _adaptive(self) -> AdaKVPress | None:
        """The press inside where that is AdaKV, which chooses by scores and says how many of each head."""
        press = self.press
        return press if isinstance(press, AdaKVPress) and type(press).chosen is AdaKVPress.chosen else None

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        is_whole = view.positions is None and view.n_counted is None  # else more of the text may come
        if is_whole and max(first for first, _ in self.spans) >= view.end:
            said = f"of {list(self.spans)} a span lies beyond the prompt's {view.end} tokens, and has no share"
            warnings.warn(f"FairPress: {said}.", stacklevel=2)
        scores = checked(view.guard(self.scores(view), must))
        counts = torch.full(scores.shape[:2], n_keep, device=scores.device)
        if self._adaptive is not None:
            counts = self._adaptive.counts(view, n_keep, must)
        elif view.counts is not None:
            counts = counts.minimum(view.counts)
        is_in, sizes = self._spans_of(view)  # [B or 1, Hkv or 1, S, T], [S]
        quotas = _quotas(counts, (is_in & must[:, :, None]).sum(-1), sizes)  # [B, Hkv, S]; maybe more than are held
        first = torch.zeros_like(scores, dtype=torch.bool)
        for own, quota in zip(is_in.unbind(2), quotas.unbind(2), strict=True):
            first |= best(scores.masked_fill(~own, -torch.inf), quota) & own
        return select_counts(scores.masked_fill(first, torch.inf), counts)

    def _spans_of(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Which span each slot is in, bool ``[B or 1, Hkv or 1, S, T]``, and how many tokens of the text each has.

        The last of the S spans has all tokens outside of the others, and empty slots, which have no scores to win by.
        """
        at, start = positions_of(view), view.first_position if view.positions is None else 0
        bounds = torch.tensor(self.spans, device=at.device).view(-1, 2, 1)
        inside = (at[:, :, None] >= bounds[:, 0]) & (at[:, :, None] < bounds[:, 1])
        outside = ~inside.any(2, keepdim=True)
        sizes = bounds.clamp(start, view.end).diff(dim=1).flatten()
        return torch.cat([inside, outside], dim=2), torch.cat([sizes, (view.end - start - sizes.sum())[None]])


def _quotas(counts: Tensor, n_forced: Tensor, sizes: Tensor) -> Tensor:
    """How many pairs each span keeps at least: int64 ``[B, Hkv, S]``, no more than ``counts`` together.

    Args:
        counts: int64 ``[B, Hkv]``, pairs that each head keeps.
        n_forced: int64 ``[B or 1, Hkv or 1, S]``, those that must stay, no more than ``counts`` together.
        sizes: int64 ``[S]``.
    """
    n = counts[..., None]
    n_forced = n_forced.expand(*counts.shape, -1)
    quotas, is_more = n * sizes // sizes.sum(), torch.zeros_like(n_forced, dtype=torch.bool)
    while (more := (n_forced > quotas) & ~is_more).any():
        is_more |= more
        left, total = n - (n_forced * is_more).sum(-1, keepdim=True), (sizes * ~is_more).sum(-1, keepdim=True)
        quotas = n_forced.where(is_more, left * sizes // total.clamp(min=1))
    return quotas


def _checked(spans: object) -> tuple[tuple[int, int], ...]:
    """The spans as tuples.

    Raises:
        PressError: they are none, or overlap.
    """
    found = []
    for span in spans if isinstance(spans, (list, tuple)) else (None,):
        is_pair = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(end) is int for end in span)
        if not is_pair or not 0 <= span[0] < span[1] < 2**62:
            raise PressError(
                f"FairPress: spans are pairs (first, stop) of positions with 0 <= first < stop, such as "
                f"[(0, 40), (40, 90)]; got {spans!r}."
            )
        found.append((span[0], span[1]))
    for (_, stop), (first, _) in zip(sorted(found), sorted(found)[1:], strict=False):
        if first < stop:
            raise PressError(f"FairPress: spans must not overlap, and position {first} is in two of {found}.")
    if not found:
        raise PressError("FairPress: spans must name at least one span of the text, such as [(0, 40)].")
    return tuple(found)
