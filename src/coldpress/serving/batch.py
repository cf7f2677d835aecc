"""The batch: in each round, all answers that need the model for one more token need it once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.rope import has_fixed_frequencies
from coldpress.cache.joined import can_join
from coldpress.cache.pressed import PressedCache
from coldpress.errors import ColdpressError
from coldpress.models.supported import use_coldpress
from coldpress.serving.reading import run, run_together

__all__ = ["Batch", "Row", "can_run_together"]

_TRIED = (9, 3)  # lengths of two texts
_ERROR = 0.02  # of logits, beside the distance from the least to the largest, that is another order of the same sums


class Row(Protocol):
    """A text that waits for the logits after its next token."""

    cache: PressedCache

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it still."""

    def take(self, logits: Tensor | Exception) -> None:
        """Take float32 logits ``[V]``, or what went wrong."""


class Batch:
    """Rows that wait for the model, which come and go from call to call.

    Args:
        model: of all rows.

    Attributes:
        is_joined: the model can take rows of several texts in one call; else it takes them one after the other.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.is_joined = model, can_run_together(model)
        self._waiting: list[tuple[Row, int]] = []

    def add(self, row: Row, token: int) -> None:
        """Have ``token`` read after what the cache of ``row`` has seen, in the next :meth:`run`."""
        self._waiting.append((row, token))

    def run(self) -> int:
        """Read all tokens that wait, and hand each row its logits; how many there were."""
        waiting, self._waiting = [(row, token) for row, token in self._waiting if row.is_wanted], []
        joined = [pair for pair in waiting if self.is_joined and can_join(pair[0].cache)]
        if len(joined) < 2:
            joined = []  # a row alone is read as the library reads it, to the last bit
        else:
            self._read(joined)
        for pair in waiting:
            if pair not in joined:
                self._read([pair])
        return len(waiting)

    def _read(self, pairs: Sequence[tuple[Row, int]]) -> None:
        caches, tokens = [row.cache for row, _ in pairs], [token for _, token in pairs]
        try:
            found = run(self.model, caches[0], tokens) if len(pairs) == 1 else run_together(self.model, caches, tokens)
        except Exception as error:
            for row, _ in pairs:
                row.take(error)
            return
        for (row, _), logits in zip(pairs, found, strict=True):
            row.take(logits)


def can_run_together(model: PreTrainedModel) -> bool:
    """Whether a model reads one token of several texts in one call as it does in one call for each; tried once."""
    takes = inspect.signature(model.forward).parameters
    if "position_ids" not in takes or not has_fixed_frequencies(model):
        return False
    use_coldpress(model)
    n_ids = model.get_input_embeddings().num_embeddings
    texts = [[(7 * i + n) % n_ids for i in range(n)] for n in _TRIED]
    alone, together = [], []
    try:
        for ids in texts:
            cache = PressedCache()
            run(model, cache, ids)
            together.append(cache)
            alone.append(run(model, cache.fork(), ids[:1])[0])
        if not all(map(can_join, together)):
            return False
        found = run_together(model, together, [ids[0] for ids in texts])
    except (ColdpressError, TypeError, ValueError, RuntimeError, IndexError):
        return False  # a model that takes one text at a time
    expected = torch.stack(alone)
    return bool((found - expected).abs().max() <= _ERROR * (expected.max() - expected.min()))
