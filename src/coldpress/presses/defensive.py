"""DefensiveKV: how much a pair mattered at worst, instead of on average, and budgets that heads or layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.registry import register
from coldpress.bases.together import carrying, keep_best
from coldpress.core.choice import select_counts
from coldpress.core.counts import adaptive_counts, counts_together, share_of
from coldpress.core.kept import Kept
from coldpress.core.requirements import require_block
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.criticalkv import two_stages
from coldpress.presses.snapkv import SnapKVPress

if TYPE_CHECKING:
    from coldpress.cache.pressed import PressedCache


@register("defensive")
@dataclass(frozen=True)
class DefensiveKVPress(SnapKVPress):
    """Keep the pairs that some query of the last window needed most, whatever head of the layer they are in.

    With A[g, q, t] the attention (softmax in float32) of window query q of head g of the group to token t before the
    window, P[g, q] = avgpool(A[g, q]) along t with zero padding, scaled to the sum of A[g, q], n the pairs that a head
    keeps on average, and N[t] the mean over the group's heads of ||W_O v[t]||_1, W_O the head's slice of the output
    projection:
    1. M[t] = max over g and q of P[g, q, t]; score[b, h, t] = max(M[t], mean over t of M) * N[t] / mean over t of N.
    2. First stage: each head keeps the tokens with the largest mean of A over g and q, one by one as long as these and
    the protected ones have received less than first_stage_mass of its attention, at most n with the protected ones.
    3. The other places of the layer, Hkv * n in all, go to the largest scores in any head.
    The window, the sinks and pinned tokens are protected: every head has them, and they are in no ranking.

    Source: Feng et al. 2025, arXiv:2510.13334, section 4. Differs from the paper: every head keeps at least its
    floor(alpha_safeguard * n) best pairs; sinks; a prompt no longer than the window is scored by its later half.
    Differs from the authors' code: values are weighed against other tokens' of their head, not against the same token's
    in other heads (norms_over); the first stage counts what the window receives in each head, not what as many tokens
    before it receive in the mean over heads (window_bias); the window is always kept; every row has its own budget.

    Needs: keys, values, the window's queries and the output projection. Cost: O(window_size * T * D) and
    O(T * D * hidden) per query head and layer, and sorting the scores.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        window_size: last tokens that score the others and are kept, at least 1.
        kernel_size: width of the pooling in tokens, odd.
        n_sink: first tokens that are kept; at 0, as in the paper, heads lose them where few pairs are kept.
        first_stage_mass: share of a head's attention that goes before the scores, in [0, 1]; at 0 scores decide alone.
        alpha_safeguard: share of the mean budget that no head falls below, in [0, 1]; at 1 all heads keep the same.
        norms_over: what the norms of values are divided by: "tokens", their mean over the head's tokens, or "heads",
            that over the layer's heads of the same token; the latter needs heads that store the same tokens, and so
            does not choose again.
        window_bias: what the first stage has before it begins: "own", the attention to the head's protected tokens, or
            "before", that to the window_size tokens before the window, mean over heads; then first_stage_mass less this
            is a share of the attention to unprotected tokens.
    """

    per_head = True
    per_head_independent = False

    window_size: int = 32
    n_sink: int = 4
    first_stage_mass: float = 0.9
    alpha_safeguard: float = 0.0
    norms_over: str = "tokens"
    window_bias: str = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "n_sink")
        check_between(self, 0, 1, "first_stage_mass", "alpha_safeguard")
        for name, words in {"norms_over": ("tokens", "heads"), "window_bias": ("own", "before")}.items():
            if (given := getattr(self, name)) not in words:
                allowed = " or ".join(map(repr, words))
                raise PressError(f"{type(self).__name__}: {name} must be {allowed}, got {given!r}.")

    @property
    def can_rechoose(self) -> bool:  # type: ignore[override]
        return self.norms_over == "tokens"

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.n_sink, self._window(view)

    def score(self, view: LayerView) -> Tensor:
        most, tiny = self._most(view), torch.finfo(torch.float32).tiny
        floor = most[..., : max(1, view.n_tokens - self._window(view))].mean(-1, keepdim=True)
        norms = view.projected_value_norms()
        mean = norms.mean(-1 if self.norms_over == "tokens" else 1, keepdim=True)
        return most.maximum(floor) * (norms / mean.clamp(min=tiny))

    def _most(self, view: LayerView) -> Tensor:
        """The most that a reference query needs each pair: M, float32 ``[B, Hkv, T]``."""
        window = self._window(view)
        before, inside = view.window_attention(window).split([view.n_tokens - window, window], dim=-1)
        if before.shape[-1]:
            before = pooled(before, self.kernel_size)
        return torch.cat([before.amax(dim=(2, 3)), inside.amax(dim=(2, 3))], dim=-1)

    def ranked(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        """:meth:`scores` with infinity at what must be kept, and the largest number there is at the first stage's.

        Args:
            n_keep, must: as in :meth:`chosen`.
        """
        window = self._window(view)
        attention = view.window_attention(window).mean(dim=(2, 3))  # [B, Hkv, T]
        must = must.expand(attention.shape)
        others = attention.masked_fill(must, 0.0)
        mass, rest, n_must = attention.sum(-1, keepdim=True), others.sum(-1, keepdim=True), must.sum(-1)
        if self.window_bias == "own":
            needed = self.first_stage_mass * mass - (mass - rest)
        else:
            bias = attention[..., -2 * window : -window].sum(-1, keepdim=True).mean(1, keepdim=True)
            needed = (self.first_stage_mass - bias) * rest
        n_first = (others.sort(descending=True).values.cumsum(-1) < needed).sum(-1).minimum(n_keep - n_must)
        return two_stages(view, attention, n_must + n_first, self.scores(view), must)

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor:
        scores = self.ranked(view, n_keep, must)
        n_safe = max(share_of(n_keep, self.alpha_safeguard), int(must.sum(-1).max()))
        counts = adaptive_counts(scores, n_keep, n_safe)
        return select_counts(scores, counts if view.counts is None else counts.minimum(view.counts))


def pooled(attention: Tensor, kernel_size: int) -> Tensor:
    """Attention ``[B, Hkv, G, Q, T]`` averaged along the tokens, each row scaled to the sum that it had."""
    if kernel_size == 1:
        return attention
    means = avg_pool1d(attention.flatten(0, 3), kernel_size, 1, kernel_size // 2).view_as(attention)
    tiny = torch.finfo(torch.float32).tiny
    return means * (attention.sum(-1, keepdim=True) / means.sum(-1, keepdim=True).clamp(min=tiny))


@register("layer_defensive")
@dataclass(frozen=True)
class LayerDefensiveKVPress(DefensiveKVPress):
    """Keep the pairs that some query of the last window needed most, whatever layer and head they are in.

    Scores and both stages are those of DefensiveKVPress; the other places of all layers together go to the largest
    scores in any layer and head, once all layers are there. So layers keep different numbers.

    Source: Feng et al. 2025, arXiv:2510.13334, section 4. Differs from the paper: as DefensiveKVPress does. Differs
    from the authors' code: as DefensiveKVPress does; a layer with small scores keeps its window and what the first
    stage gives it too; each row of a batch has its own budget.

    Needs: keys, values, the window's queries and the output projection, and input_ids. Cost: as DefensiveKVPress; all
    pairs are stored until the prefill is over.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1), over all layers and heads.
        window_size, kernel_size, n_sink, first_stage_mass, norms_over, window_bias: as in DefensiveKVPress.
        alpha_safeguard: share of the mean budget that no head of any layer falls below, in [0, 1].
    """

    per_layer = True
    can_rechoose = False
    offers_choice = False
    offers_scores = False
    chooses_together = True
    changes = frozenset()

    def compress(self, view: LayerView) -> Kept | None:
        n_keep = self.keep(view)
        if n_keep >= view.n_tokens:
            return None
        require_block(self, view.token_ids)
        return carrying(view, self.ranked(view, n_keep, self.forced(view, n_keep)))

    def choose_together(self, cache: PressedCache) -> None:
        def counts(scores: Sequence[Tensor], n_keep: int, n_must: int) -> list[Tensor]:
            return counts_together(scores, n_keep, max(n_must, share_of(n_keep, self.alpha_safeguard)))

        keep_best(self, cache, counts)
