"""Presses that a name and a ratio alone do not make: without a ratio, or with numbers taken from a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from tests.contract.architectures import Look, tiny, tokens
from tests.presses.words import Words
from transformers import PreTrainedModel

from coldpress import (
    BasePress,
    DMSPress,
    DuoAttentionPress,
    KnormPress,
    LagKVPress,
    LUKVPress,
    PressedCache,
    QualityPress,
    SimLayerKVPress,
    SnapKVPress,
    ThinKPress,
    make_press,
    press_names,
)
from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.registry import parameters_of
from coldpress.core.press import parts


def duo(n_layers: int, n_heads: int) -> DuoAttentionPress:
    """Heads of different lengths in the same layer, if there are several."""
    gates = [[(3 * i + 2 * j) % 5 / 5 for j in range(n_heads)] for i in range(n_layers)]
    return DuoAttentionPress(0.6, pattern=gates, sink_size=2, recent_size=9)


def lukv(n_layers: int, n_heads: int) -> LUKVPress:
    """Heads and layers lean to more or less than the ratio."""
    leans = [[(3 * i + 2 * j) % 5 / 5 - 0.4 for j in range(n_heads)] for i in range(n_layers)]
    curves = [[[r + lean * r * (1 - r) for lean in layer] for layer in leans] for r in (p / 100 for p in range(1, 100))]
    return LUKVPress(KnormPress(0.5), curves=curves)


# name -> a press that compresses some 40 tokens, made for so many compressed layers and KV heads
OTHERS: dict[str, Callable[[int, int], BasePress]] = {
    "dms_lagkv": lambda n_layers, n_heads: DMSPress(LagKVPress(lag_size=5), threshold=0.5, sliding_window_size=8),
    "duo_attention": lambda n_layers, n_heads: duo(n_layers, n_heads),
    "lukv": lambda n_layers, n_heads: lukv(n_layers, n_heads),
    "quality": lambda n_layers, n_heads: QualityPress(SnapKVPress(window_size=8), threshold=0.4),
    "think": lambda n_layers, n_heads: ThinKPress(0.5, 8, press=KnormPress(0.3)),
    "simlayerkv": lambda n_layers, n_heads: SimLayerKVPress(0.0, n_recent=12, n_initial=3),
}


def waits_for_a_block(press: BasePress) -> bool:
    """Whether it needs ``with press(model):`` around the prefill."""
    return press.needs_model or press.needs_hidden_states or press.chooses_together


# with a ratio, but they are shown more of the model than a cache sees, inside 'with press(model):'
IN_BLOCK = [
    name
    for name in press_names(has_ratio=True, at_prefill=True)
    if any(map(waits_for_a_block, parts(make_press(name, 0.5))))  # type: ignore[arg-type]
]

# a name and a ratio are all they need; the tests make up what calibrated ones look up
WITH_RATIO = [name for name in press_names(has_ratio=True, at_prefill=True) if name not in (*OTHERS, *IN_BLOCK)]


SMALL = {
    "window_size": 8, "chunk_length": 10, "block_size": 10, "lag_size": 5, "chunk_size": 10, "sketch_dimension": 6,
    "grace": 8, "n_recent": 8, "n_queries": 16,
}  # fmt: skip


def small_press(name: str, model: str) -> BasePress:
    """The press of any registered name, which removes some of 40 tokens of the tiny model ``model``."""
    return other_press(name, model) if name in OTHERS else press_of(name, 0.5)


def press_of(name: str, ratio: float) -> BasePress:
    """Small enough for some 40 tokens, and with a seed."""
    given: dict[str, Any] = {k: v for k, v in SMALL.items() if k in parameters_of(name)}
    if "seed" in parameters_of(name):
        given["seed"] = 0
    if ratio == 0 and "key_channel_compression_ratio" in parameters_of(name):  # channels are no pairs
        given["key_channel_compression_ratio"] = 0.0
    press = make_press(name, ratio, **given)
    assert press is not None
    return press


def block(model: PreTrainedModel, press: BasePress) -> AbstractContextManager[Any]:
    """``with press(model):`` for presses that need it, with a tokenizer for those that ask for one."""
    return press.prepared(model, Words())(model) if waits_for_a_block(press) else nullcontext()


@cache
def other_press(name: str, model: str) -> BasePress:
    """The press called ``name`` for the tiny model ``model``."""
    look = Look()
    tiny(model)(tokens(1, 5), **cache_argument(PressedCache(look)))
    return OTHERS[name](look.views[0].n_layers, look.views[0].keys.shape[1])
