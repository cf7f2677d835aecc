"""Losses of tokens under logits: one formula, whose error is known, for everything that is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "blocks", "loss_error", "token_losses"]

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


def loss_error(losses: Tensor) -> Tensor:
    """By how much losses of :func:`token_losses` may be off, in nats: ``2**-20 + 2**-22 * loss``.

    The first part is the sum over the vocabulary, which torch makes in a tree; the second the distance to the largest
    logit, the logarithm and their sum, which float32 rounds to one part in 2**24 each. Measured against float64, with
    50,000 tokens of vocabulary: half of it at most (tests/eval/test_losses.py). ``log_softmax`` adds up in a row, and
    is off by as much as 3e-5.
    """
    return 2.0**-20 + 2.0**-22 * losses
