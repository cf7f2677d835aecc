"""KVgrad: KVzip's attention, weighed by what the last hidden states make of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coldpress.bases.registry import register
from coldpress.bases.replay import last_block
from coldpress.core.call import LayerCall
from coldpress.errors import PressError
from coldpress.presses.kvzip import KVzipPress

if TYPE_CHECKING:
    from coldpress.cache.layer import PressedLayer
    from coldpress.cache.pressed import PressedCache


@register("kvgrad")
@dataclass(frozen=True)
class KVgradPress(KVzipPress):
    """Keep the pairs whose contribution, when the model repeats the text, moves its last hidden states most.

    The replay and its attention A[q, t] are KVzip's. With a[q] the residual stream after the layer's attention and
    Phi = sum over q of ||h[q]||_2^2, h the output of the last decoder layer before the final norm:
    score[h, t] = max over q and the group's heads of A[q, t] * ||W_O v[t]||_2 * ||d Phi / d a[q]||_2.

    Source: KVgrad, https://openreview.net/forum?id=cg1wTCJjjk, as in kvpress. Differs from kvpress: as KVzipPress does;
    it works inside torch.inference_mode and torch.no_grad, and neither needs nor leaves gradients on the model.

    Needs: the model once more after the prefill, with gradients, its tokenizer, one text at a time. Cost: a forward
    and a backward pass over the text, each chunk attending to all of it; all activations of a chunk at once.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1), over all layers and heads.
        layerwise: every layer keeps the same number, which its heads share out.
        n_sink: first tokens that are kept, and seen by every chunk of the replay.
        chunk_size: tokens of the text in each pass of the replay, at least 1.
        tokenizer: as for KVzipPress.
    """

    kvzip_plus_normalization: bool = field(default=False, init=False, repr=False)
    chunk_size: int = 512

    def scores(
        self, cache: PressedCache, model: nn.Module, token_ids: Tensor, layers: Sequence[PressedLayer]
    ) -> list[Tensor]:
        if len(cache.pressed_layers()) < len(cache.layers):
            raise PressError(
                "KVgradPress needs gradients, which do not go through layers that keep a state instead of keys and "
                "values, as this model's do; use KVzipPress."
            )
        indices = {layer.index for layer in layers}
        with torch.inference_mode(False):  # what is made in inference mode can never have a gradient
            found = {
                layer.index: torch.zeros(layer.keys.shape[:3], device=layer.keys.device)
                for layer in layers
                if layer.keys is not None
            }
            for start, stop, replay in self.chunks(token_ids.clone(), model):
                calls: dict[int, tuple[PressedLayer, LayerCall]] = {}

                def on_attention(
                    layer: PressedLayer, call: LayerCall, calls: dict[int, tuple[PressedLayer, LayerCall]] = calls
                ) -> None:
                    if layer.index in indices:
                        calls[layer.index] = layer, call

                outputs, last = self._differentiate(cache, model, replay, on_attention)
                wanted = [outputs[call.module] for _, call in calls.values()]
                with torch.enable_grad():
                    phi = last.float().square().sum()
                gradients = torch.autograd.grad(phi, wanted)
                for (index, (layer, call)), gradient in zip(calls.items(), gradients, strict=True):
                    weight = gradient.float().norm(dim=-1)  # [1, Q]
                    found[index][:, :, start:stop] = self.weigh(layer, call, start, stop, weight)
        return list(found.values())

    def _differentiate(
        self, cache: PressedCache, model: nn.Module, replay: Tensor, on_attention: Any
    ) -> tuple[dict[nn.Module, Tensor], Tensor]:
        """Run the replay with gradients: outputs of the attention layers, and of the last decoder layer."""
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs[module] = output[0] if isinstance(output, tuple) else output

        last = last_block(model)
        with ExitStack() as stack, torch.enable_grad():
            for module in model.modules():
                if hasattr(module, "layer_idx") or module is last:
                    stack.callback(module.register_forward_hook(keep).remove)
            embeddings = model.get_input_embeddings()(replay).detach().requires_grad_(True)  # type: ignore[operator]
            self.run(cache, model, on_attention, replay.shape[1], inputs_embeds=embeddings)
        return outputs, outputs[last]
