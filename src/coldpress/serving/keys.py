"""Keys of snapshots: what of a model, its tokenizer and a prefix decides the numbers in one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.identity import model_facts
from coldpress.cache.pins import Pins
from coldpress.core.data import as_data
from coldpress.core.press import Press
from coldpress.errors import PressError
from coldpress.stores.codec import Codec
from coldpress.version import VERSION

__all__ = ["key_of", "origin_of", "seed_of"]

_FORMAT = 1  # goes up when the same key would mean other numbers
_OF_CALLS = ("truncation", "padding")  # what calls of a tokenizer leave behind in it


def origin_of(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """The parts of a key that a model and its tokenizer give, in the types of JSON.

    Weights, sizes, rotary parameters and dtype; vocabulary, merges and chat template; the version of coldpress. Names
    and folders do not count.
    """
    facts = model_facts(model)
    return {
        "format": _FORMAT,
        "coldpress": VERSION,
        "model": {name: facts[name] for name in ("weights", "sizes", "kind", "dtype")},
        "tokenizer": None if tokenizer is None else _digest(_tokenizer(tokenizer)),
    }


def key_of(
    origin: dict[str, Any],
    ids: Sequence[int],
    press: Press | None,
    kv_bits: Codec | None,
    chunk_tokens: int | None,
    pins: Pins,
) -> str:
    """The key of a prefix under a press: 32 hexadecimal digits.

    Args:
        origin: of :func:`origin_of`.
        ids: of the prefix.
    """
    said = {
        **origin,
        "ids": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
        "press": None if press is None else _press(press),
        "kv_bits": None if kv_bits is None else kv_bits.described(),
        "chunk_tokens": chunk_tokens,
        "pins": pins,
    }
    return _digest(said)[:32]


def seed_of(key: str) -> int:
    """What a snapshot's press draws numbers by, so that it draws them again when the snapshot is made again.

    A file of a cache says it, and so which snapshot's pairs it holds.
    """
    return int(key[:15], 16)


def _press(press: Press) -> Any:
    try:
        return as_data(press)
    except PressError:  # it has a parameter that JSON has no type for
        return repr(press)


def _tokenizer(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = {name: part for name, part in json.loads(backend.to_str()).items() if name not in _OF_CALLS}
    return [type(tokenizer).__name__, rules, str(getattr(tokenizer, "chat_template", None)), tokenizer.bos_token]


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
