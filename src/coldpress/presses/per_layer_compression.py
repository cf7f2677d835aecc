"""PerLayerCompression: a ratio for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar

from torch import Tensor

from coldpress.bases.scorer import ScorerPress
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.kept import Place
from coldpress.core.ratio import check_ratio
from coldpress.core.requirements import CHOICE
from coldpress.core.view import LayerView
from coldpress.errors import PressError

_P = TypeVar("_P", bound="PerLayerCompressionPress")


@dataclass(frozen=True)
class PerLayerCompressionPress(WrapperPress):
    """Keep in each layer what the inner press keeps at that layer's own ratio.

    Source: kvpress's PerLayerCompressionPress, https://github.com/NVIDIA/kvpress; no paper.

    Needs: what the inner press needs. Cost: of the inner press.

    Args:
        press: any press that chooses which pairs are kept; its own ratio does not count.
        compression_ratios: one for each layer that is compressed, each in [0, 1). ``compression_ratio`` is their mean.
    """

    can_rechoose = False
    needs_inside = (*CHOICE, "layers")
    per_layer = True

    compression_ratios: Sequence[float] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.press.budget_tokens is not None or self.press.budget_bytes is not None:
            raise PressError(f"PerLayerCompressionPress has a ratio for each layer; {self.press!r} has a budget too.")
        ratios = tuple(self.compression_ratios)
        if not ratios:
            raise PressError("PerLayerCompressionPress needs compression_ratios, one for each layer of the model.")
        for ratio in ratios:
            check_ratio(ratio, "each of compression_ratios")
        object.__setattr__(self, "compression_ratios", ratios)
        mean = sum(Fraction(repr(float(ratio))) for ratio in ratios) / len(ratios)
        object.__setattr__(self, "compression_ratio", float(mean))

    def with_budget(self: _P, **budget: Any) -> _P:
        """The same press with all its ratios multiplied, so that their mean is ``compression_ratio``.

        Raises:
            PressError: a layer would have to remove everything, or a budget that is no ratio.
        """
        if set(budget) != {"compression_ratio"}:
            raise PressError("PerLayerCompressionPress has ratios, and no budget in tokens or bytes.")
        compression_ratio = budget["compression_ratio"]
        check_ratio(compression_ratio)
        mean = self.compression_ratio
        factor = compression_ratio / mean if mean else 0.0
        ratios = [round(r * factor, 12) if mean else compression_ratio for r in self.compression_ratios]
        return replace(self, compression_ratios=ratios)

    def keep_of(self, n_tokens: int, place: Place) -> int:
        return self._at(place.layer_idx, place.n_layers).keep_of(n_tokens, place)

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor | None:
        return self._at(view.layer_idx, view.n_layers).chosen(view, n_keep, must)

    def _at(self, layer_idx: int, n_layers: int) -> ScorerPress:
        """The inner press at the ratio of layer ``layer_idx``."""
        if len(self.compression_ratios) != n_layers:
            raise PressError(
                f"PerLayerCompressionPress has {len(self.compression_ratios)} ratios and the model compresses "
                f"{n_layers} layers; give one for each."
            )
        return self.press.with_ratio(self.compression_ratios[layer_idx])
