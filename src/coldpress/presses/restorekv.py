"""RestoreKV: trained tokens read the whole text once, and their pairs are stored instead of as many others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.rope import Rope
from coldpress.bases.registry import register
from coldpress.core.call import LayerCall
from coldpress.errors import PressError
from coldpress.learned.lora import Lora, read_tensors
from coldpress.learned.published import damaged, model_name, published_file
from coldpress.presses.kvzip import KVzipPress

if TYPE_CHECKING:
    from coldpress.cache.layer import PressedLayer
    from coldpress.cache.pressed import PressedCache

_P = TypeVar("_P", bound="RestoreKVPress")
_EMBEDDINGS = "restore_embeddings"


@register("restorekv")
@dataclass(frozen=True)
class RestoreKVPress(KVzipPress):
    """Keep what KVzip keeps, but for n pairs of each head that trained tokens make of the whole text.

    Before anything is evicted the model, with a LoRA adapter added for this one pass, reads n trained embeddings
    (8 in the published ones) at positions T .. T + n - 1 after the text. Every layer and head stores their n pairs
    besides what KVzip keeps at a budget of n pairs per head less, so that the budget is met. Where it is no more than n
    pairs per head, KVzip alone spends it.

    As the method was trained, the next token comes after the restored ones, at T + n. The cache goes on counting tokens
    of the text, the next one at T, and all stored keys of these layers are rotated n positions back instead: by rotary
    attention, which depends on distances only, the same. Layers that do not rotate keep their keys as they are, and
    with learned positions the next token shares that of the first restored one. cache.positions() lists restored pairs
    behind the others of their head, with the position of the last token, T - 1. Layers with a sliding window beside
    full ones are left alone.

    Source: arXiv:2608.01247, as in kvpress. Differs from kvpress: what is evicted is freed; no adapter is left on the
    model, and PEFT is not needed; KVzip's differences. The adapter's sums are taken in float32. Of the published files
    only the form is known here: what the adapter is added to is read from the names in it, and all but plain LoRA is
    refused.

    Needs: the model twice more after the prefill, its tokenizer, one text at a time, and trained weights: those
    published as higokri/RestoreKV-<model> (Llama-3.1-8B-Instruct, Qwen3-8B; with kvzip_plus_normalization
    RestoreKV-<model>_plus), or yours. Cost: of KVzip, a pass of n tokens, and O(D) per kept pair.

    Args:
        compression_ratio, layerwise, n_sink, kvzip_plus_normalization, chunk_size, tokenizer: as in
            :class:`KVzipPress`.
        weights: a folder with restore_embeddings.safetensors, adapter_config.json and adapter_model.safetensors as
            published; None finds them by the model's name.
    """

    kind = "trained"
    changes = frozenset({"keys", "values"})  # it adds pairs of its own

    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            object.__setattr__(self, "weights", str(self.weights))

    def prepared(self: _P, model: PreTrainedModel, tokenizer: Any = None) -> _P:
        ready = super().prepared(model, tokenizer)
        if self.compresses:  # what is missing is better said before the prefill
            self.restorer(model)[1].modules(self, model)
        return ready

    def restorer(self, model: nn.Module) -> tuple[Tensor, Lora]:
        """The trained embeddings ``[n, hidden]`` for ``model``, as it has its own, and the adapter."""
        repo = "higokri/RestoreKV-"
        repo += "<model>" if self.weights is not None else model_name(self, model.config)
        repo += "_plus" if self.kvzip_plus_normalization else ""
        path, described, adapter = (
            published_file(self, repo, name, self.weights)
            for name in (f"{_EMBEDDINGS}.safetensors", "adapter_config.json", "adapter_model.safetensors")
        )
        own, read = model.get_input_embeddings().weight, read_tensors(self, path)  # type: ignore[operator]
        if _EMBEDDINGS not in read or read[_EMBEDDINGS].dim() != 2 or not len(read[_EMBEDDINGS]):
            raise damaged(self, path, f"it has no matrix {_EMBEDDINGS}")
        embeddings = read[_EMBEDDINGS]
        if embeddings.shape[1] != own.shape[1]:
            raise PressError(
                f"{type(self).__name__}: {path} is for another model: its embeddings have {embeddings.shape[1]} "
                f"dimensions, and those of this model {own.shape[1]}; give weights that were trained for it."
            )
        return embeddings.to(own.device, own.dtype), Lora.read(self, described, adapter)

    def evict(
        self, cache: PressedCache, model: nn.Module, token_ids: Tensor, layers: Sequence[PressedLayer], n_keep: int
    ) -> None:
        embeddings, lora = self.restorer(model)
        n, n_tokens = len(embeddings), token_ids.shape[1]
        if n_keep <= n:
            return super().evict(cache, model, token_ids, layers, n_keep)
        made: dict[int, tuple[Tensor, Tensor, Rope | None]] = {}
        wanted = {layer.index for layer in layers}

        def on_attention(layer: PressedLayer, call: LayerCall) -> None:
            if layer.index in wanted:
                assert layer.keys is not None and layer.values is not None
                rope = layer.rope(call)
                made[layer.index] = layer.keys[:, :, -n:].clone(), layer.values[:, :, -n:].clone(), rope

        with lora.added(self, model):
            self.run(cache, model, on_attention, n, inputs_embeds=embeddings[None])
        super().evict(cache, model, token_ids, layers, n_keep - n)
        for layer in layers:
            keys, values, rope = made[layer.index]
            assert layer.keys is not None and layer.values is not None
            kept, positions = _moved_back(layer.keys, rope, n, n_tokens), layer.positions()
            slots = (positions >= 0).sum(-1, keepdim=True) + torch.arange(n, device=positions.device)  # [1, Hkv, n]
            layer.store(
                _with(kept, _moved_back(keys, rope, n, n_tokens + n), slots),
                _with(layer.values, values, slots),
                pad(positions, (0, n), value=-1).scatter(2, slots, n_tokens - 1),
            )


def _moved_back(keys: Tensor, rope: Rope | None, n: int, end: int) -> Tensor:
    """``keys`` ``[1, Hkv, m, D]`` of a text of ``end`` tokens as they would be ``n`` positions earlier."""
    if rope is None:
        return keys
    cos, sin = (part[:, :1] for part in rope.cos_sin(torch.tensor([n, end - 1], device=keys.device)))
    scale = (cos.square() + sin.square()).sqrt()  # as in Rope.inverse, but keys keep theirs
    return rope.rotate(keys.float(), cos / scale, -sin / scale).to(keys.dtype)


def _with(states: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """``[1, Hkv, m + n, D]``: ``states`` ``[1, Hkv, m, D]`` with ``new`` ``[1, Hkv, n, D]`` at ``slots``."""
    at = slots[..., None].expand(-1, -1, -1, states.shape[3])
    return pad(states, (0, 0, 0, new.shape[2])).scatter(2, at, new)
