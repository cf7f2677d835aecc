"""Weights: the attention weights of one layer, as scorers ask for them; never a whole ``[T, T]`` matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.core.pick import at_once

__all__ = ["Weights"]


@dataclass(frozen=True, eq=False)
class Weights:
    """Softmax in float32 of what queries see of keys. Attributes are those of :class:`~coldpress.core.view.LayerView`.

    ``bias``: float32 ``[B, Hkv, T]`` that is added to the logits of the keys, or None.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    sliding_window: int | None
    first_position: int
    positions: Tensor | None
    counts: Tensor | None
    bias: Tensor | None

    def rows(self, start: int, stop: int, heads: slice = slice(None)) -> Tensor:
        """Weights of queries ``start .. stop - 1`` over the keys up to the last of them: ``[B, Hkv, G, n, T']``.

        Args:
            heads: the KV heads that are looked at.
        """
        logits, is_hidden = self.logits(start, stop, heads)
        if self.sinks is None:
            if self.positions is None or is_hidden is None:
                return logits.softmax(-1)
            sees_nothing = is_hidden.all(-1, keepdim=True)  # all that a query of a token in the past saw may be gone
            return logits.masked_fill_(sees_nothing, 0.0).softmax(-1).masked_fill_(sees_nothing, 0.0)
        sinks = self.sinks.float().view(-1, logits.shape[2], 1, 1)[heads].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]

    def logits(self, start: int, stop: int, heads: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """What the softmax of :meth:`rows` is of, minus infinity where a query does not see a key.

        The other one is a mask of such places that causal order alone does not explain; None if there are none.
        """
        keys = self.keys[:, heads]
        (n_batch, n_kv_heads), group = keys.shape[:2], self.queries.shape[1] // self.keys.shape[1]
        n_tokens = self.keys.shape[2]
        offset = n_tokens - self.queries.shape[2]
        end = offset + stop  # keys after the last query are invisible to all of them
        if self.positions is not None:
            end = n_tokens
        n = stop - start
        queries = self.queries[:, :, start:stop].unflatten(1, (-1, group))[:, heads].float() * self.scaling
        queries = queries.reshape(n_batch, n_kv_heads, group * n, -1)  # a group shares its keys: no copies
        logits = queries @ keys[:, :, :end].float().transpose(-1, -2)
        logits = logits.view(n_batch, n_kv_heads, group, n, end)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.bias is not None:
            logits = logits + self.bias[:, heads, None, None, :end]
        query_at = torch.arange(offset + start, offset + stop, device=logits.device)[:, None]
        key_at = torch.arange(end, device=logits.device)
        is_hidden: Tensor | None = None
        if self.positions is not None:
            query_at = query_at + self.first_position
            key_at = self.positions[:, heads, None, None]  # [B, Hkv, 1, 1, T']
            is_hidden = key_at > query_at
        else:  # all are in the past of all queries, but for the last ones
            logits[..., end - n :].masked_fill_(key_at[end - n :] > query_at, -torch.inf)
        if self.sliding_window is not None:
            is_far = key_at <= query_at - self.sliding_window
            is_hidden = is_far if is_hidden is None else is_hidden | is_far
        if self.counts is not None:
            is_empty = key_at < 0
            is_hidden = is_empty if is_hidden is None else is_hidden | is_empty
        if is_hidden is not None:
            logits.masked_fill_(is_hidden, -torch.inf)
        return logits, is_hidden

    def column_sums(self, first: int) -> Tensor:
        """What each key received from the queries from ``first`` on, mean over the group: float32 ``[B, Hkv, T]``."""
        (n_batch, n_kv_heads), n_queries = self.keys.shape[:2], self.queries.shape[2]
        device, n_tokens = self.keys.device, self.keys.shape[2]
        block = max(16, min(1024, at_once(device, n_tokens)))  # queries, for some of the KV heads
        n_rows = n_batch * self.queries.shape[1] // n_kv_heads * min(block, n_queries)
        n_heads = at_once(device, n_rows * n_tokens)
        sums = torch.zeros(self.keys.shape[:3], dtype=torch.float32, device=device)
        for head in range(0, n_kv_heads, n_heads):
            heads = slice(head, head + n_heads)
            for start in range(first, n_queries, block):
                weights = self.rows(start, min(start + block, n_queries), heads)
                sums[:, heads, : weights.shape[-1]] += weights.sum(-2).mean(2)
        return sums
