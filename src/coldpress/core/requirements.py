"""Requirements: what a press needs, who has it, and one sentence for where it is missing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coldpress.architecture.sharded import is_sharded
from coldpress.core.definition import as_given
from coldpress.core.press import Press, parts
from coldpress.errors import CacheError, PressError

__all__ = [
    "CHOICE",
    "OUTSIDE",
    "PRESS",
    "SCORER",
    "check_chunks",
    "check_heads",
    "check_quantisable",
    "refusal",
    "require",
    "require_block",
    "require_rerotatable",
    "require_text",
]


class Need(NamedTuple):
    """Something that wrappers, schedules or caches need of a press, in the words of :func:`refusal`."""

    what: str
    is_met: Callable[[Press], bool]
    lack: str
    instead: str


OUTSIDE = "put it outside: {inner}({field}={outer}(...))"
_BUDGET = ("compression_ratio", "budget_tokens", "budget_bytes")
_NEEDS = {
    "one_layer": Need(
        "a press that can be asked about one layer at a time",
        lambda press: not (press.needs_model or press.chooses_together),
        "chooses among the pairs of all layers",
        "use it by itself",
    ),
    "choice": Need(
        "a press that says which pairs stay, such as SnapKVPress(0.5)",
        lambda press: press.offers_choice,
        "has no budget and no scores that others could choose by",
        OUTSIDE,
    ),
    "pairs": Need(
        "pairs as the model made them", lambda press: not press.changes, "changes the pairs it keeps", OUTSIDE
    ),
    "keys": Need(
        "keys as the model made them",
        lambda press: press.changes <= {"values"},
        "changes the keys that it keeps",
        OUTSIDE,
    ),
    "channels": Need(
        "keys in all their channels",
        lambda press: "channels" not in press.changes,
        "holds keys in fewer channels",
        "use one of the two",
    ),
    "scores": Need(
        "scores that it can choose by",
        lambda press: press.offers_scores,
        "makes that choice in its own way",
        "give it a scorer such as SnapKVPress(0.5)",
    ),
    "attention": Need(
        "attention weights, which it multiplies with a norm of the values",
        lambda press: press.estimates_attention,
        "gives scores that are no attention",
        "wrap SnapKVPress, PyramidKVPress, TOVAPress, ObservedAttentionPress or "
        "ExpectedAttentionPress(use_vnorm=False), or a class of yours that says estimates_attention = True",
    ),
    "pointwise": Need(
        "scores of single tokens, because it judges each token as it comes",
        lambda press: press.pointwise,
        "scores tokens by one another or by the queries of others",
        "use KnormPress, QFilterPress, KVzapPress or a class of yours that says pointwise = True, or decoding=False",
    ),
    "queries_of_a_block": Need(
        "a press that gets by with the queries of one block",
        lambda press: not press.needs_all_queries,
        "needs those of all tokens",
        "use ChunkPress, or the press alone",
    ),
    "layers": Need(
        "to decide by itself how much each layer keeps",
        lambda press: not press.per_layer,
        "does so too",
        "use one of them, or a scorer such as SnapKVPress",
    ),
    "amount": Need(
        "to say by itself how much is kept",
        lambda press: not any(getattr(press, name, None) for name in _BUDGET),
        "has a ratio or budget",
        "leave it out",
    ),
    "again": Need(
        "a press that chooses again and again among what is left of a text",
        lambda press: press.can_rechoose,
        "chooses once, from a whole prompt",
        "use a scorer such as SnapKVPress(), or AdaKVPress around one",
    ),
    "prompt": Need(
        "a press that compresses the prompt",
        lambda press: press.at_prefill,
        "begins after it",
        "give it as decoding_press",
    ),
    "stops": Need(
        "a press that stops after the prefill",
        lambda press: not press.evicts_while_decoding,
        "goes on while decoding by itself",
        "use it alone",
    ),
    "goes_on": Need(
        "a press that goes on while decoding",
        lambda press: press.evicts_while_decoding,
        "does nothing while decoding",
        "give decoding_press=DecodingPress(...)",
    ),
    "whole_layers": Need(
        "a press that cuts back a layer at once",
        lambda press: not press.n_waiting,
        "evicts token by token",
        "use DecodingPress",
    ),
    "bytes": Need(
        "a budget in bytes, which it spends over pairs and bits",
        lambda press: getattr(press, "budget_bytes", None) is not None,
        "has none",
        "give budget_bytes, or say the bits, storage=RotatedBits(4, 4)",
    ),
    "own_heads": Need(
        "a press that looks at each head alone, because every process has some of them",
        lambda press: press.per_head_independent,
        "may need all heads of a layer at once",
        "use SnapKVPress, KnormPress or ExpectedAttentionPress, or device_map='auto' instead of tp_plan",
    ),
    "own_bytes": Need(
        "a budget that a process with some of the heads can count",
        lambda press: getattr(press, "budget_bytes", None) is None,
        "has budget_bytes, those of all heads",
        "give budget_tokens or a compression_ratio",
    ),
}
PRESS = ("one_layer", "choice")  # with a budget, and a choice of pairs
CHOICE = (*PRESS, "pairs")  # which leaves the pairs as they are
SCORER = (*CHOICE, "scores")  # with scores and nothing around them


def require(outer: object, press: object, *needs: str, instead: str = "") -> None:
    """Raise :class:`PressError` unless ``press``, and every press inside it, has what ``outer`` needs.

    Args:
        outer: a press, or a text that says what else needs it.
        needs: what is needed, as this module calls it.
        instead: what to do, where that is not what it is for most.
    """
    if not isinstance(press, Press):
        raise PressError(f"{_name(outer)} wraps a press such as SnapKVPress(0.5), got {as_given(press)}.")
    for need in needs:
        for part in parts(press):
            if not _NEEDS[need].is_met(part):
                raise PressError(refusal(outer, part, need, instead))


def refusal(outer: object, inner: Press, need: str, instead: str = "") -> str:
    """The sentence that says why ``outer`` does not go with ``inner``; see :func:`require`."""
    what, _, lack, usually = _NEEDS[need]
    advice, field = instead or usually, _field_of(inner)
    if advice == OUTSIDE and not _goes_outside(outer, inner):
        advice = "use it by itself" if field is None or need == "choice" else "use one of the two"
    names = {"outer": _name(outer), "inner": type(inner).__name__, "field": field}
    return "{outer} needs {0}, and {inner} {1}; {2}.".format(what, lack, advice.format(**names), **names)


def _field_of(press: Press) -> str | None:
    """The parameter that is the press inside, or may be; None without one."""
    inside = next((name for name, value in vars(press).items() if isinstance(value, Press)), None)
    return inside or ("press" if "press" in vars(press) else None)


def _goes_outside(outer: object, inner: Press) -> bool:
    """Whether ``inner`` can be made around ``outer``, which has refused it inside: it is tried."""
    field = _field_of(inner)
    if field is None or not isinstance(outer, Press) or _TRIAL.is_on:
        return False
    _TRIAL.is_on = True
    try:
        replace(inner, **{field: _without(outer, inner)})  # type: ignore[type-var]
    except (TypeError, ValueError):  # PressError among them
        return False
    finally:
        _TRIAL.is_on = False
    return True


def _without(press: Press, part: Press) -> Press:
    """``press`` with what is inside ``part`` in the place of that; one of several presses is left out."""
    field = _field_of(press)
    if field is None:
        for name, value in vars(press).items():
            if isinstance(value, (list, tuple)) and any(one is part for one in value):
                others: dict[str, Any] = {name: [one for one in value if one is not part]}
                return replace(press, **others)  # type: ignore[type-var]
        raise PressError(f"{type(press).__name__} has no press inside.")
    inside: Press = getattr(press, field)
    return inside if press is part else replace(press, **{field: _without(inside, part)})  # type: ignore[type-var]


class _Trial(threading.local):
    """Whether this thread tries a press out, so that what is refused then needs no advice."""

    is_on = False


_TRIAL = _Trial()


def _name(outer: object) -> str:
    return outer if isinstance(outer, str) else type(outer).__name__


def require_block(press: Press, needed: object) -> None:
    """Raise :class:`PressError` if what a press needs of the model is not there, because nothing has shown it."""
    if needed is None:
        what, how = "looks at hidden states, which a cache by itself is not shown", ""
        if press.needs_model:
            what, how = "runs the model again on the tokens of the prefill", ", with input_ids"
        elif not press.needs_hidden_states:
            what, how = "chooses when all layers are there, which a cache by itself does not know", ", with input_ids"
        raise PressError(f"{type(press).__name__} {what}: run the prefill inside 'with press(model):'{how}.")


def require_text(press: Press, given: Mapping[str, Any]) -> None:
    """Raise :class:`PressError` unless a call brings a text and nothing else: all that a second run of it is shown.

    Args:
        given: the call's arguments by name.
    """
    for name, value in given.items():
        if isinstance(value, Tensor):
            is_more = name == "position_ids" and not _in_order(value, given.get("attention_mask"))
            is_more = is_more or (name != "attention_mask" and value.is_floating_point())
        else:  # images that were encoded already
            is_more = isinstance(value, Mapping) and any(part is not None for part in value.values())
        if is_more:
            raise PressError(
                f"{type(press).__name__} runs the model on the text again and was given {name} that are more than its "
                "tokens in order, such as an image; use a press that does not, such as SnapKVPress."
            )


def _in_order(position_ids: Tensor, mask: object) -> bool:
    """Whether tokens are at consecutive positions from 0 on, with the padding of ``mask`` counted or left out."""
    at = torch.arange(position_ids.shape[-1], device=position_ids.device)
    if bool((position_ids == at).all()):
        return True
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != len(at):
        return False
    return bool(((position_ids == mask.cumsum(-1) - 1) | (mask == 0)).all())


def require_rerotatable(press: Press) -> None:
    """Raise :class:`PressError` unless a cache can move up the keys that ``press`` keeps."""
    outer = "positions='rerotate', which moves keys up whenever a layer is cut back,"
    instead = "leave positions out, or use a scorer or DecodingPress around one"
    require(outer, press, "keys", "one_layer", "whole_layers", instead=instead)


def check_heads(press: Press, module: nn.Module, n_heads: int) -> None:
    """Raise :class:`PressError` if ``module`` has but some of the heads and ``press`` may need them all."""
    if is_sharded(module, n_heads):
        require("tensor parallelism", press, "own_heads", "own_bytes")


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
    if press is None or press.chooses_again:
        return
    if not press.at_prefill:
        instead = (
            "PrefillDecodingPress(SnapKVPress(0.5), {inner}(...)), with None in the first place to keep the prompt"
        )
        raise PressError(refusal("chunk_tokens", press, "prompt", f"give {instead} whole, or leave chunk_tokens out"))
    instead = "leave chunk_tokens out, or take a scorer such as SnapKVPress(0.5), or AdaKVPress around one"
    raise PressError(refusal("chunk_tokens", press, "again", instead))


def check_quantisable(
    press: Press | None, kv_bits: object, rerotates: bool = False, chunk_tokens: int | None = None
) -> None:
    """Raise :class:`CacheError` if what ``press`` keeps cannot be stored in few bits.

    Args:
        kv_bits: how pairs are stored; None: as they are.
        rerotates: keys move up whenever pairs are evicted.
        chunk_tokens: that a prompt comes in at most at once; None: all.
    """
    chooses = bool(getattr(kv_bits, "chooses", False))
    if chooses and (rerotates or chunk_tokens is not None):
        given = "positions='rerotate'" if rerotates else "chunk_tokens"
        raise CacheError(
            f"storage=Mixed() compares what is stored with a whole prompt as the model read it, and not with {given}: "
            "leave that out, or say the bits, storage=RotatedBits(4, 4)."
        )
    if press is None or kv_bits is None:
        return
    if chooses:
        _check_mixed(press)
    if press.evicts_while_decoding and not getattr(kv_bits, "evictable", False):
        why = (
            "groups of tokens cannot be taken apart without quantising them again: give kv_bits k8v4 or "
            "k4v4, which are RotatedBits(8, 4) and (4, 4) and encode pairs one by one, another press, or no kv_bits"
        )
        raise CacheError(refusal("kv_bits", press, "stops", why))
    if press.evicts_while_decoding and rerotates:
        why = "keys in few bits would be quantised again whenever they move: leave positions out, or store them whole"
        raise CacheError(refusal("positions='rerotate' with few bits", press, "stops", why))
    for part in parts(press):
        if "channels" in part.changes:
            raise CacheError(refusal("kv_bits", part, "channels"))


def _check_mixed(press: Press) -> None:
    """Raise :class:`CacheError` unless ``press`` has a budget in bytes that Mixed can spend when a prompt was read."""
    outer, instead = "storage=Mixed()", "say the bits, storage=RotatedBits(4, 4)"
    for part in parts(press):
        plans = part.per_layer and not (part.needs_model or part.chooses_together)
        for need in ("stops", "keys", *(["layers"] if plans else [])):
            if not _NEEDS[need].is_met(part):
                raise CacheError(refusal(outer, part, need, instead))
    if all(getattr(part, "budget_bytes", None) is None for part in parts(press)):
        raise CacheError(refusal(outer, press, "bytes"))
