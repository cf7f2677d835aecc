"""Perplexity of a text that is read from its first to its last token, with a cache that is cut back on the way.

``StreamRun`` reads each document chunk by chunk. A target is scored from what the cache stored before its chunk and the
tokens of the chunk before it; then the chunk is in the cache, and the press's schedule may cut that back. Every token
but the first of a document is scored exactly once, and nothing crosses from one document into the next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.press import BasePress
from coldpress.cache.pressed import PressedCache
from coldpress.errors import SelfCheckError
from coldpress.eval.checks import release
from coldpress.eval.losses import token_losses
from coldpress.eval.metrics import perplexity
from coldpress.eval.models import input_device
from coldpress.eval.perplexity import forward

__all__ = ["Reader", "StreamRun", "by_position", "read_stream"]

FIRST_BUCKET = 256  # positions; each later bucket ends at twice the position


def read_stream(
    model: PreTrainedModel, ids: Tensor, cache: PressedCache, chunk: int, start: int = 0
) -> Iterator[tuple[Tensor, int]]:
    """Losses of a document's tokens from token ``start + 1`` on, and the cache's bytes, after each chunk.

    Args:
        model: a causal language model on coldpress's backend.
        ids: int64 ``[N]``.
        cache: stores the ``start`` tokens before; its press decides what it stores afterwards.
        chunk: tokens that are fed in together.

    Yields:
        Losses in nats, float32 on the CPU, one for each token of the chunk but the document's last, which predicts
        nothing; and :meth:`PressedCache.kv_bytes` when the chunk is in the cache.

    Raises:
        SelfCheckError: a loss is not finite.
    """
    for begin in range(start, len(ids) - 1, chunk):
        part = ids[begin : min(begin + chunk, len(ids) - 1)]
        logits = forward(model, part[None], cache)
        losses = token_losses(logits, ids[None, begin + 1 : begin + 1 + len(part)])[0].cpu()
        if not torch.isfinite(losses).all():
            raise SelfCheckError("A loss is not finite: the model's logits overflow in this dtype.")
        yield losses, cache.kv_bytes()


def by_position(documents: Sequence[Tensor]) -> dict[str, float]:
    """Mean losses by the position of the target in its document, in buckets that double in length.

    Args:
        documents: losses ``[n]`` of the tokens at positions 1 .. n of each document.
    """
    longest = max(len(losses) for losses in documents) + 1
    edges = [1, FIRST_BUCKET]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    means = {}
    for a, b in itertools.pairwise(edges):
        inside = torch.cat([losses[a - 1 : b - 1] for losses in documents]).double()
        if len(inside):
            means[f"{a}-{b - 1}"] = float(inside.mean())
    return means


@dataclass
class Reader:
    """One press (None: the uncompressed cache), and what it has made of the documents so far."""

    press: BasePress | None
    losses: list[Tensor] = field(default_factory=list)  # [n] of each document, in order
    kv_bytes_max: int = 0
    kv_bytes: int = 0  # at the end of the last document
    kv_lengths: list[int] = field(default_factory=list)  # likewise: stored tokens of each layer
    error: Exception | None = None


class StreamRun:
    """Read documents with several presses; :meth:`results` can be asked for at any time.

    Args:
        model: a causal language model on coldpress's backend.
        presses: decoding schedules, or None for the uncompressed cache, which keeps original positions.
        documents: token ids, int64 ``[N]`` each.
        chunk: tokens that are fed in together.
        positions: of the presses' caches, as in :class:`PressedCache`.
        limit: tokens of each document that are read at original positions; None for all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        presses: Sequence[BasePress | None],
        documents: Sequence[Tensor],
        *,
        chunk: int,
        positions: Literal["original", "rerotate"],
        limit: int | None = None,
    ):
        self.model, self.chunk, self.positions = model, chunk, positions
        self.readers = [Reader(press) for press in presses]
        self.whole = list(documents)
        self.within = [ids[:limit] for ids in documents]
        self.is_complete = False

    def position_mode(self, reader: Reader) -> Literal["original", "rerotate"]:
        """Where this reader's keys stand."""
        return "original" if reader.press is None else self.positions

    def documents(self, reader: Reader) -> list[Tensor]:
        """What it reads of the documents."""
        return self.within if self.position_mode(reader) == "original" else self.whole

    @torch.inference_mode()
    def run(self, progress: Callable[[Any], Any] = iter) -> None:
        """Read everything. Of an interrupted run, what was read until then stays."""
        device = input_device(self.model)
        steps = [
            (reader, ids, begin)
            for i in range(len(self.whole))
            for reader in self.readers
            for ids in [self.documents(reader)[i]]
            for begin in range(0, len(ids) - 1, self.chunk)
        ]
        cache = PressedCache()
        for reader, ids, begin in progress(steps):
            if reader.error is not None:
                continue
            try:
                if begin == 0:
                    cache = PressedCache(reader.press, positions=self.position_mode(reader))
                    reader.losses.append(torch.empty(0))
                stop = min(begin + self.chunk + 1, len(ids))
                for losses, n_bytes in read_stream(self.model, ids[:stop].to(device), cache, self.chunk, begin):
                    reader.losses[-1] = torch.cat([reader.losses[-1], losses])
                    reader.kv_bytes, reader.kv_bytes_max = n_bytes, max(n_bytes, reader.kv_bytes_max)
                reader.kv_lengths = cache.stored_lengths()
            except Exception as error:
                if reader.press is None:
                    raise
                reader.error = release(error)
                cache = PressedCache()
        self.is_complete = True

    def results(self) -> Iterator[tuple[Reader, dict[str, Any] | Exception]]:
        """Each press that has read something, with its part of a result record or what went wrong."""
        for reader in self.readers:
            if reader.error is not None:
                yield reader, reader.error
            elif any(len(losses) for losses in reader.losses):
                try:
                    yield reader, self._result(reader)
                except SelfCheckError as error:
                    yield reader, error

    def before_failure(self, reader: Reader) -> dict[str, Any] | None:
        """The part of a result record over what was read before it failed; None if there is nothing."""
        is_begun = reader.error is not None and any(len(losses) for losses in reader.losses)
        return self._result(reader) if is_begun else None

    def _result(self, reader: Reader) -> dict[str, Any]:
        nll = [float(losses.double().sum()) for losses in reader.losses]
        counts = [len(losses) for losses in reader.losses]
        expected = sum(len(ids) - 1 for ids in self.documents(reader))
        if self.is_complete and reader.error is None and sum(counts) != expected:
            raise SelfCheckError(f"{sum(counts)} tokens were scored, of documents that have {expected} to score.")
        loss = math.fsum(nll) / sum(counts)
        return {
            "scored_tokens": sum(counts),
            "loss": loss,
            "ppl": perplexity(loss),
            "nll_by_position": by_position(reader.losses),
            "per_document": [{"id": i, "n": n, "nll": own} for i, (n, own) in enumerate(zip(counts, nll, strict=True))],
            "kv_bytes": reader.kv_bytes,
            "kv_bytes_max": reader.kv_bytes_max,
            "kv_len_after": reader.kv_lengths,
            "position_mode": self.position_mode(reader),
        }
