"""AttentionMatching: the values of the kept pairs are fitted, so that they answer for those that are gone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.bases.checks import check_at_least
from coldpress.bases.moved import asked_ahead, queries_moved_on
from coldpress.bases.registry import register
from coldpress.bases.replay import ReplayPress, check_one_text
from coldpress.bases.together import carrying
from coldpress.bases.wrapper import WrapperPress, require_forced
from coldpress.core.call import LayerCall
from coldpress.core.choice import pack, protect, unpack
from coldpress.core.column import PINNED
from coldpress.core.forced import as_far_as, ends, must_keep, positions_of
from coldpress.core.kept import Kept
from coldpress.core.requirements import CHOICE, require, require_block
from coldpress.core.view import LayerView
from coldpress.errors import PressError
from coldpress.presses.defensive import DefensiveKVPress
from coldpress.presses.kvzip import KVzipPress
from coldpress.presses.sampled_defensive import RECENT_PART, SampledDefensiveKVPress
from coldpress.presses.snapkv import SnapKVPress

if TYPE_CHECKING:
    from coldpress.cache.layer import PressedLayer
    from coldpress.cache.pressed import PressedCache

_P = TypeVar("_P", bound="AttentionMatchingPress")
_RIDGES = (1e-2, 1e-3)  # of the largest eigenvalue, for the values
_MASS_RIDGE = 1e-2  # likewise, for the bias
_LEAST_WEIGHT, _MOST_WEIGHT = math.exp(-3), 20.0  # of a kept pair: e to the power of its bias
_MOST_NORM = 2.0  # of a fitted value, as a part of the largest norm of the head's values
_BLOCK = 8  # reference queries side by side, of which every fourth block is left out at first
_ROWS = 768  # reference queries of a KV head, at most


@register("attention_matching_defensive", DefensiveKVPress)
@register("attention_matching_kvzip", KVzipPress, queries="repeat")
@register("attention_matching_sampled_defensive", SampledDefensiveKVPress)
@register("attention_matching_snapkv", SnapKVPress)
@dataclass(frozen=True)
class AttentionMatchingPress(WrapperPress):
    """Keep what the inner press keeps, with values fitted so that attention gives what the whole cache gave.

    For each KV head, with reference queries q, A[q, t] their attention over all pairs and S the kept ones: without a
    fit the output is X V_S, X[q, s] = A[q, s] / (sum over S of A[q, s]). The values C minimise
    sum over q of |A V - X C|^2 + ridge * |C - V_S|^2. With bias each pair weighs w_s = e^b_s in the softmax,
    X[q, s] = A[q, s] w_s / (sum over S of A[q, s] w_s), where w minimises sum over q of (1 - sum over S of A[q, s]
    w_s)^2 + ridge * |w - 1|^2: what was kept then has the mass of the whole. The first n_sink tokens, the newest
    n_recent, at most an eighth of what is kept, and pinned ones are kept as far as the budget has room, and left as
    they are.

    Fitting can overfit. So every fourth block of 8 reference queries (of fewer, where there are fewer than 32)
    is left out at first, and the head takes what has the smallest error on these: no fit, or values with one of two
    ridges (1e-2 and 1e-3 of the largest eigenvalue), each with and without bias. That is then fitted to all of them. A
    fit with a value of more than twice the largest norm of the head's values is not used: the reference queries say
    nothing of what such a value is for. With fewer than 4 reference queries nothing is fitted.

    Reference queries, of all heads of a group: with queries="window" those of the last n_queries tokens, where they
    were made and moved on by n_queries positions, as if the next tokens asked what these did. With queries="repeat"
    those of a second pass, in which the model repeats the text (as KVzip's): better, and a whole pass more, unless the
    inner press makes it anyway. At most 768 of them are used.

    Source: Zweiger et al. 2026, arXiv:2602.16284 (Attention Matching), sections 3 and 4. Differs from the paper: any
    press says which pairs are kept; the ridge pulls towards the original values and not towards nothing; sinks and
    newest tokens are exact; what is left out decides whether a fit is used, by its output alone: weights that bring
    back the mass and change no output are not used; window queries are moved as well.

    Needs: what the inner press needs; a rotary embedding that can be undone, for queries="window". With "repeat" the
    model and its tokenizer, one text at a time. Cost: of the inner press, and per KV head O(n^2 * kept + n * T * D) for
    n reference queries.

    Args:
        press: says which pairs are kept, with the compression ratio: a scorer, a wrapper around one, one that chooses
            among the pairs of all layers (LayerDefensiveKVPress), or one that shows the model the text again
            (KVzipPress), which needs queries="repeat".
        queries: ``window`` or ``repeat``.
        bias: fit one number more for each pair, which is added to its logits. Without it the cache holds keys and
            values alone.
        n_queries: newest tokens whose queries are the window, at least 4.
        n_sink, n_recent: first and newest tokens that are kept and left as they are; of the newest no more than an
            eighth of what is kept, as more of them would take the places of what the inner press needs.
        tokenizer: the model's, for queries="repeat". The pipeline and the commands hand theirs over.
    """

    can_rechoose = False
    per_head_independent = True
    changes = frozenset({"values"})
    needs_inside = CHOICE

    press: Any
    queries: Literal["window", "repeat"] = "window"
    bias: bool = True
    n_queries: int = 256
    n_sink: int = 4
    n_recent: int = 64
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.queries not in ("window", "repeat"):
            raise PressError(f"{type(self).__name__}: queries must be 'window' or 'repeat', got {self.queries!r}.")
        check_at_least(self, 4, "n_queries")
        check_at_least(self, 0, "n_sink", "n_recent")
        is_replay = isinstance(self.press, ReplayPress)
        if not is_replay and not getattr(self.press, "chooses_together", False):
            super().__post_init__()
            require_forced(self, self.press, "use it by itself")
            return
        if is_replay and self.queries == "window":
            raise PressError(
                f"{type(self).__name__}: {type(self.press).__name__} chooses when the prefill is over and its queries "
                "are gone; say queries='repeat'."
            )
        require(self, self.press, "pairs")
        for name in ("compression_ratio", "budget_tokens", "budget_bytes"):
            object.__setattr__(self, name, getattr(self.press, name))

    @property
    def adds_bytes(self) -> int:
        return 4 if self.bias else 0

    @property
    def needs_model(self) -> bool:
        return self.queries == "repeat"

    @property
    def chooses_together(self) -> bool:
        return not self.needs_model and bool(self.press.chooses_together)

    def prepared(self: _P, model: PreTrainedModel, tokenizer: Any = None) -> _P:
        ready = super().prepared(model, tokenizer)
        if self.queries == "window" or isinstance(self.press, ReplayPress) or self.tokenizer is not None:
            return ready
        return replace(ready, tokenizer=KVzipPress(0.5).prepared(model, tokenizer).tokenizer)

    def compress(self, view: LayerView) -> Kept | None:
        if isinstance(self.press, ReplayPress):
            return self.press.compress(view)
        if self.press.chooses_together:
            kept = self.press.compress(view)
            if kept is None or kept.carry is None:
                return kept
            n_keep, must = self.keep(view), kept.carry == torch.inf
            must = as_far_as(must, ends(view, (self.n_sink, self._n_recent(n_keep))), n_keep)
            references = self._references(view) if self.queries == "window" else ()
            return kept._replace(carry=protect(kept.carry, must), references=references)
        positions = self.choose(view)
        if positions is None:
            return None
        if self.queries == "repeat":
            require_block(self, view.token_ids)
            return carrying(view, unpack(positions, view.n_tokens).float())
        fixed = ends(view, (self.n_sink, self._n_recent(self.keep(view))))
        return self._fitted(view.take(positions), self._references(view), fixed | view.columns.get(PINNED, fixed))

    def _references(self, view: LayerView) -> list[LayerView]:
        """Views with the window's queries, where they were made and moved on."""
        n = min(self.n_queries, view.n_queries)
        newest = replace(view, queries=view.queries[:, :, -n:].clone(), hidden_states=None, _memo={})
        return [newest, queries_moved_on(newest, n)]

    def protected(self, view: LayerView) -> tuple[int, int]:
        if isinstance(self.press, ReplayPress):
            return 0, 0
        n_first, n_last = self.press.protected(view)
        return max(self.n_sink, n_first), max(self._n_recent(self.keep(view)), n_last)

    def _n_recent(self, n_keep: int) -> int:
        """How many of the newest tokens stay as they are when a head keeps ``n_keep``."""
        return min(self.n_recent, n_keep // RECENT_PART)

    def choose_together(self, cache: PressedCache) -> None:
        self.press.choose_together(cache)
        for layer in cache.pressed_layers():
            heard, layer.references = layer.references, []
            if heard and layer.was_compressed:
                self._refit(layer, heard, 0)

    def chosen(self, view: LayerView, n_keep: int, must: Tensor) -> Tensor | None:
        return self.press.chosen(view, n_keep, must)

    def check_prefill(self, token_ids: Tensor, has_padding: bool) -> None:
        if self.queries == "repeat":
            check_one_text(self, token_ids, has_padding)

    def finish(self, cache: PressedCache, model: nn.Module, token_ids: Tensor) -> None:
        n_tokens, session = token_ids.shape[1], cache.session
        n_keep = self.press.budget(cache, model, token_ids)[1] if isinstance(self.press, ReplayPress) else 0
        if n_keep >= n_tokens:
            return
        layers = {layer.index: layer for layer in cache.pressed_layers() if layer.keys is not None}
        pairs: dict[int, Any] = {index: (layer.keys, layer.values) for index, layer in layers.items()}
        heard: dict[int, list[LayerCall]] = {index: [] for index in layers}

        def listen(layer: PressedLayer, call: LayerCall) -> None:
            assert layer.keys is not None
            stride = -(-n_tokens * call.query.shape[1] // (_ROWS * layer.keys.shape[1]))
            heard[layer.index].append(replace(call, query=call.query[:, :, ::stride].clone(), hidden_states=None))

        pins = session.pins
        try:
            if isinstance(self.press, ReplayPress):
                session.on_attention = listen
                own = pins[0] if pins else ()
                n_recent = self._n_recent(n_keep)
                added = (0, self.n_sink), (n_tokens - n_recent, n_tokens)
                n_most = self.n_sink + n_recent + self.press.n_first(token_ids) + sum(b - a for a, b in own)
                if n_most <= n_keep:
                    session.pins = (tuple(span for span in (*own, *added) if span[0] < span[1]),)
                self.press.finish(cache, model, token_ids)
            elif any(layer.carried() is not None for layer in layers.values()):
                replay = KVzipPress(tokenizer=self.tokenizer)
                for _, _, ids in replay.chunks(token_ids, model):
                    replay.run(cache, model, listen, ids.shape[1], input_ids=ids)
                if self.press.chooses_together:
                    self.press.choose_together(cache)
        finally:
            session.on_attention, session.pins = None, pins
        for index, layer in layers.items():
            carried = layer.carried()
            if carried is not None:
                layer.keep(pack(carried > 0))
            if heard[index] and layer.was_compressed:
                keys, values = pairs[index]
                call, queries = heard[index][0], torch.cat([call.query for call in heard[index]], dim=2)
                view = LayerView(
                    keys, values, queries, call.module, call.scaling, call.layer_idx, call.n_layers,
                    softcap=call.softcap, sinks=call.sinks,
                )  # fmt: skip
                self._refit(layer, [(slice(None), None, [asked_ahead(view, view.queries)])], n_keep)

    def _refit(
        self,
        layer: PressedLayer,
        heard: Sequence[tuple[slice | Tensor, Tensor | None, Sequence[LayerView]]],
        n_keep: int,
    ) -> None:
        """Store fitted values in ``layer``.

        Args:
            heard: as ``layer.references``: rows, the positions of their tokens, and views with reference queries.
            n_keep: of a head, mean over layers and heads; 0: as many as the budget of each view or this layer keeps.
        """
        columns, keys, values, positions = layer.columns(), layer.keys, layer.values, layer.positions()
        assert keys is not None and values is not None
        pinned, values, bias = columns.pop(PINNED, None), values.clone(), torch.zeros(positions.shape)
        for rows, tokens, references in heard:
            whole, at = references[0], positions[rows]
            if tokens is not None:  # padding is not among them
                tokens = tokens.expand(-1, at.shape[1], -1).contiguous()
                at = torch.searchsorted(tokens, at.clamp(min=0)).where(at >= 0, -1)
            place = positions_of(whole)
            n = n_keep or (self.keep(whole) if self.chooses_together else int((at >= 0).sum(-1).float().mean()))
            fixed = must_keep(place, int(place.max()) + 1, (self.n_sink, self._n_recent(n)))
            if pinned is not None:
                fixed = fixed | unpack(at.masked_fill(~pinned[rows], -1), whole.n_tokens)
            fitted = self._fitted(Kept(keys[rows], values[rows], at), references, fixed)
            values[rows] = fitted.values
            if fitted.bias is not None:
                bias[rows] = fitted.bias.cpu()
        layer.store(keys, values, positions, columns | ({"bias": bias.to(keys.device)} if self.bias else {}))

    def _fitted(self, kept: Kept, references: Sequence[LayerView], fixed: Tensor) -> Kept:
        """``kept`` with fitted values and bias.

        Args:
            references: views of all pairs, with reference queries.
            fixed: bool ``[B or 1, Hkv or 1, T]``, pairs that are left as they are.
        """
        whole, values, bias = references[0], kept.values.clone(), torch.zeros_like(kept.positions, dtype=torch.float32)
        fixed = fixed.expand(whole.keys.shape[:3])
        for row, head in itertools.product(*(range(n) for n in bias.shape[:2])):
            chosen = kept.positions[row, head]
            chosen = chosen[chosen >= 0]
            is_free = ~fixed[row, head, chosen]
            if not is_free.any():
                continue
            attention = torch.cat([_attention(view, row, head) for view in references], dim=1)  # [G, n, T]
            stride = -(-attention.shape[0] * attention.shape[1] // _ROWS)
            attention = attention[:, ::stride]
            block = min(_BLOCK, max(1, attention.shape[1] // 4))
            is_left_out = torch.arange(attention.shape[1], device=chosen.device) // block % 4 == 3
            is_left_out = is_left_out.expand(attention.shape[:2]).flatten()
            own, mass = fit(attention.flatten(0, 1), whole.values[row, head], chosen, is_free, is_left_out, self.bias)
            values[row, head, : len(chosen)] = own.to(values.dtype)
            bias[row, head, : len(chosen)] = mass.log().float()
        return kept._replace(values=values, bias=bias if self.bias else None)


def fit(
    attention: Tensor, values: Tensor, chosen: Tensor, is_free: Tensor, is_left_out: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """Values and weights of the kept pairs of one head.

    Args:
        attention: ``[n, T]`` of the reference queries over all pairs.
        values: ``[T, Dv]``.
        chosen: int64 ``[t]``, the kept pairs.
        is_free: bool ``[t]``, which of them may change.
        is_left_out: bool ``[n]``, queries that decide which fit is used.
        bias: whether weights may be other than 1.

    Returns:
        float64 ``[t, Dv]`` and ``[t]``; e to the power of a pair's bias is its weight.
    """
    attention, before = attention.double(), values[chosen].double()
    target, kept, missing = attention @ values.double(), attention[:, chosen], 1 - attention.sum(-1)
    gone = 1 - missing - kept.sum(-1)  # attention to pairs that are gone; what is missing is that of attention sinks
    ones = torch.ones(len(chosen), dtype=torch.float64, device=chosen.device)
    rows = ~is_left_out if bool(is_left_out.any()) else torch.ones_like(is_left_out)
    found: list[tuple[float, bool, float]] = []  # error, with weights, ridge: infinite for values as they are
    for weighs in (False, True) if bias else (False,):
        weights = _weights(kept[rows], gone[rows], is_free) if weighs else ones
        part, error = _error(kept * weights, missing, before, target)
        found.append((float(error[~rows].square().sum()), weighs, math.inf))
        gram = part[:, is_free] @ part[:, is_free].mT
        for ridge in _RIDGES:
            own = _solve(gram[rows][:, rows], error[rows], ridge)
            found.append((float((error[~rows] - gram[~rows][:, rows] @ own).square().sum()), weighs, ridge))
    most = _MOST_NORM * values.double().norm(dim=-1).max()
    for _, weighs, ridge in sorted(found, key=lambda one: one[0]):
        weights = _weights(kept, gone, is_free) if weighs else ones
        if ridge == math.inf:
            break
        part, error = _error(kept * weights, missing, before, target)
        free = part[:, is_free]
        fitted = before[is_free] + free.mT @ _solve(free @ free.mT, error, ridge)
        if bool(fitted.norm(dim=-1).max() <= most):
            before[is_free] = fitted
            break
    return before, weights


def _weights(kept: Tensor, gone: Tensor, is_free: Tensor) -> Tensor:
    """Weights of the kept pairs that make up for the attention ``gone``, ``[n]``: ``[t]``, 1 where not free."""
    free = kept[:, is_free]
    more = free.mT @ _solve(free @ free.mT, gone[:, None], _MASS_RIDGE)[:, 0]
    weights = torch.ones_like(kept[0])
    weights[is_free] = (1 + more).clamp(_LEAST_WEIGHT, _MOST_WEIGHT)
    return weights


def _error(weighed: Tensor, missing: Tensor, before: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the kept pairs alone, ``[n, t]``, and what its output lacks, ``[n, Dv]``."""
    part = weighed / (weighed.sum(-1) + missing).clamp(min=1e-30)[:, None]
    return part, target - part @ before


def _solve(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    """``(gram + ridge * its largest eigenvalue)^-1 target``."""
    largest = gram.diagonal().clamp(min=1e-30).sqrt()[:, None]
    for _ in range(10):  # power iteration
        largest = gram @ largest
        largest = largest / largest.norm().clamp(min=1e-300)
    scale = (largest.mT @ gram @ largest).clamp(min=1e-30)
    damped = gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(target, torch.linalg.cholesky(damped))


def _attention(view: LayerView, row: int, head: int) -> Tensor:
    """Attention of the queries of one KV head: float32 ``[G, n, T]``."""
    found = view.of_head(row, head).window_attention(view.n_queries)[0, 0]
    view.forget()
    return found
