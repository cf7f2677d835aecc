"""The options of the pipeline "kv-press-text-generation": which there are, and which a compressed context rules out."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers import GenerationConfig, QuantizedCache

from coldpress.cache.pins import checked_pins
from coldpress.cache.pressed import PressedCache
from coldpress.core.definition import as_given
from coldpress.core.press import Press
from coldpress.errors import CacheError, InputError, PressError, nearest
from coldpress.stores.bits import BITS, storage_of

__all__ = ["OWN", "check_config", "check_options"]

OWN = (
    "question",
    "questions",
    "answer_prefix",
    "press",
    "max_new_tokens",
    "max_context_length",
    "enable_thinking",
    "cache",
    "kv_bits",
    "pin",
    "pin_system",
)
_PASSED_ON = ("streamer", "generation_config", "stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn")
_GUESSING = ("prompt_lookup_num_tokens", "assistant_early_exit")
_REFUSED = {
    "use_cache": "the context is in a cache",
    "cache_implementation": "the cache is a PressedCache; give your own with cache=, or kv_bits= for a quantised one",
    "cache_config": "the cache is a PressedCache; give your own with cache=, or kv_bits= for a quantised one",
    "num_return_sequences": "each question has one answer",
    "max_length": "it would count the context; give max_new_tokens",
    "min_length": "it would count the context; give min_new_tokens",
    "prompt_lookup_num_tokens": "transformers 5 gets assisted decoding from a filled cache wrong, whatever the cache",
    "assistant_early_exit": "transformers 5 gets assisted decoding from a filled cache wrong, whatever the cache",
}


def check_config(config: Any, own: Any) -> None:
    """Refuse in a GenerationConfig what is refused as an option, and in the model's own what changes answers.

    Args:
        config: given by the caller, or None.
        own: the model's; what it says otherwise does not count.
    """
    default, own_value = GenerationConfig(), lambda name: getattr(own, name, None)
    for name, reason in _REFUSED.items():
        value = own_value(name) if config is None else getattr(config, name, None)
        usual = [None, getattr(default, name, None), *([] if name in _GUESSING else [own_value(name)])]
        if value not in usual:
            where = "the model's generation_config" if config is None else "generation_config"
            raise InputError(f"kv-press-text-generation does not take {name}={value!r} in {where}: {reason}.")


def check_options(options: dict[str, Any]) -> None:
    """Refuse unknown options, and values and combinations that are invalid, before the context is read."""
    allowed = [name for name in (*OWN, *_PASSED_ON, *_generation_options()) if name not in _REFUSED]
    for name in options:
        if name in _REFUSED:
            raise InputError(f"kv-press-text-generation does not take {name}: {_REFUSED[name]}.")
        if name not in allowed:
            raise InputError(f"Unknown option {name!r} of kv-press-text-generation.{nearest(name, allowed)}")
    question, questions, press = options.get("question"), options.get("questions"), options.get("press")
    if question is not None and questions is not None:
        raise InputError("Give question or questions, not both.")
    if not isinstance(question, (str, type(None))):
        raise InputError(f"question must be a text, got {question!r}; for several use questions=.")
    if questions is not None and not (
        isinstance(questions, (list, tuple)) and all(isinstance(text, str) for text in questions)
    ):
        raise InputError(f"questions must be a list of texts, got {questions!r}; for a single one use question=.")
    if press is not None and not isinstance(press, Press):
        raise PressError(f"press must be a press such as coldpress.SnapKVPress(0.5), got {as_given(press)}.")
    cache, kv_bits = options.get("cache"), storage_of(options.get("kv_bits"))
    if not isinstance(cache, (PressedCache, type(None))):
        raise CacheError(f"cache must be a coldpress.PressedCache, not {type(cache).__name__}.{_instead_of(cache)}")
    if cache is not None and kv_bits not in (None, cache.storage):
        raise CacheError(
            "The cache says how its pairs are stored: give kv_bits to the PressedCache, or leave cache= out."
        )
    pin, system = options.get("pin"), options.get("pin_system")
    if len(checked_pins(pin)) > 1:
        raise InputError(f"A context is one row: give pin spans of its tokens, [(0, 40), (100, 120)]; got {pin!r}.")
    if pin is not None and cache is not None:
        raise CacheError("The cache says what is pinned: give pin to the PressedCache, or leave cache= out.")
    if system is not None and not (isinstance(system, str) and system.strip()):
        raise InputError(f"pin_system must be a text, the system prompt; got {system!r}.")
    if system is not None and cache is not None and cache.seen_tokens:
        raise CacheError("The cache stores a context already, so no system prompt can come before it.")
    if system is not None and cache is not None and len(cache.session.pins) > 1:
        raise CacheError("The cache has pins for several rows, and a context is one; give spans for one row.")
    for name in ("max_new_tokens", "max_context_length"):
        value = options.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be an integer of at least 1, got {value!r}.")


def _instead_of(cache: Any) -> str:
    """Advice what to give instead of a quantised cache of transformers, with its bits and groups."""
    if not isinstance(cache, QuantizedCache):
        return ""
    layer = next(iter(getattr(cache, "layers", ())), None)
    bits, size, newest = (getattr(layer, name, None) for name in ("nbits", "q_group_size", "residual_length"))
    if bits not in BITS:
        return (
            " To store what is kept in few bits, give kv_bits=4 (or 8, or 2) instead; the press scores full precision."
        )
    return (
        f" Give kv_bits=coldpress.KVBits({bits}, group_size={size}, residual_tokens={newest}) instead: the press "
        "scores pairs as they are, and what it keeps is quantised once."
    )


@functools.cache
def _generation_options() -> tuple[str, ...]:
    """The options of ``generate`` that transformers knows."""
    names = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]
    return (
        *names,
        *(n for n in inspect.signature(GenerationConfig.__init__).parameters if n not in ("self", "kwargs")),
    )
