"""Finch: what the question at the end of the text attends to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldpress.bases.checks import check_at_least
from coldpress.bases.registry import register
from coldpress.bases.scorer import ScorerPress
from coldpress.core.choice import best, checked, pack
from coldpress.core.counts import spread_forced
from coldpress.core.kept import Kept
from coldpress.core.requirements import require_block
from coldpress.core.view import LayerView
from coldpress.errors import PressError


@register("finch", window_size=64)
@dataclass(frozen=True)
class FinchPress(ScorerPress):
    """Keep the tokens that the question attends to, and the question, which is the end of the compressed text.

    With A[q, t] the attention (softmax in float32) of token q of the question to token t, and n[q] the number of tokens
    that q sees: score[b, h, t] = mean over the group's heads and q of A[q, t] * n[q]; without normalize_scores of
    A[q, t]. The question is protected. With chunk_length each chunk of the text keeps its share of the budget. With
    rerotate_keys the kept keys move to consecutive positions, as KeyRerotationPress does it.

    The question is the text after the last delimiter_token_id, or the last window_size tokens. It has to be part of
    the prefill: in the pipeline give context and question as one text, pipe(context + delimiter + question, press=...),
    and no question=, which would not be in the text.

    Source: Corallo and Papotti 2024, arXiv:2408.00167, section 3, as in kvpress (one prefill; the paper's goes chunk by
    chunk). Differs from kvpress: the delimiter is any token, or tokens, of the model's own vocabulary and kept in the
    text; neither tokenizer nor embeddings change; counts add up to the ratio with chunk_length too.

    Needs: keys and the question's queries, the token ids for a delimiter (inside 'with press(model):'). Cost:
    O(question * T * D) per query head and layer.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        chunk_length: tokens of a chunk, at least 1; None for one chunk.
        normalize_scores: multiply a query's attention by the number of tokens that it sees.
        rerotate_keys: close the gaps between the positions of the kept keys.
        window_size: tokens of the question; does not count if there is a delimiter.
        delimiter_token_id: the token, or the tokens in a row, that the question comes after. Best a special token, as
            no letter next to it can change how it is tokenised.
    """

    can_rechoose = False

    chunk_length: int | None = None
    normalize_scores: bool = True
    rerotate_keys: bool = True
    window_size: int | None = None
    delimiter_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, *(n for n in ("chunk_length", "window_size") if getattr(self, n) is not None))
        given = self.delimiter_token_id
        if given is None and self.window_size is None:
            raise PressError(
                "FinchPress compresses by the question at the end of the text: say where it begins, with "
                "delimiter_token_id (of the token before it) or window_size (its tokens)."
            )
        if given is not None and not isinstance(given, int):
            object.__setattr__(self, "delimiter_token_id", tuple(given))
        if not self._delimiter() and given is not None:
            raise PressError("FinchPress: delimiter_token_id must be a token id or several, got none.")

    def score(self, view: LayerView) -> Tensor:
        window = self._window(view)
        attention = view.window_attention(window)  # [B, Hkv, G, window, T]
        if self.normalize_scores:
            seen = torch.arange(view.n_tokens - window + 1, view.n_tokens + 1, device=attention.device)
            attention = attention * seen[:, None]
        return attention.mean(dim=(2, 3))

    def protected(self, view: LayerView) -> tuple[int, int]:
        return 0, self._window(view)

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor | None:
        if self.chunk_length is None:
            return super().chosen(view, n_keep, must)
        must = must.expand(view.keys.shape[:3])
        scores = view.guard(checked(self.scores(view)), must)
        cuts = [*range(0, view.n_tokens, self.chunk_length), view.n_tokens]
        parts = zip(itertools.pairwise(cuts), spread_forced(n_keep, must, cuts), strict=True)
        return pack(torch.cat([best(scores[..., start:stop], counts) for (start, stop), counts in parts], dim=-1))

    @property
    def changes(self) -> frozenset[str]:
        return frozenset({"keys"} if self.rerotate_keys else ())

    def compress(self, view: LayerView) -> Kept | None:
        kept = super().compress(view)
        if kept is None or not self.rerotate_keys:
            return kept
        n_keep = kept.positions.shape[-1]
        places = torch.arange(view.n_tokens - n_keep, view.n_tokens, device=view.keys.device)
        return kept._replace(keys=view.moved_keys(kept, places.expand_as(kept.positions)))

    def _delimiter(self) -> tuple[int, ...]:
        given = self.delimiter_token_id
        return () if given is None else (given,) if isinstance(given, int) else tuple(given)

    def _window(self, view: LayerView) -> int:
        """Tokens of the question, of which all rows of ``view`` have as many.

        Raises:
            PressError: no delimiter, nothing after it, or rows whose questions differ in length.
        """
        if self.delimiter_token_id is None:
            assert self.window_size is not None
            window = self.window_size if view.n_tokens > self.window_size else max(1, view.n_tokens // 2)
            return min(window, view.n_queries)
        require_block(self, view.token_ids)
        assert view.token_ids is not None
        ids = view.token_ids
        lengths = view.once(("finch", self._delimiter()), lambda: self._lengths(ids))
        if 0 in lengths:
            raise PressError("FinchPress: the delimiter is the last token of the text; the question comes after it.")
        if len(lengths) > 1:
            raise PressError(
                f"FinchPress: the questions of this batch have {sorted(lengths)} tokens; run texts whose questions "
                "differ in length one by one."
            )
        return min(*lengths, view.n_queries)

    def _lengths(self, token_ids: Tensor) -> set[int]:
        """How many tokens come after the last delimiter, in any of the rows ``[B, T]``."""
        delimiter = torch.tensor(self._delimiter(), device=token_ids.device)
        n_tokens, width = token_ids.shape[1], len(delimiter)
        lengths = set()
        for row in token_ids:
            found = (row.unfold(0, width, 1) == delimiter).all(-1).nonzero() if n_tokens >= width else row[:0]
            if not len(found):
                ids = list(self._delimiter())
                raise PressError(f"FinchPress: the delimiter {ids[0] if width == 1 else ids} is not in the text.")
            lengths.add(n_tokens - int(found[-1]) - width)
        return lengths
