"""What a cache makes of the tokens that follow it: losses, and how far its predictions are from another cache's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.errors import SelfCheckError
from coldpress.eval.perplexity import BLOCK_TOKENS

__all__ = ["Scores"]


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
        cls, logits: Tensor, wanted: Tensor, reference: Sequence[Tensor] | None = None
    ) -> tuple[Scores, list[Tensor]]:
        """Scores of ``wanted [W, n]`` under ``logits [W, n, V]``.

        Args:
            logits, wanted: predictions, and the tokens that came.
            reference: the baseline's log-probabilities in blocks of tokens; None for the baseline itself.

        Returns:
            The scores and, without a reference, these log-probabilities, to be the reference of others.

        Raises:
            SelfCheckError: a loss is not finite.
        """
        parts, kept = [], []
        for i, rows in enumerate(logits.split(BLOCK_TOKENS, dim=1)):
            log_probs = rows.float().log_softmax(-1)
            base = log_probs if reference is None else reference[i]
            target = wanted[:, i * BLOCK_TOKENS : i * BLOCK_TOKENS + rows.shape[1], None]
            own, its = log_probs.gather(-1, target)[..., 0], base.gather(-1, target)[..., 0]
            top = log_probs.argmax(-1)
            kld = torch.zeros_like(own) if reference is None else (base.exp() * (base - log_probs)).sum(-1)
            is_top1, is_same_top1 = top == target[..., 0], top == base.argmax(-1)
            parts.append(torch.stack([-own, kld, own.exp() - its.exp(), is_top1.float(), is_same_top1.float()]))
            if reference is None:
                kept.append(log_probs)
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
