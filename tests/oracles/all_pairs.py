"""Every pair that a model ever made, and attention to those of them alone that a head still holds."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from tests.contract.architectures import tiny
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from coldpress import PressedCache


class AllPairs:
    """All pairs of each layer, ``[B, Hkv, T, D]``, and which of them are still held, bool ``[B, Hkv, T]``.

    What is evicted is masked, in float64; nothing is freed, moved or stored elsewhere.
    """

    running: ClassVar[AllPairs]

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.held: dict[int, Tensor] = {}
        self.mask = torch.ones(0)  # bool [B, T], False where a token is padding

    def each(self, change: Any) -> None:
        for states in (self.keys, self.values, self.held):
            for i in states:
                states[i] = change(states[i])

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of ``ids``, the next tokens; ``mask`` is that of all tokens so far."""
        if mask is None:
            mask = torch.ones(len(ids), self.mask.shape[-1] + ids.shape[1])
        self.mask, AllPairs.running = mask.bool(), self
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :].long()
        logits: Tensor = tiny(self.name, "all_pairs")(ids, position_ids=places, use_cache=False).logits
        return logits

    def keep(self, past: PressedCache) -> None:
        """Hold the pairs whose positions ``past`` says that it holds, and no others."""
        for i, layer in enumerate(past.pressed_layers()):
            at, n = layer.positions(), self.keys[i].shape[2]
            self.held[i] = torch.zeros(*at.shape[:2], n + 1, dtype=torch.bool).scatter_(2, at.where(at >= 0, n), True)
            self.held[i] = self.held[i][..., :n]

    def attend(
        self,
        i: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        n_batch, n_heads, n, _ = key.shape
        new = torch.ones(n_batch, n_heads, n, dtype=torch.bool)
        if i in self.keys:
            key, value = torch.cat([self.keys[i], key], 2), torch.cat([self.values[i], value], 2)
            new = torch.cat([self.held[i], new], 2)
        self.keys[i], self.values[i], self.held[i] = key, value, new
        at = torch.arange(key.shape[2])
        sees = (new & self.mask[:, None])[:, :, None] & (at <= at[-n:, None])
        if window is not None:
            rank = self.mask.cumsum(-1)
            sees = sees & (rank[:, None] > rank[:, -n:, None] - window)[:, None]
        sees = sees | (at == at[-n:, None])
        group = query.shape[1] // n_heads
        key, value, sees = (states.repeat_interleave(group, 1) for states in (key, value, sees))
        logits = query.double() @ key.double().transpose(2, 3) * scaling
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        logits = logits.masked_fill(~sees, -torch.inf)
        if sinks is not None:  # a column that takes weight and gives nothing
            logits = torch.cat([logits, sinks.double()[None, :, None, None].expand(n_batch, -1, n, 1)], -1)
        return (logits.softmax(-1)[..., : key.shape[2]] @ value.double()).to(query.dtype)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    window, softcap, sinks = (options.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    found = AllPairs.running.attend(module.layer_idx, query, key, value, scaling, window, softcap, sinks)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register("all_pairs", _attention)
AttentionMaskInterface.register("all_pairs", lambda *args, **options: None)
