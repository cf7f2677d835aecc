"""Phase: where in its life a layer is, as the calls of a model take it there.

::

    EMPTY ──► PROMPT ──────────────► LATER     the whole prompt in one call
      │
      ├────► PIECE ──► LAST_PIECE ─► LATER     a prompt in pieces of chunk_tokens
      │        └─ PIECE ... ┘
      └────► SHORT_PROMPT ─────────► LATER     in pieces, and the first call had fewer tokens than one
"""

from __future__ import annotations

from enum import Enum, auto

from coldpress.errors import CacheError

__all__ = ["Phase", "check_piece", "phase_after"]


class Phase(Enum):
    """The kind of the latest call of a layer."""

    EMPTY = auto()  # there was none
    PROMPT = auto()
    PIECE = auto()
    LAST_PIECE = auto()
    SHORT_PROMPT = auto()  # taken for the whole prompt
    LATER = auto()  # a token of the answer, or a later turn

    @property
    def is_prefill(self) -> bool:
        """Whether the call brought tokens of the prompt."""
        return self not in (Phase.EMPTY, Phase.LATER)

    @property
    def is_whole(self) -> bool:
        """Whether all of the prompt is there."""
        return self not in (Phase.EMPTY, Phase.PIECE)


def phase_after(phase: Phase, n_new: int, seen: int, chunk_tokens: int | None, prefill_end: int | None) -> Phase:
    """The phase of a call that brings ``n_new`` tokens.

    A prompt comes in one call, unless the cache has ``chunk_tokens``. Then :func:`coldpress.prefill` says where it
    ends; where another caller feeds it (``generate(prefill_chunk_size=...)``), it goes on while calls bring
    ``chunk_tokens`` tokens, a call with fewer is its last piece, and a single token is generated, or stored as one.
    What this cannot be right for is refused (:func:`check_piece`).

    Args:
        phase: of the call before.
        n_new: tokens of the call.
        seen: tokens seen, these included.
        chunk_tokens: of the cache.
        prefill_end: length of the prompt, where it is known.
    """
    is_first = phase is Phase.EMPTY
    if chunk_tokens is None:
        return Phase.PROMPT if is_first else Phase.LATER
    if not (is_first or (phase is Phase.PIECE and (prefill_end is not None or n_new > 1))):
        return Phase.LATER
    is_last = n_new < chunk_tokens if prefill_end is None else seen >= prefill_end
    if not is_last:
        return Phase.PIECE
    return Phase.SHORT_PROMPT if is_first and prefill_end is None else Phase.LAST_PIECE


def check_piece(phase: Phase, n_new: int, seen: int, chunk_tokens: int, may_guess: bool) -> None:
    """Raise :class:`CacheError` if a call is no piece of a prompt, or may be none.

    Args:
        phase: of the call before.
        n_new: tokens of the call.
        seen: tokens seen before it.
        chunk_tokens: of the cache.
        may_guess: nothing depends on where the prompt ends, or it is known.
    """
    if not phase.is_whole and n_new > chunk_tokens:
        raise CacheError(
            f"This PressedCache has chunk_tokens={chunk_tokens} and was given {n_new} tokens in one call, "
            "which cannot be cut up from inside the model. Run the prompt by coldpress.prefill(model, input_ids, "
            f"cache), or by generate(..., prefill_chunk_size={chunk_tokens})."
        )
    if may_guess:
        return
    if phase is Phase.EMPTY and n_new == 1:
        raise CacheError(
            f"This PressedCache has chunk_tokens={chunk_tokens} and was given a single token first, so it cannot tell "
            "where the prompt ends. Run the prompt by coldpress.prefill(model, input_ids, cache), or by "
            f"generate(..., prefill_chunk_size={max(2, chunk_tokens)}) with as many chunk_tokens."
        )
    if phase is Phase.SHORT_PROMPT and n_new > 1:
        raise CacheError(
            f"This PressedCache has chunk_tokens={chunk_tokens} and took a first call of {seen} tokens for the "
            f"whole prompt, and {n_new} more came right after it, so it cannot tell where the prompt ends. Bring "
            f"pieces of {chunk_tokens} tokens, or run the prompt by coldpress.prefill(model, input_ids, cache); then a "
            "question may follow."
        )
