"""PyramidKV: SnapKV with more room in the first layers than in the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.core.counts import exact_keep, pyramid_counts
from coldpress.core.kept import Place
from coldpress.presses.snapkv import SnapKVPress


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKVPress(SnapKVPress):
    """SnapKV's scores; the first layers keep more tokens and the last ones fewer, on a straight line.

    The counts are those of :func:`coldpress.core.counts.pyramid_counts`; they add up to SnapKV's at the same ratio.
    Where the last layer would keep fewer than window_size pairs, as it does when the mean is below beta * window_size
    and the line is not flattened, all layers keep the same number: then this is SnapKV.

    Source: Cai et al. 2024, arXiv:2406.02069, equations 2 and 3; scores as in SnapKVPress. Differs from the paper: the
    mean budget follows from compression_ratio, unless budget_tokens gives it.

    Needs: keys and the window's queries. Cost: as SnapKVPress.

    Args:
        compression_ratio: fraction of the pairs of the whole model to remove, in [0, 1).
        window_size: last tokens that score the others and are kept, at least 1.
        kernel_size: width of the pooling in tokens, odd.
        beta: steepness, at least 1; the last layer keeps 1/beta of the mean where the line is not flattened.
    """

    per_layer = True

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "beta")

    def keep_of(self, n_tokens: int, place: Place) -> int:
        mean: int | Fraction = self.mean_keep(n_tokens, place)
        if self.budget_tokens is None and self.budget_bytes is None:
            mean = exact_keep(n_tokens, self.compression_ratio)
        counts = self._counts(n_tokens, mean, place)
        stored = place.stored_bytes
        if self.budget_bytes is not None and stored is not None:  # short layers may keep all their bits
            while mean > 1 and sum(map(stored, counts)) > self.budget_bytes:
                mean -= 1
                counts = self._counts(n_tokens, mean, place)
        return counts[place.layer_idx]

    def _counts(self, n_tokens: int, mean: int | Fraction, place: Place) -> list[int]:
        return pyramid_counts(n_tokens, mean, place.n_layers, window=self.window_size, beta=self.beta)
