"""DuoAttention: some heads need the whole text, the others only both of its ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coldpress.budget import check_ratio, ends, pack
from coldpress.errors import PressError
from coldpress.presses.base import BasePress, check_at_least, numbers_of
from coldpress.presses.registry import register
from coldpress.view import Kept, LayerView

_HEADS, _SIZES = "full_attention_heads.tsv", "config.json"  # names of the published files
_SINK_SIZE, _RECENT_SIZE = 128, 256  # of most published patterns


class Pattern(NamedTuple):
    """Which heads need the whole text, and what the others keep.

    Attributes:
        gates: for each compressed layer and KV head how much it needs the whole text, 0 to 1.
        sink_size, recent_size: first and last tokens that a streaming head keeps; None where the pattern does not say.
    """

    gates: tuple[tuple[float, ...], ...]
    sink_size: int | None = None
    recent_size: int | None = None


def pattern_for(config: Any, on_the_fly: bool = False) -> Pattern:
    """The pattern of a model that its user gave none for.

    Args:
        config: the model's configuration.
        on_the_fly: measure it, even if there is a published one.

    Raises:
        PressError: there is none.
    """
    name = getattr(config, "_name_or_path", "") or "MODEL"
    raise PressError(
        f"DuoAttentionPress has no pattern of {name}. Make one with "
        f"`coldpress calibrate duo_attention --model {name} --dataset DATASET`, or give the folder of a published one: "
        "DuoAttentionPress(0.5, pattern=FOLDER)."
    )


@register("duo_attention")
@dataclass(frozen=True)
class DuoAttentionPress(BasePress):
    """Keep everything in the retrieval heads, and the first and the recent tokens in the streaming heads.

    A pattern says for each KV head how much it needs the whole text, its gate. The round(head_compression_ratio *
    number of KV heads in all layers) heads with the smallest gates are streaming heads; they keep the first sink_size
    and the last recent_size tokens. How many pairs are removed depends on the text; ``PressedCache.achieved_ratio()``
    tells. Evicted pairs are freed: a layer's tensors are as long as its longest head, so a layer becomes short when
    all its heads stream.

    Source: Xiao et al. 2024, arXiv:2410.10819, section 2.3. Differs from the paper: the prompt's own attention is
    complete in all heads, and next tokens stay in the streaming heads. Differs from kvpress: evicted pairs leave memory
    instead of being masked; a text shorter than both ends stays as it is.

    Needs: a pattern of the model. Cost: none beside copying what is kept.

    Args:
        head_compression_ratio: fraction of the KV heads that stream, in [0, 1).
        on_the_fly_scoring: measure the pattern on the model instead of looking for a published one.
        pattern: gates ``[layers, KV heads]`` as a tensor or lists, for the layers that are compressed; or the path of a
            published pattern: a folder with full_attention_heads.tsv and config.json, or a file like the former.
        sink_size, recent_size: first and last tokens that a streaming head keeps, instead of what the pattern says
            (128 and 256 where it says nothing).
    """

    kind = "calibrated"
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
            return _read(self, Path(self.pattern))
        return Pattern(self.pattern)  # type: ignore[arg-type]

    def compress(self, view: LayerView) -> Kept | None:
        if self.head_compression_ratio == 0:
            return None
        pattern = self._given
        if self.pattern is None:
            pattern = pattern_for(view.module.config, self.on_the_fly_scoring)
        shape = len(pattern.gates), len(pattern.gates[0])
        if shape != (view.n_layers, view.keys.shape[1]):
            raise PressError(
                f"DuoAttentionPress: the pattern has {shape[0]} layers with {shape[1]} KV heads; the model compresses "
                f"{view.n_layers} layers with {view.keys.shape[1]}."
            )
        sizes = (self.sink_size, pattern.sink_size, _SINK_SIZE), (self.recent_size, pattern.recent_size, _RECENT_SIZE)
        n_sink, n_recent = (next(size for size in given if size is not None) for given in sizes)
        n_sink = max(0, n_sink - view.first_position)  # what a sliding window has left of them
        streaming = streaming_heads(pattern.gates, self.head_compression_ratio)[view.layer_idx]
        if n_sink + n_recent >= view.n_tokens or not any(streaming):
            return None
        device = view.keys.device
        is_end = ends(view.n_tokens, n_sink, n_recent, device)  # [T]
        is_kept = is_end | ~torch.tensor(streaming, device=device)[:, None]  # [Hkv, T]
        return view.take(pack(is_kept.expand(view.keys.shape[:3])))


def streaming_heads(gates: Sequence[Sequence[float]], ratio: float) -> list[list[bool]]:
    """Which heads stream: the share ``ratio`` of all with the smallest gates, the earlier ones among equals."""
    heads = [(gate, i, j) for i, layer in enumerate(gates) for j, gate in enumerate(layer)]
    chosen = sorted(heads)[: round(Fraction(repr(float(ratio))) * len(heads))]
    streams = {(i, j) for _, i, j in chosen}
    return [[(i, j) in streams for j in range(len(layer))] for i, layer in enumerate(gates)]


def _read(press: DuoAttentionPress, path: Path) -> Pattern:
    """A pattern as the authors publish it."""
    heads = path / _HEADS if path.is_dir() else path
    sizes = heads.parent / _SIZES
    try:
        rows = [[float(x) for x in line.split()] for line in heads.read_text(encoding="utf-8").splitlines() if line]
        said = json.loads(sizes.read_text(encoding="utf-8")) if sizes.is_file() else {}
    except (OSError, ValueError) as error:
        raise PressError(
            f"DuoAttentionPress cannot read the pattern {path}: {error}. It takes a folder with {_HEADS} (a line for "
            f"each layer, a number for each KV head) and {_SIZES}, or such a file."
        ) from error
    gates = numbers_of(press, "pattern", rows, 2)
    clipped = tuple(tuple(min(1.0, max(0.0, gate)) for gate in layer) for layer in gates)
    return Pattern(clipped, said.get("sink_size"), said.get("recent_size"))
