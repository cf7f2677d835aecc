"""Checks of what ``generate`` would silently do wrong with a cache: guesses, pieces, padding, and dropping it.

Decoding with guesses (an assistant model, prompt lookup) brings guesses together with the prompt. A prompt that it cuts
up (``prefill_chunk_size``) looks like a short prompt with turns after it. Behind padding on the right it generates from
what the model says of the padding. And where a text gets longer than the point at which a model with "longrope" scaling
changes its frequencies, some models throw their cache away and read the text anew into another one.

A cache is not told who calls it. The frames of its callers are the only sign that all versions of transformers give.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor

from coldpress.errors import CacheError

__all__ = [
    "refuse_dropping",
    "refuse_guesses",
    "refuse_pieces",
    "switching_point",
    "switching_refusal",
    "warn_of_padding",
]


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def refuse_guesses() -> None:
    """Raise if ``generate`` decodes with guesses now: a press would compress the first ones along with the prompt."""
    if any(frame.f_code.co_name == "_assisted_decoding" for frame in _callers()):
        raise CacheError(
            "Decoding with guesses (an assistant model, prompt lookup) feeds guesses together with the prompt, and the "
            "press would compress both. Use a PressedCache without a press, or generate without guesses."
        )


def refuse_pieces(press: str, chunk_tokens: int | None, chooses_again: bool) -> None:
    """Raise if ``generate`` cuts up the prompt that begins now: a press would compress the first piece alone.

    A single token that is left over is no piece: it is stored as a generated one is.

    Args:
        press: the name of what compresses the prompt.
        chunk_tokens: of the cache.
        chooses_again: the press can compress a prompt piece by piece.
    """
    for frame in _callers():
        cut = frame.f_locals.get("input_chunks") if frame.f_code.co_name.startswith("_prefill") else None
        if cut is None:
            continue
        n, n_more = cut[0].shape[1], sum(piece.shape[1] for piece in cut[1:])
        if n_more < 2 or n == chunk_tokens or (n == 1 and chunk_tokens is not None):  # which the layers refuse
            return
        same = max(2, n)
        instead = (
            f"give both the same number, PressedCache(press, chunk_tokens={same}) and prefill_chunk_size={same}"
            if chooses_again
            else "leave prefill_chunk_size out, as this press chooses once, from a whole prompt"
        )
        raise CacheError(
            f"generate was told prefill_chunk_size={n}, and {press} would compress the first of these pieces as if it "
            f"were the whole prompt: {instead}."
        )


def warn_of_padding(mask: Tensor) -> None:
    """Warn, once in a process, if ``generate`` goes on behind padding: from there it makes its next tokens.

    Args:
        mask: bool ``[B, n]``, of a prompt.
    """
    if bool(mask[:, -1].all()):
        return
    if any(frame.f_code.co_name == "generate" and _is_of_transformers(frame) for frame in _callers()):
        _say_padding()


def _is_of_transformers(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("transformers.")


@functools.cache
def _say_padding() -> None:
    warnings.warn(
        "generate was given rows that end in padding, and takes their next tokens from what the model says after that, "
        "with any cache: pad on the left, with tokenizer(..., padding_side='left').",
        stacklevel=2,
    )


def switching_point(config: Any) -> int | None:
    """The number of tokens up to which a model with "longrope" scaling has its short frequencies; None for others."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "longrope" not in (scaling.get("rope_type"), scaling.get("type")):
        return None
    own = getattr(config, "original_max_position_embeddings", None)
    return own or scaling.get("original_max_position_embeddings")


def switching_refusal(switch_at: int) -> CacheError:
    """The error message where a cached text crosses the switching point."""
    return CacheError(
        f"This model changes its rotary frequencies after {switch_at} tokens, and the keys in the cache have those "
        "of a shorter text. Prefill more tokens than that in one call with an empty cache, or stay within them."
    )


def refuse_dropping(seen: int, switch_at: int) -> None:
    """Raise if ``generate`` is about to go past ``switch_at`` tokens with a cache that has seen no more than these."""
    for frame in _callers():
        if frame.f_code.co_name == "prepare_inputs_for_generation":
            ids = frame.f_locals.get("input_ids")
            if isinstance(ids, Tensor) and seen <= switch_at < ids.shape[1]:
                raise switching_refusal(switch_at)
            return
