"""What the model reads: prefixes that are compressed, and what comes after them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.offloaded import device_of
from coldpress.architecture.rope import stand_at
from coldpress.cache.joined import JoinedCache
from coldpress.cache.pressed import PressedCache
from coldpress.models.block import prefilling
from coldpress.models.prompts import prefill

__all__ = ["compressed", "run", "run_together"]


def compressed(model: PreTrainedModel, tokenizer: Any, ids: Sequence[int], cache: PressedCache) -> None:
    """Read a prefix into an empty cache, whose press compresses it. Raises what goes wrong in the press."""
    given = torch.tensor([list(ids)], device=device_of(model) or model.device)
    backbone: Any = getattr(model, model.base_model_prefix, model)
    if cache.press is not None:
        cache.session.press = cache.press.prepared(model, tokenizer)
    with prefilling(model, cache):
        prefill(backbone, given, cache)
    cache.session.check_claimed()


@torch.no_grad()
def run(model: PreTrainedModel, cache: PressedCache, ids: Sequence[int], has_all: bool = False) -> Tensor:
    """Read ``ids`` after what ``cache`` has seen: float32 logits ``[Q or 1, V]``, after all of them or the last one."""
    called: Any = model
    stand_at(model, cache.seen_tokens)
    given = torch.tensor([list(ids)], device=device_of(model) or model.device)
    options = {}
    if not has_all and "logits_to_keep" in inspect.signature(called.forward).parameters:
        options["logits_to_keep"] = 1
    output = called(input_ids=given, **cache_argument(cache, model), use_cache=True, **options)
    logits: Tensor = output.logits[0] if has_all else output.logits[0, -1:]
    return logits.float()


@torch.no_grad()
def run_together(model: PreTrainedModel, caches: Sequence[PressedCache], tokens: Sequence[int]) -> Tensor:
    """Read one token after what each cache has seen, in one call: float32 logits ``[rows, V]`` after each.

    The caches are such as :func:`coldpress.cache.joined.can_join` allows, and the model takes position_ids. Products of
    a matrix with several rows are other sums than those with one, so logits differ from :func:`run`'s in the last bits.
    """
    called: Any = model
    device = device_of(model) or model.device
    positions = torch.tensor([[cache.seen_tokens] for cache in caches], device=device)
    given = torch.tensor([[token] for token in tokens], device=device)
    joined = cache_argument(JoinedCache(caches), model)
    logits: Tensor = called(input_ids=given, position_ids=positions, **joined, use_cache=True).logits[:, -1]
    return logits.float()
