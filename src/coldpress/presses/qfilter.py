"""QFilter: how far a key points where the queries of its head usually point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.view import LayerView
from coldpress.io.artefacts import Shape
from coldpress.learned.calibrated import Calibrated, Calibration
from coldpress.learned.calibration import ByLayer, Moments


@register("qfilter")
@dataclass(frozen=True)
class QFilterPress(Calibrated, ScorerPress):
    """Keep the keys that lie in the direction in which the queries of their head usually point.

    score[b, h, t] = -(f[h] . k[b, h, t]), in float32, with one filter f for each layer and KV head. With v the first
    right singular vector of a query head's (rotated) queries over a text, its sign such that their mean has a positive
    projection, f is the mean of -v over the group's heads: queries multiply k with something close to v.

    Source: Godey et al. 2025, arXiv:2503.02812, section 3. Differs from the paper: the published filters are -v, and
    so are ours; all queries of the text count, not a sample of 3,000 (v is found from the sum of q q').

    Needs: filters of the model; keys. Cost: O(T * D) per layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        filters: a file that ``coldpress calibrate qfilter`` wrote, or a published one, its folder, or its repository on
            the hub; None looks them up by the model's name.
    """

    pointwise = True

    artefact: ClassVar[str] = "qfilter"
    holds: ClassVar[str] = "filters"
    parameter: ClassVar[str] = "filters"
    published_names: ClassVar[Mapping[str, str]] = {"q_filters": "filters"}

    filters: str | None = None

    def score(self, view: LayerView) -> Tensor:
        filters = self.of_layer(view)["filters"]  # [Hkv, D]
        return -(view.keys.float() @ filters[..., None]).squeeze(-1)

    def layer_shapes(self, shape: Shape) -> dict[str, tuple[int | None, ...]]:
        return {"filters": (shape.n_kv_heads, shape.head_dim)}

    def repository(self, model: str) -> str | None:
        name = model.split("/")[-1]
        if "Meta-Llama-3.1-405B" not in name:
            name = name.replace("Meta-Llama", "Llama")
        return f"nthngdy/{name}_qfilt"

    def calibration(self) -> Calibration:
        return _Directions()


class _Directions(ByLayer):
    """The main direction of the queries of each group of heads."""

    def __init__(self) -> None:
        self.moments: dict[int, Moments] = {}
        self.n_kv_heads = 0

    def see(self, view: LayerView) -> None:
        self.n_kv_heads = view.keys.shape[1]
        self.moments.setdefault(view.layer_idx, Moments()).add(view.queries)

    def tensors(self) -> dict[str, Tensor]:
        filters = []
        for _, moments in sorted(self.moments.items()):
            # right singular vectors of the queries are eigenvectors of the sum of q q', the largest last
            main = torch.linalg.eigh(moments.products).eigenvectors[..., -1]  # [Hq, D]
            sign = torch.where((main * moments.total).sum(-1, keepdim=True) < 0, -1.0, 1.0)
            filters.append(-(sign * main).unflatten(0, (self.n_kv_heads, -1)).mean(1))
        return {"filters": torch.stack(filters).float()}
