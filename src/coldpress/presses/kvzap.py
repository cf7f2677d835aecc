"""KVzap: a small trained model reads from a token's hidden state how much it will be needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.requirements import require_block
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.io.files import read_text
from coldpress.learned.published import damaged, model_name, published_file

_Layer = tuple[tuple[Tensor, Tensor], ...]  # weight [out, in] and bias [out] of one or two linear maps


@register("kvzap")
@dataclass(frozen=True)
class KVzapPress(ScorerPress):
    """Keep the tokens to which a model, trained to foresee KVzip+ scores, gives the highest scores.

    score[b, h, t] = (W2 gelu(W1 x[b, t] + b1) + b2)[h], or (W x[b, t] + b)[h] with model_type="linear", where x[b, t]
    is the input of the attention layer; each layer has weights of its own. Computed in the model's dtype. Scores are
    logarithms, comparable across heads and layers: made for a threshold, ``DMSPress(KVzapPress(), threshold=-4)``.

    While decoding only new tokens can be scored, older ones whose hidden states are gone keep the scores that the press
    around has had them carry; so DMSPress can go on with it, and DecodingPress, which scores anew, cannot.

    Source: Jegou and Jeblick 2026, arXiv:2601.07891, section 3.

    Needs: hidden states, and trained weights: those published as nvidia/KVzap-<model_type>-<model>, or a folder of
    yours. Cost: O(T * hidden * width) per layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        model_type: ``mlp`` or ``linear``.
        weights: a folder with config.json and model.safetensors as published; None finds them by the model's name.
    """

    kind = "trained"
    can_rechoose = False
    per_head_independent = False
    needs_hidden_states = True
    pointwise = True
    needs_all_queries = True  # as BlockPress means it: of every token, here its hidden state

    model_type: str = "mlp"
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in ("mlp", "linear"):
            raise PressError(f"KVzapPress: model_type must be 'mlp' or 'linear', got {self.model_type!r}.")
        if self.weights is not None:
            object.__setattr__(self, "weights", str(self.weights))

    def score(self, view: LayerView) -> Tensor:
        require_block(self, view.hidden_states)
        assert view.hidden_states is not None
        x = view.hidden_states[:, -view.n_tokens :].detach()
        n_old = view.n_tokens - x.shape[1]
        old = None if view.carried is None else view.carried[..., :n_old]
        if n_old and (old is None or old.isnan().any()):
            raise PressError(
                f"KVzapPress scores tokens by their hidden states, and those of {n_old} of {view.n_tokens} are gone; "
                "while decoding, a press around it has to carry their scores along (Kept.carry)."
            )
        n_heads = view.keys.shape[1] if view.whole is None else view.whole.keys.shape[1]
        first, *second = self._layer(view, x, n_heads)
        scores = torch.nn.functional.linear(x, *first)
        for weight, bias in second:
            scores = torch.nn.functional.linear(torch.nn.functional.gelu(scores), weight, bias)
        scores = scores.transpose(1, 2).float()  # [B, Hkv, T]
        if view.whole is not None:
            scores = scores[:, view.row_head[1]][:, None]
        return scores if old is None or not n_old else torch.cat([old, scores], dim=-1)

    def _layer(self, view: LayerView, x: Tensor, n_heads: int) -> _Layer:
        """The linear maps for the layer of ``view``, in the dtype and on the device of ``x``."""
        config, index = view.module.config, int(view.module.layer_idx)  # type: ignore[arg-type]
        repo = f"nvidia/KVzap-{self.model_type}-"
        repo += "<model>" if self.weights is not None else model_name(self, config)
        described, path = (
            published_file(self, repo, name, self.weights) for name in ("config.json", "model.safetensors")
        )
        try:
            sizes = json.loads(read_text(described))
            n_in, n_out, n_hidden, n_layers = (sizes[k] for k in ("input_dim", "output_dim", "hidden_dim", "n_modules"))
            if not all(type(n) is int and 0 < n < 2**31 for n in (n_in, n_out, n_layers, n_hidden or 1)):
                raise ValueError("its sizes are no positive integers")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged(self, described, repr(error)) from error
        found = "linear" if n_hidden is None else "mlp"
        if found != self.model_type:
            raise PressError(
                f"KVzapPress: {path.parent} holds weights of model_type={found!r}; say so, or give others."
            )
        if n_in != x.shape[-1] or n_out != n_heads or not index < n_layers:
            raise PressError(
                f"KVzapPress: {path.parent} holds weights for {n_layers} layers of {n_out} KV heads and hidden states "
                f"of {n_in}, and layer {index} of this model has {n_heads} KV heads and hidden states of "
                f"{x.shape[-1]}; give weights that were trained for it."
            )
        shapes = [(n_out, n_in)] if n_hidden is None else [(n_hidden, n_in), (n_out, n_hidden)]
        try:
            layer = _read(path, path.stat().st_mtime_ns, index, len(shapes), x.dtype, x.device)
        except Exception as error:  # safetensors has an error class of its own, and files may be broken in any way
            raise damaged(self, path, error) from error
        if [tuple(weight.shape) for weight, _ in layer] != shapes or [len(b) for _, b in layer] != [
            s[0] for s in shapes
        ]:
            raise damaged(self, path, f"the shapes of layer {index} are not those in config.json")
        return layer


@lru_cache(maxsize=256)  # layers, so some models at once
def _read(path: Path, changed: int, index: int, n_maps: int, dtype: torch.dtype, device: torch.device) -> _Layer:
    """One layer of the weights in ``path``; ``changed`` tells versions of the file apart."""
    from safetensors import safe_open

    names = [f"layers.{index}"] if n_maps == 1 else [f"layers.{index}.0", f"layers.{index}.2"]  # 1 is the GELU
    with torch.inference_mode(False), safe_open(path, "pt") as file:  # they outlive the mode that they are read in
        maps = [(file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.bias")) for name in names]
        if not all(part.is_floating_point() and part.isfinite().all() for each in maps for part in each):
            raise ValueError("its weights are not finite numbers")
        return tuple((weight.to(device, dtype), bias.to(device, dtype)) for weight, bias in maps)
