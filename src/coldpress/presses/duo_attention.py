"""DuoAttention: some heads need the whole text, the others only both of its ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least, numbers_of
from coldpress.bases.registry import register
from coldpress.core.choice import pack
from coldpress.core.forced import forced
from coldpress.core.kept import Kept
from coldpress.core.ratio import check_ratio
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.io.artefacts import Artefact, Shape, artefacts_folder
from coldpress.io.files import path_of, read_text
from coldpress.io.network import fetch_url
from coldpress.learned.calibrated import Calibrated, Calibration
from coldpress.learned.calibration import ByLayer

_HEADS, _SIZES = "full_attention_heads.tsv", "config.json"  # names of the published files
_SIZE_NAMES = ("sink_size", "recent_size")
_SINK_SIZE, _RECENT_SIZE = 128, 256  # of most published patterns
_BASE_URL = "https://raw.githubusercontent.com/mit-han-lab/duo-attention/refs/heads/main/attn_patterns"
_TRAINED_TO = {  # models that patterns are published of -> the longest texts that they were trained on
    "togethercomputer/Llama-2-7B-32K-Instruct": 32000,
    "gradientai/Llama-3-8B-Instruct-Gradient-1048k": 32000,
    "gradientai/Llama-3-8B-Instruct-Gradient-4194k": 32000,
    "meta-llama/Meta-Llama-3.1-8B-Instruct": 128000,
    "mistralai/Mistral-7B-Instruct-v0.2": 32000,
    "mistralai/Mistral-7B-Instruct-v0.3": 32000,
}
_N_POSITIONS = 500  # of the text that heads are measured on


class Pattern(NamedTuple):
    """Which heads need the whole text, and what the others keep.

    Attributes:
        gates: for each compressed layer and KV head how much it needs the whole text, 0 to 1.
        sink_size, recent_size: first and last tokens that a streaming head keeps; None where the pattern does not say.
    """

    gates: tuple[tuple[float, ...], ...]
    sink_size: int | None = None
    recent_size: int | None = None


@register("duo_attention", head_compression_ratio=0.5)
@dataclass(frozen=True)
class DuoAttentionPress(Calibrated):
    """Keep everything in the retrieval heads, and the first and the recent tokens in the streaming heads.

    A pattern says for each KV head how much it needs the whole text, its gate. The round(head_compression_ratio *
    number of KV heads in all layers) heads with the smallest gates are streaming heads; they keep the first sink_size
    and the last recent_size tokens. How many pairs are removed depends on the text; ``PressedCache.achieved_ratio()``
    tells. Evicted pairs are freed in every head. The registered name lets half of the heads stream, as the paper does
    with grouped queries; the class by itself lets none.

    The published patterns were trained. ``coldpress calibrate duo_attention`` measures one as kvpress does on the fly:
    with the mean query and the mean key of a head before rotation over a sample, both repeated at 500 positions and
    rotated, a gate is the mean of the cumulated attention of the last query, over positions, the group's heads and
    samples. It is near 1 for a head that looks far back, and near 0 for one that looks at recent tokens only.

    Source: Xiao et al. 2024, arXiv:2410.10819, section 2.3. Differs from the paper: the prompt's own attention is
    complete in all heads, and next tokens are stored in the streaming heads. Differs from kvpress: evicted pairs leave
    memory instead of being masked; a text shorter than both ends is kept whole; all six published patterns are found;
    on_the_fly_scoring takes what was measured beforehand.

    Needs: a pattern of the model. Cost: none beside copying what is kept.

    Args:
        head_compression_ratio: fraction of the KV heads that stream, in [0, 1).
        on_the_fly_scoring: take the pattern that was measured on the model, and never a published one.
        pattern: gates ``[layers, KV heads]`` as a tensor or lists, for the layers that are compressed; or the path of a
            published pattern: a folder with full_attention_heads.tsv and config.json, or a file like the former; or
            the path of a file that ``coldpress calibrate duo_attention`` wrote. None looks it up by the model's name.
        sink_size, recent_size: first and last tokens that a streaming head keeps, instead of what the pattern says
            (128 and 256 where it says nothing).
    """

    artefact: ClassVar[str] = "duo_attention"
    holds: ClassVar[str] = "gates"
    parameter: ClassVar[str] = "pattern"

    per_head = True
    per_layer = True

    head_compression_ratio: float = 0.0
    on_the_fly_scoring: bool = False
    pattern: str | Path | Tensor | Sequence[Sequence[float]] | None = None
    sink_size: int | None = None
    recent_size: int | None = None

    def __post_init__(self) -> None:
        check_ratio(self.head_compression_ratio, "head_compression_ratio")
        if not isinstance(self.on_the_fly_scoring, bool):
            raise PressError(
                f"DuoAttentionPress: on_the_fly_scoring must be True or False, got {self.on_the_fly_scoring!r}."
            )
        if self.on_the_fly_scoring and self.pattern is not None:
            raise PressError("DuoAttentionPress: give a pattern or on_the_fly_scoring, which makes one; not both.")
        for name, least in (("sink_size", 0), ("recent_size", 1)):
            if getattr(self, name) is not None:
                check_at_least(self, least, name)
        if self.pattern is not None and not isinstance(self.pattern, (str, Path)):
            object.__setattr__(self, "pattern", numbers_of(self, "pattern", self.pattern, 2))
        if self.pattern is not None:
            self._given  # noqa: B018 -- a file that cannot be read is refused now

    @cached_property
    def _given(self) -> Pattern:
        """The pattern that the user gave."""
        if isinstance(self.pattern, (str, Path)):
            path = path_of(self.pattern)
            return (
                _pattern(self.form_checked(self.from_file(path)))
                if path.suffix == ".safetensors"
                else _read(self, path)
            )
        return Pattern(self.pattern)  # type: ignore[arg-type]

    def compress(self, view: LayerView) -> Kept | None:
        if self.head_compression_ratio == 0:
            return None
        pattern = _pattern(self.of_model(view)) if self.pattern is None else self._given
        shape = len(pattern.gates), len(pattern.gates[0])
        if shape != (view.n_layers, view.keys.shape[1]):
            raise PressError(
                f"DuoAttentionPress: the pattern has {shape[0]} layers with {shape[1]} KV heads; the model compresses "
                f"{view.n_layers} layers with {view.keys.shape[1]}."
            )
        sizes = (self.sink_size, pattern.sink_size, _SINK_SIZE), (self.recent_size, pattern.recent_size, _RECENT_SIZE)
        n_sink, n_recent = (next(size for size in given if size is not None) for given in sizes)
        must = forced(view, (n_sink, n_recent))
        streaming = streaming_heads(pattern.gates, self.head_compression_ratio)[view.layer_idx]
        if must.all() or not any(streaming):
            return None
        is_kept = must | ~torch.tensor(streaming, device=must.device)[:, None]  # [B or 1, Hkv, T]
        return view.take(pack(is_kept.expand(view.keys.shape[:3])))

    def layer_shapes(self, shape: Shape) -> dict[str, tuple[int | None, ...]]:
        return {"gates": (shape.n_kv_heads,)}

    def needs_artefact(self) -> bool:
        return self.pattern is None and self.head_compression_ratio > 0

    def published(self, model: str) -> Artefact | None:
        if self.on_the_fly_scoring or model not in _TRAINED_TO:
            return None
        name = model.split("/")[-1]
        url = f"{_BASE_URL}/{name}/lr=0.02-reg=0.05-ctx=1000_{_TRAINED_TO[model]}-multi_passkey10"
        folder = artefacts_folder() / "published" / self.artefact / name
        for part in (_SIZES, _HEADS):
            if fetch_url(f"{url}/{part}", folder / part) is None:
                return None
        pattern = _read(self, folder)
        sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
        return Artefact(self.artefact, {"gates": torch.tensor(pattern.gates)}, sizes, str(folder))

    def calibration(self) -> Calibration:
        return _Reach()


class _Reach(ByLayer):
    """How far back the mean query of each head looks, if all keys are the mean key."""

    def __init__(self) -> None:
        self.totals: dict[int, Tensor] = {}
        self.n_samples: dict[int, int] = {}

    def see(self, view: LayerView) -> None:
        query = view.unrotated_queries().mean(2, keepdim=True)  # [1, Hq, 1, D]
        key = view.unrotated_keys().mean(2, keepdim=True).expand(-1, -1, _N_POSITIONS, -1)  # [1, Hkv, 500, D]
        rope = view.find_rope()
        if rope is not None:
            cos, sin = rope.cos_sin(torch.arange(_N_POSITIONS, device=key.device))
            query, key = rope.rotate(query, cos[:, -1:], sin[:, -1:]), rope.rotate(key, cos, sin)
        queries = query.unflatten(1, (key.shape[1], -1))  # [1, Hkv, G, 1, D]
        weights = (queries @ key[:, :, None].transpose(-1, -2) * view.scaling).softmax(-1)  # [1, Hkv, G, 1, 500]
        gates = weights.cumsum(-1).mean((0, 2, 3, 4)).cpu()  # [Hkv]
        self.totals[view.layer_idx] = self.totals.get(view.layer_idx, torch.zeros(())) + gates
        self.n_samples[view.layer_idx] = self.n_samples.get(view.layer_idx, 0) + 1

    def tensors(self) -> dict[str, Tensor]:
        return {"gates": torch.stack([self.totals[i] / self.n_samples[i] for i in sorted(self.totals)])}


def _are_sizes(said: Mapping[str, Any]) -> bool:
    """Whether what a pattern says of sinks and recent tokens, if anything, are numbers of tokens."""
    values = (said.get(name) for name in _SIZE_NAMES)
    return all(value is None or (type(value) is int and 0 <= value < 2**31) for value in values)


def _pattern(artefact: Artefact) -> Pattern:
    """What an artefact says."""
    if not _are_sizes(artefact.facts):
        raise PressError(f"{artefact.source} is damaged: its sink_size or recent_size is no number of tokens.")
    gates = tuple(map(tuple, artefact.tensors["gates"].tolist()))
    return Pattern(gates, artefact.facts.get("sink_size"), artefact.facts.get("recent_size"))


def streaming_heads(gates: Sequence[Sequence[float]], ratio: float) -> list[list[bool]]:
    """Which heads stream: the share ``ratio`` of all with the smallest gates, the earlier ones among equals."""
    heads = [(gate, i, j) for i, layer in enumerate(gates) for j, gate in enumerate(layer)]
    chosen = sorted(heads)[: round(Fraction(repr(float(ratio))) * len(heads))]
    streams = {(i, j) for _, i, j in chosen}
    return [[(i, j) in streams for j in range(len(layer))] for i, layer in enumerate(gates)]


def _read(press: DuoAttentionPress, path: Path) -> Pattern:
    """A pattern as the authors publish it."""
    heads = path / _HEADS if os.path.isdir(path) else path
    sizes = heads.parent / _SIZES
    try:
        rows = [[float(x) for x in line.split()] for line in read_text(heads).splitlines() if line]
        said = json.loads(read_text(sizes)) if sizes.is_file() else {}
        if not isinstance(said, dict) or not _are_sizes(said):
            raise ValueError(f"{sizes.name} holds no sizes")
    except (OSError, ValueError, RecursionError) as error:
        raise PressError(
            f"DuoAttentionPress cannot read the pattern {path}: {error}. It takes a folder with {_HEADS} (a line for "
            f"each layer, a number for each KV head) and {_SIZES}, or such a file."
        ) from error
    gates = numbers_of(press, "pattern", rows, 2)
    clipped = tuple(tuple(min(1.0, max(0.0, gate)) for gate in layer) for layer in gates)
    return Pattern(clipped, said.get("sink_size"), said.get("recent_size"))
