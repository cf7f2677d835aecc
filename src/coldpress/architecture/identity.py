"""Identity of a model: the facts that a file which belongs to one model stores of it."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.offloaded import weight_of
from coldpress.errors import ModelError

__all__ = ["model_facts"]

_OURS = ("accelerate", "coldpress", "torch", "transformers")  # whose hooks change no numbers
_ELSEWHERE = ("type", "original_max_position_embeddings")  # said by another name, or beside the rotary parameters


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What tells ``model`` from others, in the types of JSON and independent of the version of transformers.

    Returns:
        ``name``: hub id or folder, or an empty text. ``revision``: the commit on the hub, or None. ``dtype``.
        ``sizes``: what the shape of a cache depends on. ``kind``: what else its numbers depend on, by the
        configuration. ``weights``: a hash over shapes and first 64 numbers of all weights, whatever device, dtype and
        order they are in and whatever their names are, which change with transformers. It tells a model from its own
        fine-tuned or merged versions. Of PEFT's adapters those count that are switched on, with their scale; without
        any, the model is as it was before they were added. Hooks that others have put on its modules count by their
        names.
    """
    config = model.config.get_text_config(decoder=True)
    n_heads, hidden_size = config.num_attention_heads, config.hidden_size
    return {
        "name": getattr(model.config, "_name_or_path", "") or "",
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sizes": {
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": hidden_size,
            "num_attention_heads": n_heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or n_heads,
            "head_dim": getattr(config, "head_dim", None) or hidden_size // n_heads,
        },
        "kind": {
            "model_type": config.model_type,
            "vocab_size": config.vocab_size,
            "sliding_window": getattr(config, "sliding_window", None),
            "rope": _rope(config),
        },
        "weights": _weights(model),
    }


def _weights(model: nn.Module) -> str:
    """Digest of all weights; those that are on the meta device count by their shape only."""
    idle, parts = set(), []
    for module in model.modules():
        if hasattr(module, "disable_adapters") and hasattr(module, "adapter_layer_names"):
            unused, scales = _adapters(module)
            idle |= unused
            parts += scales
        parts += [hashlib.sha256(name.encode()).digest() for name in _hooks(module)]
    for name, weights in model.named_parameters():
        if id(weights) not in idle:
            parts.append(_digest(model, name, weights))
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]


def _digest(model: nn.Module, name: str, weights: Tensor) -> bytes:
    path, _, leaf = name.rpartition(".")
    if weights.is_meta:  # stored elsewhere until its layer runs
        with contextlib.suppress(ModelError):
            weights = weight_of(model.get_submodule(path), leaf)
    numbers = b"" if weights.is_meta else weights.detach().flatten()[:64].cpu().double().numpy().tobytes()
    return hashlib.sha256(f"{tuple(weights.shape)}".encode() + numbers).digest()


def _adapters(module: Any) -> tuple[set[int], list[bytes]]:
    """Of a module of PEFT the ids of the weights that its forward leaves out, and digests of its adapters' scales.

    What is merged is in the module's own weights, unless the next forward takes it out again, which it does where
    adapters are off.
    """
    merged = set(getattr(module, "merged_adapters", ()))
    active = set() if module.disable_adapters else set(module.active_adapters) - merged
    unused, scales = set(), []
    for kind in module.adapter_layer_names:
        for name, part in dict(getattr(module, kind, {})).items():
            held_in = part.parameters() if isinstance(part, nn.Module) else [part]
            if name not in active:
                unused |= {id(weights) for weights in held_in if isinstance(weights, Tensor)}
            elif kind == "modules_to_save":  # in the place of the original
                unused |= {id(weights) for weights in module.original_module.parameters()}
    for name in active:
        scale = getattr(module, "scaling", {}).get(name)
        scales += [] if scale is None else [hashlib.sha256(f"scale {float(scale)}".encode()).digest()]
    if module.disable_adapters and merged:
        scales.append(hashlib.sha256(b"merged and off").digest())
    return unused, scales


def _hooks(module: nn.Module) -> list[str]:
    """Names of functions that others have put around a module's forward, which may change what it computes."""
    found = []
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        function = getattr(hook, "func", hook)  # of a partial
        where = str(getattr(function, "__module__", ""))
        if where.partition(".")[0] not in _OURS:
            found.append(f"{where}.{getattr(function, '__qualname__', type(function).__qualname__)}")
    return found


def _rope(config: Any) -> Any:
    """The rotary embedding's parameters; by kinds of layers where these differ. As transformers 5 has them."""
    given = getattr(config, "rope_parameters", None)
    if given is None:  # transformers 4
        theta = getattr(config, "rope_theta", None)
        if theta is None:
            return None
        given = {"rope_theta": theta, "partial_rotary_factor": getattr(config, "partial_rotary_factor", None) or 1.0}
        given |= getattr(config, "rope_scaling", None) or {}
        local = getattr(config, "rope_local_base_freq", None)
        if local is not None:
            given = {"full_attention": given, "sliding_attention": {"rope_theta": local}}
    kinds = {kind: part for kind, part in given.items() if isinstance(part, dict)}
    return {kind: _plain(part) for kind, part in kinds.items()} if kinds else _plain(given)


def _plain(rope: dict[str, Any]) -> dict[str, Any]:
    """With the defaults filled in, without what stands there in some versions only, and with lists as JSON has them."""
    kind = {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    rest = {name: list(v) if isinstance(v, tuple) else v for name, v in rope.items() if name not in _ELSEWHERE}
    return {"partial_rotary_factor": 1.0, **rest, **kind}
