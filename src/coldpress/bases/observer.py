"""ObserverPress: scorers that watch attention, call by call, and go by what each pair has received since it came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView

__all__ = ["ObserverPress"]


@dataclass(frozen=True)
class ObserverPress(ScorerPress):
    """A scorer whose pairs carry a state, which every attention call brings up to date.

    Subclasses declare ``columns``, say in ``observe`` what a call adds to them, and read them in ``score`` by
    :meth:`state`.

    Args:
        compression_ratio, budget_tokens, budget_bytes: as in :class:`~coldpress.bases.scorer.BudgetPress`.
        n_sink: first tokens that stay.
        grace: newest tokens that stay: what just came has received little yet.
    """

    n_sink: int = 4
    grace: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "n_sink", "grace")

    def protected(self, view: LayerView) -> tuple[int, int]:
        return self.n_sink, self.grace

    def state(self, view: LayerView) -> Mapping[str, Tensor]:
        """The columns of ``view``; of one that no cache has shown to this press, what it observes there of a prompt."""
        missing = {kind.name: kind.new(view.keys) for kind in self.columns if kind.name not in view.columns}
        if not missing:
            return view.columns

        def look() -> Mapping[str, Tensor]:
            new = replace(view, columns={**view.columns, **missing}, n_counted=view.end, _memo={})
            return {**new.columns, **self.observe(new)}

        return view.once((self.with_ratio(0.0), "state"), look)

    @staticmethod
    def is_prompt(view: LayerView) -> bool:
        """Whether the queries of ``view`` are tokens of the prompt, or of a piece of it."""
        return view.positions is None or view.n_counted is not None

    @staticmethod
    def weights(view: LayerView) -> Iterator[tuple[Tensor, Tensor]]:
        """What each query of ``view`` gives to each key, mean over the group's heads, block by block.

        Yields:
            int64 ``[n]``, positions of the queries of a block, and float32 ``[B, Hkv, n, T']``; T' < T leaves out last
            keys that none of them sees. One query alone comes from ``view.attention_column_sums``, so that a view is
            asked for its weights once.
        """
        first, device = view.end - view.n_queries, view.keys.device
        if view.n_queries == 1:
            yield torch.tensor([first], device=device), view.attention_column_sums()[:, :, None]
            return
        for start, weights in view.attention_blocks():
            yield torch.arange(weights.shape[3], device=device) + first + start, weights.mean(2)
