"""SampledDefensive: how much a pair matters at worst to queries from all over the prompt, asked again at its end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.moved import samples_moved_on
from coldpress.bases.registry import register
from coldpress.core.view import LayerView
from coldpress.presses.defensive import LayerDefensiveKVPress, pooled

RECENT_PART = 8  # the newest tokens that are protected are at most one in so many of what is kept


@register("sampled_defensive")
@dataclass(frozen=True)
class SampledDefensiveKVPress(LayerDefensiveKVPress):
    """Keep the pairs that some query of the whole prompt would need most, if it were asked next.

    As LayerDefensiveKVPress, with more queries: those of n_samples tokens evenly apart, at the positions that come
    after the prompt, so that each is asked about every pair. With A[g, q, t] the attention of query head g of the group
    for query q, M[t] = max over g and q of A[g, q, t], where q are the window's queries and the samples. The first
    stage is of the window alone. The first n_sink tokens and the newest are protected; of these window_size, or an
    eighth of what a head keeps where that is less.

    Source: our own; DefensiveKV (Feng et al. 2025, arXiv:2510.13334), with queries as ExpectedAttention (Devoto et al.
    2025, arXiv:2510.00636) has them, but samples and their maximum in place of a Gaussian and its mean.

    Needs: keys, values, all queries, the output projection, input_ids, and a rotary embedding that can be undone. Cost:
    O((window_size + n_samples) * T * D) and O(T * D * hidden) per query head and layer, and sorting the scores; all
    pairs are stored until the prefill is over.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1), over all layers and heads.
        window_size: last tokens whose queries count as they are; the newest of them are kept. At least 1.
        kernel_size: width of the pooling in tokens, odd; at 1 there is none.
        n_sink, first_stage_mass, alpha_safeguard, norms_over, window_bias: as in LayerDefensiveKVPress.
        n_samples: queries from all over the prompt, at least 1; all of them where there are fewer.
    """

    needs_all_queries = True

    kernel_size: int = 1
    first_stage_mass: float = 0.75
    n_samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "n_samples")

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.n_sink, min(self._window(view), max(1, self.keep(view) // RECENT_PART))

    def _most(self, view: LayerView) -> Tensor:
        most = super()._most(view)
        ahead = samples_moved_on(view, min(self.n_samples, view.n_queries))
        for _, block in ahead.attention_blocks():  # [B, Hkv, G, n, T]
            most = most.maximum(pooled(block, self.kernel_size).amax(dim=(2, 3)))
        return most
