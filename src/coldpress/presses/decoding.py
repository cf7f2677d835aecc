"""DecodingPress: a budget for the text that is being generated, restored every few tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from coldpress.bases.checks import check_at_least
from coldpress.bases.press import BasePress
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.counts import keep_count
from coldpress.core.definition import as_given
from coldpress.core.kept import Kept
from coldpress.core.ratio import check_ratio
from coldpress.core.requirements import PRESS, refusal, require
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.keydiff import KeyDiffPress
from coldpress.presses.knorm import KnormPress
from coldpress.presses.snapkv import SnapKVPress
from coldpress.presses.streaming_llm import StreamingLLMPress
from coldpress.presses.tova import TOVAPress
from coldpress.presses.triattention import TriAttentionPress

if TYPE_CHECKING:
    from coldpress.cache.pressed import PressedCache


@dataclass(frozen=True)
class DecodingPress(BasePress):
    """Keep everything of the prompt; while decoding, cut the cache back to a fixed size every few tokens.

    Each time that compression_interval tokens have come since the last time, the base press chooses target_size pairs
    of those that are stored, on average over heads and layers. In between the new tokens are kept, so that, once it was
    first cut back, a layer never stores more than target_size + compression_interval - 1 tokens after a step. Pairs are
    stored in the order of the text, sinks and recent tokens are found by their positions, and queries are those of the
    newest tokens at the positions where they were made, whatever has been evicted since.

    Source: kvpress's DecodingPress, https://github.com/NVIDIA/kvpress; no paper. Differs from kvpress: the newest
    queries are remembered across compressions; tokens are counted, not calls, so a question of many tokens counts
    for as many; heads may keep different numbers (AdaKVPress inside), and evict for real.

    Needs: what the base press needs, of the newest tokens only. Cost: of the base press, every compression_interval
    tokens, on target_size + compression_interval tokens.

    Args:
        base_press: a scorer, or AdaKVPress and its relatives around one, without a ratio or budget of its own.
        compression_interval: tokens between two compressions, at least 1.
        target_size: tokens that are kept of each head, on average, at least 1.
        hidden_states_buffer_size: how many of the newest tokens' queries the base press sees; at least one is kept.
    """

    at_prefill = False
    can_rechoose = True
    per_head_independent = True

    base_press: ScorerPress
    compression_interval: int = 512
    target_size: int = 2048
    hidden_states_buffer_size: int = 256

    def __post_init__(self) -> None:
        require(self, self.base_press, *PRESS, "again", "amount")
        check_at_least(self, 1, "compression_interval", "target_size")
        check_at_least(self, 0, "hidden_states_buffer_size")

    @property
    def n_recent_queries(self) -> int:
        return max(1, self.hidden_states_buffer_size)

    def compress(self, view: LayerView) -> Kept | None:
        return None

    def is_due(self, n_new: int) -> bool:
        return n_new >= self.compression_interval

    def target(self, view: LayerView) -> int:
        """How many tokens of the text so far are kept of each head, on average."""
        return self.target_size

    def compress_again(self, view: LayerView) -> Kept | None:
        return self.base_press.with_budget(budget_tokens=self.target(view)).compress(view)


@register("decoding_knorm", BoundaryPress, KnormPress, compression_interval=64)
@register("decoding_keydiff", BoundaryPress, KeyDiffPress, compression_interval=64)
@register("decoding_snapkv", BoundaryPress, SnapKVPress, compression_interval=64)
@register("decoding_streaming_llm", BoundaryPress, StreamingLLMPress, compression_interval=64)
@register("decoding_tova", BoundaryPress, TOVAPress, compression_interval=64)
@register("decoding_triattention", BoundaryPress, TriAttentionPress, compression_interval=64)
@dataclass(frozen=True)
class CompressionRatioDecodingPress(DecodingPress):
    """Keep everything of the prompt; while decoding, cut the cache back to a share of the text so far.

    As DecodingPress, but the base press chooses floor(n * (1 - target_compression_ratio)) pairs where n is the length
    of the text so far, prompt included. The registered names compress every 64 tokens, their ratio is
    target_compression_ratio, and a tenth of what they keep is at each end of the prompt (BoundaryPress, share).

    Source: kvpress's CompressionRatioDecodingPress, https://github.com/NVIDIA/kvpress; no paper. Differs from kvpress:
    as DecodingPress does; the length of the text is the cache's own, not read from position_ids.

    Needs: what the base press needs, of the newest tokens only. Cost: of the base press, every compression_interval
    tokens.

    Args:
        base_press: a scorer, or AdaKVPress and its relatives around one, without a ratio or budget of its own.
        compression_interval: tokens between two compressions, at least 1.
        hidden_states_buffer_size: how many of the newest tokens' queries the base press sees; at least one is kept.
        target_compression_ratio: fraction of the pairs of the text so far to remove, in [0, 1).
    """

    has_ratio = True

    target_size: int = field(default=1, init=False, repr=False, compare=False)
    target_compression_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.target_compression_ratio, "target_compression_ratio")

    def target(self, view: LayerView) -> int:
        return keep_count(view.end, self.target_compression_ratio)


@dataclass(frozen=True)
class PrefillDecodingPress(BasePress):
    """Keep of the prompt what one press keeps, and go on with another one while decoding.

    Source: kvpress's PrefillDecodingPress, https://github.com/NVIDIA/kvpress; no paper.

    Needs: what the two presses need. Cost: the sum of theirs.

    Args:
        prefilling_press: any press that compresses after the prefill; None keeps the prompt whole.
        decoding_press: a press that goes on while decoding, such as DecodingPress; None keeps all that is generated.
    """

    can_rechoose = True
    per_head_independent = True

    prefilling_press: BasePress | None = None
    decoding_press: BasePress | None = None

    def __post_init__(self) -> None:
        for name in ("prefilling_press", "decoding_press"):
            press = getattr(self, name)
            if not isinstance(press, (BasePress, type(None))):
                raise PressError(f"PrefillDecodingPress: {name} must be a press or None, got {as_given(press)}.")
        if self.prefilling_press is None and self.decoding_press is None:
            raise PressError("PrefillDecodingPress needs a prefilling_press, a decoding_press or both.")
        if self.decoding_press is not None and not self.decoding_press.evicts_while_decoding:
            raise PressError(refusal(self, self.decoding_press, "goes_on"))
        if isinstance(self.decoding_press, PrefillDecodingPress):
            raise PressError(
                "PrefillDecodingPress: one inside another would never use its prefilling_press; give the inner one's "
                "decoding_press itself."
            )
        if self.prefilling_press is not None:
            require(self, self.prefilling_press, "prompt", "stops", *(["channels"] if self.decoding_press else []))

    @property
    def needs_hidden_states(self) -> bool:
        return any(press.needs_hidden_states for press in (self.prefilling_press, self.decoding_press) if press)

    @property
    def needs_model(self) -> bool:
        return self.prefilling_press is not None and self.prefilling_press.needs_model

    @property
    def chooses_together(self) -> bool:
        return self.prefilling_press is not None and self.prefilling_press.chooses_together

    @property
    def n_recent_queries(self) -> int:
        return 0 if self.decoding_press is None else self.decoding_press.n_recent_queries

    @property
    def n_waiting(self) -> int:
        return 0 if self.decoding_press is None else self.decoding_press.n_waiting

    @property
    def chooses_again(self) -> bool:
        return self.prefilling_press is None or self.prefilling_press.chooses_again

    def judge(self, view: LayerView) -> Tensor:
        assert self.decoding_press is not None
        return self.decoding_press.judge(view)

    def compress(self, view: LayerView) -> Kept | None:
        return None if self.prefilling_press is None else self.prefilling_press.compress(view)

    def check_prefill(self, token_ids: Tensor, has_padding: bool) -> None:
        if self.prefilling_press is not None:
            self.prefilling_press.check_prefill(token_ids, has_padding)

    def finish(self, cache: PressedCache, model: nn.Module, token_ids: Tensor) -> None:
        if self.prefilling_press is not None:
            self.prefilling_press.finish(cache, model, token_ids)

    def choose_together(self, cache: PressedCache) -> None:
        if self.prefilling_press is not None:
            self.prefilling_press.choose_together(cache)

    def is_due(self, n_new: int) -> bool:
        return self.decoding_press is not None and self.decoding_press.is_due(n_new)

    def compress_again(self, view: LayerView) -> Kept | None:
        assert self.decoding_press is not None
        return self.decoding_press.compress_again(view)
