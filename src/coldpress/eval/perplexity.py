"""Perplexity of a model, and perplexity under a compressed context.

Compression comes after attention, so a teacher-forced forward under a press measures nothing: its logits are those of
the uncompressed model. ``PrefixRun`` prefills a context, compresses it, and scores the tokens that follow against what is
left, at their original positions. All presses share one prefill per window, the uncompressed cache scores the same
tokens, and the run fails rather than report numbers that contradict themselves.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.budget import keep_count
from coldpress.cache import PressedCache
from coldpress.errors import SelfCheckError
from coldpress.eval.metrics import paired_difference, perplexity, quantiles
from coldpress.eval.windows import PrefixPlan, plan_strided, strided_scored_tokens
from coldpress.presses.base import BasePress, ScorerPress

__all__ = ["Point", "PrefixRun", "forward", "plain_perplexity", "token_losses"]

DISTANCES = (16, 64, 256)  # upper ends of the buckets of distance to the compressed context, in tokens
_BLOCK_TOKENS = 128  # rows of the vocabulary-sized arithmetic that are held at once


def forward(model: PreTrainedModel, input_ids: Tensor, cache: PressedCache | None, keep: int = 0) -> Tensor:
    """Logits ``[B, keep, V]`` of the last ``keep`` tokens (0: of all) of ``input_ids`` after what ``cache`` holds."""
    options: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    logits: Tensor = model(input_ids, **options).logits
    return logits[:, -keep:] if keep else logits


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, float32 ``[B, n]``, of ``targets [B, n]`` under ``logits [B, n, V]``."""
    blocks = []
    for rows, wanted in zip(logits.split(_BLOCK_TOKENS, dim=1), targets.split(_BLOCK_TOKENS, dim=1)):
        blocks.append(-rows.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0])
    return torch.cat(blocks, dim=1)


@torch.inference_mode()
def plain_perplexity(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    max_length: int,
    stride: int,
    progress: Callable[[Any], Any] = iter,
) -> dict[str, Any]:
    """Perplexity of the uncompressed model with a strided sliding window; every token is scored exactly once.

    Args:
        model: a causal language model.
        documents: token ids, int64 ``[N]`` each; windows never cross from one to the next.
        max_length, stride: see :func:`coldpress.eval.windows.plan_strided`.
        progress: wraps the list of windows, for a progress bar.

    Returns:
        ``scored_tokens``, ``windows``, ``loss`` (nats a token), ``ppl``, ``nll`` (the sum) as a dictionary.

    Raises:
        SelfCheckError: a loss is not finite, or the number of scored tokens is not what the formula says.
    """
    device = next(model.parameters()).device
    jobs = [(ids, window) for ids in documents for window in plan_strided(len(ids), max_length, stride)]
    total, scored = 0.0, 0
    for ids, window in progress(jobs):
        batch = ids[None, window.begin : window.end].to(device)
        n = window.n_scored
        logits = forward(model, batch, None, keep=n + 1)[:, :-1]
        losses = token_losses(logits, batch[:, -n:])
        total += float(losses.double().sum())
        scored += n
    expected = sum(strided_scored_tokens(len(ids), max_length, stride) for ids in documents)
    if scored != expected:
        raise SelfCheckError(f"{scored} tokens were scored, the windows' formula says {expected}.")
    if not math.isfinite(total):
        raise SelfCheckError(f"The loss is {total}: the model's logits are not finite in {model.dtype}.")
    loss = total / scored
    return {"scored_tokens": scored, "windows": len(jobs), "nll": total, "loss": loss, "ppl": perplexity(loss)}


@dataclass
class Point:
    """One press at one ratio (None: the uncompressed baseline), and what has been measured of it so far."""

    press: BasePress | None
    counts: list[int] = field(default_factory=list)  # scored tokens of each window
    nll: list[float] = field(default_factory=list)  # sum of their losses, nats
    distance_nll: list[Tensor] = field(default_factory=list)  # [target - 1] losses by distance, float64
    kld: list[float] = field(default_factory=list)  # KL(baseline || press) of each token, nats
    delta_p: list[float] = field(default_factory=list)  # p(target) - baseline p(target) of each token
    n_top1: int = 0  # tokens whose most likely prediction is right
    n_same_top1: int = 0  # ... is that of the baseline
    is_identical: bool = True  # so far every loss is bit for bit the baseline's
    kv_bytes: int | None = None  # of one window, right after the prefill
    kv_lengths: list[int] = field(default_factory=list)  # stored tokens of each layer, likewise
    achieved_ratio: float = 0.0
    kept_hash: str | None = None
    error: Exception | None = None

    def result(self, baseline: Point) -> dict[str, Any]:
        """The perplexity part of a result record, over the windows measured so far.

        Raises:
            Exception: what the press raised, if it failed.
            SelfCheckError: pairs were evicted and yet no loss changed.
        """
        if self.error is not None:
            raise self.error
        n_tokens = sum(self.counts)
        if self.press is not None and self.achieved_ratio > 0 and self.is_identical:
            raise SelfCheckError(
                f"{self.press}: all {n_tokens} losses are bit for bit those of the uncompressed cache: nothing was compressed."
            )
        loss, base = math.fsum(self.nll) / n_tokens, math.fsum(baseline.nll) / n_tokens
        paired = paired_difference(self.counts, self.nll, baseline.nll)
        record: dict[str, Any] = {
            "scored_tokens": n_tokens,
            "windows": len(self.counts),
            "loss": loss,
            "ppl": perplexity(loss),
            "baseline_loss": base,
            "baseline_ppl": perplexity(base),
            "top1_acc": self.n_top1 / n_tokens,
            "nll_by_distance": self._by_distance(),
            "per_window": [
                {"id": i, "n": n, "nll": a, "nll_base": b}
                for i, (n, a, b) in enumerate(zip(self.counts, self.nll, baseline.nll))
            ],
            "kv_bytes": self.kv_bytes,
            "kv_bytes_baseline": baseline.kv_bytes,
            "kv_len_after": self.kv_lengths,
            "effective_compression_ratio": self.achieved_ratio,
            "kept_hash": self.kept_hash,
        }
        if self.press is not None:
            ci = paired.ci95
            p50, p90, p99 = quantiles(self.kld, (0.5, 0.9, 0.99))
            record |= {
                "delta_nll": paired.delta,
                "delta_nll_se": paired.se,
                "delta_nll_ci95": ci,
                "ppl_ratio_ci95": None if ci is None else [math.exp(ci[0]), math.exp(ci[1])],
                "same_top1": self.n_same_top1 / n_tokens,
                "kld": {
                    "mean": math.fsum(self.kld) / n_tokens, "median": p50, "p90": p90, "p99": p99, "max": max(self.kld),
                },
                "delta_p": {
                    "mean": math.fsum(self.delta_p) / n_tokens,
                    "rms": math.sqrt(math.fsum(d * d for d in self.delta_p) / n_tokens),
                },
            }  # fmt: skip
        return record

    def _by_distance(self) -> dict[str, float]:
        mean = torch.stack(self.distance_nll).mean(0)  # [target - 1]
        edges = [0, *(d for d in DISTANCES if d < len(mean)), len(mean)]
        return {f"{a + 1}-{b}": float(mean[a:b].mean()) for a, b in zip(edges, edges[1:])}


class PrefixRun:
    """Score targets against compressed contexts, window by window; :meth:`results` can be asked for at any time.

    Args:
        model: a causal language model on coldpress's backend.
        presses: the points to measure; the uncompressed baseline is always measured too.
        documents: token ids, int64 ``[N]`` each, with the plan of their windows.
        batch_size: windows that are run together.

    Raises:
        SelfCheckError: from :meth:`run`, when the baseline itself contradicts a direct forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        presses: Sequence[BasePress],
        documents: Sequence[tuple[Tensor, PrefixPlan]],
        batch_size: int = 1,
    ):
        self.model = model
        self.baseline = Point(None)
        self.points = [Point(press) for press in presses]
        self.plan = documents[0][1]
        width = self.plan.context + self.plan.target
        windows = [ids[start : start + width] for ids, plan in documents for start in plan.starts]
        self.batches = [torch.stack(windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)]
        self.n_windows = len(windows)

    @torch.inference_mode()
    def run(self, progress: Callable[[Any], Any] = iter) -> None:
        """Measure all windows. What an interrupted run has measured stays: whole windows only."""
        device = next(self.model.parameters()).device
        for i, batch in enumerate(progress(self.batches)):
            self._measure(batch.to(device), is_first=i == 0)

    def results(self) -> Iterator[tuple[Point, dict[str, Any] | Exception]]:
        """Each point, the baseline first, with its record or with what went wrong."""
        for point in (self.baseline, *self.points):
            try:
                if point.error is None and point.counts:
                    self._check_counts(point)
                yield point, point.result(self.baseline)
            except Exception as error:
                yield point, error

    def _measure(self, ids: Tensor, is_first: bool) -> None:
        context, target = self.plan.context, self.plan.target
        alive = [point for point in self.points if point.error is None]
        zeros = [p.press.with_ratio(0.0) for p in alive if isinstance(p.press, ScorerPress)] if is_first else []
        full = PressedCache()
        branches = full.branches([*(point.press for point in alive), *zeros])
        forward(self.model, ids[:, :context], full, keep=1)
        inputs, wanted = ids[:, context:-1], ids[:, context + 1 :]
        if is_first:
            self._describe(self.baseline, full, full)
        logits = forward(self.model, inputs, full.fork() if is_first else full)
        base = _Scored.of(logits, wanted)
        if is_first:
            self._check_baseline(ids, base.losses, target)
        scored = [(self.baseline, base)]
        for i, branch in enumerate(branches):
            point = alive[i] if i < len(alive) else None
            try:
                if point is not None and is_first:
                    self._describe(point, branch, full)
                result = _Scored.of(forward(self.model, inputs, branch), wanted, base)
                if point is None:
                    self._check_zero(zeros[i - len(alive)], result.losses, base.losses)
                else:
                    scored.append((point, result))
            except Exception as error:
                culprit = point or next(p for p in alive if _same_but_ratio(p.press, zeros[i - len(alive)]))
                culprit.error = error
            branches[i] = None  # type: ignore[call-overload]  # free it before the next one grows
        for point, result in scored:  # all at once, so that an interruption leaves whole windows
            result.add_to(point, base)

    def _describe(self, point: Point, cache: PressedCache, full: PressedCache) -> None:
        """Sizes of the compressed cache, and the check that they are what was asked for."""
        point.kv_lengths = cache.stored_lengths()
        rows = cache.positions(self._first_layer(cache)).shape[0]
        point.kv_bytes = cache.kv_bytes() // rows
        if isinstance(point.press, ScorerPress):
            point.achieved_ratio = cache.achieved_ratio()
            wanted = 1 - keep_count(self.plan.context, point.press.compression_ratio) / self.plan.context
            full_reach = all(layer._window is None for layer in full.pressed_layers())
            if full_reach and abs(point.achieved_ratio - wanted) > 1e-9:
                raise SelfCheckError(
                    f"{point.press}: {wanted:.6f} of the pairs should have been removed, {point.achieved_ratio:.6f} were."
                )
            digest = hashlib.sha256()
            for layer in cache.pressed_layers():
                digest.update(layer.positions().cpu().numpy().tobytes())
            point.kept_hash = digest.hexdigest()[:16]

    @staticmethod
    def _first_layer(cache: PressedCache) -> int:
        return next(layer.index for layer in cache.pressed_layers() if layer.is_initialized)

    def _check_baseline(self, ids: Tensor, losses: Tensor, target: int) -> None:
        """The cached baseline against one direct forward pass without a cache, on the first windows."""
        direct = forward(self.model, ids[:, :-1], None, keep=target - 1)
        reference = token_losses(direct, ids[:, -(target - 1) :])
        tolerance = 1e-3 if losses.dtype == self.model.dtype == torch.float32 else 0.25
        worst = float((losses - reference).abs().max())
        if not worst <= tolerance:
            raise SelfCheckError(
                f"The uncompressed cache and a forward pass without a cache differ by {worst:.2g} nats on one token."
            )

    def _check_zero(self, press: BasePress, losses: Tensor, base: Tensor) -> None:
        worst = float((losses - base).abs().max())
        if not worst <= 1e-5:
            raise SelfCheckError(f"{press} removes nothing and yet changes a loss by {worst:.2g} nats.")

    def _check_counts(self, point: Point) -> None:
        expected = len(point.counts) * self.plan.scored_per_window
        if sum(point.counts) != expected:
            raise SelfCheckError(f"{sum(point.counts)} tokens were scored, the windows' formula says {expected}.")


@dataclass(frozen=True)
class _Scored:
    """Per-token results of one cache on one batch of windows, each ``[B, target - 1]``."""

    losses: Tensor
    top: Tensor
    correct: Tensor
    log_probs: Tensor | None  # [B, target - 1, V] of the baseline, which the presses are compared with
    kld: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, wanted: Tensor, base: _Scored | None = None) -> _Scored:
        losses, top, kld, kept = [], [], [], []
        for block, rows in enumerate(logits.split(_BLOCK_TOKENS, dim=1)):
            log_probs = rows.float().log_softmax(-1)
            part = slice(block * _BLOCK_TOKENS, block * _BLOCK_TOKENS + rows.shape[1])
            losses.append(-log_probs.gather(-1, wanted[:, part, None])[..., 0])
            top.append(log_probs.argmax(-1))
            if base is None:
                kept.append(log_probs)
            else:
                assert base.log_probs is not None
                reference = base.log_probs[:, part]
                kld.append((reference.exp() * (reference - log_probs)).sum(-1))
        best = torch.cat(top, 1)
        result = torch.cat(losses, 1)
        if not torch.isfinite(result).all():
            raise SelfCheckError("A loss is not finite: the model's logits overflow in this dtype.")
        return cls(
            result, best, best == wanted, torch.cat(kept, 1) if kept else None, torch.cat(kld, 1) if kld else None
        )

    def add_to(self, point: Point, base: _Scored) -> None:
        losses = self.losses.double().cpu()
        point.counts += [losses.shape[1]] * losses.shape[0]
        point.nll += losses.sum(1).tolist()
        point.distance_nll += list(losses)
        point.n_top1 += int(self.correct.sum())
        if self.kld is not None:
            point.kld += self.kld.flatten().tolist()
            point.delta_p += ((-self.losses).exp() - (-base.losses).exp()).flatten().tolist()
            point.n_same_top1 += int((self.top == base.top).sum())
            point.is_identical &= torch.equal(self.losses, base.losses)


def _same_but_ratio(press: BasePress | None, other: BasePress) -> bool:
    return isinstance(press, ScorerPress) and isinstance(other, ScorerPress) and press.with_ratio(0.0) == other
