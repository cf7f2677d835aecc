"""LU-KV: how much each head of each layer keeps was found out beforehand, for every ratio."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least, numbers_of
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.choice import protect, select_counts
from coldpress.core.column import PINNED
from coldpress.core.counts import apportion
from coldpress.core.forced import as_far_as, ends, forced
from coldpress.core.kept import Place
from coldpress.core.requirements import SCORER
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.io.artefacts import Artefact, Shape, artefacts_folder
from coldpress.io.files import path_of
from coldpress.io.network import fetch_url
from coldpress.learned.budget_curves import BudgetCurves
from coldpress.learned.calibrated import Calibrated, Calibration
from coldpress.presses.expected_attention import ExpectedAttentionPress

_L = TypeVar("_L", bound="LUKVPress")
Curves = tuple[tuple[tuple[float, ...], ...], ...]


_URL = "https://raw.githubusercontent.com/baidu-baige/LU-KV/main/evaluation/curve_data"
_PUBLISHED = {"meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b/ea_0.02_sink4_win1_llama_avg_ratio.npy"}


@register("lukv", ExpectedAttentionPress, epsilon=2e-2)
@dataclass(frozen=True)
class LUKVPress(Calibrated, WrapperPress):
    """Keep the best scores of each head; how many that is was measured once on the model, for every ratio.

    Curves say which share of its pairs each head of each layer loses when the whole cache loses 1, 2, ... 99 percent.
    Between two of these (and 0, where no head loses any, and 100, where all do) the shares lie on a straight line. The
    places of the whole cache, ratio and text length as asked for, are given to the layers in proportion to the mean of
    what their heads may keep, then to each layer's heads in proportion to theirs; every head has at least one place.
    The first ``sink`` and the last ``window`` tokens, and what the inner press protects, are kept as far as a head's
    places allow.

    Source: Tang et al. 2026, arXiv:2602.08585. Differs from the paper: what ``coldpress calibrate lukv`` computes
    follows the paper's idea where its details are not at hand; :class:`coldpress.learned.budget_curves.BudgetCurves`
    says what it is. Differs from kvpress: evicted pairs leave memory instead of being masked; counts add up to the
    ratio that was asked for, and ratios between two percents have budgets of their own; the published curves serve the
    scorer that they were made with, and no other parameters of it.

    Needs: what the inner press needs, and curves of the model and the inner press. Cost: of the inner press, and
    sorting the scores.

    Args:
        press: the scorer inside; it may have the ratio or budget.
        compression_ratio: keyword only; the same as the ratio of the press inside.
        sink, window: first and last tokens that every head keeps, at least 0.
        curves: shares to remove, ``[99, layers, KV heads]`` in [0, 1], for the layers that are compressed: a tensor, or
            the path of an .npy file, or of what ``coldpress calibrate lukv`` wrote. None looks them up by the model's
            name and the press inside.
    """

    artefact: ClassVar[str] = "lukv"
    holds: ClassVar[str] = "budget curves"
    parameter: ClassVar[str] = "curves"
    between = (0.0, 1.0)

    can_rechoose = False
    needs_inside = (*SCORER, "layers")
    per_head = True
    per_layer = True

    compression_ratio: float = field(default=0.0, kw_only=True, compare=False, repr=False)
    press: ScorerPress = field(default_factory=lambda: ExpectedAttentionPress(epsilon=2e-2))
    sink: int = 4
    window: int = 1
    curves: str | Path | Tensor | Sequence[Sequence[Sequence[float]]] | None = None

    def __post_init__(self) -> None:
        asked = self.compression_ratio
        super().__post_init__()
        if asked != 0 and self.press.with_ratio(asked) != self.press:
            if self.press.with_ratio(0.0) != self.press:
                raise PressError(
                    f"LUKVPress: compression_ratio={asked!r} and {self.press!r} both say how much is kept."
                )
            object.__setattr__(self, "press", self.press.with_ratio(asked))
            super().__post_init__()
        check_at_least(self, 0, "sink", "window")
        if self.curves is not None and not isinstance(self.curves, (str, Path)):
            object.__setattr__(self, "curves", numbers_of(self, "curves", self.curves, 3))
        if self.curves is not None:
            self._given  # noqa: B018 -- a file that cannot be read is refused now

    @cached_property
    def _given(self) -> Curves:
        """The curves that the user gave."""
        curves = self.curves
        if isinstance(curves, (str, Path)):
            path = path_of(curves)
            curves = (
                _curves(self.form_checked(self.from_file(path))) if path.suffix == ".safetensors" else _read(self, path)
            )
        assert isinstance(curves, tuple)
        shares = [share for percent in curves for layer in percent for share in layer]
        if len(curves) != 99 or min(shares) < 0 or max(shares) > 1:
            raise PressError(
                "LUKVPress: curves must be the shares that 99 ratios, 1 to 99 percent, remove of each head of each "
                f"layer, in [0, 1]; got {len(curves)} ratios and shares from {min(shares):g} to {max(shares):g}."
            )
        return curves

    def with_budget(self: _L, **budget: Any) -> _L:
        return replace(self, press=self.press.with_budget(**budget), compression_ratio=0.0)

    def keep_of(self, n_tokens: int, place: Place) -> int:
        """As in ScorerPress; without curves of its own the mean over layers, which the model's curves decide."""
        n_mean = self.press.keep_of(n_tokens, place)
        if self.curves is None or n_mean >= n_tokens:
            return n_mean
        return self._layers(self._given, n_tokens, n_mean)[place.layer_idx]

    def protected(self, view: LayerView) -> tuple[int, int]:
        n_sink, n_window = self.press.protected(view)
        return max(n_sink, self.sink), max(n_window, self.window)

    def choose(self, view: LayerView) -> Tensor | None:
        n_tokens, n_heads = view.n_tokens, view.keys.shape[1]
        n_mean = self.press.keep(view)
        if n_mean >= n_tokens:
            return None
        curves = _curves(self.of_model(view)) if self.curves is None else self._given
        if (len(curves[0]), len(curves[0][0])) != (view.n_layers, n_heads):
            raise PressError(
                f"LUKVPress: the curves have {len(curves[0])} layers with {len(curves[0][0])} KV heads; the model "
                f"compresses {view.n_layers} layers with {n_heads}."
            )
        pinned = forced(view, (0, 0), n_mean) if PINNED in view.columns else None
        least = 1 if pinned is None else max(1, int(pinned.sum(-1).max()))
        n_layer = self._layers(curves, n_tokens, n_mean, least)[view.layer_idx]
        shares = _kept_shares(curves, n_mean / n_tokens)[view.layer_idx]
        counts = apportion(n_heads * n_layer, shares, least, n_tokens)
        both = self.protected(view)
        own = torch.tensor(counts, device=view.keys.device).expand(view.keys.shape[:2])
        must = as_far_as(pinned, torch.cat([ends(view, both, n) for n in counts], dim=1), own)  # [B or 1, Hkv, T]
        reserved = self.reserved(view, min(counts))
        must = must if reserved is None else as_far_as(must, reserved, own)
        return select_counts(protect(self.scores(view), must), own)

    @staticmethod
    def _layers(curves: Curves, n_tokens: int, n_mean: int, least: int = 1) -> list[int]:
        """How many of ``n_tokens`` pairs a head of each layer keeps, on average over the heads; at least ``least``."""
        shares = [sum(heads) / len(heads) for heads in _kept_shares(curves, n_mean / n_tokens)]
        return apportion(len(shares) * n_mean, shares, least, n_tokens)

    def variant(self) -> str:
        what = f"{self.press.with_ratio(0.0)!r} {self.sink} {self.window}"
        return f"{type(self.press).__name__}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    def layer_shapes(self, shape: Shape) -> dict[str, tuple[int | None, ...]]:
        return {"removed": (shape.n_kv_heads, 99)}

    def needs_artefact(self) -> bool:
        return self.curves is None

    def published(self, model: str) -> Artefact | None:
        if model not in _PUBLISHED or self.with_ratio(0.0) != LUKVPress():
            return None
        path = artefacts_folder() / "published" / self.artefact / Path(_PUBLISHED[model]).name
        if fetch_url(f"{_URL}/{_PUBLISHED[model]}", path) is None:
            return None
        removed = torch.tensor(_read(self, path), dtype=torch.float32).permute(1, 2, 0)
        return Artefact(self.artefact, {"removed": removed}, source=str(path))

    def calibration(self) -> Calibration:
        return BudgetCurves(self.press.with_ratio(0.0), self.sink, self.window)


def _read(press: LUKVPress, path: Path) -> Curves:
    """Curves as the authors publish them."""
    try:
        read = np.load(path, mmap_mode="r", allow_pickle=False).astype(np.float64)  # no more than the file holds
    except (OSError, ValueError, EOFError) as error:
        raise PressError(
            f"LUKVPress cannot read the curves {path}: {error} It takes an .npy file or a calibrated one."
        ) from error
    return numbers_of(press, "curves", read, 3)


@lru_cache(maxsize=4)
def _curves(artefact: Artefact) -> Curves:
    """What an artefact says, ratio first."""
    return tuple(tuple(map(tuple, layers)) for layers in artefact.tensors["removed"].permute(2, 0, 1).tolist())


def _kept_shares(curves: Curves, kept: float) -> list[list[float]]:
    """The share that each head of each layer keeps when the whole cache keeps ``kept``: ``[layers][KV heads]``."""
    at = 100 * (1 - kept)
    below = min(99, int(at))
    weight = at - below

    def removed(percent: int, layer: int, head: int) -> float:
        return float(percent == 100) if percent in (0, 100) else curves[percent - 1][layer][head]

    return [
        [
            1 - (1 - weight) * removed(below, layer, head) - weight * removed(below + 1, layer, head)
            for head in range(len(heads))
        ]
        for layer, heads in enumerate(curves[0])
    ]
