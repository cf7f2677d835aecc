"""Quest: nothing is evicted, and each decoding query reads the pages of the cache that may matter to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.bases.checks import check_at_least, check_share
from coldpress.bases.press import BasePress
from coldpress.core.column import PINNED
from coldpress.core.counts import share_of
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView


@dataclass(frozen=True)
class QuestPress(BasePress):
    """Keep everything, and have a decoding query read the pages whose keys may have the largest product with it.

    It saves neither memory nor time here: bounds are worked out from all keys at each step, so a step takes longer than
    one that reads everything (benchmarked at 8,192 tokens in 6 layers, 8 heads and 64 dimensions, on a CPU). So it has
    no name, and ``--press all`` does not measure it. What it shows is what such a choice costs in quality.

    The stored pairs of a head are cut in pages of ``page`` tokens, the last one shorter. Of T pairs a query reads
    ceil(floor(T * read) / page) pages, at least 3: the last one, those with pinned tokens, and those with the largest
    bound[p] = max over the group's heads of sum over channels i of max(q_i * low_i, q_i * high_i),
    with low_i and high_i the least and the largest number that a key of page p has in channel i, after rotation. No
    product of q with a key of the page is larger. A text that has no more pages is read as a whole, as are the first
    ``dense_layers`` layers.

    Source: Tang et al. 2024, arXiv:2406.10774, section 3. Differs from the paper: heads of a group read the same pages;
    pages to read are a share of the text. Differs from the authors' code: the last page is always read.

    Needs: keys and the newest query. Cost: O(T * D) per KV head, layer and decoding step; the paper keeps bounds.

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

    def compress(self, view: LayerView) -> Kept | None:
        return None

    def slots(self, view: LayerView) -> Tensor:
        """The slots of each page: int64 ``[B, Hkv, P, page]``, -1 for none."""
        slots = torch.arange(view.n_tokens, device=view.keys.device).expand(view.keys.shape[:3])
        slots = slots if view.positions is None else slots.where(view.positions >= 0, -1)
        return pad(slots, (0, -view.n_tokens % self.page), value=-1).unflatten(2, (-1, self.page))

    def bounds(self, view: LayerView) -> Tensor:
        """Bounds of the newest query's products: float32 ``[B, Hkv, P]``, minus infinity for a page without tokens."""
        is_empty = (self.slots(view) < 0)[..., None]
        keys = pad(view.keys.float(), (0, 0, 0, -view.n_tokens % self.page)).unflatten(2, (-1, self.page))
        low, high = keys.masked_fill(is_empty, torch.inf).amin(3), keys.masked_fill(is_empty, -torch.inf).amax(3)
        has_some = ~is_empty.all(3)[..., 0]
        low, high = (part.masked_fill(~has_some[..., None], 0.0) for part in (low, high))
        query = view.queries[:, :, -1].float().unflatten(1, (-1, view.group_size))  # [B, Hkv, G, D]
        # max(q low, q high) is q high where q is positive, and q low elsewhere
        bounds = query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT  # [B, Hkv, G, P]
        return bounds.amax(2).masked_fill(~has_some, -torch.inf)

    def select(self, view: LayerView) -> Tensor | None:
        n_pages = -(-view.n_tokens // self.page)
        n_read = max(3, -(-share_of(view.n_tokens, self.read) // self.page))
        if view.layer_idx < self.dense_layers or n_read >= n_pages:
            return None
        slots, bounds = self.slots(view), self.bounds(view)
        last = (bounds > -torch.inf).sum(-1, keepdim=True) - 1
        bounds = bounds.scatter(2, last, torch.inf)
        if PINNED in view.columns:
            pinned = pad(view.columns[PINNED], (0, -view.n_tokens % self.page)).unflatten(2, (-1, self.page)).any(-1)
            bounds = bounds.masked_fill(pinned, torch.inf)
            n_read = min(n_pages, max(n_read, int((bounds == torch.inf).sum(-1).max())))
        best = bounds.topk(n_read).indices.sort().values
        return slots.gather(2, best[..., None].expand(-1, -1, -1, self.page)).flatten(2)
