"""The caches that take turns, filled by one prefill."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu.shapes import Sizes, decode_ms, text
from transformers import DynamicCache

from coldpress import AdaKVPress, PressedCache, RotatedBits, SnapKVPress, compiled, use_coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.press import Press
from coldpress.stores.codec import Codec

__all__ = ["Turn", "filled", "freed", "run_on", "turns_of", "ways"]


@dataclass
class Turn:
    """A cache and how it is decoded from.

    Attributes:
        n_seen: tokens before the first new one.
        is_compiled: in a ``compiled()`` block.
    """

    cache: Any
    n_seen: int
    is_compiled: bool = False
    n_rows: int = 1
    compile_s: float = 0.0  # of the last sample

    def ms(self, model: Any, n_new: int) -> list[float]:
        """Milliseconds of each token."""
        is_ours = isinstance(self.cache, PressedCache)
        run_on(model, "coldpress" if is_ours else "sdpa")
        name = next(iter(cache_argument(self.cache)))
        if not self.is_compiled:
            return decode_ms(model, self.cache, name, self.n_seen, n_new, self.n_rows)
        with compiled(model, new_tokens=64, tell=None) as done:
            found = decode_ms(model, self.cache, name, self.n_seen, n_new, self.n_rows)
        self.compile_s = round(done.compile_s, 1)
        return found

    @property
    def kv_bytes(self) -> int:
        if isinstance(self.cache, PressedCache):
            return self.cache.kv_bytes()
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def run_on(model: Any, implementation: str) -> None:
    if model.config._attn_implementation != implementation:
        if implementation == "coldpress":
            use_coldpress(model)
        else:
            model.set_attn_implementation(implementation)


def ways(sizes: Sizes) -> dict[str, tuple[Press | None, Codec | None]]:
    """Press and storage of each cache but transformers' own."""
    snap, newest = SnapKVPress(0.5, window_size=sizes.window), 2 * sizes.window
    return {
        "no press": (None, None),
        "SnapKV 0.5": (snap, None),
        "AdaKV 0.5": (AdaKVPress(snap), None),
        "k8v4": (None, RotatedBits(8, 4, newest=newest)),
        "SnapKV 0.5, k4v4": (snap, RotatedBits(4, 4, newest=newest)),
    }


def filled(model: Any, sizes: Sizes, n_tokens: int, names: list[str]) -> dict[str, PressedCache]:
    """Caches of one text, by one prefill."""
    run_on(model, "coldpress")
    full, chosen = PressedCache(), ways(sizes)
    others = [name for name in names if name != "no press"]
    branches = full.branches([chosen[name][0] for name in others], [chosen[name][1] for name in others])
    with torch.inference_mode():
        model.base_model(text(1, n_tokens, model), **cache_argument(full))
    return {"no press": full, **dict(zip(others, branches, strict=True))}


def turns_of(model: Any, sizes: Sizes, n_tokens: int) -> dict[str, Turn]:
    """Every cache, transformers' own with all pairs among them."""
    found = {name: Turn(cache, n_tokens) for name, cache in filled(model, sizes, n_tokens, list(ways(sizes))).items()}
    own = DynamicCache()
    for layer in found["no press"].cache.pressed_layers():
        own.update(layer.keys.clone(), layer.values.clone(), layer.index)
    return {"DynamicCache": Turn(own, n_tokens)} | found


@contextmanager
def freed() -> Iterator[None]:
    """What the block leaves behind is given back to the device before what comes next."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
