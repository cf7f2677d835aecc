"""A codec: how the older pairs of a cache are stored. Here each key and value in 8 bits, with a step of its own.

A codec sees blocks of pairs, whole ones and once, and no layer, row or head. It goes with any press that stops after
the prompt, in heads of equal or different length::

    PressedCache(AdaKVPress(SnapKVPress(0.5)), storage=Int8Codec())
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress import Codec


@dataclass(frozen=True)
class Int8Codec(Codec):
    """Numbers of a key or value as q * s, with q in -127 .. 127 and s = max |number| / 127: off by s / 2 at most.

    Args:
        block_tokens: pairs of a head that are encoded together, at least 1.
        exact_tokens: newest pairs of a head that stay as they are.
    """

    block_tokens: int = 16
    exact_tokens: int = 32

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        blocks = {}
        for name, numbers in (("keys", keys.float()), ("values", values.float())):
            step = numbers.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
            blocks[f"{name}.step"] = step  # [N, g, 1]
            blocks[f"{name}.codes"] = (numbers / step).round().to(torch.int8)  # [N, g, D]
        return blocks

    def decode_keys(self, blocks: dict[str, Tensor], out: Tensor) -> None:
        self._decode(blocks["keys.codes"], blocks["keys.step"], out)

    def decode_values(self, blocks: dict[str, Tensor], out: Tensor) -> None:
        self._decode(blocks["values.codes"], blocks["values.step"], out)

    def _decode(self, codes: Tensor, step: Tensor, out: Tensor) -> None:
        out.copy_((codes * step).view(out.shape))
