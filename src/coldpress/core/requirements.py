"""What does not go together, in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coldpress.architecture.sharded import is_sharded
from coldpress.core.press import Press, parts
from coldpress.errors import CacheError, PressError

__all__ = [
    "check_chunks",
    "check_heads",
    "check_quantisable",
    "require_block",
    "require_rerotatable",
    "require_text",
]


def require_block(press: Press, needed: object) -> None:
    """Raise :class:`PressError` if what a press needs of the model is not there, because nothing has shown it."""
    if needed is None:
        what, how = "looks at hidden states, which a cache by itself is not shown", ""
        if press.needs_model:
            what, how = "runs the model again on the tokens of the prefill", ", with input_ids"
        raise PressError(f"{type(press).__name__} {what}: run the prefill inside 'with press(model):'{how}.")


def require_text(press: Press, given: Mapping[str, Any]) -> None:
    """Raise :class:`PressError` unless a call brings a text and nothing else: all that a second run of it is shown.

    Args:
        given: the call's arguments by name.
    """
    for name, value in given.items():
        if isinstance(value, Tensor):
            at = torch.arange(value.shape[-1], device=value.device) if name == "position_ids" else value
            is_more = bool((value != at).any()) or (name != "attention_mask" and value.is_floating_point())
        else:  # images that were encoded already
            is_more = isinstance(value, Mapping) and any(part is not None for part in value.values())
        if is_more:
            raise PressError(
                f"{type(press).__name__} runs the model on the text again and was given {name} that are more than its "
                "tokens in order, such as an image; use a press that does not, such as SnapKVPress."
            )


def require_rerotatable(press: Press) -> None:
    """Raise :class:`PressError` unless a cache can move up the keys that ``press`` keeps."""
    for part in parts(press):
        name = type(part).__name__
        if not part.leaves_keys:
            why = f"{name} changes the keys that it keeps"
        elif part.needs_model or part.chooses_together:
            why = f"{name} chooses among the pairs of all layers when the prefill is over"
        elif part.n_waiting:
            why = f"{name} evicts token by token"
        else:
            continue
        raise PressError(
            f"positions='rerotate' moves keys up whenever a layer is cut back, and {why}; leave positions out, or use "
            "a scorer or DecodingPress around one."
        )


def check_heads(press: Press, module: nn.Module, n_heads: int) -> None:
    """Raise :class:`PressError` if ``module`` has but some of the heads and ``press`` may need them all."""
    if not is_sharded(module, n_heads):
        return
    for part in parts(press):
        if not vars(type(part)).get("per_head_independent"):  # a subclass may do something else
            raise PressError(
                f"{type(part).__name__} may need all heads of a layer at once, and under tensor parallelism every "
                "process has some of them; use a press that looks at each head alone, such as SnapKVPress, KnormPress "
                "or ExpectedAttentionPress, or device_map='auto' instead of tp_plan."
            )
        if getattr(part, "budget_bytes", None) is not None:
            raise PressError(
                "budget_bytes counts the bytes of all heads, and under tensor parallelism every process has some of "
                "them; give budget_tokens or a compression_ratio."
            )


def check_chunks(press: Press | None, chunk_tokens: int | None) -> None:
    """Raise unless a prompt can come in pieces of ``chunk_tokens`` under ``press``.

    Raises:
        CacheError: ``chunk_tokens`` is not an integer of at least 1.
        PressError: the press chooses once, from a whole prompt.
    """
    if chunk_tokens is None:
        return
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise CacheError(f"chunk_tokens must be an integer >= 1, got {chunk_tokens!r}.")
    if press is not None and not press.at_prefill:
        name = type(press).__name__
        raise PressError(
            f"With chunk_tokens a prompt is cut back piece by piece, and {name} begins after it; give "
            f"PrefillDecodingPress(SnapKVPress(0.5), {name}(...)), with None in the first place to keep the prompt "
            "whole, or leave chunk_tokens out."
        )
    if press is not None and not press.chooses_again:
        raise PressError(
            f"With chunk_tokens a press chooses again and again among what is left of a prompt, and {press!r} cannot; "
            "leave chunk_tokens out, or take a scorer such as SnapKVPress(0.5), or AdaKVPress around one."
        )


def check_quantisable(press: Press | None, kv_bits: object) -> None:
    """Raise :class:`CacheError` if what ``press`` keeps cannot be held in few bits."""
    if press is None or kv_bits is None:
        return
    if press.evicts_while_decoding:
        raise CacheError(
            f"{type(press).__name__} evicts pairs while decoding, and kv_bits holds keys in groups of tokens that "
            "cannot be taken apart without quantising them again; use a press that stops after the prefill, or no "
            "kv_bits."
        )
    if any(getattr(part, "key_channel_compression_ratio", 0) for part in parts(press)):
        raise CacheError(
            f"{type(press).__name__} holds keys in fewer channels and kv_bits in fewer bits; both at once are not "
            "supported: use one of them."
        )
