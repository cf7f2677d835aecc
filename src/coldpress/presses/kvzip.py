"""KVzip: what the model looks at when it repeats the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.replay import ReplayPress, chunk_view, projected_norms
from coldpress.core.call import LayerCall
from coldpress.core.counts import adaptive_counts
from coldpress.core.requirements import require_block
from coldpress.errors import PressError

if TYPE_CHECKING:
    from coldpress.cache.layer import PressedLayer
    from coldpress.cache.pressed import PressedCache

_K = TypeVar("_K", bound="KVzipPress")
_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_N_LEAD = 8  # tokens of the chunk before that a later prompt ends in


@register("kvzip")
@register("kvzip_plus", kvzip_plus_normalization=True)
@dataclass(frozen=True)
class KVzipPress(ReplayPress):
    """Keep the pairs that the model looks at when it is asked to repeat the text, whatever layer and head they are in.

    After the prefill the text is replayed in chunks of chunk_size tokens: "Repeat the previous context exactly.", then
    the chunk. With A[q, t] the attention (softmax in float32) of token q of the replay over the first n_sink tokens,
    the chunk and the replay so far: score[h, t] = max over q and the group's heads of A[q, t], for t in the chunk. The
    best scores of all layers and heads are kept, of each layer with layerwise. With kvzip_plus_normalization A[q, t]
    is multiplied by ||W_O v[t]||_2 / ||x[q]||_2, x the input of the attention layer. The first n_sink tokens, and what
    a chat template puts before the text, are protected.

    Source: Kim et al. 2025, arXiv:2505.23416, section 3 and algorithm 1; the normalisation is that of Jegou and Jeblick
    2026, arXiv:2601.07891, as in kvpress. Differs from kvpress: what is evicted is freed; all of a chat template's
    beginning is protected, as in the authors' code, and it is looked for in the text instead of taken for granted; the
    tokenizer may be handed over.

    Needs: the model once more after the prefill, its tokenizer, one text at a time. Cost: a second pass over the text,
    each chunk attending to all of it, and the keys and values a second time while it lasts.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1), over all layers and heads.
        layerwise: every layer keeps the same number, which its heads share out.
        n_sink: first tokens that are kept, and seen by every chunk of the replay.
        kvzip_plus_normalization: weigh attention by values and hidden states.
        chunk_size: tokens of the text in each pass of the replay, at least 1.
        tokenizer: the model's. The pipeline and the commands hand theirs over; else it is loaded from where the model
            was loaded from.
    """

    needs_hidden_states = True

    layerwise: bool = False
    n_sink: int = 4
    kvzip_plus_normalization: bool = False
    chunk_size: int = 2048
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "n_sink")
        check_at_least(self, 1, "chunk_size")

    def prepared(self: _K, model: PreTrainedModel, tokenizer: Any = None) -> _K:
        if self.tokenizer is not None or not self.compresses:
            return self
        return replace(self, tokenizer=_find_tokenizer(self, model) if tokenizer is None else tokenizer)

    def n_first(self, token_ids: Tensor) -> int:
        return max(self.n_sink, self._frame(token_ids)[0])

    def counts(self, scores: Sequence[Tensor], n_keep: int, n_safe: int) -> list[Tensor]:
        if self.layerwise:
            return [adaptive_counts(part, n_keep, n_safe) for part in scores]
        return super().counts(scores, n_keep, n_safe)

    def scores(
        self, cache: PressedCache, model: nn.Module, token_ids: Tensor, layers: Sequence[PressedLayer]
    ) -> list[Tensor]:
        found = {layer.index: _zeros(layer) for layer in layers}
        for start, stop, replay in self.chunks(token_ids, model):

            def on_attention(layer: PressedLayer, call: LayerCall, start: int = start, stop: int = stop) -> None:
                if layer.index in found:
                    found[layer.index][:, :, start:stop] = self.score_chunk(layer, call, start, stop)

            self.run(cache, model, on_attention, replay.shape[1], input_ids=replay)
        return list(found.values())

    def score_chunk(self, layer: PressedLayer, call: LayerCall, start: int, stop: int) -> Tensor:
        """Scores of tokens ``start .. stop - 1`` by the replay that ``call`` is about: float32 ``[1, Hkv, n]``."""
        queries = None
        if self.kvzip_plus_normalization:
            require_block(self, call.hidden_states)
            assert call.hidden_states is not None
            queries = 1 / call.hidden_states.float().norm(dim=-1)  # [1, Q]
        return self.weigh(layer, call, start, stop, queries)

    def weigh(self, layer: PressedLayer, call: LayerCall, start: int, stop: int, query_weight: Tensor | None) -> Tensor:
        """Max over queries and the group's heads of attention: ``[1, Hkv, n]``.

        Args:
            query_weight: ``[1, Q]``; attention is multiplied by it and by the norm of the projected values. None for
                attention alone.
        """
        assert layer.values is not None
        n_sink = min(self.n_sink, start)
        device = call.query.device
        view = chunk_view(
            layer, call, torch.cat([torch.arange(n_sink, device=device), torch.arange(start, stop, device=device)])
        )
        norms = None
        if query_weight is not None:
            values = layer.values[:, :, start:stop]
            norms = projected_norms(call.module, values, call.query.shape[1])[:, :, :, None]  # [1, Hkv, G, 1, n]
        best = torch.zeros(1, view.keys.shape[1], stop - start, device=device)
        for first, attention in view.attention_blocks():
            attention = attention[..., n_sink : n_sink + stop - start]  # [1, Hkv, G, n_queries, n]
            if query_weight is not None and norms is not None:
                own = query_weight[:, first : first + attention.shape[3]]
                attention = attention * norms * own[:, None, None, :, None]
            best = torch.maximum(best, attention.amax(dim=(2, 3)))
        return best

    def chunks(self, token_ids: Tensor, model: nn.Module) -> Iterator[tuple[int, int, Tensor]]:
        """Each chunk of the text with what is replayed for it: start, stop, ids ``[1, Q]``."""
        n_before, after = self._frame(token_ids)
        first, later, n_tokens = self._encode(_FIRST), self._encode(_LATER), token_ids.shape[1]
        known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if max((*first, *later, *after)) >= known:
            raise PressError(
                f"{type(self).__name__}: the tokenizer gives ids that the model, which knows {known} tokens, does not "
                "have; pass the model's own tokenizer."
            )
        for start in range(n_before, n_tokens, self.chunk_size):
            stop = min(start + self.chunk_size, n_tokens)
            lead = first if start == n_before else later + token_ids[0, max(n_before, start - _N_LEAD) : start].tolist()
            prompt = torch.tensor([lead + after], device=token_ids.device)
            yield start, stop, torch.cat([prompt, token_ids[:, start:stop]], dim=1)

    def _frame(self, token_ids: Tensor) -> tuple[int, list[int]]:
        """How many tokens a chat template has put before the text, and what it puts after a request.

        0 and a line break where there is no template, or the text does not begin with what it puts there. The last of
        those tokens may have merged with the text.
        """
        if getattr(self.tokenizer, "chat_template", None) is not None:
            mark = "context" + "#" * 15
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
            before, _, after = rendered.partition(mark)
            expected = self._encode(before)
            given = token_ids[0, : len(expected)].tolist()
            n_same = next((i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), len(given))
            if n_same and n_same >= len(expected) - 1:
                return n_same, self._encode(after)
        return 0, self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _zeros(layer: PressedLayer) -> Tensor:
    assert layer.keys is not None
    return torch.zeros(layer.keys.shape[:3], device=layer.keys.device)


def _find_tokenizer(press: KVzipPress, model: PreTrainedModel) -> Any:
    """The tokenizer that lies beside the model's weights."""
    name, where = type(press).__name__, getattr(model.config, "_name_or_path", "")
    what_to_do = f"pass it: {name}(..., tokenizer=tokenizer)."
    if not where:
        raise PressError(
            f"{name} asks the model in words, and a model that was not loaded from anywhere does not say which "
            f"tokenizer is its own; {what_to_do}"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        has_words = len(tokenizer) > len(tokenizer.all_special_ids)
    except Exception as error:  # files of any kind may be broken in any way
        reason = " ".join(str(error).split())[:200]
        raise PressError(f"{name} found no tokenizer in {where} ({reason}); {what_to_do}") from error
    if not has_words:
        raise PressError(f"{name} found no tokenizer in {where}; {what_to_do}")
    return tokenizer
