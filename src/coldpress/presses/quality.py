"""Quality: how much is kept follows from how far the model's next tokens may be off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rope import stand_at
from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.registry import register
from coldpress.cache.pressed import PressedCache
from coldpress.core.choice import pack, unpack
from coldpress.core.definition import in_short
from coldpress.core.kept import Kept
from coldpress.core.requirements import CHOICE, require
from coldpress.core.view import LayerView
from coldpress.errors import NoRoomError, PressError
from coldpress.io.artefacts import Shape
from coldpress.learned.calibrated import Calibrated, Calibration
from coldpress.models.block import prefilling
from coldpress.presses.defensive import DefensiveKVPress

_Q = TypeVar("_Q", bound="QualityPress")
LEVELS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # of max_kl, in nats a token
_RATIOS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_THRESHOLDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25)
_SCORED = 8  # one part in so many of a sample is what the cache is judged by


@register("quality", DefensiveKVPress)
@dataclass(frozen=True)
class QualityPress(Calibrated):
    """Keep as few pairs as leave the next tokens as they were, within max_kl nats a token, prompt by prompt.

    A layer misses, at a ratio, the share of the attention of the newest n_queries queries that goes to pairs which the
    inner press evicts, the mean over heads. Each layer of each row takes the largest ratio of 0.95, 0.9, ... 0.1 at
    which it misses at most the threshold, or keeps everything. So an easy prompt is compressed more than a hard one.

    The threshold is calibrated: ``coldpress calibrate quality`` compresses samples of a text at a grid of thresholds
    and measures KL(whole cache || compressed) of the tokens that follow. Of each sample, the safe threshold is the
    largest one up to which all keep the mean KL at most max_kl; of n samples' safe thresholds the
    floor(risk * (n + 1))-th smallest is taken. For a text drawn as the samples were, KL then exceeds max_kl with
    probability at most risk (split conformal prediction); for texts of another kind nothing is promised, so calibrate
    on your own. Where no threshold is safe, everything is kept; the calibration says so, and so does a press that is
    about to be used. Everything is kept, too, where what must stay fits into no ratio. Around a press that looks at the
    worst case it removes most (benchmarks/kl_bound).

    Source: conformal risk control, Angelopoulos et al. 2022, arXiv:2208.02814, for a loss of 0 or 1; the statistic is
    our own. Differs from the paper: thresholds are on a grid, and the loss is made monotone in them.

    Needs: what the inner press needs, and thresholds of the model and the inner press. Cost: of the inner press, once
    for each ratio that is tried, and its scores once.

    Args:
        press: a scorer or a wrapper around one; it has no ratio or budget of its own.
        max_kl: KL in nats a token that a prompt may cost, at least 0.001; the next lower one of 0.001, 0.002, 0.005,
            0.01, 0.02, 0.05, 0.1 and 0.2 is what is calibrated.
        risk: share of prompts that may cost more, in (0, 0.5]; a calibration needs 1 / risk - 1 samples at least.
        n_queries: newest tokens whose attention counts, at least 1.
        threshold: share of attention that a layer may miss, in [0, 1]; None for the calibrated one.
        thresholds: the file that ``coldpress calibrate quality`` wrote; None looks it up by the model's name.
    """

    artefact: ClassVar[str] = "quality"
    holds: ClassVar[str] = "thresholds"
    parameter: ClassVar[str] = "thresholds"
    between = (0.0, 1.0)

    can_rechoose = False
    per_layer = True

    press: Any
    max_kl: float = 0.02
    risk: float = 0.05
    n_queries: int = 32
    threshold: float | None = None
    thresholds: str | Path | None = None

    def __post_init__(self) -> None:
        require(self, self.press, *CHOICE, "amount", "layers")
        check_at_least(self, 1, "n_queries")
        check_between(self, LEVELS[0], math.inf, "max_kl")
        check_between(self, 0, 0.5, "risk")
        if not self.risk:
            raise PressError("QualityPress: risk must be above 0; a calibration needs 1 / risk - 1 samples.")
        if self.threshold is not None:
            check_between(self, 0, 1, "threshold")

    def compress(self, view: LayerView) -> Kept | None:
        threshold = self._threshold(view)
        kept = torch.ones(view.keys.shape[:3], dtype=torch.bool, device=view.keys.device)
        undecided = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        for ratio in _RATIOS:
            own, missed = view.once(("kept at", id(self.press), self.n_queries, ratio), partial(self._at, view, ratio))
            takes = undecided & (missed <= threshold)
            kept = torch.where(takes[:, None, None], own, kept)
            undecided = undecided & ~takes
            if not undecided.any():
                break
        return None if kept.all() else view.take(pack(kept))

    def _at(self, view: LayerView, ratio: float) -> tuple[Tensor, Tensor]:
        """What the inner press keeps at ``ratio``, bool ``[B, Hkv, T]``, and how much it misses, ``[B]``.

        More than all is missed where what must stay does not fit into so few.
        """
        whole = torch.ones(view.keys.shape[:3], dtype=torch.bool, device=view.keys.device)
        try:
            chosen = self.press.with_budget(compression_ratio=ratio).choose(view)
        except NoRoomError:
            return whole, torch.full((len(whole),), math.inf, device=whole.device)
        own = whole if chosen is None else unpack(chosen, view.n_tokens)
        attention = view.window_attention(min(self.n_queries, view.n_queries)).sum((2, 3))  # [B, Hkv, T]
        return own, 1 - ((attention * own).sum(-1) / attention.sum(-1).clamp(min=1e-30)).mean(-1)

    def _threshold(self, view: LayerView) -> float:
        if self.threshold is not None:
            return self.threshold
        return float(self.of_layer(view)["thresholds"][self._level])

    @property
    def _level(self) -> int:
        return max(i for i, kl in enumerate(LEVELS) if kl <= self.max_kl * (1 + 1e-9))

    def prepared(self: _Q, model: PreTrainedModel, tokenizer: Any = None) -> _Q:
        ready = super().prepared(model, tokenizer)
        if self.needs_artefact():
            thresholds = self.look_up(Shape.of_config(model.config)).tensors["thresholds"]
            if not bool(thresholds[:, self._level].any()):
                warnings.warn(
                    f"QualityPress keeps everything: its calibration found nothing safe for max_kl={self.max_kl:g}; "
                    "allow more KL or risk, or wrap a better press.",
                    stacklevel=2,
                )
        return ready

    def needs_artefact(self) -> bool:
        return self.threshold is None

    def made_with(self, model: str) -> str:
        if self.press == DefensiveKVPress():
            return super().made_with(model)
        around = f"around {in_short(self.press)}, and coldpress calibrate quality makes those around DefensiveKVPress()"
        return f"coldpress.learned.calibration.calibrate(press, model, samples), for threshold=; they are {around}"

    def variant(self) -> str:
        inner = self.press.with_budget(compression_ratio=0.0)
        return f"{inner!r}, {self.n_queries} queries, risk {self.risk:g}"

    def layer_shapes(self, shape: Shape) -> dict[str, tuple[int | None, ...]]:
        return {"thresholds": (len(LEVELS),)}

    def calibration(self) -> Calibration:
        return _SafeThresholds(self)


def safe_threshold(losses: Sequence[Sequence[float]], max_kl: float, risk: float) -> int:
    """How many of the thresholds, ascending, are safe.

    Args:
        losses: KL of each sample at each threshold.
        max_kl: what a sample may cost.
        risk: share of samples that may cost more.

    Raises:
        PressError: there are too few samples for this risk.
    """
    k = math.floor(risk * (len(losses) + 1) + 1e-9)
    if k < 1:
        n = math.ceil(1 / risk - 1 - 1e-9)
        raise PressError(
            f"QualityPress: risk={risk:g} needs at least {n} samples, and there are {len(losses)}; give more text, "
            "more --n_samples, or a larger risk."
        )
    safe = [next((i for i, loss in enumerate(sample) if loss > max_kl), len(sample)) for sample in losses]
    return sorted(safe)[k - 1]


class _SafeThresholds:
    """KL of what follows a prompt that is compressed at each threshold."""

    def __init__(self, press: QualityPress) -> None:
        self.press, self.n_layers = press, 0
        self.losses: list[list[float]] = []

    def run(self, model: nn.Module, ids: Tensor) -> None:
        n_scored = max(1, ids.shape[1] // _SCORED)
        prompt, rest = ids[:, :-n_scored], ids[:, -n_scored:]
        if prompt.shape[1] < 2:
            raise PressError("QualityPress is calibrated on samples of at least 3 tokens.")
        backbone: Any = getattr(model, "base_model", model)
        stand_at(backbone, 0)
        full = PressedCache()
        branches = full.branches([replace(self.press, threshold=threshold) for threshold in _THRESHOLDS])
        with prefilling(model, full, *branches):
            backbone(input_ids=prompt, **cache_argument(full, backbone), use_cache=True)
        self.n_layers = len(full.pressed_layers())

        def after(cache: PressedCache) -> Tensor:
            logits: Tensor = model(input_ids=rest, **cache_argument(cache, model), use_cache=True).logits
            return logits.float().log_softmax(-1)

        expected = after(full)
        own = []
        for branch in branches:
            found = expected if branch.achieved_ratio() == 0 else after(branch)
            own.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
        self.losses.append(own)

    def tensors(self) -> dict[str, Tensor]:
        safe = [safe_threshold(self.losses, kl, self.press.risk) for kl in LEVELS]
        own = torch.tensor([0.0, *_THRESHOLDS])[safe]
        unsafe = [f"{kl:g}" for kl, n in zip(LEVELS, safe, strict=True) if not n]
        if unsafe:
            warnings.warn(f"No threshold is safe for max_kl of {', '.join(unsafe)}: all is kept there.", stacklevel=2)
        return {"thresholds": own.expand(self.n_layers, -1).contiguous()}
