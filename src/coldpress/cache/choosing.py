"""ChoosingLayer: which codec of a storage costs a layer's output least is tried out when its prompt is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coldpress.cache.eviction import EvictingLayer
from coldpress.cache.rows import RowGroup
from coldpress.cache.slots import BIAS, CARRIED, Slots
from coldpress.core.press import Press
from coldpress.core.view import LayerView
from coldpress.errors import NoRoomError

__all__ = ["ChoosingLayer", "Trial"]

_QUERIES = 64  # the newest ones, whose output is compared


class Trial(NamedTuple):
    """What pairs carry for a press that chooses when all layers are there, under the budget of one codec."""

    carried: Tensor | None
    references: Sequence[Any]


@dataclass(frozen=True)
class _Asked:
    """The newest queries of a group of rows.

    Attributes:
        rows: of the batch.
        tokens: int64 ``[b, 1, T]``, where in the input each token of the view stood; None where that is 0 .. T - 1.
        view: the queries, without pairs.
        first: position of the first token of the view.
        end: position of the next token.
        output: float32 ``[b, Hkv, G, n, Dv]``, what they get of all pairs.
    """

    rows: slice | Tensor
    tokens: Tensor | None
    view: LayerView
    first: int
    end: int
    output: Tensor

    @classmethod
    def of(cls, group: RowGroup) -> _Asked:
        whole = group.view
        queries = whole.queries[:, :, -_QUERIES:].clone()
        asking = replace(whole, queries=queries, hidden_states=None, token_ids=None, columns={}, _memo={})
        output, nothing = _output(asking), (whole.keys[:, :, :0], whole.values[:, :, :0])
        asking = replace(asking, keys=nothing[0].clone(), values=nothing[1].clone(), _memo={})
        return cls(group.rows, group.slots, asking, whole.first_position, whole.end, output)

    def output_of(self, slots: Slots) -> Tensor:
        """What the queries get of ``slots``, as :attr:`output`."""
        store, at = slots.filled, slots.positions()[self.rows]
        if self.tokens is not None:  # padding is not among them
            tokens = self.tokens.expand(-1, at.shape[1], -1).contiguous()
            at = (torch.searchsorted(tokens, at.clamp(min=0)) + self.first).where(at >= 0, -1)
        bias = slots.column(BIAS.name)
        view = replace(
            self.view,
            keys=store.keys[self.rows],
            values=store.values[self.rows],
            positions=at,
            counts=(at >= 0).sum(-1),
            first_position=self.end - at.shape[2],
            columns={} if bias is None else {BIAS.name: bias[self.rows]},
            _memo={},
        )
        return _output(view)


@torch.no_grad()
def _output(view: LayerView) -> Tensor:
    """The attention output of a view's queries over its pairs: float32 ``[B, Hkv, G, n, Dv]``."""
    return view.window_attention(view.n_queries) @ view.values.float()[:, :, None]


class ChoosingLayer(EvictingLayer):
    """A layer that takes one of the codecs of its storage when its prompt is compressed.

    Attributes:
        trials: by codec, until the pairs of all layers are chosen.
    """

    def clear(self) -> None:
        super().clear()
        self.trials: dict[int, Trial] = {}
        self._asked: list[_Asked] = []

    def _keep_of(self, press: Press, source: Slots, groups: list[RowGroup], has_said: bool) -> bool:
        n_codecs = 1 if self.session.storage is None else len(self.session.storage.codecs)
        if n_codecs == 1:
            return super()._keep_of(press, source, groups, has_said)
        self._asked = [_Asked.of(group) for group in groups]
        best: tuple[float, int, Slots, tuple[int, int]] | None = None
        refusal: NoRoomError | None = None
        for index in range(n_codecs):
            self.taken = index
            try:
                if not super()._keep_of(press, source, groups, has_said):
                    self.slots = source.shared()
            except NoRoomError as why:  # for what is pinned, in so many bits
                refusal = why
                continue
            if self.session.is_to_finish:
                self.trials[index] = Trial(self.slots.column(CARRIED.name), self.references)
                continue
            self.encode()
            error = self.error_of(self.slots)
            if best is None or error < best[0]:
                best = error, index, self.slots, self.n_pairs
        if refusal is not None and best is None and not self.trials:
            raise refusal
        self.taken = 0
        if best is not None:
            self.take(*best[1:])
        return True

    def error_of(self, slots: Slots) -> float:
        """How far the output of the newest queries over ``slots`` is from that over all pairs, as a part of its size.

        The squared distance over the squared norm, of all rows and heads together.
        """
        off = sum(float((own.output_of(slots) - own.output).square().sum()) for own in self._asked)
        return off / max(sum(float(own.output.square().sum()) for own in self._asked), 1e-30)

    def take(self, index: int, slots: Slots, n_pairs: tuple[int, int]) -> None:
        """Store ``slots``, which the codec ``index`` has encoded, as what was tried out and found best."""
        self.taken, self.slots, self.n_pairs = index, slots, n_pairs
        self.trials, self._asked, self.references = {}, [], []
