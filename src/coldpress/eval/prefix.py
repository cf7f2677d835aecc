"""Perplexity under a compressed context.

Compression comes after attention, so a teacher-forced forward under a press measures nothing: its logits are those of
the uncompressed model. ``PrefixRun`` prefills a context, compresses it, and scores the tokens that follow against what
is left, at their original positions. All presses share one prefill per window, the uncompressed cache scores the same
tokens, and a number that contradicts a check is an error instead of a result.

With ``chunk_tokens`` the context is prefilled in pieces and compressed after each. What the model computes of the
second piece depends on what the press has kept of the first, so every press and ratio has a prefill of its own; the
baseline, in the same pieces, is measured once for all of them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache import PressedCache
from coldpress.chunks import prefill
from coldpress.errors import SelfCheckError
from coldpress.eval.checks import check_stored_pairs, release
from coldpress.eval.metrics import paired_difference, perplexity, quantiles
from coldpress.eval.perplexity import BLOCK_TOKENS, forward, token_losses
from coldpress.eval.windows import PrefixPlan
from coldpress.presses.base import BasePress, BudgetPress
from coldpress.pressing import prefilling
from coldpress.quantised import KVBits

__all__ = ["Point", "PrefixRun"]

DISTANCES = (16, 64, 256)  # upper ends of the buckets of distance to the compressed context, in tokens
ZERO_TOLERANCE = 1e-5  # nats by which a loss may change when nothing is removed


@dataclass
class Point:
    """One press at one ratio, in so many bits, and what its cache looked like in the first window.

    Without a press and bits it is the uncompressed baseline.
    """

    press: BasePress | None
    kv_bits: KVBits | None = None
    kv_bytes: int | None = None  # right after the prefill
    kv_lengths: list[int] = field(default_factory=list)  # stored tokens of each layer, likewise
    achieved_ratio: float = 0.0
    kept_hash: str | None = None
    error: Exception | None = None


class PrefixRun:
    """Score targets against compressed contexts, window by window; :meth:`results` can be asked for at any time.

    Args:
        model: a causal language model on coldpress's backend.
        presses: the points to measure; the uncompressed baseline is always measured too.
        kv_bits: how what each of them keeps is held; None: all as it is.
        documents: token ids, int64 ``[N]`` each, with the plan of their windows; all plans have the same sizes.
        batch_size: windows that are run together.
        chunk_tokens: tokens of a piece of the context; None for a context in one piece.

    Raises:
        SelfCheckError: from :meth:`run`, when the baseline contradicts a direct forward pass or is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        presses: Sequence[BasePress | None],
        documents: Sequence[tuple[Tensor, PrefixPlan]],
        batch_size: int = 1,
        chunk_tokens: int | None = None,
        kv_bits: Sequence[KVBits | None] | None = None,
    ):
        self.model, self.chunk_tokens = model, chunk_tokens
        self.baseline = Point(None)
        kv_bits = [None] * len(presses) if kv_bits is None else kv_bits
        self.points = [Point(press, bits) for press, bits in zip(presses, kv_bits, strict=True)]
        self.plan = documents[0][1]
        width = self.plan.context + self.plan.target
        windows = [ids[start : start + width] for ids, plan in documents for start in plan.starts]
        self.batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        self.done: list[dict[int, Scores]] = []  # of each batch that was measured, by the id of the point

    @property
    def is_complete(self) -> bool:
        return len(self.done) == len(self.batches)

    @torch.inference_mode()
    def run(self, progress: Callable[[Any], Any] = iter) -> None:
        """Measure all windows. Of an interrupted run, the windows that were finished for every press stay."""
        device = next(self.model.parameters()).device
        for batch in progress(self.batches):
            self.done.append(self._measure(torch.stack(batch).to(device), is_first=not self.done))
            for point in self.points:
                release(point.error)  # of the frame of _measure

    def results(self) -> Iterator[tuple[Point, dict[str, Any] | Exception]]:
        """Each point of which there is something to say, the baseline first, with its record or what went wrong."""
        for point in (self.baseline, *self.points):
            if point.error is not None:
                yield point, point.error
            elif self.done:
                try:
                    yield point, self._result(point)
                except SelfCheckError as error:
                    yield point, error

    # -- one batch of windows -----------------------------------------------------------------------------------

    def _measure(self, ids: Tensor, is_first: bool) -> dict[int, Scores]:
        context = self.plan.context
        inputs, wanted = ids[:, context:-1], ids[:, context + 1 :]
        alive = [point for point in self.points if point.error is None]
        scorers = [p.press for p in alive if isinstance(p.press, BudgetPress) and p.press.exact_at_0]
        zeros = list(dict.fromkeys(press.with_ratio(0.0) for press in scorers)) if is_first else []
        bits = [*(point.kv_bits for point in alive), *(None for _ in zeros)]
        full, branches = self._prefill(ids[:, :context], [*(point.press for point in alive), *zeros], bits)
        if is_first:
            self._describe(self.baseline, full)
        base, reference = Scores.of(forward(self.model, inputs, full), wanted)
        if is_first:
            self._check_baseline(ids, base.losses)
        scores = {id(self.baseline): base}
        for point in alive:
            branch = next(branches)  # its memory is free again before the next one grows
            try:
                branch.get_seq_length()  # raises what the press raised
                if is_first:
                    self._describe(point, branch)
                check_stored_pairs(point.press, branch, context, full)
                scores[id(point)], _ = Scores.of(forward(self.model, inputs, branch), wanted, reference)
            except Exception as error:
                point.error = release(error)
        measured: dict[Any, Tensor] = {}  # presses that keep everything share one cache, and its losses
        for zero in zeros:
            branch = next(branches)
            try:
                branch.get_seq_length()
                states = (state for layer in branch.pressed_layers() for state in (layer.keys, layer.values))
                held = tuple((state.data_ptr(), state.shape) for state in states if state is not None)
                if held not in measured or self.chunk_tokens is not None:  # in pieces none are shared
                    measured[held] = token_losses(forward(self.model, inputs, branch), wanted).cpu()
                self._check_zero(zero, measured[held], base.losses)
            except Exception as error:
                for point in alive:
                    if isinstance(point.press, BudgetPress) and point.press.with_ratio(0.0) == zero:
                        point.error = point.error or release(error)
        return scores

    def _prefill(
        self, context: Tensor, presses: Sequence[BasePress | None], kv_bits: Sequence[KVBits | None]
    ) -> tuple[PressedCache, Iterator[PressedCache]]:
        """The uncompressed cache of ``context [B, C]``, and that of each press.

        A press that fails leaves a cache that raises the error when it is used.
        """
        full = PressedCache(chunk_tokens=self.chunk_tokens)
        if self.chunk_tokens is not None:
            prefill(self.model, context, full)
            return full, (self._prefill_alone(context, *pair) for pair in zip(presses, kv_bits, strict=True))
        branches = full.branches(presses, kv_bits)
        with prefilling(self.model, full, *branches):
            forward(self.model, context, full, keep=1)  # the one prefill
        branches.reverse()
        return full, (branches.pop() for _ in presses)

    def _prefill_alone(self, context: Tensor, press: BasePress | None, kv_bits: KVBits | None) -> PressedCache:
        cache = PressedCache(press, chunk_tokens=self.chunk_tokens, kv_bits=kv_bits)
        try:
            with prefilling(self.model, cache):
                prefill(self.model, context, cache)
        except Exception as error:
            cache.session.error = release(error)
        return cache

    def _describe(self, point: Point, cache: PressedCache) -> None:
        """Sizes of one window's cache, and a fingerprint of which pairs it keeps."""
        layers = [layer for layer in cache.pressed_layers() if layer.is_initialized]
        positions = [layer.positions() for layer in layers]
        point.kv_lengths = cache.stored_lengths()
        point.kv_bytes = cache.kv_bytes() // positions[0].shape[0]
        point.achieved_ratio = cache.achieved_ratio()
        if point is not self.baseline:
            digest = hashlib.sha256(b"".join(p[0].cpu().numpy().tobytes() for p in positions))
            point.kept_hash = digest.hexdigest()[:16]

    def _check_baseline(self, ids: Tensor, losses: Tensor) -> None:
        """The cached baseline against one direct forward pass without a cache."""
        n = self.plan.scored_per_window
        direct = token_losses(forward(self.model, ids[:, :-1], None, keep=n), ids[:, -n:]).cpu()
        worst = float((losses - direct).abs().max())
        if not worst <= (1e-3 if self.model.dtype == torch.float32 else 0.25):
            raise SelfCheckError(
                f"The uncompressed cache and a forward pass without a cache differ by {worst:.2g} nats on one token."
            )

    @staticmethod
    def _check_zero(press: BasePress, losses: Tensor, base: Tensor) -> None:
        worst = float((losses - base).abs().max())
        if not worst <= ZERO_TOLERANCE:
            raise SelfCheckError(f"{press} removes nothing and yet changes a loss by {worst:.2g} nats.")

    # -- all windows --------------------------------------------------------------------------------------------

    def _result(self, point: Point) -> dict[str, Any]:
        """The perplexity part of a result record, over the windows measured so far."""
        own = Scores.join(batch[id(point)] for batch in self.done)
        base = Scores.join(batch[id(self.baseline)] for batch in self.done)
        n_windows, n_tokens = own.losses.shape[0], own.losses.numel()
        expected = sum(len(batch) for batch in self.batches[: len(self.done)]) * self.plan.scored_per_window
        if n_tokens != expected:
            raise SelfCheckError(f"{n_tokens} tokens were scored, the windows' formula says {expected}.")
        asked = getattr(point.press, "compression_ratio", 0.0)
        is_smaller = point.kv_bits is not None and (point.kv_bytes or 0) < (self.baseline.kv_bytes or 0)
        if (asked > 0 or point.achieved_ratio > 0 or is_smaller) and torch.equal(own.losses, base.losses):
            bits = "" if point.kv_bits is None else f" in {point.kv_bits.bits} bits"
            raise SelfCheckError(
                f"{point.press}{bits}: all {n_tokens} losses are bit for bit those of the uncompressed cache: "
                "nothing was compressed."
            )
        counts = [self.plan.scored_per_window] * n_windows
        nll, base_nll = own.losses.double().sum(1).tolist(), base.losses.double().sum(1).tolist()
        loss, base_loss = math.fsum(nll) / n_tokens, math.fsum(base_nll) / n_tokens
        record: dict[str, Any] = {
            "scored_tokens": n_tokens,
            "windows": n_windows,
            "loss": loss,
            "ppl": perplexity(loss),
            "baseline_loss": base_loss,
            "baseline_ppl": perplexity(base_loss),
            "top1_acc": float(own.is_top1.double().mean()),
            "nll_by_distance": _by_distance(own.losses.double().mean(0)),
            "per_window": [{"id": i, "n": counts[i], "nll": nll[i], "nll_base": base_nll[i]} for i in range(n_windows)],
            "kv_bytes": point.kv_bytes,
            "kv_bytes_baseline": self.baseline.kv_bytes,
            "kv_len_before": self.plan.context,
            "kv_len_after": point.kv_lengths,
            "effective_compression_ratio": point.achieved_ratio,
            "kept_hash": point.kept_hash,
        }
        if point is not self.baseline:
            paired = paired_difference(counts, nll, base_nll)
            ci = paired.ci95
            kld, delta_p = own.kld.double(), own.delta_p.double()
            p50, p90, p99 = quantiles(kld.flatten().tolist(), (0.5, 0.9, 0.99))
            record |= {
                "delta_nll": paired.delta,
                "delta_nll_se": paired.se,
                "delta_nll_ci95": ci,
                "ppl_ratio_ci95": None if ci is None else [perplexity(ci[0]), perplexity(ci[1])],
                "same_top1": float(own.is_same_top1.double().mean()),
                "kld": {"mean": float(kld.mean()), "median": p50, "p90": p90, "p99": p99, "max": float(kld.max())},
                "delta_p": {"mean": float(delta_p.mean()), "rms": math.sqrt(float(delta_p.square().mean()))},
            }
        return record


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
    def join(cls, batches: Iterator[Scores]) -> Scores:
        """The scores of several batches of windows, one after the other."""
        columns = zip(*((s.losses, s.kld, s.delta_p, s.is_top1, s.is_same_top1) for s in batches), strict=True)
        return cls(*(torch.cat(column) for column in columns))


def _by_distance(mean: Tensor) -> dict[str, float]:
    """Mean losses of ``mean [target - 1]`` in buckets of distance to the context."""
    edges = [0, *(d for d in DISTANCES if d < len(mean)), len(mean)]
    return {f"{a + 1}-{b}": float(mean[a:b].mean()) for a, b in itertools.pairwise(edges)}
