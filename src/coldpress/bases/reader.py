"""ReaderPress: nothing is evicted, and a decoding query reads a part of what is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from coldpress.bases.press import BasePress
from coldpress.core.kept import Kept
from coldpress.core.pick import pick
from coldpress.core.view import LayerView

__all__ = ["ReaderPress"]


class ReaderPress(BasePress):
    """Keep everything, and say which pairs a decoding query reads (:meth:`select`) and how much that may miss.

    A press of this kind defines :meth:`select` and :meth:`most`.
    """

    def compress(self, view: LayerView) -> Kept | None:
        return None

    def most(self, view: LayerView) -> Tensor:
        """What the newest query's product with each key does not exceed: float32 ``[B, Hkv, G, T]``."""
        raise NotImplementedError(f"{type(self).__name__} must define most(view)")

    def missed(self, view: LayerView, slots: Tensor | None) -> Tensor:
        """The share of its attention that the newest query misses at most if it reads ``slots`` alone.

        M / (Z + M), Z the sum of exp(logit) over what is read, M that of exp(bound) over the rest, with the bounds of
        :meth:`most`. Of the keys themselves only those that are read are looked at, as far as :meth:`most` does
        without the others. True but for the rounding of float32.

        Args:
            view: of a decoding step.
            slots: int64 ``[B, Hkv, n]``, as :meth:`select` returns them; None: all.

        Returns:
            float32 ``[B, Hq]``, in 0 .. 1; 0 where all is read.
        """
        if slots is None:
            return view.queries.new_zeros(view.queries.shape[:2], dtype=torch.float32)
        at, bias = slots.clamp(min=0), view.columns.get("bias")
        query = view.queries[:, :, -1].float().unflatten(1, (-1, view.group_size))  # [B, Hkv, G, D]
        read = _logits(view, query @ pick(view.keys, at).float().mT, None if bias is None else bias.gather(2, at))
        mass = read.masked_fill((slots < 0)[:, :, None], -torch.inf).logsumexp(-1)  # [B, Hkv, G]
        if view.sinks is not None:
            mass = torch.logaddexp(mass, view.sinks.float().view(mass.shape[1:]))
        rest = _logits(view, self.most(view), bias).masked_fill(~_unread(view, slots)[:, :, None], -torch.inf)
        return (rest.logsumexp(-1) - mass).sigmoid().flatten(1)

    def truly_missed(self, view: LayerView, slots: Tensor | None) -> Tensor:
        """The share that :meth:`missed` bounds, from all keys: float32 ``[B, Hq]``."""
        if slots is None:
            return self.missed(view, None)
        weights = view.window_attention(1)[..., 0, :]  # [B, Hkv, G, T]
        return weights.masked_fill(~_unread(view, slots)[:, :, None], 0.0).sum(-1).flatten(1)


def _unread(view: LayerView, slots: Tensor) -> Tensor:
    """Which tokens of the view are not in ``slots``: bool ``[B, Hkv, T]``, False where a slot is empty."""
    is_read = torch.zeros(*view.keys.shape[:2], view.n_tokens + 1, dtype=torch.bool, device=slots.device)
    is_read.scatter_(2, slots.where(slots >= 0, view.n_tokens), True)
    unread = ~is_read[..., :-1]
    if view.counts is None:
        return unread
    return unread & (torch.arange(view.n_tokens, device=slots.device) < view.counts[..., None])


def _logits(view: LayerView, products: Tensor, bias: Tensor | None) -> Tensor:
    """Logits of products ``[B, Hkv, G, n]``, or of bounds of them; ``bias``: ``[B, Hkv, n]``."""
    logits = products * view.scaling
    if view.softcap is not None:
        logits = view.softcap * (logits / view.softcap).tanh()
    return logits if bias is None else logits + bias[:, :, None].float()
