"""KeyRerotation: close the gaps that eviction leaves between positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coldpress.bases.registry import register
from coldpress.bases.wrapper import WrapperPress
from coldpress.core.kept import Kept
from coldpress.core.requirements import PRESS
from coldpress.core.view import LayerView
from coldpress.presses.streaming_llm import StreamingLLMPress


@register("rerotated_streaming_llm", StreamingLLMPress)
@dataclass(frozen=True)
class KeyRerotationPress(WrapperPress):
    """Keep what the inner press keeps, its keys rotated to consecutive positions.

    A head that keeps n of T tokens gets its j-th key at position T - n + j, so that the next token, at position T,
    follows it without a gap. Rotary attention depends on distances only: this is the same as keys at 0 .. n - 1 and
    next tokens from n on, and the cache goes on counting positions in the text, for padded rows, layers and heads that
    keep different numbers as well. Distances stay below n plus the tokens that follow, however long the text was. Keys
    are moved by the model's own rotary embedding, in float32, and only in the dimensions that it rotates; layers
    without one keep their keys as they are. Sliding windows go by the positions in the text.

    Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2 (positions within the cache), with StreamingLLMPress inside.
    Differs from the paper: keys are moved once, after the prompt.

    Needs: what the inner press needs, and a rotary embedding that can be undone. Cost: of the inner press, and
    O(n * D) per layer.

    Args:
        press: any press that chooses which pairs are kept, or MergingPress, with the compression ratio.
    """

    can_rechoose = False
    changes = frozenset({"keys"})
    needs_inside = (*PRESS, "keys")

    def compress(self, view: LayerView) -> Kept | None:
        kept = self.press.compress(view)
        if kept is None:
            return None
        longest = kept.positions.shape[-1]
        gaps = (kept.positions < 0).sum(-1, keepdim=True)
        places = torch.arange(longest, device=gaps.device) + gaps + (view.n_tokens - longest)
        return kept._replace(keys=view.moved_keys(kept, places.clamp(max=view.n_tokens - 1)))
