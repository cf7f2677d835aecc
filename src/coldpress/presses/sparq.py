"""SparQ: nothing is evicted, and each decoding query reads the pairs that a few channels of it point at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least, check_share
from coldpress.bases.reader import ReaderPress
from coldpress.core.choice import best, checked, pack
from coldpress.core.column import PINNED
from coldpress.core.counts import share_of
from coldpress.core.view import LayerView


@dataclass(frozen=True)
class SparQPress(ReaderPress):
    """Keep everything, and have a decoding query read the pairs with the largest logits in its largest channels.

    It saves neither memory nor time here: a key's channels lie side by side, so reading some of them takes as long as
    reading all. Measured on a CPU (benchmarks/read_little), a token takes longer than with all pairs read, and is
    nearer to what these give than QuestPress's. So it has no name, and ``--press all`` does not measure it.

    With C the ``channels`` channels in which the sum of |q| over the group's heads is largest, each head has the logits
    l[t] = sum over i in C of q_i k_i[t] * s * sqrt(sum of |q| over all channels / sum of |q| over C),
    s the attention's scaling. A query reads the floor(T * read) of T pairs, at least ``local`` and 1, that have the
    largest sum over the group's heads of l[t], the newest ``local`` among them; and pinned ones.

    ``missed`` bounds what a query misses: channels alone bound nothing, so it takes the lengths of queries and keys
    in the others (Cauchy-Schwarz), for which it reads all keys.

    Source: Ribar et al. 2024, arXiv:2312.04985, section 4. Differs from the paper: what is not read is left out, and
    not replaced by the mean of all values times its approximate weight, as a press says which slots are read and not
    what attention gives; pairs to read are a share of the text.

    Needs: keys and the newest query. Cost: O(T * channels) per query head, layer and decoding step.

    Args:
        channels: of the query that choose, at least 1; more than a head has are all of them.
        read: share of the stored pairs that a query reads, in (0, 1].
        local: newest pairs that are read, at least 0.
    """

    per_head_independent = True

    channels: int = 16
    read: float = 0.125
    local: int = 32

    def __post_init__(self) -> None:
        check_at_least(self, 1, "channels")
        check_at_least(self, 0, "local")
        check_share(self, "read")

    def logits(self, view: LayerView) -> Tensor:
        """Approximate logits of the newest query: float32 ``[B, Hkv, G, T]``."""
        query, at = self._channels(view)
        size = query.abs()
        share = size.gather(3, at.expand(*size.shape[:3], -1)).sum(-1, keepdim=True) / size.sum(-1, keepdim=True)
        return self._products(view, query, at) * view.scaling / share.nan_to_num(1.0).clamp(min=1e-30).sqrt()

    def most(self, view: LayerView) -> Tensor:
        """The product over C, which is exact, and that of the lengths of query and key in the other channels."""
        query, at = self._channels(view)
        rest, keys = (x.scatter(3, at.expand(*x.shape[:3], -1), 0.0) for x in (query, view.keys.float()))
        return self._products(view, query, at) + rest.norm(dim=-1, keepdim=True) * keys.norm(dim=-1)[:, :, None]

    def _channels(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """The newest query, float32 ``[B, Hkv, G, D]``, and the channels C, int64 ``[B, Hkv, 1, r]``."""
        query = view.queries[:, :, -1].float().unflatten(1, (-1, view.group_size))
        sizes = query.abs().sum(2, keepdim=True)
        return query, sizes.topk(min(self.channels, query.shape[-1]), sorted=False).indices

    @staticmethod
    def _products(view: LayerView, query: Tensor, at: Tensor) -> Tensor:
        """Of the query with each key, in the channels ``at``: float32 ``[B, Hkv, G, T]``."""
        keys = view.keys.gather(3, at.expand(*view.keys.shape[:3], -1)).float()  # [B, Hkv, T, r]
        return query.gather(3, at.expand(*query.shape[:3], -1)) @ keys.mT

    def select(self, view: LayerView) -> Tensor | None:
        n_read = max(1, self.local, share_of(view.n_tokens, self.read))
        if n_read >= view.n_tokens:
            return None
        scores = checked(self.logits(view).sum(2))  # [B, Hkv, T]
        at = torch.arange(view.n_tokens, device=scores.device) if view.positions is None else view.positions
        if view.positions is not None:
            scores = scores.masked_fill(at < 0, -torch.inf)
        n_held = view.n_tokens if view.counts is None else view.counts[..., None]
        newest = torch.arange(view.n_tokens, device=scores.device) >= n_held - self.local
        is_read = best(scores.masked_fill(newest & (scores > -torch.inf), torch.inf), n_read) & (scores > -torch.inf)
        return pack(is_read | view.columns[PINNED] if PINNED in view.columns else is_read)
