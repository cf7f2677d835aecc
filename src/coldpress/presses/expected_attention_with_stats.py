"""ExpectedAttention with statistics of the queries of another text, measured beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.io.artefacts import Shape
from coldpress.learned.calibrated import Calibrated, Calibration
from coldpress.learned.calibration import ByLayer, Moments
from coldpress.presses.expected_attention import ExpectedAttentionPress


@register("expected_attention_with_stats")
@dataclass(frozen=True)
class ExpectedAttentionStatsPress(Calibrated, ExpectedAttentionPress):
    """Keep the tokens that future queries are expected to attend to, if they are distributed as in another text.

    The score of ExpectedAttentionPress; mu and Sigma, for each layer and query head, are those of the queries before
    rotation over samples of a text that was read beforehand, the first n_sink tokens of each sample left out.

    Source: Devoto et al. 2025, arXiv:2510.00636, section 3. Differs from kvpress: its samples are cut after so many
    characters, ours after so many tokens.

    Needs: query statistics of the model; keys and values. Cost: O(T * D * D) per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        n_future_positions, n_sink, use_covariance, use_vnorm, epsilon: as in ExpectedAttentionPress.
        sample_seq_len, num_samples, dataset_name: which published statistics are looked for.
        stats_folder: a file that ``coldpress calibrate expected_attention_with_stats`` wrote, or a published one, its
            folder, or its repository on the hub; None looks them up by the model's name.
    """

    artefact: ClassVar[str] = "expected_attention_with_stats"
    holds: ClassVar[str] = "query statistics"
    parameter: ClassVar[str] = "stats_folder"
    published_names: ClassVar[Mapping[str, str]] = {"query_mean": "mean", "query_cov": "covariance"}

    sample_seq_len: int = 1000
    num_samples: int = 100
    dataset_name: str = "kmfoda/booksum"
    stats_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "sample_seq_len", "num_samples")
        if not isinstance(self.dataset_name, str) or not self.dataset_name:
            raise PressError(f"ExpectedAttentionStatsPress: dataset_name must be a name, got {self.dataset_name!r}.")

    def statistics(self, view: LayerView) -> tuple[Tensor, Tensor | None]:
        own = self.of_layer(view)
        return own["mean"][None, :, None], own["covariance"][None] if self.use_covariance else None

    def layer_shapes(self, shape: Shape) -> dict[str, tuple[int | None, ...]]:
        return {
            "mean": (shape.n_heads, shape.head_dim),
            "covariance": (shape.n_heads, shape.head_dim, shape.head_dim),
        }

    def repository(self, model: str) -> str | None:
        what = f"{model}_{self.dataset_name}".replace("/", "_")
        return f"alessiodevoto/exp_att_stats_{what}_{self.num_samples}_{self.sample_seq_len}_{self.n_sink}"

    def calibration(self) -> Calibration:
        return _Statistics(self.n_sink)


class _Statistics(ByLayer):
    """Mean and covariance of the queries of each head before rotation."""

    def __init__(self, n_sink: int) -> None:
        self.n_sink = n_sink
        self.moments: dict[int, Moments] = {}

    def see(self, view: LayerView) -> None:
        skip = max(0, self.n_sink - (view.end - view.n_queries))
        if skip < view.n_queries:
            self.moments.setdefault(view.layer_idx, Moments()).add(view.unrotated_queries()[:, :, skip:])

    def tensors(self) -> dict[str, Tensor]:
        if not self.moments:
            raise PressError(f"No sample is longer than the {self.n_sink} tokens of n_sink, which do not count.")
        layers = [moments for _, moments in sorted(self.moments.items())]
        return {
            "mean": torch.stack([moments.mean() for moments in layers]).float(),
            "covariance": torch.stack([moments.covariance() for moments in layers]).float(),
        }
