"""A step: the forward of a model for one token of each row, over parts of layers; what torch.compile is given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from coldpress.models.columns import OneRow
from coldpress.models.compiling import inductor
from coldpress.stores.parts import Part, Sight

__all__ = ["CURRENT", "Seen", "StepCache", "Steps"]


class Seen(NamedTuple):
    """What an attention function was told in a step, for a press that goes on."""

    query: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    sliding_window: int | None


class StepCache(Cache):
    """A cache to the model: it writes one pair per head and returns whole buffers."""

    def __init__(self, parts: list[Part], sights: list[Sight], is_watched: bool):
        self.layers: list[Any] = []
        self.parts, self.sights, self.is_watched = parts, sights, is_watched
        self.seen: dict[int, Seen] = {}  # by layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.parts[layer_idx].write(key_states, value_states)

    def get_seq_length(self, *args: Any) -> int:
        return 0  # not needed: positions and mask are given

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return 1, 0


class _Current:
    """What the attention function finds the step's cache by; set and unset within the step alone."""

    cache: StepCache | None = None


CURRENT = _Current()
_NUMBERS = itertools.count()


def _step(
    model: PreTrainedModel,
    forward: Any,
    ids: Tensor,
    position: Tensor,
    parts: list[Part],
    sights: list[Sight],
    is_watched: bool,
    n_parts: int,
    cache_name: str,
) -> tuple[Tensor, dict[int, Seen]]:
    """Logits ``[B, 1, V]`` of one token a row; its pairs are in every layer's buffers afterwards.

    The mask is one that transformers hands through and that no other call has, by which the attention function knows a
    step. Which slots a layer hides, its part and its sight say.
    """
    cache = StepCache(parts, sights, is_watched)
    CURRENT.cache = cache
    with OneRow(n_parts):
        output = forward(
            input_ids=ids,
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=ids.device),
            position_ids=position,
            use_cache=True,
            **{cache_name: cache},
        )
    CURRENT.cache = None
    return output.logits, cache.seen


class Steps:
    """The compiled steps over layers of the same kinds, one for each way in which the model is called.

    torch keeps eight forms of each function. What has differed between calls of functions of one name and place in a
    file it takes for a variable: the heads of two models, or the buffers of two kinds of layers. So the functions have
    a name of their own, which is that of all ways.
    """

    def __init__(self) -> None:
        self._name = f"_step_{next(_NUMBERS)}"
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def has(self, way: Any) -> bool:
        """Whether there is a step for a way: grad mode, dtype and the like, each of which is a form by itself."""
        return way in self._compiled

    def run(self, way: Any, *given: Any) -> tuple[Tensor, dict[int, Seen]]:
        """A step. Where torch would keep no more forms of it, those that there are go, and others are compiled."""
        if way in self._compiled:
            try:
                return self._compiled[way](*given)
            except Exception as error:  # before anything was written
                if not type(error).__name__.endswith("LimitHit"):
                    raise
        code: CodeType = _step.__code__
        function = FunctionType(code.replace(co_name=self._name), _step.__globals__, self._name)
        self._compiled[way] = torch.compile(function, fullgraph=True, backend=inductor)
        return self._compiled[way](*given)
