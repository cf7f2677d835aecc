"""Presses that a name and a ratio alone do not make: without a ratio, or with numbers taken from a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tests.contract.architectures import Look, tiny, tokens

from coldpress import (
    BasePress,
    DMSPress,
    DuoAttentionPress,
    KnormPress,
    LagKVPress,
    LUKVPress,
    PressedCache,
    SimLayerKVPress,
    ThinKPress,
    make_press,
    press_names,
)
from coldpress.presses.base import parts


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
    "think": lambda n_layers, n_heads: ThinKPress(0.5, 8, press=KnormPress(0.3)),
    "simlayerkv": lambda n_layers, n_heads: SimLayerKVPress(0.0, n_recent=12, n_initial=3),
}

# with a ratio, but they are shown more of the model than a cache sees, inside 'with press(model):'
IN_BLOCK = [
    name
    for name in press_names(has_ratio=True, at_prefill=True)
    if any(p.needs_model or p.needs_hidden_states for p in parts(make_press(name, 0.5)))  # type: ignore[arg-type]
]

# a name and a ratio are all they need; the tests make up what calibrated ones look up
WITH_RATIO = [name for name in press_names(has_ratio=True, at_prefill=True) if name not in (*OTHERS, *IN_BLOCK)]


@cache
def other_press(name: str, model: str) -> BasePress:
    """The press called ``name`` for the tiny model ``model``."""
    look = Look()
    tiny(model)(tokens(1, 5), past_key_values=PressedCache(look))
    return OTHERS[name](look.views[0].n_layers, look.views[0].keys.shape[1])
