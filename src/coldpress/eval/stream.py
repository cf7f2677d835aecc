"""Perplexity of a text that is read from its first to its last token, with a cache that is cut back on the way.

``StreamRun`` reads each document chunk by chunk. A target is scored from what the cache stored before its chunk and the
tokens of the chunk before it; then the chunk is in the cache, and the press's schedule may cut that back. Every token
but the first of a document is scored exactly once, and nothing crosses from one document into the next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.pressed import PressedCache
from coldpress.errors import SelfCheckError
from coldpress.eval.jobs import BASELINE, Point
from coldpress.eval.ledger import Ledger
from coldpress.eval.losses import finite, forward, token_losses
from coldpress.eval.point_run import Item, PointRun, release
from coldpress.loading.models import input_device
from coldpress.records.metrics import perplexity

FIRST_BUCKET = 256  # positions; each later bucket ends at twice the position


def read_stream(
    model: PreTrainedModel, ids: Tensor, cache: PressedCache, chunk: int, start: int = 0
) -> Iterator[tuple[Tensor, int]]:
    """Losses of a document's tokens from token ``start + 1`` on, and the cache's bytes, after each chunk.

    Args:
        ids: int64 ``[N]``.
        cache: stores the ``start`` tokens before; its press decides what it stores afterwards.
        chunk: tokens that are fed in together.

    Yields:
        Losses in nats, float32 on the CPU, one for each token of the chunk but the document's last, which predicts
        nothing; and :meth:`PressedCache.kv_bytes` when the chunk is in the cache.
    """
    for begin in range(start, len(ids) - 1, chunk):
        part = ids[begin : min(begin + chunk, len(ids) - 1)]
        logits = forward(model, part[None], cache)
        losses = token_losses(logits, ids[None, begin + 1 : begin + 1 + len(part)])[0].cpu()
        yield finite(losses), cache.kv_bytes()


def by_position(documents: Sequence[Tensor]) -> dict[str, float]:
    """Mean losses by the position of the target in its document, 1 .. n, in buckets that double in length."""
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


@dataclass(frozen=True)
class Read:
    """What one point made of one chunk: its losses, and the bytes and stored tokens of each layer after it."""

    losses: Tensor
    kv_bytes: int
    kv_lengths: list[int]


@dataclass(frozen=True)
class Streamed:
    """What a ledger notes of a document that one point has read to its end: of each chunk what :class:`Read` has."""

    losses: list[list[float]]
    kv_bytes: list[int]
    kv_lengths: list[list[int]]


class Chunk(NamedTuple):
    """Tokens that ``point`` reads at once, after those before them: of which document, and from which token on."""

    point: Point
    document: int
    begin: int


class StreamRun(PointRun[Read]):
    """Read documents with several presses; :meth:`results` can be asked for at any time.

    A document is read to its end by one press after the other, in this process: each chunk follows from the cache that
    the one before has left.

    Args:
        points: decoding schedules, or the uncompressed baseline, which keeps original positions.
        documents: token ids, int64 ``[N]`` each.
        chunk: tokens that are fed in together.
        positions: of the presses' caches, as in :class:`PressedCache`.
        limit: tokens of each document that are read at original positions; None for all.
        ledger: of documents that a point has read to their ends; one that it has begun is read anew.
    """

    kind = Streamed

    def __init__(
        self,
        model: PreTrainedModel,
        points: Sequence[Point],
        documents: Sequence[Tensor],
        *,
        chunk: int,
        positions: Literal["original", "rerotate"],
        limit: int | None = None,
        ledger: Ledger | None = None,
    ):
        self.chunk, self.positions, self.limit = chunk, positions, limit
        self.whole = list(documents)
        self.within = [ids[:limit] for ids in documents]
        chunks = [
            Chunk(point, i, begin)
            for i in range(len(self.whole))
            for point in points
            for begin in range(0, len(self.documents(point)[i]) - 1, chunk)
        ]
        self.work, self.cache = self._read, PressedCache()
        super().__init__(model, points, chunks, ledger)

    def position_mode(self, point: Point) -> Literal["original", "rerotate"]:
        """Where this point's keys stand."""
        return "original" if point == BASELINE else self.positions

    def documents(self, point: Point) -> list[Tensor]:
        """What it reads of the documents."""
        return self.within if self.position_mode(point) == "original" else self.whole

    def losses(self, point: Point) -> list[Tensor]:
        """What it has made of the documents: losses ``[n]`` of each that it has begun."""
        found: dict[int, list[Tensor]] = {}
        for chunk, done in zip(self.given, self.done, strict=True):
            if point.key in done:
                found.setdefault(chunk.document, []).append(done[point.key].losses)
        return [torch.cat(parts) for parts in found.values()]

    def _missing(self, index: int) -> list[Point]:
        point = self.given[index].point
        return [] if point.key in self.done[index] or point.key in self.errors else [point]

    def _fingerprint(self, index: int) -> str:
        return f"{self.chunk} {self.positions} {self.limit}"

    def _places(self, key: str, document: int) -> list[int]:
        """Where the chunks of a document are that a point reads."""
        return [i for i, (point, of, _) in enumerate(self.given) if (point.key, of) == (key, document)]

    def _restore(self, ledger: Ledger) -> None:
        for document in range(len(self.whole)):
            for key, found in ledger.load(Streamed, document, self._fingerprint(document)).items():
                chunks = zip(found.losses, found.kv_bytes, found.kv_lengths, strict=True)
                for place, (losses, n_bytes, lengths) in zip(self._places(key, document), chunks, strict=False):
                    self.done[place][key] = Read(torch.tensor(losses), n_bytes, lengths)

    def _save(self, ledger: Ledger, index: int) -> None:
        point, document, begin = self.given[index]
        if begin + self.chunk < len(self.documents(point)[document]) - 1 or point.key in self.errors:
            return
        read = [self.done[place][point.key] for place in self._places(point.key, document)]
        own = Streamed([r.losses.tolist() for r in read], [r.kv_bytes for r in read], [r.kv_lengths for r in read])
        others = ledger.load(Streamed, document, self._fingerprint(document))
        ledger.save(document, {**others, point.key: own}, self._fingerprint(document))

    @torch.inference_mode()
    def _read(self, model: PreTrainedModel, item: Item) -> dict[str, Read | Exception]:
        point, document, begin = item.given
        ids = self.documents(point)[document]
        try:
            if begin == 0:
                self.cache = PressedCache(point.press, positions=self.position_mode(point))
            part = ids[: min(begin + self.chunk + 1, len(ids))].to(input_device(model))
            ((losses, kv_bytes),) = read_stream(model, part, self.cache, self.chunk, begin)
            return {point.key: Read(losses, kv_bytes, self.cache.stored_lengths())}
        except Exception as error:
            if point == BASELINE:
                raise
            self.cache = PressedCache()
            return {point.key: release(error)}

    def _result(self, point: Point) -> dict[str, Any]:
        read, losses = [done[point.key] for done in self.done if point.key in done], self.losses(point)
        nll, counts = [float(own.double().sum()) for own in losses], [len(own) for own in losses]
        expected = sum(len(ids) - 1 for ids in self.documents(point))
        if self.is_complete and point.key not in self.errors and sum(counts) != expected:
            raise SelfCheckError(f"{sum(counts)} tokens were scored, of documents that have {expected} to score.")
        loss = math.fsum(nll) / sum(counts)
        return {
            "scored_tokens": sum(counts),
            "loss": loss,
            "ppl": perplexity(loss),
            "nll_by_position": by_position(losses),
            "per_document": [{"id": i, "n": n, "nll": own} for i, (n, own) in enumerate(zip(counts, nll, strict=True))],
            "kv_bytes": read[-1].kv_bytes,
            "kv_bytes_max": max(each.kv_bytes for each in read),
            "kv_len_after": read[-1].kv_lengths,
            "position_mode": self.position_mode(point),
        }
