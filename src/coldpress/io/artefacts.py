"""Artefacts: tensors that were measured of a model once, on a text, for presses to use.

One artefact is one safetensors file: named tensors, and what they were measured on. ``coldpress calibrate`` writes
them to ``$COLDPRESS_ARTEFACTS``, or else to ``~/.cache/coldpress/artefacts``, as ``PRESS/MODEL.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coldpress.errors import OutputError, PressError
from coldpress.io.files import forbidden, path_of, replace_file

__all__ = [
    "Artefact",
    "Shape",
    "artefact_path",
    "artefacts_folder",
    "digest_of",
    "is_hub_id",
    "read_artefact",
]

_KEY = "coldpress"  # of our part of a file's metadata


class Shape(NamedTuple):
    """Sizes of the model that a press works for; None where the configuration does not say.

    Attributes:
        name: hub id or folder that the model was loaded from; empty for a model made from a configuration.
        n_layers: layers that are compressed.
        n_hidden_layers: all layers.
        n_heads, n_kv_heads, head_dim: of each layer.
    """

    name: str
    n_layers: int
    n_hidden_layers: int
    n_heads: int | None
    n_kv_heads: int | None
    head_dim: int | None

    @classmethod
    def of_config(cls, config: Any) -> Shape:
        """As a model's configuration says."""
        name = getattr(config, "_name_or_path", "") or ""
        config = config.get_text_config(decoder=True)
        n_full = sum(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        sizes = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        return cls(name, n_full or config.num_hidden_layers, config.num_hidden_layers, *sizes)


@dataclass(frozen=True, eq=False)
class Artefact:
    """Tensors that were measured of a model, and how.

    Attributes:
        press: the name of the press that they are for.
        tensors: float32, the first dimension of each is the layer.
        facts: model, its architecture, text and its hash, number of tokens, version of coldpress; empty where the
            artefact was published by others.
        source: where it was read from.
    """

    press: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = "memory"
    _moved: dict[torch.device, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors on ``device``, moved there once."""
        if device not in self._moved:
            self._moved[device] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self._moved[device]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: it cannot be written there.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        said = {"press": self.press, "facts": dict(self.facts), "sha256": digest_of(tensors)}
        try:
            replace_file(path, lambda part: save_file(tensors, part, metadata={_KEY: json.dumps(said)}))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written ({error}); name another file with --output.") from error


def read_artefact(path: Path, press: str, names: Mapping[str, str]) -> Artefact:
    """The artefact in a file that coldpress wrote, or that others published.

    Args:
        path: the file.
        press: the press that asks.
        names: what published files call their tensors, and what we call them.

    Raises:
        PressError: the file is damaged, or for another press.
    """
    make = f"make it again with coldpress calibrate {press}"
    if (why := forbidden(path)) is not None:
        raise PressError(f"{path} cannot be read ({why}); let it be read, or {make}.")
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no iterator
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PressError(f"{path} is damaged or no safetensors file ({reason}); {make}.") from error
    kinds = {"press": str, "sha256": str, "facts": dict}
    if said is None:  # by others
        missing = sorted(set(names) - set(tensors))
        if missing:
            raise PressError(f"{path} is not for {press}: it has no {missing[0]!r}, only {sorted(tensors)[:8]}.")
        said = {"press": press, "facts": {}}
        tensors = {ours: tensors[theirs] for theirs, ours in names.items()}
    elif type(said) is not dict or any(type(said.get(name)) is not kind for name, kind in kinds.items()):
        raise PressError(f"{path} is damaged: it does not say what it is for, on what it was measured, or how; {make}.")
    elif said["press"] != press:
        raise PressError(f"{path} is for {said['press']}, not for {press}; {make}.")
    elif said["sha256"] != digest_of(tensors):
        raise PressError(f"{path} is damaged: its numbers are not those that were written; {make}.")
    if not all(tensor.is_floating_point() and tensor.dim() and tensor.numel() for tensor in tensors.values()):
        raise PressError(f"{path} is damaged: it holds what is no table of numbers, one for each layer; {make}.")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise PressError(f"{path} is damaged: it holds numbers that are not finite; {make}.")
    return Artefact(press, {name: tensor.float() for name, tensor in tensors.items()}, said["facts"], str(path))


def artefacts_folder() -> Path:
    """Where artefacts of this machine lie."""
    given = os.environ.get("COLDPRESS_ARTEFACTS", "").strip()
    return path_of(given) if given else Path.home() / ".cache" / "coldpress" / "artefacts"


def artefact_path(press: str, model: str, variant: str = "") -> Path:
    """The file of ``press`` for ``model``, a hub id or a folder; ``variant`` where a press has several of a model."""
    name = model.replace("/", "--")
    if not is_hub_id(model):
        folder = path_of(model).resolve()
        name = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    return artefacts_folder() / press / f"{name}{'.' if variant else ''}{variant}.safetensors"


def is_hub_id(model: str) -> bool:
    """Whether ``model`` names a repository of the hub, and no folder that is here."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model) is not None and not os.path.exists(model)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and numbers of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
