"""CaM: before a value is evicted while decoding, it may be added to kept values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView
from coldpress.presses.decoding import DecodingPress


@dataclass(frozen=True)
class CAMPress(DecodingPress):
    """As DecodingPress, but an evicted value may be added to kept values; measured worse than plain eviction.

    With A[t] the attention that token t of a head received while decoding (summed over steps, mean over the group's
    heads): of the pairs of a head that are evicted, the best-scored ones, as many as tokens have come since the last
    time (of equal scores the later ones), are merged with probability min(1, A[t] / mean of A over J), J the
    merge_budget kept tokens next after t, or as many as there are. Then v[t] / |J| is added to every value of J. Keys
    are unchanged. What is added is added on top: the longer the text, the longer the values, and after some thousand
    tokens they ruin the predictions of both models that were measured (benchmarks/long_stream).

    Source: Zhang et al. 2024, https://openreview.net/forum?id=LCTmppB165, equations 5 to 7. Differs from the paper:
    pairs are evicted every compression_interval tokens together, at 1 as in the paper. Differs from kvpress: each head
    evicts its own pairs, as its base press scores them; random numbers come from the cache's seed.

    Needs: what the base press needs, and the queries of the tokens since the last compression. Cost: as DecodingPress,
    and attention of the new tokens once more.

    Args:
        base_press, compression_interval, target_size, hidden_states_buffer_size: as for DecodingPress.
        merge_budget: how many of the kept tokens share a value, at least 1.
    """

    draws = True

    merge_budget: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "merge_budget")

    @property
    def n_recent_queries(self) -> int:
        return max(self.hidden_states_buffer_size, self.compression_interval)

    def compress_again(self, view: LayerView) -> Kept | None:
        n_new = view.n_queries if view.n_new is None else view.n_new
        received = view.attention_column_sums(n_new)  # [B, Hkv, T]
        if view.carried is not None:
            received = received + view.carried.nan_to_num(nan=0.0)
        press = self.base_press.with_budget(budget_tokens=self.target(view))
        chosen = press.choose(view)
        if chosen is None:
            slots = torch.arange(view.n_tokens, device=received.device).expand_as(received)
            return view.take(view.held(slots))._replace(carry=received)
        scores, summed = press.scores(view), self._summands(view)
        generator = torch.Generator()
        seed = (view.seed + 1_009 * view.layer_idx + 1_000_003 * view.end) % 2**63
        for row, head in itertools.product(*(range(n) for n in chosen.shape[:2])):
            n_stored = view.n_tokens if view.counts is None else int(view.counts[row, head])
            if head == 0:  # every row draws what it draws alone
                generator.manual_seed(seed)
            kept = chosen[row, head][chosen[row, head] >= 0]
            if not len(kept):  # heads that share a budget may be left with nothing
                continue
            is_evicted = torch.ones(n_stored, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
            evicted = is_evicted.nonzero()[:, 0].flip(0)  # the later ones first
            best = scores[row, head, evicted].argsort(descending=True, stable=True)[:n_new]
            added = self._shares(received[row, head], summed[row, head], evicted[best], kept, generator)
            summed[row, head].index_add_(0, added[0], added[1].to(summed.dtype))
        taken = view.take(chosen)
        at = chosen.clamp(min=0)
        merged = summed.gather(2, at[..., None].expand(-1, -1, -1, summed.shape[3]))
        return self._merged(taken, merged)._replace(carry=received.gather(2, at))

    def _summands(self, view: LayerView) -> Tensor:
        """What evicted pairs share out and kept ones add up, a copy ``[B, Hkv, T, Dv or more]``: the values."""
        return view.values.clone()

    def _merged(self, taken: Kept, sums: Tensor) -> Kept:
        """The pairs ``taken`` with what has come of their summands, ``[B, Hkv, n, Dv or more]``."""
        return taken._replace(values=sums)

    def _shares(
        self, received: Tensor, values: Tensor, evicted: Tensor, kept: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What is added to which value of one head.

        Args:
            received: ``[T]``, attention.
            values: ``[T, Dv or more]``, summands.
            evicted: int64 ``[m]``, slots of the pairs that may be merged.
            kept: int64 ``[n]``, ascending.

        Returns:
            Slots int64 ``[s]`` and what comes to their summands, float32 ``[s, Dv or more]``.
        """
        first = torch.searchsorted(kept, evicted, right=True)
        n_most = min(self.merge_budget, len(kept))
        place = first[:, None] + torch.arange(n_most, device=kept.device)  # [m, n_most]
        is_there = place < len(kept)
        heirs = kept[place.clamp(max=len(kept) - 1)]
        n_heirs = is_there.sum(-1)
        mean = (received[heirs] * is_there).sum(-1) / n_heirs.clamp(min=1)
        probability = torch.where(mean > 0, (received[evicted] / mean.clamp(min=1e-30)).clamp(max=1), 1.0)
        draw = torch.rand(len(evicted), generator=generator).to(probability.device)
        is_merged = ((draw < probability) & (n_heirs > 0))[:, None] & is_there
        share = values[evicted].float() / n_heirs.clamp(min=1)[:, None]  # [m, Dv or more]
        return heirs[is_merged], share[:, None].expand(-1, n_most, -1)[is_merged]


@dataclass(frozen=True)
class MassCAMPress(CAMPress):
    """As CAMPress, with the mass of what was merged; measured far better than it, and worse than plain eviction.

    A pair begins with weight w = 1. An evicted pair t that is merged gives w[t] / |J| of its weight to every pair j of
    J: w[j]' = w[j] + w[t] / |J|, v[j]' = (w[j] v[j] + w[t] / |J| v[t]) / w[j]', and ln w[j] is added to the logits of
    j. So what is evicted leaves the average of the values that follow as it was, where CAMPress adds it on top of the
    whole weight: values stay means of values, however long the text is. Measured in benchmarks/long_stream.

    Source: CAMPress, with the bias of token merging, Bolya et al. 2022, arXiv:2210.09461, section 3, where ln of the
    number of merged tokens is added. Differs from it: a token may be shared out among several pairs.

    Needs: what CAMPress needs. Cost: as CAMPress, and one number more for each pair.

    Args:
        base_press, compression_interval, target_size, hidden_states_buffer_size, merge_budget: as for CAMPress.
    """

    adds_bytes = 4

    def _summands(self, view: LayerView) -> Tensor:
        """Weighted values and, behind them, the weights: float32 ``[B, Hkv, T, Dv + 1]``."""
        bias = view.columns.get("bias")
        weights = torch.ones_like(view.values[..., :1], dtype=torch.float32) if bias is None else bias.exp()[..., None]
        return torch.cat([weights * view.values.float(), weights], dim=-1)

    def _merged(self, taken: Kept, sums: Tensor) -> Kept:
        weights = sums[..., -1]
        values = (sums[..., :-1] / weights[..., None]).to(taken.values.dtype)
        return taken._replace(values=values, bias=weights.log())
