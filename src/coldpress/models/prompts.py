"""A prompt in pieces: :func:`prefill` feeds them, and each layer of the cache is cut back after every one.

What a layer does after a piece is in ``cache/eviction.py``; whether it is asked to, the cache says (``chunk_tokens``).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rope import stand_at
from coldpress.errors import CacheError, InputError

if TYPE_CHECKING:
    from coldpress.cache.pressed import PressedCache

__all__ = ["pieces", "prefill"]


def pieces(n_tokens: int, chunk_tokens: int | None) -> list[tuple[int, int]]:
    """Where a prompt is cut: first token of each piece, and of what follows; one piece without ``chunk_tokens``.

    Counted from the end, so that what is left over comes first: rows of a batch that are padded on the left are then
    cut where they would be cut alone, and the last piece, whose queries judge which pairs are kept, is a whole one.
    """
    if chunk_tokens is None or n_tokens <= chunk_tokens:
        return [(0, n_tokens)]
    stops = range(n_tokens % chunk_tokens or chunk_tokens, n_tokens + 1, chunk_tokens)
    return [(max(0, stop - chunk_tokens), stop) for stop in stops]


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Tensor,
    cache: PressedCache,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Run a prompt through ``model`` in pieces of ``cache.chunk_tokens``, and compress ``cache`` after each of them.

    ::

        cache = PressedCache(KeyDiffPress(budget_tokens=2048), chunk_tokens=512)
        coldpress.prefill(model, ids[:, :-1], cache)
        model.generate(ids, cache=cache, max_new_tokens=50)

    After the last piece the cache is within the budget of the whole prompt. A cache without ``chunk_tokens`` gets the
    prompt in one call. Gradients are not kept. Rows that are padded on the left keep what they would keep alone;
    padding on the right shifts where a row is cut.

    Args:
        model: on coldpress's backend, with its head or without (``model.base_model``): no piece needs logits.
        input_ids: int64 ``[B, T]``.
        cache: empty.
        attention_mask: ``[B, T]``, 0 where a token is padding; None if there is none.
        options: of the model's forward, the same for every piece.

    Returns:
        What the model returns for the last piece, with the logits of its last token if it has a head.

    Raises:
        CacheError: the cache stores tokens already.
        InputError: the prompt has no tokens, or the mask has another shape or hides all of them.
    """
    if cache.seen_tokens:
        raise CacheError("prefill() needs an empty cache; reset() it, or call the model itself to add a later turn.")
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise InputError(f"prefill() needs token ids [rows, tokens], at least one; got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}."
        )
    if attention_mask is not None and not attention_mask.any():
        raise InputError("attention_mask hides all tokens of the prompt; give 1 where a token is one of the text.")
    takes = inspect.signature(model.forward).parameters
    if "logits_to_keep" in takes:
        options = {"logits_to_keep": 1, **options}
    position_ids = options.pop("position_ids", None)
    if position_ids is None and attention_mask is not None and "position_ids" in takes and not attention_mask.all():
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # as generate has them
    stand_at(model, 0)
    session, output = cache.session, None
    session.prefill_end = input_ids.shape[1]
    try:
        for start, stop in pieces(input_ids.shape[1], cache.chunk_tokens):
            if attention_mask is not None:
                options["attention_mask"] = attention_mask[:, :stop]
            if position_ids is not None:
                options["position_ids"] = position_ids[:, start:stop]
            output = None  # its logits are not needed while the next ones are made
            output = model(
                input_ids=input_ids[:, start:stop], **cache_argument(cache, model), use_cache=True, **options
            )
    finally:
        session.prefill_end = None
    session.check_claimed()
    cache.remember(input_ids)
    return output
