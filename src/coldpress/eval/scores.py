"""What a cache makes of the tokens that follow it: losses, and how far its predictions are from another cache's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coldpress.errors import SelfCheckError
from coldpress.eval.losses import Rows, blocks

__all__ = ["Scores"]


class Reference(NamedTuple):
    """The baseline's distributions of some tokens: ``[W, n, V]`` and ``[W, n]``, float32."""

    logits: Tensor
    total: Tensor  # log of the sum of their exponentials
    probs: Tensor
    top: Tensor  # the most likely token, int64
    losses: Tensor  # of the tokens that came


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
        for i, (block, targets) in enumerate(blocks(logits, wanted)):
            peak, top = block.max(-1, keepdim=True)  # much faster than argmax
            rows, top = Rows.of(block, peak), top[..., 0]
            losses = rows.losses(targets)
            total = (rows.peak + rows.sums.log())[..., 0]
            if reference is None:
                base = Reference(rows.logits, total, rows.weights.div_(rows.sums), top, losses)
                kld = torch.zeros_like(losses)
                kept.append(base)
            else:
                base = reference[i]
                kld = (base.probs * (base.logits - rows.logits)).sum(-1) + (total - base.total)
            delta_p = (-losses).exp() - (-base.losses).exp()
            is_top1, is_same_top1 = top == targets, top == base.top
            parts.append(torch.stack([losses, kld, delta_p, is_top1.float(), is_same_top1.float()]))
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
