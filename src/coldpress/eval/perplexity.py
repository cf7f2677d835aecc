"""Perplexity of an uncompressed model: a strided sliding window, or a preset. Under a press, see ``prefix.py``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.errors import SelfCheckError
from coldpress.eval.ledger import UNREADABLE, Ledger
from coldpress.eval.losses import forward, token_losses
from coldpress.eval.metrics import (
    FEW_WINDOWS,
    bits_per_byte,
    bootstrap_difference,
    iid_se,
    paired_difference,
    perplexity,
)
from coldpress.eval.models import input_device
from coldpress.eval.windows import PRESETS, STRIDED, Window

_Job = tuple[int, Window]  # number of a document, and one of its windows
_FILE = "plain-{:06d}.json"  # of a ledger


@torch.inference_mode()
def plain_perplexity(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    max_length: int,
    stride: int,
    preset: str | None = None,
    token_bytes: Sequence[Tensor | None] = (),
    units: Sequence[tuple[int, int]] | None = None,
    batch_size: int = 1,
    progress: Callable[[Any], Any] = iter,
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """Perplexity of the uncompressed model: with a strided sliding window, or as a preset cuts the documents.

    Args:
        documents: token ids, int64 ``[N]`` each; windows never cross from one to the next.
        max_length, stride: see :func:`coldpress.eval.windows.plan_strided`.
        preset: one of :data:`coldpress.eval.windows.PRESETS`; None for a strided window, where every token but the
            first is scored once.
        token_bytes: what each token of each document stands for, int64 ``[N]``, for bits per byte; None or nothing
            where that is unknown.
        units: words and bytes of each document, by which lm-eval divides.
        batch_size: windows that are run together; those of another length than their neighbours run alone.
        ledger: of batches that an earlier run of the same has finished, and of those that this one has.

    Returns:
        ``scored_tokens``, ``windows``, ``loss`` (nats a token), ``ppl``, ``nll`` (the sum), ``ppl_ci95`` (clustered by
        window, by document for lm-eval; None with one), ``ppl_se`` (as llama.cpp prints it, for independent tokens),
        ``scored_bytes`` and ``bits_per_byte`` (None where unknown). With few windows also
        ``ppl_bootstrap_ci95``; with ``units`` also ``scored_words``, ``word_perplexity`` and ``byte_perplexity``.

    Raises:
        SelfCheckError: a loss is not finite, or the number of scored tokens is not what the formula says.
    """
    device = input_device(model)
    how = STRIDED if preset is None else PRESETS[preset]
    jobs = [(i, window) for i, ids in enumerate(documents) for window in how.windows(len(ids), max_length, stride)]
    rows: list[Tensor] = []  # losses of each window, in the order of the jobs
    for number, batch in enumerate(progress(list(_batches(jobs, batch_size)))):
        n = batch[0][1].n_scored
        losses = None if ledger is None else _kept(ledger, number, (len(batch), n))
        if losses is None:
            ids = torch.stack([documents[i][window.begin : window.end] for i, window in batch]).to(device)
            losses = token_losses(forward(model, ids[:, :-1], None, keep=n), ids[:, -n:]).cpu()
            if ledger is not None and losses.isfinite().all():
                ledger.write(_FILE.format(number), "losses", losses.tolist(), number)
        rows += losses
    scored = sum(len(row) for row in rows)
    expected = sum(how.scored(len(ids), max_length, stride) for ids in documents)
    if scored != expected:
        raise SelfCheckError(f"{scored} tokens were scored, the windows' formula says {expected}.")
    sums = [float(row.double().sum()) for row in rows]
    total = math.fsum(sums)
    if not math.isfinite(total):
        raise SelfCheckError(f"The loss is {total}: the model's logits are not finite in {model.dtype}.")
    loss = total / scored
    result: dict[str, Any] = {"scored_tokens": scored, "windows": len(jobs), "nll": total, "loss": loss}
    result["ppl"] = perplexity(loss)
    result |= _error_bars(jobs, rows, sums, by_document=units is not None)
    n_bytes = _scored_bytes(jobs, token_bytes)
    if units is not None:
        n_words, n_bytes = (sum(column) for column in zip(*units, strict=True))
        result |= {"scored_words": n_words, "word_perplexity": perplexity(total / n_words)}
        result["byte_perplexity"] = perplexity(total / n_bytes)
    return result | {"scored_bytes": n_bytes, "bits_per_byte": bits_per_byte(total, n_bytes or 0)}


def _kept(ledger: Ledger, number: int, shape: tuple[int, int]) -> Tensor | None:
    """The losses of a batch of windows, ``[windows, scored]``; None where they are not there, or damaged."""
    try:
        losses = torch.tensor(ledger.read(_FILE.format(number), "losses", number), dtype=torch.float32)
    except UNREADABLE:
        return None
    return losses if losses.shape == shape else None


def _error_bars(
    jobs: Sequence[_Job], rows: Sequence[Tensor], sums: Sequence[float], by_document: bool
) -> dict[str, Any]:
    """Intervals of perplexity: clustered by window or document, and as if tokens were independent."""
    clusters: dict[Any, list[int]] = {}
    for number, (document, window) in enumerate(jobs):
        clusters.setdefault(document if by_document else (document, window.begin), []).append(number)
    counts = [sum(len(rows[i]) for i in members) for members in clusters.values()]
    nll = [math.fsum(sums[i] for i in members) for members in clusters.values()]
    mean, _, ci = paired_difference(counts, nll)
    se = iid_se(torch.cat(list(rows)))
    found: dict[str, Any] = {
        "ppl_ci95": None if ci is None else [perplexity(ci[0]), perplexity(ci[1])],
        "ppl_se": None if se is None else se * perplexity(mean),
    }
    drawn = bootstrap_difference(counts, nll) if len(counts) < FEW_WINDOWS else None
    if drawn is not None:
        found["ppl_bootstrap_ci95"] = [perplexity(drawn[0]), perplexity(drawn[1])]
    return found


def _scored_bytes(jobs: Sequence[_Job], token_bytes: Sequence[Tensor | None]) -> int | None:
    """Bytes that the scored tokens stand for; None where a document's are unknown."""
    total = 0
    for document, window in jobs:
        n_bytes = token_bytes[document] if token_bytes else None
        if n_bytes is None:
            return None
        total += int(n_bytes[window.first_scored : window.end].sum())
    return total


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    """Runs of windows of one shape, at most ``size`` of them."""
    for _, run in itertools.groupby(jobs, key=lambda job: (job[1].end - job[1].begin, job[1].n_scored)):
        alike = list(run)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
