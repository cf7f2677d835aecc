"""Save a compressed cache to a file, and go on with it tomorrow, in another process, on another machine.

The file is one of safetensors: tensors and a text, and nothing that is run when it is read. The text says, as JSON,
which model and press made the cache, and how long its layers are; it has a checksum over all tensors, and a checksum
of its own stands beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.identity import model_facts
from coldpress.architecture.offloaded import device_of
from coldpress.cache.observation import declared
from coldpress.cache.packed import pack_layer, unpack_layer
from coldpress.cache.schema import MASK, TOKENS, check_said, check_tensors, sizes_of
from coldpress.cache.taken import Malformed
from coldpress.core.data import as_data, from_data
from coldpress.core.press import Press, parts
from coldpress.errors import CacheError, OutputError, PressError
from coldpress.io.artefacts import digest_of
from coldpress.io.files import forbidden, path_of, replace_file
from coldpress.stores.bits import KVBits
from coldpress.stores.codec import Codec, codec_of
from coldpress.version import VERSION

__all__ = ["FORMATS", "load_cache", "model_options", "require_file", "save_cache"]

_C = TypeVar("_C")

# goes up when an older coldpress would misread a newer file: 2 has pins, columns that presses declare, or a codec
FORMATS = (1, 2)
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_AGAIN = "compress the context again and save it"


def save_cache(
    cache: Any,
    path: str | Path,
    model: PreTrainedModel,
    attention_mask: Tensor | None,
    name: str | None = None,
    is_private: bool = False,
) -> None:
    """See :meth:`coldpress.PressedCache.save`; ``is_private``: this user alone may read the file.

    Args:
        name: of the model, where its configuration does not know by which it can be loaded again.
    """
    path, session = path_of(path), cache.session
    session.check_claimed()
    layers = cache.pressed_layers()
    if len(layers) < len(cache.layers):
        raise CacheError("This cache holds states beside keys and values (a recurrent model's), which are not saved.")
    seen = {layer.slots.seen for layer in layers if layer.is_initialized}
    if not seen:
        raise CacheError("This cache holds no tokens, so there is nothing to save; run the prefill first.")
    if len(seen) > 1:
        raise CacheError("An earlier call failed half-way, so layers differ in length; reset() this cache.")
    facts = model_facts(model)
    facts["name"] = name or facts["name"]
    if len(layers) > facts["sizes"]["num_hidden_layers"]:
        raise CacheError(
            f"This cache has {len(layers)} layers and the model {facts['sizes']['num_hidden_layers']}; save it with "
            "the model that filled it."
        )
    tensors: dict[str, Tensor] = {}
    about = [pack_layer(layer, tensors) for layer in layers]
    if attention_mask is not None:
        n_rows = next(layer for layer in layers if layer.is_initialized).positions().shape[0]
        if attention_mask.shape != (n_rows, *seen):
            raise CacheError(
                f"attention_mask must be of all tokens that the cache has seen, {(n_rows, *seen)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        tensors[MASK] = attention_mask.bool()
    elif any(layer.has_padding for layer in layers):
        raise CacheError(
            "The text has padding, which a cache does not know the place of; give attention_mask=, the mask "
            f"[rows, tokens] of all {max(seen)} tokens."
        )
    if cache.token_ids is not None:
        tensors[TOKENS] = cache.token_ids.long()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    newer = _newer(session, about)
    session.settle_seed()
    said = json.dumps(
        newer
        | ({"cut_tokens": session.cut_tokens} if session.cut_tokens else {})
        | {
            "coldpress": VERSION,
            "model": facts,
            "press": _of_press(cache.press),
            "chunk_tokens": cache.chunk_tokens,
            "positions": cache._places,
            "kv_bits": None if cache.kv_bits is None else asdict(cache.kv_bits),
            "seed": session._seed,
            "has_padding": any(layer.has_padding for layer in layers),
            "layers": about,
            "sha256": digest_of(tensors),
        }
    )
    metadata = {"format": f"coldpress cache {2 if newer else 1}", "cache": said, "sha256": _digest(said)}
    try:
        replace_file(path, lambda part: save_file(tensors, part, metadata=metadata), is_private)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written ({error}); name another file.") from error


def _newer(session: Any, layers: list[dict[str, Any] | None]) -> dict[str, Any]:
    """The properties of a cache that need a format of the file after format 1."""
    found: dict[str, Any] = {}
    if session.pins:
        found["pins"] = session.pins
    if session.storage is not None and not isinstance(session.storage, KVBits):
        found["storage"] = _of_codec(session.storage)
    if any(layer is not None and layer.get("columns") for layer in layers):
        found["columns"] = True
    return found


def _of_codec(codec: Codec) -> dict[str, Any]:
    """A codec in the types of JSON."""
    try:
        said: dict[str, Any] = json.loads(json.dumps(codec.described()))
        if codec_of(said) != codec:
            raise CacheError(f"{type(codec).__name__} made from its parameters is another codec.")
    except (TypeError, ValueError, CacheError) as error:
        raise CacheError(f"A file cannot hold {codec!r}, by which the pairs were stored: {error}") from error
    return said


def load_cache(make: Callable[..., _C], path: str | Path, model: PreTrainedModel, check_model: bool) -> _C:
    """See :meth:`coldpress.PressedCache.load`."""
    path = path_of(path)
    require_file(path)
    own = model_facts(model)
    with _reading(path), path.open("rb") as file:  # once, for it may be replaced at any time
        metadata = _metadata(file)
        said = _said(path, metadata)
        check_said(said, own, _version(metadata))
        _check_model(path, said["model"], own, check_model)
        file.seek(0)
        tensors = load(file.read())
        if digest_of(tensors) != said["sha256"]:
            raise CacheError(f"{path} is damaged: its numbers are not those that were saved; {_AGAIN}.")
        press = _press(path, said["press"], model)
        n_recent = 0 if press is None else press.n_recent_queries
        storage = codec_of(said["storage"]) if "storage" in said else None
        sizes = sizes_of(model.config.get_text_config(decoder=True))
        check_tensors(said, tensors, sizes, n_recent, storage, declared(press))
    kv_bits = None if said["kv_bits"] is None else KVBits(**said["kv_bits"])
    cache: Any = make(
        press,
        chunk_tokens=said["chunk_tokens"],
        positions=said["positions"],
        kv_bits=kv_bits,
        storage=storage,
        pin=said.get("pins"),
    )
    session = cache.session
    session._seed, session.cut_tokens = said["seed"], said.get("cut_tokens", 0)
    devices, device = _devices(model), device_of(model) or model.device
    for index, about in enumerate(said["layers"]):
        layer = cache.layer(index)
        if about is not None:
            unpack_layer(layer, about, tensors, devices.get(index, device))
    if MASK in tensors:
        cache.attention_mask = tensors[MASK].to(device)
        for layer in cache.pressed_layers():
            layer.shown = cache.attention_mask
    if TOKENS in tensors:
        cache.remember(tensors[TOKENS].to(device))
    return cache


def model_options(path: str | Path) -> dict[str, str]:
    """The model of a saved cache, in arguments of :func:`load_model`: ``name``, ``revision`` and ``dtype``.

    What the file does not say is left out. No tensor is read.

    Raises:
        CacheError: as when it is loaded.
    """
    path = path_of(path)
    require_file(path)
    with _reading(path), path.open("rb") as file:
        saved = _said(path, _metadata(file)).get("model")
    parts = {name: saved.get(name) for name in ("name", "revision", "dtype")} if isinstance(saved, dict) else {}
    return {name: part for name, part in parts.items() if part and isinstance(part, str)}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise :class:`CacheError` instead of what a damaged file raises."""
    try:
        yield
    except CacheError:
        raise
    except Malformed as error:
        reason = f"it cannot say or hold {error}"
        raise CacheError(f"{path} is damaged or was altered ({reason}); {_AGAIN}.") from error
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CacheError(f"{path} is damaged or no file of a saved cache ({reason}); {_AGAIN}.") from error


def require_file(path: str | Path) -> None:
    """Raise :class:`CacheError` if there is no file at ``path``."""
    given, path = path, path_of(path)
    if (why := forbidden(path)) is not None:
        raise CacheError(f"{given} cannot be read ({why}); name a file that you may read.")
    if os.path.isdir(path):
        raise CacheError(f"{given} is a folder; name the file in it that coldpress compress wrote.")
    if not os.path.isfile(path):
        raise CacheError(f"There is no file {given}; name one that PressedCache.save or coldpress compress wrote.")


def _metadata(file: BinaryIO) -> dict[str, str]:
    """The metadata in the header of a file of safetensors; nothing else of the file is looked at.

    Raises:
        ValueError: there is no such header.
    """
    size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError("it does not begin as one of safetensors does")
    header = json.loads(file.read(size))
    found = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return {}
    return found


def _said(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What a file says of its cache.

    Raises:
        CacheError: it is another file, a newer one, or damaged.
    """
    kind, _, version = metadata.get("format", "").rpartition(" ")
    if kind != "coldpress cache" or not {"cache", "sha256"} <= metadata.keys():
        raise CacheError(f"{path} is damaged or holds no cache that coldpress saved; name one, or {_AGAIN}.")
    if version not in map(str, FORMATS):
        raise CacheError(
            f"{path} is of format {version}, and coldpress {VERSION} reads 1 to {FORMATS[-1]}; install the "
            f"coldpress that wrote it, or {_AGAIN}."
        )
    if _digest(metadata["cache"]) != metadata["sha256"]:
        raise CacheError(f"{path} is damaged: what it says of the cache is not what was saved; {_AGAIN}.")
    found: dict[str, Any] = json.loads(metadata["cache"])
    return found


def _version(metadata: dict[str, str]) -> int:
    return int(metadata["format"].rpartition(" ")[2])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_model(path: Path, saved: dict[str, Any], own: dict[str, Any], check_model: bool) -> None:
    """Raise :class:`CacheError` unless a cache of the model ``saved`` is one of the model ``own``."""
    name = f" ({saved['name']})" if saved["name"] else ""
    anyway = "or give check_model=False (coldpress ask: --any_model) if you are sure"
    parts = ("sizes", "kind") if check_model else ("sizes",)
    for part in parts:
        for fact, value in saved[part].items():
            if own[part].get(fact) != value:
                raise CacheError(
                    f"{path} is of another model{name}: its {fact} is {value}, and here it is {own[part].get(fact)}; "
                    f"load it with the model that made it{f', {anyway}' if part == 'kind' else ''}."
                )
    if saved["dtype"] != own["dtype"]:
        raise CacheError(
            f"{path} was made by a model in {saved['dtype']}, and this one is in {own['dtype']}; load the model with "
            f"dtype=torch.{saved['dtype']} (coldpress ask: --dtype {saved['dtype']})."
        )
    if check_model and saved["weights"] != own["weights"]:
        raise CacheError(
            f"{path} is of a model with the same sizes and other weights{name}: load it with the model and revision "
            f"that made it, its adapters and hooks as they were, {anyway}."
        )


# -- presses ----------------------------------------------------------------------------------------------------------


def _of_press(press: Press | None) -> dict[str, Any] | None:
    """A press in the types of JSON; only one that still has work to do has to come back from there."""
    if press is None:
        return None
    said: dict[str, Any] = {"repr": repr(press), "goes_on": _goes_on(press), "data": None}
    try:
        data = json.loads(json.dumps(as_data(press)))
        if from_data(data) != press:
            raise PressError(f"{type(press).__name__} made from its parameters is another press.")
    except PressError as error:
        if said["goes_on"]:
            raise CacheError(f"The press goes on while decoding, and cannot be saved: {error}") from error
    else:
        said["data"] = data
    return said


def _press(path: Path, said: dict[str, Any] | None, model: PreTrainedModel) -> Press | None:
    """The press of a saved cache; None for one that has done its work and cannot be made here."""
    if said is None or said["data"] is None:
        return None
    try:
        press = from_data(said["data"])
    except PressError as error:
        if said["goes_on"]:
            raise CacheError(f"{path} goes on being compressed by {said['repr']}: {error}") from error
        return None
    if _goes_on(press) != said["goes_on"]:
        raise Malformed("press.goes_on")
    return press.prepared(model) if said["goes_on"] else press


def _goes_on(press: Press) -> bool:
    """Whether what comes next depends on the press: it evicts while decoding, or says what a query reads."""
    return press.evicts_while_decoding or any(part.reads_part for part in parts(press))


def _devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where the attention layers of ``model`` compute, by their index."""
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        device = device_of(module) if isinstance(index, int) else None
        if isinstance(index, int) and device is not None:
            found[index] = device
    return found
