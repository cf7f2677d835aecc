"""Run one press of either library on one model: which pairs are left, and the loss of the tokens that follow.

What is left is found by comparing the stored keys and values, bit by bit, with those that the model wrote into the
cache. So neither library's own bookkeeping is believed, and the same code serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.parity.case import Case
from benchmarks.parity.models import Setting
from torch import Tensor
from torch.nn.functional import pad

from coldpress.architecture.cache_argument import cache_argument


@dataclass
class Measurement:
    """What one run leaves behind.

    Attributes:
        kept: bool ``[B, L, Hkv, T]``, over all tokens before the scored ones.
        losses: float32 ``[B, n_scored]``, nats.
        scores: float32 ``[B, L, Hkv, T]`` by which the pairs were chosen, to recognise ties, or None.
        extra: stored pairs that are none of those of the text.
        error: what the library raised instead.
    """

    kept: Tensor | None = None
    losses: Tensor | None = None
    scores: Tensor | None = None
    extra: int = 0
    error: str | None = None


class Written:
    """Every key and value that the model hands to a cache, in order."""

    def __init__(self, cache: Any):
        self.pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        update: Callable[..., Any] = cache.update

        def recorded(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.pairs.setdefault(layer_idx, []).append((keys.clone(), values.clone()))
            return update(keys, values, layer_idx, *args, **kwargs)

        cache.update = recorded

    def layer(self, layer_idx: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """The first ``n_tokens`` that layer ``layer_idx`` got: ``[B, Hkv, T, D]`` twice."""
        keys, values = zip(*self.pairs[layer_idx], strict=True)
        return torch.cat(keys, dim=2)[:, :, :n_tokens], torch.cat(values, dim=2)[:, :, :n_tokens]


def kept_positions(
    stored: tuple[Tensor, Tensor], written: tuple[Tensor, Tensor], filled: Tensor | None = None
) -> Tensor:
    """Which of the ``written`` pairs are ``stored``: bool ``[B, Hkv, T]``.

    By their keys; by their values where keys were rotated or thinned.

    Args:
        stored, written: keys and values ``[B, Hkv, n, D]``.
        filled: bool ``[B, Hkv, n]``, False where a place is empty because the head keeps fewer than the longest.

    Raises:
        ValueError: a stored pair is none of them.
    """
    n_batch, n_heads, n_tokens = written[0].shape[:3]
    kept = torch.zeros(n_batch, n_heads, n_tokens, dtype=torch.bool)
    for row in range(n_batch):
        for head in range(n_heads):
            places = [_places(states[row, head]) for states in written]
            held = [states[row, head] if filled is None else states[row, head][filled[row, head]] for states in stored]
            for key, value in zip(*map(_bytes, held), strict=True):
                place = places[0].get(key) or places[1].get(value)
                if place is None:
                    raise ValueError("a stored pair is none of those of the text")
                # of pairs that look the same, the first one that is free
                kept[row, head, next((at for at in place if not kept[row, head, at]), place[0])] = True
    return kept


def _bytes(states: Tensor) -> list[bytes]:
    return [row.tobytes() for row in states.contiguous().numpy()]


def _places(states: Tensor) -> dict[bytes, list[int]]:
    places: dict[bytes, list[int]] = {}
    for position, row in enumerate(_bytes(states)):
        places.setdefault(row, []).append(position)
    return places


@torch.no_grad()
def measure(
    setting: Setting, case: Case, press: Any, cache: Any, rerotated: bool, scores: Callable[[int], Tensor | None]
) -> Measurement:
    """Prefill and compress, decode ``case.decode`` tokens under the press, then score the tokens that follow.

    Args:
        press: of the library that runs, or None.
        cache: an empty cache of that library.
        rerotated: the next token's position is the number of stored pairs instead of its place in the text.
        scores: the scores of a layer, ``[B, Hkv, T]``, if they were seen.
    """
    model, ids = setting.model, setting.ids[: case.rows]
    start = setting.n_context + case.decode
    written = Written(cache)
    with press(model) if press is not None else nullcontext():
        model.model(input_ids=ids[:, : setting.n_context], **cache_argument(cache))
        for at in range(setting.n_context, start):
            positions = torch.full((case.rows, 1), at)
            model.model(input_ids=ids[:, at : at + 1], **cache_argument(cache), position_ids=positions)
    kept, extra = [], 0
    for index, layer in enumerate(model.model.layers):
        # what is after the text, a press has left there that ran the model again
        stored = cache.layers[index].keys[:, :, :start], cache.layers[index].values[:, :, :start]
        extra += cache.layers[index].keys[:, :, start:, 0].numel()
        # coldpress marks the places that a shorter head leaves empty; its attention goes by the same marks
        filled = cache.positions(index) >= 0 if hasattr(cache, "positions") else None
        kept.append(kept_positions(stored, written.layer(index, start), filled))
        masked = getattr(layer.self_attn, "masked_key_indices", None)  # kvpress's head-wise presses evict nothing
        if masked is not None:
            kept[-1][tuple(masked)] = False
    seen = [scores(index) for index in range(len(kept))]
    first = cache.layers[0].keys.shape[2] if rerotated else start
    losses = _losses(setting, case, cache, start, first)
    if case.decode:  # what came after the only cut was not scored, and is kept
        seen = [None if s is None else pad(s, (0, max(0, start - s.shape[-1])), value=torch.inf) for s in seen]
    whole = [s for s in seen if s is not None and s.shape == kept[0].shape]
    scored = torch.stack(whole, 1) if len(whole) == len(kept) else None
    return Measurement(torch.stack(kept, 1), losses, scored, extra)


def _losses(setting: Setting, case: Case, cache: Any, start: int, first: int) -> Tensor:
    """Nats of each of the ``n_scored`` tokens after the one at ``start``, whose position is ``first``."""
    ids = setting.ids[: case.rows]
    n_scored = setting.n_scored
    size = 1 if case.one_by_one else n_scored
    logits = []
    for offset in range(0, n_scored, size):
        at = slice(start + offset, start + offset + size)
        positions = torch.arange(first + offset, first + offset + size).expand(case.rows, -1)
        logits.append(setting.model(ids[:, at], **cache_argument(cache), position_ids=positions).logits)
    targets = ids[:, start + 1 : start + 1 + n_scored]
    return torch.nn.functional.cross_entropy(torch.cat(logits, 1).transpose(1, 2).float(), targets, reduction="none")
