"""R-KV: what the newest tokens attend to, less what newer keys say already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from coldpress.bases.checks import check_at_least, check_between
from coldpress.bases.registry import register
from coldpress.bases.window import WindowPress
from coldpress.core.pick import at_once
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.decoding import CompressionRatioDecodingPress


@register("rkv")
@dataclass(frozen=True)
class RKVPress(WindowPress):
    """Keep tokens that the window attends to and whose keys no newer key repeats.

    With s[g, q, t] the attention logit of query head g of the group, at window query q, for key t, in float32:
    I[t] = maxpool along t of the mean over q of the softmax over the tokens before the window of max over g of
    s[g, q, t]. The group's logits are reduced before the softmax, by their maximum. R = redundancy(k), below, over all
    keys as they are stored, after rotation. score[b, h, t] = lam * I[t] - (1 - lam) * R[t]. The window is protected.

    Source: Cai et al. 2025, arXiv:2505.24133, section 3, as in the authors' code. Differs from the authors' code: a key
    counts among those that are like it, so that of two equal keys the older one is redundant (there each of the two
    excuses the other), and a key that nothing is like excuses no other (there it excuses the first one); rows of a
    batch are scored each by itself; a text no longer than the window is scored by its later half.

    Needs: keys and the window's queries. Cost: O(T * T * D) per KV head and layer, block by block: memory for one block
    of cosines, never [T, T]; and O(window_size * T * D) per query head.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        window_size: last tokens that score the others and are kept, at least 1.
        kernel_size: width of the pooling in tokens, odd.
        lam: weight of the attention, in [0, 1]; the redundancy has the rest.
        threshold: cosine above which two keys are alike.
    """

    window_size: int = 8
    kernel_size: int = 7
    lam: float = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "kernel_size")
        if self.kernel_size % 2 == 0:
            raise PressError(f"RKVPress: kernel_size must be odd, got {self.kernel_size}.")
        check_between(self, 0, 1, "lam")
        check_between(self, -1, 1, "threshold")

    def score(self, view: LayerView) -> Tensor:
        logits = view.window_logits(self.window(view)).amax(2)  # [B, Hkv, window, T]
        weights, is_older = self.weights(view, logits).mean(2), self.older(view)
        pooled = max_pool1d(weights.masked_fill(~is_older, -torch.inf), self.kernel_size, 1, self.kernel_size // 2)
        importance = torch.where(is_older, pooled, weights)
        return self.lam * importance - (1 - self.lam) * redundancy(view.keys, self.threshold)


def redundancy(keys: Tensor, threshold: float) -> Tensor:
    """How much other keys of a head are like each key: float32 ``[B, Hkv, T]``, a softmax over T.

    With C[i, j] the cosine of keys i and j, and 0 where i = j or j is the newest key with a cosine to i above
    ``threshold``, or i itself if none is newer: the softmax over j of the mean over i of C[i, j].

    Args:
        keys: ``[B, Hkv, T, D]``, all of them stored.
        threshold: cosine above which two keys are alike.
    """
    unit, token = normalize(keys.float(), dim=-1), torch.arange(keys.shape[2], device=keys.device)
    sums = torch.zeros(keys.shape[:3], device=keys.device)
    block = at_once(keys.device, sums.numel())
    for own in token.split(block):
        cosines, is_self = unit[:, :, own] @ unit.mT, own[:, None] == token  # [B, Hkv, b, T], [b, T]
        newest = token.where((cosines > threshold) | is_self, -1).amax(-1, keepdim=True)
        sums += cosines.masked_fill_(is_self | (token == newest), 0.0).sum(2)
    return (sums / keys.shape[2]).softmax(-1)


register("decoding_rkv", BoundaryPress, RKVPress, compression_interval=64)(CompressionRatioDecodingPress)
