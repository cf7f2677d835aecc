"""Quest: nothing is evicted, and each query reads the pages of the cache that may matter to it.

A selective reader: ``select`` says which slots the query of a decoding step reads::

    cache = PressedCache(QuestPress(page_tokens=16, n_pages=64))
    model.generate(**inputs, cache=cache)
    cache.read_ratio()  # what queries have read, of the stored pairs

Bounds are worked out from all keys in each step: this shows the choice, and not the speed of Quest's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress import BasePress, Kept, LayerView


@dataclass(frozen=True)
class QuestPress(BasePress):
    """Keep everything; a query reads the pages whose keys may have the largest product with it, and the newest page.

    bound[page] = sum over channels i of max(q_i * min_i, q_i * max_i), with the least and the largest number that a key
    of the page has in each channel; the largest of the group's heads. No q . k of the page is larger.
    Source: Tang et al. 2024, arXiv:2406.10774, section 3. Differs from the paper: heads of a group read the same pages.
    """

    per_head_independent = True
    page_tokens: int = 16
    n_pages: int = 64  # that are read
    dense_layers: int = 2  # first layers, which read everything

    def compress(self, view: LayerView) -> Kept | None:
        return None

    def bounds(self, view: LayerView) -> Tensor:
        """Of the newest query: float32 ``[B, Hkv, pages]``, minus infinity for a page of empty slots."""
        is_empty = (self.pages(view) < 0)[..., None]
        keys = pad(view.keys.float(), (0, 0, 0, -view.n_tokens % self.page_tokens)).unflatten(2, (-1, self.page_tokens))
        low, high = keys.masked_fill(is_empty, torch.inf).amin(3), keys.masked_fill(is_empty, -torch.inf).amax(3)
        query = view.queries[:, :, -1:].float().unflatten(1, (-1, view.group_size))  # [B, Hkv, G, 1, D]
        bounds = torch.maximum(query * low[:, :, None], query * high[:, :, None]).sum(-1).amax(2)
        return bounds.masked_fill(is_empty.all(3)[..., 0], -torch.inf)

    def pages(self, view: LayerView) -> Tensor:
        """The slots of each page: int64 ``[B, Hkv, pages, page_tokens]``, -1 for none."""
        slots = torch.arange(view.n_tokens, device=view.keys.device).where(view.positions >= 0, -1)
        return pad(slots, (0, -view.n_tokens % self.page_tokens), value=-1).unflatten(2, (-1, self.page_tokens))

    def select(self, view: LayerView) -> Tensor | None:
        if view.layer_idx < self.dense_layers or view.n_tokens <= self.n_pages * self.page_tokens:
            return None
        pages, bounds = self.pages(view), self.bounds(view)
        newest = (bounds > -torch.inf).sum(-1, keepdim=True) - 1
        best = bounds.scatter(2, newest, torch.inf).topk(self.n_pages).indices.sort().values
        return pages.gather(2, best[..., None].expand(-1, -1, -1, self.page_tokens)).flatten(2)
