"""FastKVzip: trained gates read from hidden states what KVzip would find out by repeating the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.registry import register
from coldpress.bases.scorer import BudgetPress
from coldpress.bases.together import carrying, keep_best
from coldpress.core.counts import adaptive_counts, counts_together, share_of
from coldpress.core.forced import forced
from coldpress.core.kept import Kept
from coldpress.core.requirements import require_block
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.learned.published import damaged, model_name, published_file

if TYPE_CHECKING:
    from coldpress.cache.pressed import PressedCache

_REPO = "Jang-Hyun/Fast-KVzip"
_LONG_TEXT = 32_000  # tokens from which on the window has a fixed size
_EPSILON = 1e-6  # of the norms
_PARTS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b")


@register("fastkvzip")
@dataclass(frozen=True)
class FastKVzipPress(BudgetPress):
    """Keep the pairs that trained gates take for important, whatever layer and head they are in.

    The gate of a layer makes of a token's hidden state x, the input of the attention layer, G queries q_g and one key
    k of 16 dimensions for each KV head, each RMS-normalised, and compares that key with keys s of its own:

        score[b, h, t] = mean over g of 1 / (1 + sum over s of exp((s - k) . q_g / 4 - b_g))

    The best scores of all layers and heads of a row are kept, of each layer with layerwise. The first n_sink tokens and
    a window at the end are protected: floor(T * window_ratio) tokens, at least 1, or window_size from T = 32,000 on.

    Source: Kim et al. 2026, arXiv:2601.17668, section 3, as in kvpress. Differs from kvpress: what is evicted is freed;
    every row of a batch has its own budget; padding has no score; gates are computed in float32 after the projections.

    Needs: hidden states of the prefill, and trained gates: those published in Jang-Hyun/Fast-KVzip, or yours. Cost:
    O(T * hidden * 16 * Hq) per layer; all pairs are stored until the prefill is over.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1), over all layers and heads.
        layerwise: every layer keeps the same number, which its heads share out.
        n_sink: first tokens that are kept.
        window_size: last tokens that are kept of long texts.
        window_ratio: share of shorter texts that is kept at their end, in [0, 1].
        weights: a folder with the file of gates as published; None finds it by the model's name.
    """

    kind = "trained"
    per_head = True
    per_layer = True
    needs_hidden_states = True
    chooses_together = True

    layerwise: bool = False
    n_sink: int = 4
    window_size: int = 4096
    window_ratio: float = 0.02
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "n_sink")
        check_at_least(self, 1, "window_size")
        check_between(self, 0, 1, "window_ratio")
        if self.weights is not None:
            object.__setattr__(self, "weights", str(self.weights))

    def compress(self, view: LayerView) -> Kept | None:
        n_keep = self.keep(view)
        if n_keep >= view.n_tokens:
            return None
        n_window = self.window_size if view.end >= _LONG_TEXT else max(1, share_of(view.end, self.window_ratio))
        scores = view.guard(self.score(view), forced(view, (self.n_sink, n_window), n_keep))
        return carrying(view, scores)

    def score(self, view: LayerView) -> Tensor:
        """What the gate says of every token: float32 ``[B, Hkv, T]``, in (0, 1)."""
        require_block(self, view.hidden_states)
        assert view.hidden_states is not None
        x = view.hidden_states.detach()
        gate = self._gate(view, x)
        n_heads, group, dim = view.keys.shape[1], view.group_size, gate["q_norm.weight"].shape[0]
        q = linear(x, gate["q_proj.weight"], gate["q_proj.bias"]).float().view(*x.shape[:2], n_heads, group, dim)
        k = linear(x, gate["k_proj.weight"]).float().view(*x.shape[:2], n_heads, 1, dim)
        q, k = _normed(q, gate["q_norm.weight"]), _normed(k, gate["k_norm.weight"])
        own = (q * k).sum(-1) / dim**0.5 + gate["b"].float()[:, 0]  # [B, T, Hkv, G]
        others = torch.einsum("bthgd,hsd->bthgs", q, gate["k_base"].float()[:, 0]) / dim**0.5
        return (own - others.logsumexp(-1)).sigmoid().mean(-1).transpose(1, 2)

    def choose_together(self, cache: PressedCache) -> None:
        keep_best(self, cache, self._layerwise if self.layerwise else counts_together)

    @staticmethod
    def _layerwise(scores: Sequence[Tensor], n_keep: int, n_safe: int) -> list[Tensor]:
        return [adaptive_counts(part, n_keep, n_safe) for part in scores]

    def _gate(self, view: LayerView, x: Tensor) -> dict[str, Tensor]:
        """The gate for the layer of ``view``, projections in the dtype and all of it on the device of ``x``."""
        config: Any = view.module.config
        index, n_heads, group = int(view.module.layer_idx), view.keys.shape[1], view.group_size  # type: ignore[arg-type]
        folder = "" if self.weights is not None else f"{model_name(self, config).lower()}/"
        path = published_file(self, _REPO, f"{folder}q{group}_dim16_sink16.pt", self.weights)
        try:
            gate = _read(path, path.stat().st_mtime_ns, index, x.dtype, x.device)
        except IndexError as error:
            raise PressError(f"FastKVzipPress: {path} has no gate for layer {index} of this model.") from error
        except Exception as error:  # a file may be broken in any way
            raise damaged(self, path, error) from error
        dim, n_base = gate["q_norm.weight"].shape[-1], gate["k_base"].shape[-2]
        shapes = {
            "q_proj.weight": (n_heads * group * dim, x.shape[-1]),
            "q_proj.bias": (n_heads * group * dim,),
            "k_proj.weight": (n_heads * dim, x.shape[-1]),
            "k_norm.weight": (dim,),
            "k_base": (n_heads, 1, n_base, dim),
            "b": (n_heads, 1, group),
        }
        for name, shape in shapes.items():
            if gate[name].shape != shape:
                raise PressError(
                    f"FastKVzipPress: {path} has a gate of another shape: {name} is {tuple(gate[name].shape)}, and "
                    f"layer {index} of this model, of {n_heads} KV heads for {group} query heads each and hidden "
                    f"states of {x.shape[-1]}, needs {shape}; give gates that were trained for it."
                )
        return gate


def _normed(states: Tensor, weight: Tensor) -> Tensor:
    """Divided by their root mean square: float32 ``[..., D]``."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + _EPSILON) * weight.float()


@lru_cache(maxsize=256)  # layers, so some models at once
def _read(path: Path, changed: int, index: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """One gate of those in ``path``; ``changed`` tells versions of the file apart."""
    gate = _read_all(path, changed)[index]
    if (
        gate["q_norm.weight"].dim() != 1
        or gate["k_base"].dim() != 4
        or not all(gate[n].isfinite().all() for n in _PARTS)
    ):
        raise ValueError("its tensors are no gate, or not finite")
    with torch.inference_mode(False):  # they outlive the mode that they are read in
        return {n: gate[n].to(device, dtype if "proj" in n else torch.float32) for n in _PARTS}


@lru_cache(maxsize=2)
def _read_all(path: Path, changed: int) -> list[dict[str, Tensor]]:
    import numpy as np

    # The published files have some numbers of numpy's beside the gates, under the names of numpy 1 or 2.
    multiarray: Any = (np._core if hasattr(np, "_core") else np.core).multiarray
    named = [
        (f, f"numpy.{core}.multiarray.{f.__name__}")
        for f in (multiarray._reconstruct, multiarray.scalar)
        for core in ("core", "_core")
    ]
    known: list[Any] = [*named, np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    with torch.inference_mode(False), torch.serialization.safe_globals(known):
        gates: list[dict[str, Tensor]] = torch.load(path, map_location="cpu", weights_only=True)["module"]
    return gates
