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

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.scorer import BudgetPress
from coldpress.cache.pressed import PressedCache
from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import BASELINE, Point
from coldpress.eval.ledger import Ledger, Measured
from coldpress.eval.losses import Scores, forward, token_losses
from coldpress.eval.point_run import (
    Item,
    PointRun,
    check_baseline,
    check_removed,
    check_unchanged,
    each_measured,
    prefilled,
    release,
    sizes_of,
)
from coldpress.eval.windows import PrefixPlan
from coldpress.loading.models import input_device
from coldpress.records.metrics import bits_per_byte, paired_difference, perplexity

DISTANCES = (16, 64, 256)  # upper ends of the buckets of distance to the compressed context, in tokens

Found = dict[str, Measured | Exception]  # of each point, by its key


class PrefixRun(PointRun[Measured]):
    """Score targets against compressed contexts, window by window; :meth:`results` can be asked for at any time.

    See also :class:`coldpress.eval.point_run.PointRun` and :class:`WindowWork`.

    Args:
        documents: token ids, int64 ``[N]`` each, with the plan of their windows; all plans have the same sizes.
        batch_size: windows that are run together.
        token_bytes: UTF-8 bytes that each token of the documents stands for, int64 ``[N]`` each, for bits per byte;
            None where that is not known.
    """

    kind = Measured

    def __init__(
        self,
        model: PreTrainedModel,
        points: Sequence[Point],
        documents: Sequence[tuple[Tensor, PrefixPlan]],
        batch_size: int = 1,
        chunk_tokens: int | None = None,
        *,
        token_bytes: Sequence[Tensor | None] | None = None,
        greedy_tokens: int = 0,
        ledger: Ledger | None = None,
        seed: int = 0,
    ):
        self.plan = documents[0][1]
        self.work = WindowWork(self.plan.context, self.plan.scored_per_window, chunk_tokens, greedy_tokens, seed)
        windows = [window for ids, plan in documents for window in plan.windows(ids)]
        places = [(i, start) for i, (_, plan) in enumerate(documents) for start in plan.starts]
        n_bytes = _bytes_of_windows(documents, token_bytes)
        batches = range(0, len(windows), batch_size)
        self.places = [places[i : i + batch_size] for i in batches]  # of each window: document, and start in it
        self.n_bytes = None if n_bytes is None else [sum(n_bytes[i : i + batch_size]) for i in batches]
        super().__init__(model, points, [torch.stack(windows[i : i + batch_size]) for i in batches], ledger)

    def _result(self, point: Point) -> dict[str, Any]:
        """The perplexity part of a result record, over the windows measured so far."""
        measured = self.measured(point)
        _, first, first_base = measured[0]
        own = Scores.join(mine.scores for _, mine, _ in measured)
        base = Scores.join(its.scores for _, _, its in measured)
        n_windows, n_tokens = own.losses.shape[0], own.losses.numel()
        places = [place for i, *_ in measured for place in self.places[i]]
        expected = len(places) * self.plan.scored_per_window
        if n_tokens != expected:
            raise SelfCheckError(f"{n_tokens} tokens were scored, the windows' formula says {expected}.")
        if torch.equal(own.losses, base.losses):
            check_removed(point, first, first_base, f"all {n_tokens} losses")
        counts = [self.plan.scored_per_window] * n_windows
        nll, base_nll = own.losses.double().sum(1).tolist(), base.losses.double().sum(1).tolist()
        loss, base_loss = math.fsum(nll) / n_tokens, math.fsum(base_nll) / n_tokens
        mean = paired_difference(counts, nll)
        n_bytes = None if self.n_bytes is None else sum(self.n_bytes[i] for i, *_ in measured)
        record: dict[str, Any] = {
            "scored_tokens": n_tokens,
            "windows": n_windows,
            "loss": loss,
            "ppl": perplexity(loss),
            "ppl_ci95": None if mean.ci95 is None else [perplexity(end) for end in mean.ci95],
            "bits_per_byte": None if n_bytes is None else bits_per_byte(loss * n_tokens, n_bytes),
            "scored_bytes": n_bytes,
            "baseline_loss": base_loss,
            "baseline_ppl": perplexity(base_loss),
            "top1_acc": float(own.is_top1.double().mean()),
            "nll_by_distance": {name: float(part.mean()) for name, part in _buckets(own.losses.double())},
            "per_window": [
                {"id": i, "document": document, "start": start, "n": counts[i], "nll": nll[i], "nll_base": base_nll[i]}
                for i, (document, start) in enumerate(places)
            ],
            **first.facts(first_base, self.plan.context),
        }
        if first.read_ratio < 1:
            record["read_ratio"] = first.read_ratio
        if point == BASELINE:
            return record
        paired = paired_difference(counts, nll, base_nll)
        ci = paired.ci95
        kld, delta_p = own.kld.double(), own.delta_p.double()
        for window, of_window in zip(record["per_window"], kld.mean(1).tolist(), strict=True):
            window["kld"] = of_window
        p50, p90, p99 = numpy.quantile(kld.numpy(), (0.5, 0.9, 0.99)).tolist()
        record |= {
            "delta_nll": paired.delta,
            "delta_nll_se": paired.se,
            "delta_nll_ci95": ci,
            "ppl_ratio_ci95": None if ci is None else [perplexity(ci[0]), perplexity(ci[1])],
            "same_top1": float(own.is_same_top1.double().mean()),
            "kld": {"mean": float(kld.mean()), "median": p50, "p90": p90, "p99": p99, "max": float(kld.max())},
            "delta_p": {"mean": float(delta_p.mean()), "rms": math.sqrt(float(delta_p.square().mean()))},
            "delta_by_distance": _deltas_by_distance(own.losses.double(), base.losses.double()),
        }
        agreement = [n for _, mine, _ in measured for n in mine.agreement or ()]
        if agreement:
            record["greedy_agreement"] = {
                "mean": math.fsum(agreement) / len(agreement),
                "median": float(statistics.median(agreement)),
                "n_tokens": self.work.greedy_tokens,
                "windows": len(agreement),
                "lengths": agreement,
            }
        return record


def _bytes_of_windows(
    documents: Sequence[tuple[Tensor, PrefixPlan]], token_bytes: Sequence[Tensor | None] | None
) -> list[int] | None:
    """UTF-8 bytes of the scored tokens of each window; None unless they are known of all."""
    known = [n_bytes for n_bytes in token_bytes or () if n_bytes is not None]
    if len(known) < len(documents):
        return None
    found = []
    for n_bytes, (_, plan) in zip(known, documents, strict=True):
        ends = (start + plan.context + plan.target for start in plan.starts)
        found += [int(n_bytes[end - plan.scored_per_window : end].sum()) for end in ends]
    return found


def _buckets(losses: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Columns of ``losses [W, target - 1]`` in buckets of distance to the context, with their names."""
    n = losses.shape[1]
    edges = [0, *(d for d in DISTANCES if d < n), n]
    for a, b in itertools.pairwise(edges):
        yield f"{a + 1}-{b}", losses[:, a:b]


def _deltas_by_distance(own: Tensor, base: Tensor) -> dict[str, dict[str, Any]]:
    """The paired difference of losses ``[W, target - 1]`` in each bucket of distance to the context."""
    deltas = {}
    for (name, mine), (_, its) in zip(_buckets(own), _buckets(base), strict=True):
        paired = paired_difference([mine.shape[1]] * len(mine), mine.sum(1).tolist(), its.sum(1).tolist())
        deltas[name] = {"delta": paired.delta, "ci95": paired.ci95}
    return deltas


@dataclass(frozen=True)
class WindowWork:
    """Measures one batch of windows, int64 ``[W, context + target]``: work for an engine."""

    context: int  # tokens that are prefilled
    n_scored: int  # tokens scored in each window, its last ones
    chunk_tokens: int | None = None  # tokens of a piece of the context; None for a context in one piece
    greedy_tokens: int = 0  # tokens to generate from each cache, to count how many are the baseline's
    seed: int = 0  # with the batch's index, of torch's generator: what presses draw depends on no other batch

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel, batch: Item) -> Found:
        """What each point, and the baseline, made of the batch, or what went wrong with it.

        SelfCheckError where the baseline contradicts a direct forward pass, or is not finite.
        """
        torch.manual_seed(self.seed + batch.index)
        context, points = self.context, batch.points
        ids = batch.given.to(input_device(model))
        inputs, wanted = ids[:, context:-1], ids[:, context + 1 :]
        scorers = [p.press for p in points if isinstance(p.press, BudgetPress) and p.press.exact_at_0]
        zeros = list(dict.fromkeys(press.with_ratio(0.0) for press in scorers)) if batch.is_checked else []
        full, branches = prefilled(model, ids[:, :context], [*points, *map(Point, zeros)], self.chunk_tokens)
        greedy = self._generate(model, full, inputs)
        sizes = sizes_of(full)
        base, reference = Scores.of(forward(model, inputs, full), wanted)
        if batch.is_checked:
            check_baseline(model, ids, base.losses)

        def measure(branch: PressedCache) -> Measured:
            sizes = sizes_of(branch, with_hash=True)
            agreement = _agreement(greedy, self._generate(model, branch, inputs))
            scores, _ = Scores.of(forward(model, inputs, branch), wanted, reference)
            return Measured(scores=scores, **sizes, agreement=agreement, read_ratio=branch.read_ratio())

        found: Found = {BASELINE.key: Measured(scores=base, **sizes)}
        found |= each_measured(points, branches, full, context, measure)
        measured: dict[Any, Tensor] = {}  # presses that keep everything share one cache, and its losses
        for zero in zeros:
            branch = next(branches)
            try:
                branch.get_seq_length()
                states = (state for layer in branch.pressed_layers() for state in (layer.keys, layer.values))
                storage = tuple((state.data_ptr(), state.shape) for state in states if state is not None)
                if storage not in measured or self.chunk_tokens is not None:  # in pieces none are shared
                    measured[storage] = token_losses(forward(model, inputs, branch), wanted).cpu()
                check_unchanged(zero, measured[storage], base.losses)
            except Exception as error:
                alike = (p for p in points if isinstance(p.press, BudgetPress) and p.press.with_ratio(0.0) == zero)
                for point in alike:
                    if not isinstance(found[point.key], Exception):
                        found[point.key] = release(error)
        return found

    def _generate(self, model: PreTrainedModel, cache: PressedCache, inputs: Tensor) -> Tensor | None:
        """Greedy tokens ``[W, greedy_tokens]`` after the first of ``inputs``, from a copy of ``cache``."""
        if not self.greedy_tokens:
            return None
        cache, token, tokens = cache.fork(), inputs[:, :1], []
        for _ in range(self.greedy_tokens):
            token = forward(model, token, cache, keep=1).argmax(-1)
            tokens.append(token)
        return torch.cat(tokens, dim=1).cpu()


def _agreement(base: Tensor | None, own: Tensor | None) -> list[int] | None:
    """How many tokens of each row are the baseline's before the first that is not."""
    if base is None or own is None:
        return None
    return [int(n) for n in (own == base).long().cumprod(dim=1).sum(dim=1)]
