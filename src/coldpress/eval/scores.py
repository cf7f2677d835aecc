"""What a cache makes of the tokens that follow it: losses, and how far its predictions are from another cache's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coldpress.errors import SelfCheckError

__all__ = ["Scores"]


CACHED = 1 << 19  # numbers of a block of rows, few enough to stay in a processor's cache while they are looked at


class Reference(NamedTuple):
    """The baseline's distributions of some tokens: ``[W, n, V]`` and ``[W, n]``, float32."""

    logits: Tensor
    total: Tensor  # log of the sum of their exponentials
    probs: Tensor
    top: Tensor  # the most likely token, int64
    own: Tensor  # log-probability of the token that came


@dataclass(frozen=True)
class Scores:
    """What one cache made of the targets of some windows: float32 on the CPU, ``[W, target - 1]`` each."""

    losses: Tensor  # nats
    kld: Tensor  # KL(baseline || press), nats
    delta_p: Tensor  # p(target) - baseline p(target)
    is_top1: Tensor  # 1 where the most likely token is the target
    is_same_top1: Tensor  # 1 where it is that of the baseline

    @classmethod
    def of(
        cls, logits: Tensor, wanted: Tensor, reference: Sequence[Reference] | None = None
    ) -> tuple[Scores, list[Reference]]:
        """Scores of ``wanted [W, n]`` under ``logits [W, n, V]``.

        Args:
            logits, wanted: predictions, and the tokens that came.
            reference: the baseline's distributions in blocks of tokens; None for the baseline itself.

        Returns:
            The scores and, without a reference, the distributions, to be the reference of others.

        Raises:
            SelfCheckError: a loss is not finite.
        """
        parts, kept = [], []
        n_tokens = max(1, CACHED // logits.shape[-1])
        for i, rows in enumerate(logits.split(n_tokens, dim=1)):
            rows = rows.float()
            target = wanted[:, i * n_tokens : i * n_tokens + rows.shape[1], None]
            total, top = rows.logsumexp(-1), rows.argmax(-1)
            own = rows.gather(-1, target)[..., 0] - total  # log-probability
            if reference is None:
                base = Reference(rows, total, (rows - total[..., None]).exp(), top, own)
                kld = torch.zeros_like(own)
                kept.append(base)
            else:
                base = reference[i]
                kld = (base.probs * (base.logits - rows)).sum(-1) + (total - base.total)
            is_top1, is_same_top1 = top == target[..., 0], top == base.top
            parts.append(torch.stack([-own, kld, own.exp() - base.own.exp(), is_top1.float(), is_same_top1.float()]))
        scores = cls(*torch.cat(parts, dim=-1).cpu())
        if not torch.isfinite(scores.losses).all():
            raise SelfCheckError("A loss is not finite: the model's logits overflow in this dtype.")
        return scores, kept

    @classmethod
    def join(cls, batches: Iterable[Scores]) -> Scores:
        """The scores of several batches of windows, one after the other."""
        return cls.of_rows(torch.cat([batch.rows() for batch in batches], dim=1))

    def rows(self) -> Tensor:
        """All of them as one tensor ``[5, W, target - 1]``."""
        return torch.stack([self.losses, self.kld, self.delta_p, self.is_top1, self.is_same_top1])

    @classmethod
    def of_rows(cls, rows: Tensor) -> Scores:
        """What :meth:`rows` has put together."""
        return cls(*rows)
