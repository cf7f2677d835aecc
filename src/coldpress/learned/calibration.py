"""Calibration: run a model over samples of a text, and let a press measure its artefact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rope import stand_at
from coldpress.bases.press import BasePress
from coldpress.cache.pressed import PressedCache
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView

if TYPE_CHECKING:
    from coldpress.learned.calibrated import Calibrated

__all__ = ["ByLayer", "Moments", "calibrate"]


class ByLayer(ABC):
    """A calibration that looks at each layer right after the prefill of each sample."""

    @abstractmethod
    def see(self, view: LayerView) -> None:
        """Look at one layer."""

    def run(self, model: nn.Module, ids: Tensor) -> None:
        backbone: Any = getattr(model, "base_model", model)
        stand_at(backbone, 0)
        backbone(input_ids=ids, **cache_argument(PressedCache(_Probe(self)), backbone), use_cache=True)


class _Probe(BasePress):
    """Shows each layer to a calibration, and keeps everything."""

    def __init__(self, calibration: ByLayer):
        self.calibration = calibration

    def compress(self, view: LayerView) -> Kept | None:
        self.calibration.see(view)
        return None


class Moments:
    """Number, sum and sum of products of vectors, head by head, in float64 on the CPU."""

    def __init__(self) -> None:
        self.n = 0
        self.total: Tensor = torch.zeros(())
        self.products: Tensor = torch.zeros(())

    def add(self, vectors: Tensor) -> None:
        """Count ``[1, H, n, D]`` in."""
        own = vectors[0].cpu().double()
        self.n += own.shape[1]
        self.total = self.total + own.sum(1)  # [H, D]
        self.products = self.products + own.transpose(-1, -2) @ own  # [H, D, D]

    def mean(self) -> Tensor:
        """``[H, D]``."""
        return self.total / self.n

    def covariance(self) -> Tensor:
        """``[H, D, D]``, of the vectors themselves: divided by their number."""
        mean = self.mean()
        return self.products / self.n - mean[..., None] * mean[..., None, :]


def calibrate(
    press: Calibrated,
    model: nn.Module,
    samples: Sequence[Tensor],
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> dict[str, Tensor]:
    """The artefact that ``press`` needs of ``model``, measured on ``samples``.

    Args:
        press: says what is measured.
        model: on coldpress's attention backend.
        samples: token ids, int64 ``[T]`` each.
        progress: wraps the samples.

    Returns:
        The tensors of an artefact.
    """
    calibration = press.calibration()
    device = next(model.parameters()).device
    with torch.no_grad():
        for ids in progress(samples):
            calibration.run(model, ids[None].to(device))
    return calibration.tensors()
