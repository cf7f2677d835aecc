"""Newest, Pending: states of each row's newest tokens, for a press that evicts while decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Newest", "Pending", "newest_from"]


@dataclass(frozen=True, eq=False)
class Newest:
    """Queries or hidden states of each row's newest tokens. Immutable, so that forks may share it.

    Attributes:
        parts: ``[B, H, q, D]`` each, R tokens together, in the order of the text.
        end: column of the input after the last one.
        at: int64 ``[B, R]``, the column of each, -1 for none; None: the last R columns before ``end``.
    """

    parts: tuple[Tensor, ...]
    end: int
    at: Tensor | None = None

    @classmethod
    def nothing(cls, states: Tensor, end: int) -> Newest:
        """Nothing yet, before ``states [B, H, q, D]`` of the q columns before ``end``."""
        return cls((states.new_empty(*states.shape[:2], 0, states.shape[3]),), end - states.shape[2])

    @property
    def n(self) -> int:
        return sum(part.shape[2] for part in self.parts)

    @property
    def states(self) -> Tensor:
        """``[B, H, R, D]``."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=2)

    def columns(self) -> Tensor:
        """int64 ``[B, R]``, the column of each token, -1 for none."""
        if self.at is not None:
            return self.at
        n, part = self.n, self.parts[0]
        return torch.arange(self.end - n, self.end, device=part.device).expand(part.shape[0], -1)

    def counts(self) -> list[int]:
        """How many tokens each row has here."""
        return [self.n] * self.parts[0].shape[0] if self.at is None else (self.at >= 0).sum(-1).tolist()

    def and_then(self, states: Tensor, end: int, n: int, padding: Tensor | None) -> Newest:
        """With ``states [B, H, q, D]`` of the q columns before ``end``; each row has at least its newest ``n``.

        If others came in between of which nothing is known, only the new ones are left.

        Args:
            padding: bool ``[B, end]``, False where a token is padding; None if there is none.
        """
        n_new = states.shape[2]
        if end - n_new != self.end:
            return Newest.nothing(states, end).and_then(states, end, n, padding)
        if padding is None and self.at is None:
            if n_new > n:
                return Newest((states[:, :, n_new - n :].clone(),), end)
            parts = (*self.parts, states)
            while sum(part.shape[2] for part in parts[1:]) >= n:
                parts = parts[1:]
            return Newest(parts, end)
        new = Newest((states,), end)
        longer = Newest((*self.parts, states), end, torch.cat([self.columns(), new.columns()], dim=1))
        return longer if longer.n <= 2 * n else longer.newest(n, padding)

    def newest(self, n: int, padding: Tensor | None) -> Newest:
        """The newest ``n`` real tokens of each row, in one part; those of rows that have fewer are its last ones."""
        states = self.states
        first = max(0, states.shape[2] - n)
        if padding is None and self.at is None:
            return Newest((states[:, :, first:],), self.end)
        at = self.columns()
        is_real = at >= 0
        if padding is not None:
            is_real = is_real & padding.gather(1, at.clamp(min=0))
        order = is_real.to(torch.uint8).argsort(dim=1, stable=True)[:, first:]  # the real ones last
        at = at.gather(1, order).masked_fill(~is_real.gather(1, order), -1)
        states = states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
        return Newest((states,), self.end, at)

    def until(self, end: int) -> Newest:
        """Without the columns from ``end`` on."""
        dropped = self.end - end
        if dropped <= 0:
            return self
        if self.at is not None:
            return Newest(self.parts, end, self.at.masked_fill(self.at >= end, -1))
        return Newest((self.states[:, :, : max(0, self.n - dropped)],), end)

    def index_rows(self, rows: Tensor) -> Newest:
        """Of these rows."""
        parts = tuple(part.index_select(0, rows) for part in self.parts)
        return Newest(parts, self.end, None if self.at is None else self.at.index_select(0, rows))


@dataclass(eq=False)
class Pending:
    """What a press that evicts while decoding has not been shown yet.

    Attributes:
        queries: ``[B, Hq, n, D]`` of the newest tokens.
        hidden_states: ``[B, 1, n, hidden]`` of the tokens below, where the press needs them.
        n_new: tokens of each row since the press was asked last; empty before the first.
    """

    queries: Newest | None = None
    hidden_states: Newest | None = None
    n_new: list[int] = field(default_factory=list)

    def until(self, end: int, dropped: list[int]) -> Pending:
        """Without the columns from ``end`` on, ``dropped`` real tokens of each row."""
        n_new = [max(0, n - gone) for n, gone in zip(self.n_new, dropped, strict=True)] if self.n_new else []
        queries, states = (part and part.until(end) for part in (self.queries, self.hidden_states))
        return Pending(queries, states, n_new)

    def index_rows(self, rows: Tensor) -> Pending:
        """Of these rows."""
        n_new = [self.n_new[row] for row in rows.tolist()] if self.n_new else []
        queries, states = (part and part.index_rows(rows) for part in (self.queries, self.hidden_states))
        return Pending(queries, states, n_new)


def newest_from(padding: Tensor, n: int) -> Tensor:
    """Where each row's newest ``n`` real tokens begin, int64 ``[B]``; after the last column where there are none.

    Args:
        padding: bool ``[B, T]``, False where a token is padding.
    """
    later = padding.sum(-1, keepdim=True) - padding.cumsum(-1)  # [B, T] real tokens after each one
    is_new = (later < n) & padding
    return is_new.int().argmax(-1).masked_fill(~is_new.any(-1), padding.shape[1])
