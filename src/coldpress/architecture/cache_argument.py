"""The name of the cache in calls and outputs of transformers: ``cache`` from 5.24 on, ``past_key_values`` before it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["NAMES", "argument_name", "cache_argument", "cache_of", "given_cache"]

NAMES = ("cache", "past_key_values")  # the newest first


def cache_argument(cache: Any, model: Any = None) -> dict[str, Any]:
    """The keyword argument that hands ``cache`` to a model: ``model(ids, **cache_argument(cache))``.

    Args:
        cache: any cache.
        model: what is called, whose ``forward`` says how it names the argument; None: a model of this transformers,
            and ``generate``.
    """
    return {argument_name(None if model is None else model.forward): cache}


def argument_name(function: Callable[..., Any] | None = None) -> str:
    """The name of the argument in ``function``; that of this transformers if it takes any keyword, or is not given."""
    return _name(getattr(function, "__func__", function))


@functools.lru_cache(maxsize=256)
def _name(function: Callable[..., Any] | None) -> str:
    if function is None:
        from transformers import GenerationMixin

        function = GenerationMixin.prepare_inputs_for_generation
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None) or _name(None)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, under either name; None without one."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or in that of ``generate(..., return_dict_in_generate=True)``."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
