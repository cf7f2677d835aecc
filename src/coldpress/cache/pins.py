"""Pins: spans of tokens that nothing may evict."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coldpress.errors import CacheError

__all__ = ["Pins", "Spans", "among_real", "checked_pins", "of_rows", "pinned", "repeated", "warn_of_pins"]

Spans = Sequence[tuple[int, int]]  # the first token of a span, and the one after it, among a row's real tokens
Pins = tuple[tuple[tuple[int, int], ...], ...]  # of each row, or of one for all


def checked_pins(pin: Spans | Sequence[Spans] | None) -> Pins:
    """The spans of ``PressedCache(pin=...)``: spans for all rows, or a list of them for each row.

    Raises:
        CacheError: it is something else.
    """
    if pin is None:
        return ()
    is_list = isinstance(pin, (list, tuple))
    rows: Any = [pin] if is_list and all(_is_span(span) for span in pin) else pin
    if not is_list or not all(isinstance(row, (list, tuple)) and all(_is_span(span) for span in row) for row in rows):
        raise CacheError(
            "pin must be spans of tokens, [(0, 40), (100, 120)] with the first token and the one after the last, or a "
            f"list of such lists, one for each row; got {pin!r}."
        )
    found = tuple(tuple((start, stop) for start, stop in row) for row in rows)
    return found if any(found) else ()


def _is_span(span: Any) -> bool:
    is_pair = isinstance(span, (list, tuple)) and len(span) == 2
    return is_pair and all(type(end) is int for end in span) and 0 <= span[0] < span[1]


def pinned(pins: Pins, position: Tensor) -> Tensor:
    """Which tokens are in a pinned span: bool, as ``position``, int64 ``[B, ..., T]`` among each row's real tokens.

    Raises:
        CacheError: the spans are of another number of rows.
    """
    if len(pins) not in (1, len(position)):
        raise CacheError(
            f"pin= has spans for {len(pins)} rows, and the cache holds {len(position)}; give one for each."
        )
    found = torch.zeros(position.shape, dtype=torch.bool, device=position.device)
    for row in range(len(position)):
        for start, stop in pins[row if len(pins) > 1 else 0]:
            found[row] |= (position[row] >= start) & (position[row] < stop)
    return found


def among_real(position: Tensor, shown: Tensor | None) -> Tensor:
    """Positions in the input, int64 ``[B, Hkv, T]``, counted without padding; -1 for padding and where they are -1.

    Args:
        shown: bool ``[B, seen]``, False for padding; None if there is none.
    """
    if shown is None:
        return position
    rank = (shown.cumsum(-1) - 1).masked_fill(~shown, -1).to(position.device)
    return rank[:, None].expand(-1, position.shape[1], -1).gather(2, position.clamp(min=0)).where(position >= 0, -1)


def of_rows(pins: Pins, rows: Sequence[int]) -> Pins:
    """The spans of the rows ``rows``."""
    return pins if len(pins) <= 1 else tuple(pins[row] for row in rows)


def repeated(pins: Pins, repeats: int) -> Pins:
    """The spans of rows that are there ``repeats`` times each, one after the other."""
    return of_rows(pins, [row for row in range(len(pins)) for _ in range(repeats)])


def warn_of_pins(pins: Pins, n_real: int | Sequence[int], press: str) -> None:
    """Warn of spans that lie beyond a prompt whose press compresses nothing else: they pin nothing.

    Args:
        n_real: tokens of the prompt without padding, of each row or of all.
        press: the name of what compresses the prompt.
    """
    for row, spans in enumerate(pins):
        if isinstance(n_real, int):
            n_tokens = n_real
        else:
            n_tokens = max(n_real) if len(pins) == 1 else n_real[min(row, len(n_real) - 1)]
        beyond = [span for span in spans if span[0] >= n_tokens]
        if beyond:
            warnings.warn(
                f"pin= has {beyond[0]}, which lies beyond the {n_tokens} tokens of the prompt, and {press} compresses "
                "the prompt alone: it pins nothing.",
                stacklevel=2,
            )
            return
