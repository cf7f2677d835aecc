"""DMS: evict what scores below a threshold, as soon as it is no longer recent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.press import BasePress
from coldpress.bases.scorer import ScorerPress
from coldpress.core.choice import checked, pack
from coldpress.core.forced import forced
from coldpress.core.kept import Kept
from coldpress.core.press import parts
from coldpress.core.requirements import SCORER, require
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.boundary import BoundaryPress


@dataclass(frozen=True)
class DMSPress(BasePress):
    """Keep every pair that scores at least ``threshold``, and the last ``sliding_window_size`` tokens.

    With ``decoding=True`` this goes on while tokens are generated: each token is scored when it comes, and a head that
    gave it less than the threshold evicts it when it leaves the window. The inner press has to be one whose score of a
    token depends on that token alone (``pointwise``): KnormPress, QFilterPress, KVzapPress.

    Each head of each layer keeps as many pairs as reach the threshold, so how much is removed depends on the text;
    ``PressedCache.achieved_ratio()`` tells. What the inner press protects is kept as well. Evicted pairs are freed
    in every head. Thresholds belong to a scorer and a model: look at the scores of a
    text before choosing one.

    Source: the inference of Dynamic Memory Sparsification, Łańcucki et al. 2025, arXiv:2506.05345, section 3; with
    KVzap, Jegou and Jeblick 2026, arXiv:2601.07891. Differs from the paper: any scorer instead of trained decisions,
    taken after a dense prefill. Differs from kvpress: evicted pairs leave memory instead of being masked; what the
    inner press protects is kept; scorers that compare tokens with each other are refused with decoding=True, where
    kvpress lets them compare the new tokens of one call only (KeyDiff gives every single token the same score). The
    schedule is kvpress's: scored on arrival, evicted on leaving the window, after the call in which that happens.

    Needs: what the inner press needs; with decoding=True of the new tokens, so for KVzapPress generation has to happen
    inside ``with press(model):`` too. Cost: of the inner press, and sorting the positions; for each generated token, of
    the inner press for that token, and a copy of the window.

    Args:
        press: the scorer inside; it has no ratio or budget of its own.
        threshold: pairs with lower scores are evicted; must be given.
        sliding_window_size: last tokens that are kept whatever their score, at least 1.
        decoding: go on evicting while tokens are generated; ``crop`` reaches back as far as the window.
    """

    can_rechoose = True
    per_head = True
    per_layer = True

    press: ScorerPress
    threshold: float | None = None
    sliding_window_size: int = 128
    decoding: bool = False

    def __post_init__(self) -> None:
        require(self, self.press, *SCORER, "amount", "layers", *(["pointwise"] if self.decoding is True else []))
        if any(isinstance(part, BoundaryPress) for part in parts(self.press)):
            raise PressError(
                "BoundaryPress keeps a share of a budget at each end, and DMSPress has none; leave it out."
            )
        if self.threshold is None:
            raise PressError(
                f"DMSPress needs a threshold: the lowest score of {type(self.press).__name__} at which a pair is kept. "
                "There is no default, because it depends on the scorer and the model."
            )
        check_between(self, -math.inf, math.inf, "threshold")
        check_at_least(self, 1, "sliding_window_size")
        if not isinstance(self.decoding, bool):
            raise PressError(f"DMSPress: decoding must be True or False, got {self.decoding!r}.")

    @property
    def n_waiting(self) -> int:
        return self.sliding_window_size if self.decoding else 0

    @property
    def judges_prompt(self) -> bool:
        return self.decoding

    def judge(self, view: LayerView) -> Tensor:
        assert self.threshold is not None
        is_kept = checked(self.press.scores(view)) >= self.threshold  # [B, Hkv, n]
        n_sink, _ = self.press.protected(view)
        return is_kept | forced(view, (n_sink, 0))

    def compress(self, view: LayerView) -> Kept | None:
        must = forced(view, self.press.protected(view), grace=self.sliding_window_size)
        if must.all():
            return None
        assert self.threshold is not None
        is_kept = (checked(self.press.scores(view)) >= self.threshold) | must  # [B, Hkv, T]
        return None if is_kept.all() else view.take(pack(is_kept))
