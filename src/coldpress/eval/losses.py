"""Losses of tokens under logits, by one formula whose error is known, and scores of one cache beside another's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coldpress.errors import SelfCheckError

__all__ = ["Rows", "Scores", "blocks", "finite", "loss_error", "token_losses"]

BLOCK_NUMBERS = 1 << 19  # of a block of rows, few enough to stay in a processor's cache while they are looked at


class Rows(NamedTuple):
    """Logits of some tokens, float32 ``[B, n, V]``, with what a softmax of them needs."""

    logits: Tensor
    peak: Tensor  # the largest logit, [B, n, 1]
    weights: Tensor  # exp(logits - peak), [B, n, V]
    sums: Tensor  # of the weights, [B, n, 1]

    @classmethod
    def of(cls, logits: Tensor, peak: Tensor | None = None) -> Rows:
        """Of logits in float32; ``peak`` where it is known."""
        peak = logits.amax(-1, keepdim=True) if peak is None else peak
        weights = (logits - peak).exp_()
        return cls(logits, peak, weights, weights.sum(-1, keepdim=True))

    def losses(self, targets: Tensor) -> Tensor:
        """Negative log-likelihoods in nats, ``[B, n]``, of ``targets [B, n]``; see :func:`loss_error`."""
        # The distance to the peak comes first: logsumexp(logits) - logit would round to the size of the logits.
        return (self.sums.log() + (self.peak - self.logits.gather(-1, targets[..., None])))[..., 0]

    def log_probs(self) -> Tensor:
        """Log-probabilities of the whole vocabulary, ``[B, n, V]``."""
        return self.logits - self.peak - self.sums.log()


def blocks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``logits [B, N, V]`` as float32 and ``targets [B, N]``, in blocks of few tokens.

    How a sum is rounded may depend on how many rows there are, so losses are compared in these blocks.
    """
    n = max(1, BLOCK_NUMBERS // logits.shape[-1])
    for rows, wanted in zip(logits.split(n, 1), targets.split(n, 1), strict=True):
        yield rows.float(), wanted


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, float32 ``[B, n]``, of ``targets [B, n]`` under ``logits [B, n, V]``.

    They are within :func:`loss_error` of what float64 makes of the same logits. The same logits give the same bits.
    """
    return torch.cat([Rows.of(rows).losses(wanted) for rows, wanted in blocks(logits, targets)], dim=1)


def finite(losses: Tensor) -> Tensor:
    """The same losses; raises :class:`SelfCheckError` if one of them is not finite."""
    if not losses.isfinite().all():
        raise SelfCheckError("A loss is not finite: the model's logits overflow in this dtype.")
    return losses


def loss_error(losses: Tensor) -> Tensor:
    """By how much losses of :func:`token_losses` may be off, in nats: ``2**-20 + 2**-22 * loss``.

    The first part is the sum over the vocabulary, which torch makes in a tree; the second the distance to the largest
    logit, the logarithm and their sum, which float32 rounds to one part in 2**24 each. Measured against float64, with
    50,000 tokens of vocabulary: half of it at most (tests/eval/test_losses.py). ``log_softmax`` adds up in a row, and
    is off by as much as 3e-5.
    """
    return 2.0**-20 + 2.0**-22 * losses


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
        """Scores of ``wanted [W, n]`` under ``logits [W, n, V]``; SelfCheckError where a loss is not finite.

        Args:
            reference: the baseline's distributions in blocks of tokens; None for the baseline itself, of which they
                come back, to be the reference of others.
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
        finite(scores.losses)
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
