"""Logits of tokens behind a cache, their losses by one formula whose error is known, and scores of two caches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rope import stand_at
from coldpress.cache.pressed import PressedCache
from coldpress.errors import SelfCheckError

BLOCK_NUMBERS = 1 << 19  # of a block of rows, few enough to stay in a processor's cache while they are looked at


def forward(model: PreTrainedModel, input_ids: Tensor, cache: PressedCache | None, keep: int = 0) -> Tensor:
    """Logits ``[B, keep, V]`` of the last ``keep`` tokens (0: of all) of ``input_ids`` after what ``cache`` stores.

    Where a press chooses what each query reads, tokens are fed one by one, as they are when they are generated.
    """
    if cache is not None and cache.reads_part and input_ids.shape[1] > 1:
        steps = torch.cat([forward(model, token, cache) for token in input_ids.split(1, dim=1)], dim=1)
        return steps[:, -keep:] if keep else steps
    stand_at(model, 0 if cache is None else cache.seen_tokens)
    options: dict[str, Any] = {"use_cache": False} if cache is None else cache_argument(cache, model)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    logits: Tensor = model(input_ids, **options).logits
    return logits[:, -keep:] if keep else logits


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


# Continuations that are fed behind contexts in a cache, which is left unchanged


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was predicted while some tokens were fed: log-probabilities in nats, float32."""

    fed: list[float]  # of each token but the first
    is_greedy: bool  # whether each of these was the most likely one
    last: Tensor  # ``[V]``, of what may follow

    def of(self, token: int) -> tuple[float, bool]:
        """The answer for these tokens and another one after them."""
        return math.fsum([*self.fed, float(self.last[token])]), self.is_greedy and int(self.last.argmax()) == token

    def __eq__(self, other: object) -> bool:
        """Bit for bit."""
        return isinstance(other, Prediction) and self.fed == other.fed and torch.equal(self.last, other.last)


def predictions(
    model: PreTrainedModel, cache: PressedCache, mask: Tensor | None, rows: Tensor, fed: Sequence[tuple[int, ...]]
) -> list[Prediction]:
    """What is predicted where each of ``fed`` stands behind its row of ``cache``, whose ``mask`` is ``[B, C]``."""
    width = max(len(tokens) for tokens in fed)
    ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in fed], device=rows.device)
    wanted = ids.roll(-1, 1)
    branch = cache.fork()
    branch.batch_select_indices(rows)
    stand_at(model, branch.seen_tokens)
    # A press that goes on would evict after a call: what is written is fed as it is written, token by token.
    step = 1 if cache.press is not None and cache.press.evicts_while_decoding else width
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    own, is_top = [], []
    last: dict[int, Tensor] = {}
    for start in range(0, width, step):
        options: dict[str, Any] = {}
        if mask is not None:
            seen = mask[rows]
            options["attention_mask"] = torch.cat([seen, seen.new_ones(len(rows), start + step)], 1)
            if takes_positions:
                steps = torch.arange(start, start + step, device=rows.device)
                options["position_ids"] = seen.sum(-1, keepdim=True) + steps
        logits = model(ids[:, start : start + step], **cache_argument(branch, model), use_cache=True, **options).logits
        first = start
        for block, targets in blocks(logits, wanted[:, start : start + step]):
            part = Rows.of(block)
            own.append((-part.losses(targets)).cpu())
            is_top.append((block.argmax(-1) == targets).cpu())
            n = targets.shape[1]
            ends = [row for row, tokens in enumerate(fed) if first < len(tokens) <= first + n]
            log_probs = part.log_probs() if ends else block
            for row in ends:
                last[row] = log_probs[row, len(fed[row]) - 1 - first].cpu()
            first += n
    losses, tops = torch.cat(own, 1), torch.cat(is_top, 1)
    return [
        Prediction(losses[row, : len(tokens) - 1].tolist(), bool(tops[row, : len(tokens) - 1].all()), last[row])
        for row, tokens in enumerate(fed)
    ]


def left_padded(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids ``[B, C]`` and their mask, None where there is no padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
