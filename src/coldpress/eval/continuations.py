"""Predictions of continuations that are fed behind contexts in a cache, which is left unchanged."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.rope import stand_at
from coldpress.cache.pressed import PressedCache
from coldpress.eval.losses import Rows, blocks

__all__ = ["Prediction", "left_padded", "predictions"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was predicted while some tokens were fed: log-probabilities in nats, float32."""

    fed: list[float]  # of each token but the first
    is_greedy: bool  # whether each of these was the most likely one
    last: Tensor  # ``[V]``, of what may follow

    def of(self, token: int) -> tuple[float, bool]:
        """The answer for these tokens and another one after them."""
        return math.fsum([*self.fed, float(self.last[token])]), self.is_greedy and int(self.last.argmax()) == token

    def __eq__(self, other: object) -> bool:
        """Bit for bit."""
        return isinstance(other, Prediction) and self.fed == other.fed and torch.equal(self.last, other.last)


def predictions(
    model: PreTrainedModel, cache: PressedCache, mask: Tensor | None, rows: Tensor, fed: Sequence[tuple[int, ...]]
) -> list[Prediction]:
    """What is predicted where each of ``fed`` stands behind its row of ``cache``, whose ``mask`` is ``[B, C]``."""
    width = max(len(tokens) for tokens in fed)
    ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in fed], device=rows.device)
    wanted = ids.roll(-1, 1)
    branch = cache.fork()
    branch.batch_select_indices(rows)
    stand_at(model, branch.seen_tokens)
    # A press that goes on would evict after a call: what is written is fed as it is written, token by token.
    step = 1 if cache.press is not None and cache.press.evicts_while_decoding else width
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    own, is_top = [], []
    last: dict[int, Tensor] = {}
    for start in range(0, width, step):
        options: dict[str, Any] = {}
        if mask is not None:
            seen = mask[rows]
            options["attention_mask"] = torch.cat([seen, seen.new_ones(len(rows), start + step)], 1)
            if takes_positions:
                steps = torch.arange(start, start + step, device=rows.device)
                options["position_ids"] = seen.sum(-1, keepdim=True) + steps
        logits = model(ids[:, start : start + step], **cache_argument(branch, model), use_cache=True, **options).logits
        first = start
        for block, targets in blocks(logits, wanted[:, start : start + step]):
            part = Rows.of(block)
            own.append((-part.losses(targets)).cpu())
            is_top.append((block.argmax(-1) == targets).cpu())
            n = targets.shape[1]
            ends = [row for row, tokens in enumerate(fed) if first < len(tokens) <= first + n]
            log_probs = part.log_probs() if ends else block
            for row in ends:
                last[row] = log_probs[row, len(fed[row]) - 1 - first].cpu()
            first += n
    losses, tops = torch.cat(own, 1), torch.cat(is_top, 1)
    return [
        Prediction(losses[row, : len(tokens) - 1].tolist(), bool(tops[row, : len(tokens) - 1].all()), last[row])
        for row, tokens in enumerate(fed)
    ]


def left_padded(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids ``[B, C]`` and their mask, None where there is no padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
