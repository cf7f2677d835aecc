"""TriAttention: what queries will attend to at many distances, by what they were in another text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.forced import forced
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.io.artefacts import Shape
from coldpress.learned.calibrated import Calibrated, Calibration
from coldpress.learned.calibration import ByLayer


@register("triattention")
@dataclass(frozen=True)
class TriAttentionPress(Calibrated, ScorerPress):
    """Keep the tokens that queries at many distances ahead are expected to attend to, and the newest tokens.

    Each query head has statistics of its queries q before rotation over a text: the mean E, and for each pair f of
    channels that turn together, as the complex number z_f, the mean length A_f = mean |z_f|. With kappa the key before
    rotation, D its distance from the newest token, w_f the frequencies and c the scaling of the rotary embedding:
    S(D) = c**2 * sum over f of |E_f| |kappa_f| cos(w_f D + arg(E_f conj(kappa_f)))
    + c**2 * sum over f of (A_f - |E_f|) |kappa_f| + E[q_pass] . kappa_pass,
    s[t] = mean of S(D + delta) over delta in 1, 2, 4, ... max_offset, and
    score[b, h, t] = max over the group's heads of (s[t] - mean) / standard deviation, in float32, these two over the
    tokens that are neither pinned nor in the window. A standard deviation of 0 counts as 1e-6.

    The third sum is for channels that the model does not rotate (3 of 4 in GPT-NeoX): a query at distance D gives the
    logit Re(sum over f of z_f conj(kappa_f) exp(i w_f D)) * c**2 + q_pass . kappa_pass. Its mean over queries that do
    not depend on their position replaces z_f by E_f and q_pass by E[q_pass], which is the first and the third sum. The
    second is what the queries' lengths add to that; they have no length there that a rotation keeps.
    The first sum and the third are the product of the key as it is stored with E, rotated by the mean rotation of the
    positions ahead. So no key is rotated back, and pairs may be halves (Llama) or neighbours (GPT-J).

    Source: Mao et al. 2026, arXiv:2604.04921. Differs from the paper: the prompt is not kept as a whole (pin= does
    that), and sinks are not protected; it compresses prompts too. Differs from the authors' code: statistics are of
    final queries, normalised where the model does that; heads and layers choose each for themselves (its option
    per_layer_perhead); no noise breaks ties; unrotated channels count.

    Needs: query statistics of the model; keys. Cost: O(T * D) per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        window_size: newest tokens that are kept, at least 0.
        max_offset: largest distance ahead of the newest token, at least 1; the others are powers of 2.
        group_reduction: ``max`` or ``mean`` over the heads that share a KV head.
        stats: a file that ``coldpress calibrate triattention`` wrote, or its folder; None looks it up by the model's
            name.
    """

    artefact: ClassVar[str] = "triattention"
    holds: ClassVar[str] = "query statistics"
    parameter: ClassVar[str] = "stats"

    window_size: int = 128
    max_offset: int = 65536
    group_reduction: Literal["max", "mean"] = "max"
    stats: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "window_size")
        check_at_least(self, 1, "max_offset")
        if self.group_reduction not in ("max", "mean"):
            raise PressError(f"TriAttentionPress: group_reduction is 'max' or 'mean', got {self.group_reduction!r}.")

    def expected(self, view: LayerView, offsets: Sequence[int]) -> Tensor:
        """The first and the third sum, mean over ``offsets`` from the newest token: float32 ``[B, Hkv, G, T]``."""
        rope, mean = view.find_rope(), self.of_layer(view)["mean"][None, :, None]  # [1, Hq, 1, D]
        if rope is not None:
            mean = rope.rotate(mean, *rope.mean_ahead(view.end - 1, offsets, mean.device))
        return _products(view.keys.float(), mean[0, :, 0])

    def spread(self, view: LayerView) -> Tensor:
        """The second sum, which no distance changes: float32 ``[B, Hkv, G, T]``, or zeros where nothing is rotated."""
        rope, own = view.find_rope(), self.of_layer(view)
        if rope is None:
            return view.keys.new_zeros(())
        lengths, mean = own["length"][:, : rope.width], rope.pair_norms(own["mean"][None, :, None])[0, :, 0]
        c = rope.cos_sin(torch.zeros(1, dtype=torch.long, device=mean.device))[0].max()  # keys are scaled already
        return _products(rope.pair_norms(view.keys.float()), (lengths - mean).clamp(min=0) * (c / 2))  # pairs twice

    def score(self, view: LayerView) -> Tensor:
        offsets = [1 << i for i in range(self.max_offset.bit_length())]
        sums = self.expected(view, offsets) + self.spread(view)  # [B, Hkv, G, T]
        counted = ~forced(view, self.protected(view))[:, :, None]  # [B or 1, Hkv or 1, 1, T]
        counted = counted | ~counted.any(-1, keepdim=True)  # all of them where all are protected
        n = counted.sum(-1, keepdim=True)
        sums = sums - (sums * counted).sum(-1, keepdim=True) / n
        deviation = ((sums.square() * counted).sum(-1, keepdim=True) / n).sqrt()
        scores = sums / deviation.clamp(min=1e-6)
        return scores.amax(2) if self.group_reduction == "max" else scores.mean(2)

    def protected(self, view: LayerView) -> tuple[int, int]:
        return 0, self.window_size

    def layer_shapes(self, shape: Shape) -> dict[str, tuple[int | None, ...]]:
        return {"mean": (shape.n_heads, shape.head_dim), "length": (shape.n_heads, shape.head_dim)}

    def calibration(self) -> Calibration:
        return _Statistics()


def _products(keys: Tensor, queries: Tensor) -> Tensor:
    """Of ``[B, Hkv, T, d]`` with ``[Hq, d]``, each head with those of its group: ``[B, Hkv, G, T]``."""
    return queries.unflatten(0, (keys.shape[1], -1)) @ keys.transpose(-1, -2)


class _Statistics(ByLayer):
    """Mean of each head's queries before rotation, and the mean length of each pair of channels.

    ``length`` has a pair's number in both of its channels, and 0 in channels that are not rotated.
    """

    def __init__(self) -> None:
        self.n = 0
        self.totals: dict[int, Tensor] = {}  # float64 [2, Hq, D] of each layer

    def see(self, view: LayerView) -> None:
        rope, queries = view.find_rope(), view.unrotated_queries()
        lengths = torch.zeros_like(queries)
        if rope is not None:
            lengths[..., : rope.width] = rope.pair_norms(queries)
        both = torch.stack([queries[0], lengths[0]]).cpu().double().sum(2)
        self.totals[view.layer_idx] = self.totals.get(view.layer_idx, 0) + both
        self.n += view.n_queries if view.layer_idx == 0 else 0

    def tensors(self) -> dict[str, Tensor]:
        means = (torch.stack([total for _, total in sorted(self.totals.items())], dim=1) / self.n).float()
        return {"mean": means[0], "length": means[1]}
