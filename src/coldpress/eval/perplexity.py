"""Perplexity of an uncompressed model, with a strided sliding window. Under a press, see ``prefix.py``."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache import PressedCache
from coldpress.errors import SelfCheckError
from coldpress.eval.metrics import perplexity
from coldpress.eval.models import input_device
from coldpress.eval.windows import Window, plan_strided, strided_scored_tokens

__all__ = ["BLOCK_TOKENS", "forward", "plain_perplexity", "token_losses"]

BLOCK_TOKENS = 128  # rows of the vocabulary-sized arithmetic that are held at once

_Job = tuple[Tensor, Window]  # a document's ids and one of its windows


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
    for rows, wanted in zip(logits.split(BLOCK_TOKENS, 1), targets.split(BLOCK_TOKENS, 1), strict=True):
        blocks.append(-rows.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0])
    return torch.cat(blocks, dim=1)


@torch.inference_mode()
def plain_perplexity(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    max_length: int,
    stride: int,
    batch_size: int = 1,
    progress: Callable[[Any], Any] = iter,
) -> dict[str, Any]:
    """Perplexity of the uncompressed model with a strided sliding window; every token is scored exactly once.

    Args:
        model: a causal language model.
        documents: token ids, int64 ``[N]`` each; windows never cross from one to the next.
        max_length, stride: see :func:`coldpress.eval.windows.plan_strided`.
        batch_size: windows that are run together; those of another length than their neighbours run alone.
        progress: wraps the list of batches, for a progress bar.

    Returns:
        ``scored_tokens``, ``windows``, ``loss`` (nats a token), ``ppl``, ``nll`` (the sum) as a dictionary.

    Raises:
        SelfCheckError: a loss is not finite, or the number of scored tokens is not what the formula says.
    """
    device = input_device(model)
    jobs = [(ids, window) for ids in documents for window in plan_strided(len(ids), max_length, stride)]
    total, scored = 0.0, 0
    for batch in progress(list(_batches(jobs, batch_size))):
        ids = torch.stack([ids[window.begin : window.end] for ids, window in batch]).to(device)
        n = batch[0][1].n_scored
        logits = forward(model, ids, None, keep=n + 1)[:, :-1]
        losses = token_losses(logits, ids[:, -n:])
        total += float(losses.cpu().double().sum())
        scored += losses.numel()
    expected = sum(strided_scored_tokens(len(ids), max_length, stride) for ids in documents)
    if scored != expected:
        raise SelfCheckError(f"{scored} tokens were scored, the windows' formula says {expected}.")
    if not math.isfinite(total):
        raise SelfCheckError(f"The loss is {total}: the model's logits are not finite in {model.dtype}.")
    loss = total / scored
    return {"scored_tokens": scored, "windows": len(jobs), "nll": total, "loss": loss, "ppl": perplexity(loss)}


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    """Runs of windows of one shape, at most ``size`` of them."""
    for _, run in itertools.groupby(jobs, key=lambda job: (job[1].end - job[1].begin, job[1].n_scored)):
        alike = list(run)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
