"""Quest: nothing is evicted, and each decoding query reads the pages of the cache that may matter to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.bases.checks import check_at_least, check_share
from coldpress.bases.reader import ReaderPress
from coldpress.core.column import PINNED
from coldpress.core.counts import share_of
from coldpress.core.view import LayerView

_PAGES_AT_ONCE = 16  # whose limits a layer keeps together: joining them to those before copies these


@dataclass(frozen=True)
class QuestPress(ReaderPress):
    """Keep everything, and have a decoding query read the pages whose keys may have the largest product with it.

    It saves no memory: pages' limits add 1 / ``page`` of the pairs' bytes. Measured on a CPU (benchmarks/read_little),
    reading an eighth of the pairs is faster than reading all behind 32,768 tokens and about as fast behind 8,192, and
    gives another token more often than once in a hundred. It was to reach more, so it has no name, and ``--press all``
    does not measure it.

    The stored pairs of a head are cut in pages of ``page`` tokens, the last one shorter. Of T pairs a query reads
    ceil(floor(T * read) / page) pages, at least 3: the last one, those with pinned tokens, and those with the largest
    bound[p] = max over the group's heads of sum over channels i of max(q_i * low_i, q_i * high_i),
    with low_i and high_i the least and the largest number that a key of page p has in channel i, after rotation. No
    product of q with a key of the page is larger. A text that has no more pages is read as a whole, as are the first
    ``dense_layers`` layers.

    A layer keeps the limits of whole pages from step to step. Where heads or rows differ (padding, pairs that were
    evicted) and where pairs are in few bits, they are worked out again at each step, which takes longer than reading
    everything. ``missed`` bounds what a query misses by the same limits.

    Source: Tang et al. 2024, arXiv:2406.10774, section 3. Differs from the paper: heads of a group read the same pages;
    pages to read are a share of the text. Differs from the authors' code: the last page is always read.

    Needs: keys and the newest query. Cost: O(T * D * (2 / page + read)) per query head, layer and decoding step.

    Args:
        page: tokens of a page, at least 1.
        read: share of the stored pairs that a query reads, in (0, 1].
        dense_layers: first layers, whose queries read everything, at least 0.
    """

    per_head_independent = True

    page: int = 16
    read: float = 0.125
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_at_least(self, 1, "page")
        check_at_least(self, 0, "dense_layers")
        check_share(self, "read")

    def bounds(self, view: LayerView) -> Tensor:
        """Bounds of the newest query's products: float32 ``[B, Hkv, P]``, minus infinity for a page without tokens."""
        return self._bounds(view).amax(2)

    def most(self, view: LayerView) -> Tensor:
        return self._bounds(view).repeat_interleave(self.page, dim=3)[..., : view.n_tokens]

    def _bounds(self, view: LayerView) -> Tensor:
        """For each query head: float32 ``[B, Hkv, G, P]``."""
        query = view.queries[:, :, -1].float().unflatten(1, (-1, view.group_size))  # [B, Hkv, G, D]
        above, below = query.clamp(min=0), query.clamp(max=0)
        # max(q low, q high) is q high where q is positive, and q low elsewhere
        parts = [above @ high.float().mT + below @ low.float().mT for low, high in self._limits(view)]
        has_some = self._held(view, torch.arange(0, view.n_tokens, self.page, device=query.device))
        return torch.cat(parts, dim=3).masked_fill(~has_some[:, :, None], -torch.inf)

    def _held(self, view: LayerView, slots: Tensor) -> Tensor:
        """Which of ``slots``, int64 ``[..., n]``, have a token: bool ``[B or 1, Hkv or 1, n]`` at least."""
        if view.counts is None:
            return (slots < view.n_tokens).expand(1, 1, -1) if slots.dim() == 1 else slots < view.n_tokens
        return slots < view.counts[..., None]

    def _limits(self, view: LayerView) -> Iterator[tuple[Tensor, Tensor]]:
        """The least and the largest numbers in each channel, ``[B, Hkv, p, D]``: of pages that are kept, of the rest.

        Those of whole pages are kept by the layer, a few pages at a time, where no slot is empty.
        """
        step = self.page * _PAGES_AT_ONCE
        n = 0 if view.counts is not None else view.n_tokens // step * step
        if n:
            whole = lambda start, stop: view.keys[:, :, start:stop].unflatten(2, (-1, self.page))  # noqa: E731
            low = view.outlines.of_first(("least", self.page), n, lambda *at: whole(*at).amin(3))
            yield low, view.outlines.of_first(("largest", self.page), n, lambda *at: whole(*at).amax(3))
        if n < view.n_tokens:
            keys, slots = view.keys[:, :, n:], torch.arange(n, view.n_tokens, device=view.keys.device)
            is_empty = ~self._held(view, slots)[..., None]
            found = []
            for fill, least in ((torch.inf, Tensor.amin), (-torch.inf, Tensor.amax)):
                own = pad(keys.masked_fill(is_empty, fill), (0, 0, 0, -len(slots) % self.page), value=fill)
                limit = least(own.unflatten(2, (-1, self.page)), 3)
                found.append(limit.masked_fill(limit == fill, 0.0))  # of a page without tokens
            yield found[0], found[1]

    def select(self, view: LayerView) -> Tensor | None:
        n_pages = -(-view.n_tokens // self.page)
        n_read = max(3, -(-share_of(view.n_tokens, self.read) // self.page))
        if view.layer_idx < self.dense_layers or n_read >= n_pages:
            return None
        bounds = self.bounds(view)
        last = (bounds > -torch.inf).sum(-1, keepdim=True) - 1
        bounds = bounds.scatter(2, last, torch.inf)
        if PINNED in view.columns:
            pinned = pad(view.columns[PINNED], (0, -view.n_tokens % self.page)).unflatten(2, (-1, self.page)).any(-1)
            bounds = bounds.masked_fill(pinned, torch.inf)
            n_read = min(n_pages, max(n_read, int((bounds == torch.inf).sum(-1).max())))
        best = bounds.topk(n_read).indices.sort().values
        slots = (best[..., None] * self.page + torch.arange(self.page, device=best.device)).flatten(2)
        return slots.masked_fill(~self._held(view, slots), -1)
