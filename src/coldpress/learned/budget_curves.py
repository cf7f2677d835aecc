"""LU-KV's budget curves: how much each head would lose if an oracle shared a budget out among all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coldpress.architecture.projection import weight_of_heads
from coldpress.core.forced import forced
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.learned.calibration import ByLayer

if TYPE_CHECKING:
    from coldpress.bases.scorer import ScorerPress

__all__ = ["BudgetCurves"]

_FUTURE = 4  # the last quarter of a sample plays the tokens to come


class BudgetCurves(ByLayer):
    """Which share of its pairs each head of each layer loses when all of them together lose 1, 2, ... 99 percent.

    A sample's first three quarters are the context, its last quarter the tokens to come. For each layer and KV head

    1. the importance of context token j is the mean over the group's query heads of the largest ||A[q, j] v[j] W_O||_2
       over the queries q to come, A being the model's attention over all tokens and W_O the head's slice of the output
       projection;
    2. its tokens are put in the order in which the scorer would keep them: first sinks and window, then by score;
    3. what keeping n of them preserves is the sum of the first n importances; the slopes of its least concave majorant
       are the gains of each further place.

    The places are given to the largest gains of all heads and layers until so many percent are left over; a head's
    share is averaged over samples. This is the paper's procedure (oracle importance over a future window, convex hull,
    greedy by marginal utility, averages over contexts) as far as its text tells; it differs in that the tokens to come
    are those of the text, not answers to generated questions, and in that heads of a group are averaged.

    Args:
        press: the scorer.
        sink, window: first and last tokens that are always kept.
    """

    def __init__(self, press: ScorerPress, sink: int, window: int) -> None:
        self.press, self.sink, self.window = press, sink, window
        self.gains: list[Tensor] = []  # of the layers of the sample that is under way, [Hkv, C]
        self.total: Tensor | None = None  # [L, Hkv, 99]
        self.n_samples = 0

    def see(self, view: LayerView) -> None:
        if view.layer_idx == 0:
            self.gains = []
        n_future = view.n_tokens // _FUTURE
        if n_future < 1:
            raise PressError(f"LUKVPress is calibrated on samples of at least {_FUTURE} tokens.")
        context = view.part(0, view.n_tokens - n_future)
        n_sink, n_window = self.press.protected(context)
        must = forced(context, (max(n_sink, self.sink), max(n_window, self.window)))
        order = context.guard(self.press.scores(context), must).argsort(dim=-1, descending=True, stable=True)
        importance = future_importance(view, context.n_tokens).gather(-1, order)
        self.gains.append(torch.stack([concave_slopes(head) for head in importance[0].cpu()]))
        if view.layer_idx == view.n_layers - 1:
            removed = removed_shares(torch.stack(self.gains))
            self.total = removed if self.total is None else self.total + removed
            self.n_samples += 1

    def tensors(self) -> dict[str, Tensor]:
        assert self.total is not None
        return {"removed": (self.total / self.n_samples).float()}


def future_importance(view: LayerView, n_context: int) -> Tensor:
    """The most that a context token gives the layer's output for any later token: float32 ``[B, Hkv, C]``."""
    largest = view.window_attention(view.n_tokens - n_context)[..., :n_context].amax(3)  # [B, Hkv, G, C]
    values = view.values[:, :, None, :n_context].float()  # [B, Hkv, 1, C, Dv]
    heads = weight_of_heads(view.module, view.queries.shape[1], view.values)
    squares = ((values @ (heads @ heads.transpose(-1, -2))) * values).sum(-1)  # [B, Hkv, G, C]
    return (largest * squares.clamp(min=0).sqrt()).mean(2)


def concave_slopes(steps: Tensor) -> Tensor:
    """Slopes of the least concave majorant of the sums of ``steps [n]``: the nearest non-increasing steps."""
    blocks: list[tuple[float, int]] = []  # sum and number of neighbours that share a slope
    for step in steps.tolist():
        total, n = step, 1
        while blocks and blocks[-1][0] * n <= total * blocks[-1][1]:  # a later slope must not be steeper
            total, n = total + blocks[-1][0], n + blocks[-1][1]
            blocks.pop()
        blocks.append((total, n))
    return torch.cat([torch.full((n,), total / n, dtype=torch.float64) for total, n in blocks])


def removed_shares(gains: Tensor) -> Tensor:
    """Shares ``[L, Hkv, 99]`` that each head loses when the largest of all gains ``[L, Hkv, C]`` are kept."""
    n_layers, n_heads, n_tokens = gains.shape
    owner = torch.arange(n_layers * n_heads).repeat_interleave(n_tokens)[
        gains.flatten().argsort(descending=True, stable=True)
    ]
    shares = []
    for percent in range(1, 100):
        n_kept = round(len(owner) * (100 - percent) / 100)
        counts = owner[:n_kept].bincount(minlength=n_layers * n_heads)
        shares.append(1 - counts.double() / n_tokens)
    return torch.stack(shares, dim=-1).view(n_layers, n_heads, 99)
