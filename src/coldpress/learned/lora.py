"""LoRA adapters as PEFT saves them, added to a model for as long as a block lasts."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from coldpress.bases.press import BasePress
from coldpress.errors import PressError
from coldpress.io.files import read_text
from coldpress.learned.published import damaged

__all__ = ["Lora", "read_tensors"]

# What adapter_config.json may say without the sum below becoming another one: where the adapter goes, which the names
# in its file say too, and how it was trained. Whatever else is set there is refused.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
    "use_rslora",
}
_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, eq=False)
class Lora:
    """An addition to linear layers: ``y + scale * B (A x)``, with the sum of A and B in float32.

    Attributes:
        parts: the module's name in the file -> A ``[r, in]``, B ``[out, r]``, scale.
        path: the file.
    """

    parts: dict[str, tuple[Tensor, Tensor, float]]
    path: Path

    @classmethod
    def read(cls, press: BasePress, described: Path, path: Path) -> Lora:
        """The adapter in adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained writes them.

        Raises:
            PressError: a file is damaged, or the adapter is more than plain LoRA.
        """
        try:
            config = json.loads(read_text(described))
            kind, alpha, is_stabilised = config["peft_type"], float(config["lora_alpha"]), config.get("use_rslora")
            if not math.isfinite(alpha):
                raise ValueError("lora_alpha is not finite")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(press, described, repr(error)) from error
        refused = {k: v for k, v in config.items() if v and k not in _HARMLESS}
        if refused.get("bias") == "none":
            del refused["bias"]
        if refused.get("init_lora_weights") in (True, "gaussian"):  # others change the model's own weights too
            del refused["init_lora_weights"]
        if kind != "LORA":
            refused["peft_type"] = kind
        if refused:
            said = ", ".join(f"{k}={v!r}" for k, v in sorted(refused.items()))
            raise PressError(
                f"{type(press).__name__}: {described} says {said}, and coldpress adds plain LoRA only; give an adapter "
                "that was trained without."
            )
        found: dict[str, dict[str, Tensor]] = {}
        for key, weight in read_tensors(press, path).items():
            match = _KEY.fullmatch(key)
            if match is None or weight.dim() != 2:
                raise damaged(press, path, f"{key} {tuple(weight.shape)} is no matrix of LoRA")
            found.setdefault(match[1], {})[match[2]] = weight
        parts = {}
        for name, pair in found.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise damaged(press, path, f"lora_A and lora_B of {name} do not fit together")
            rank = pair["A"].shape[0]
            parts[name] = pair["A"], pair["B"], alpha / (math.sqrt(rank) if is_stabilised else rank)
        if not parts:
            raise damaged(press, path, "it holds no LoRA")
        return cls(parts, path)

    def modules(self, press: BasePress, model: nn.Module) -> dict[str, nn.Module]:
        """The module of ``model``, with or without its head, that each part belongs to.

        Raises:
            PressError: there is none of that name, or it is no linear layer of that size.
        """
        known, found = dict(model.named_modules()), {}
        for name, (a, b, _) in self.parts.items():
            own = name  # behind PEFT's prefix and the model's own, as many as there are
            while own and own not in known:
                own = own.partition(".")[2]
            module, sizes = known.get(own) if own else None, (a.shape[1], b.shape[0])
            if module is None or _sizes(module) != sizes:
                has = "it has none" if module is None else f"that is a {type(module).__name__} of {_sizes(module)}"
                raise PressError(
                    f"{type(press).__name__}: {self.path} is for another model: it adds to a linear layer {name} of "
                    f"{sizes} inputs and outputs, and in this model {has}; give an adapter that was trained for it."
                )
            found[name] = module
        return found

    @contextmanager
    def added(self, press: BasePress, model: nn.Module) -> Iterator[None]:
        """A block in which what this thread runs of ``model`` has the adapter added; no weight and no name changes."""
        owner = threading.get_ident()

        def add(part: tuple[Tensor, Tensor, float], module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Any:
            if threading.get_ident() != owner:
                return None
            x, (a, b, scale) = args[0].float(), part
            delta = linear(linear(x, a.to(x.device, x.dtype)), b.to(x.device, x.dtype))
            return (out.float() + scale * delta).to(out.dtype)

        with ExitStack() as stack:
            for name, module in self.modules(press, model).items():
                stack.callback(module.register_forward_hook(partial(add, self.parts[name])).remove)
            yield


def read_tensors(press: BasePress, path: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors, on the CPU; the same tensors again while the file does not change.

    Raises:
        PressError: it is damaged.
    """
    try:
        state = path.stat()
        return _read(path, (state.st_mtime_ns, state.st_size))
    except Exception as error:  # a file may be broken in any way
        raise damaged(press, path, error) from error


@lru_cache(maxsize=4)  # adapter and embeddings of two models
def _read(path: Path, version: tuple[int, int]) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # they outlive the mode that they are read in
        found = dict(load_file(path))
    if not all(part.is_floating_point() and part.isfinite().all() for part in found.values()):
        raise ValueError("its weights are not finite numbers")
    return found


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None
