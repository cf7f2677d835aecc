"""CodedStore: a layout whose oldest pairs are stored by a codec."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from coldpress.attend.segments import attend_segments, segment_bias
from coldpress.errors import CacheError
from coldpress.stores.base import Store, is_frozen, room_for
from coldpress.stores.codec import Blocks, Codec, decoded
from coldpress.stores.dense import DenseStore
from coldpress.stores.ragged import RaggedStore, pad_segments

__all__ = ["CodedStore"]

_OWN = ("n_blocks", "counts", "how")  # tensors of a file that are no blocks


class CodedStore(Store):
    """The oldest pairs of every segment in blocks of a codec, the others in a layout as they are.

    A segment is what one KV head of one row stores. The pairs of a block are encoded once, when they are no longer
    among the newest, in blocks of their own segment, so that it stores what it would store alone. ``keys`` and
    ``values`` are copies, made for the attention of one layer at a time.

    Args:
        layout: the pairs, the store's own from now on.
        codec: how the older ones are stored.
    """

    def __init__(self, layout: DenseStore | RaggedStore, codec: Codec):
        self.codec, self._exact = codec, layout
        self._blocks: Blocks = {}  # those of each segment in order
        n_segments = layout.n_rows * layout.n_heads
        self._n_blocks = [0] * n_segments
        # slots of a ragged layout: before those of later tokens, of each segment, and of later tokens
        self._n_first = layout.counts() if isinstance(layout, RaggedStore) else [0] * n_segments
        self._n_later = layout.n_later if isinstance(layout, RaggedStore) else 0
        self.encode()

    @property
    def is_ragged(self) -> bool:  # type: ignore[override]
        return self._exact.is_ragged

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.codec.names[self.is_ragged]

    @property
    def n(self) -> int:
        return max(self._n_first) + self._n_later if self.is_ragged else self._n_coded + self._exact.n

    @property
    def n_first(self) -> int | None:
        return max(self._n_first) if self.is_ragged else None

    @property
    def n_croppable(self) -> int:
        return self._exact.n_later if isinstance(self._exact, RaggedStore) else self._exact.n

    @property
    def _n_coded(self) -> int:
        """Slots whose pairs are in blocks, of a dense layout."""
        return self._n_blocks[0] * self.codec.block_tokens

    @property
    def n_rows(self) -> int:
        return self._exact.n_rows

    @property
    def n_heads(self) -> int:
        return self._exact.n_heads

    @property
    def device(self) -> torch.device:
        return self._exact.device

    @property
    def room(self) -> int:
        return self._exact.room

    @property
    def keys(self) -> Tensor:
        return self._whole(0)

    @property
    def values(self) -> Tensor:
        return self._whole(1)

    def tensors(self) -> tuple[Tensor, ...]:
        return *self._exact.tensors(), *(self._blocks[name] for name in sorted(self._blocks))

    def _whole(self, which: int) -> Tensor:
        """Keys (0) or values (1) of all slots."""
        layout = self._exact
        if isinstance(layout, RaggedStore):
            padded = pad_segments(self._segments(which), self._n_first, self._n_later)
            return padded.unflatten(0, (self.n_rows, self.n_heads))
        newest = layout.values if which else layout.keys
        if not self._blocks:
            return newest
        n_coded = self._n_coded
        whole = newest.new_empty(*newest.shape[:2], n_coded + newest.shape[2], newest.shape[3])
        blocks = whole[:, :, :n_coded].unflatten(2, (-1, self.codec.block_tokens))
        (self.codec.decode_values if which else self.codec.decode_keys)(self._blocks, blocks)
        whole[:, :, n_coded:] = newest
        return whole

    def _segments(self, which: int) -> list[Tensor]:
        """Keys (0) or values (1) of each segment of a ragged layout, ``[n, D]`` each."""
        assert isinstance(self._exact, RaggedStore)
        flat = self._exact.tensors()[which]
        newest = [flat[span] for span in self._exact.spans()]
        if not self._blocks:
            return newest
        coded = decoded(self.codec, self._blocks, which, sum(self._n_blocks), flat).flatten(0, 1)
        parts = coded.split([n * self.codec.block_tokens for n in self._n_blocks])
        return [torch.cat(pair) if len(pair[0]) else pair[1] for pair in zip(parts, newest, strict=True)]

    def attend(self, query: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        biases: Sequence[Tensor | None] = [None] * len(self._n_first)
        keys, values = self._segments(0), self._segments(1)
        if bias is not None:
            own = bias.expand(self.n_rows, self.n_heads, -1, -1).flatten(0, 1)
            counts = torch.tensor(self._n_first, device=bias.device)
            own = segment_bias(own, counts, max(self._n_first), self._n_later, max(map(len, keys)))
            biases = [part[:, : len(key)] for part, key in zip(own, keys, strict=True)]
        return attend_segments(query, keys, values, biases, scaling)

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        layout, until_next = self._exact, self.codec.exact_tokens + self.codec.block_tokens
        if isinstance(layout, RaggedStore):
            longest = max(span.stop - span.start for span in layout.spans())
            n_new = keys.shape[2]
            layout.append(keys, values, room=max(n_new, min(until_next, room_for(longest + n_new)) - longest))
            self._n_later += n_new
            return
        needed = layout.n + keys.shape[2]
        if layout.is_borrowed or is_frozen(layout.tensors()[1]) or needed > layout.tensors()[1].shape[2]:
            layout.own(max(needed, min(until_next, room_for(needed))))
        layout.append(keys, values)

    def encode(self) -> None:
        g, layout = self.codec.block_tokens, self._exact
        if isinstance(layout, RaggedStore):
            spans = layout.spans()
            n_new = [self.codec.n_groups(span.stop - span.start) for span in spans]
            if not any(n_new):
                return
            oldest = [slice(span.start, span.start + n * g) for span, n in zip(spans, n_new, strict=True) if n]
            keys, values = (torch.cat([flat[s] for s in oldest]).unflatten(0, (-1, g)) for flat in layout.tensors())
            self._exact = layout.without_oldest([n * g for n in n_new])
        else:
            m = self.codec.n_groups(layout.n)
            if not m:
                return
            n_new = [m] * len(self._n_blocks)
            keys, values = (
                part[:, :, : m * g].unflatten(2, (m, g)).flatten(0, 2) for part in (layout.keys, layout.values)
            )
            self._exact = layout.without_first(m * g)
        self._add(self.codec.encode(keys.detach(), values.detach()), n_new)

    def _add(self, new: Blocks, n_new: list[int]) -> None:
        """Put ``n_new`` blocks behind those of each segment."""
        if not self._blocks:
            self._blocks, self._n_blocks = new, n_new
            return
        at, at_new, order = 0, sum(self._n_blocks), []
        for old, more in zip(self._n_blocks, n_new, strict=True):
            order += [*range(at, at + old), *range(at_new, at_new + more)]
            at, at_new = at + old, at_new + more
        index = torch.tensor(order, device=self.device)
        self._blocks = {
            name: torch.cat([part, new[name]]).index_select(0, index) for name, part in self._blocks.items()
        }
        self._n_blocks = [old + more for old, more in zip(self._n_blocks, n_new, strict=True)]

    def _take(self, blocks: list[int]) -> None:
        """Select the blocks ``blocks``, in this order."""
        index = torch.tensor(blocks, device=self.device, dtype=torch.long)
        self._blocks = {name: part.index_select(0, index) for name, part in self._blocks.items()}

    def crop(self, n: int) -> None:
        dropped = self.n - n
        self._exact.crop(self._exact.n - dropped)
        if self.is_ragged:
            self._n_later -= dropped

    def index_rows(self, rows: Tensor) -> None:
        chosen = [row * self.n_heads + head for row in rows.tolist() for head in range(self.n_heads)]
        starts = [0]
        for n in self._n_blocks:
            starts.append(starts[-1] + n)
        if self._blocks:
            self._take([at for i in chosen for at in range(starts[i], starts[i + 1])])
        self._n_blocks = [self._n_blocks[i] for i in chosen]
        self._n_first = [self._n_first[i] for i in chosen]
        self._exact.index_rows(rows)

    def shared(self) -> CodedStore:
        other = copy.copy(self)
        other._exact = self._exact.shared()
        return other

    def own(self, capacity: int | None = None) -> None:
        self._exact.own(capacity if capacity is None or self.is_ragged else capacity - self._n_coded)

    def droppable(self, n: int) -> int:
        """As many slots as fill whole blocks: a block cannot be cut."""
        if self.is_ragged or n >= self._n_coded:
            return n
        return n // self.codec.block_tokens * self.codec.block_tokens

    def without_first(self, n: int) -> Store:
        if self.is_ragged:
            return DenseStore(self.keys, self.values).without_first(n)
        other = copy.copy(self)
        assert isinstance(self._exact, DenseStore)
        n_blocks, first = self._n_blocks[0], min(n // self.codec.block_tokens, self._n_blocks[0])
        other._n_blocks = [n_blocks - first] * len(self._n_blocks)
        other._exact = self._exact.without_first(max(0, n - self._n_coded))
        if first == n_blocks:
            other._blocks = {}
        else:
            n_segments = len(self._n_blocks)
            other._take([i * n_blocks + at for i in range(n_segments) for at in range(first, n_blocks)])
        return other

    def packed(self) -> dict[str, Tensor]:
        parts = {f"tail.{name}": tensor for name, tensor in self._exact.packed().items()}
        if self._blocks:
            parts["n_blocks"] = torch.tensor(self._n_blocks)
            taken = [name for name in self._blocks if name in _OWN or name.startswith("tail.")]
            if taken:
                raise CacheError(f"{type(self.codec).__name__} calls a tensor {taken[0]!r}, which a file has already.")
            parts |= self._blocks
        if self.is_ragged:
            parts["counts"] = torch.tensor([*self._n_first, self._n_later])
        return parts

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int, codec: Codec) -> CodedStore:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = cls.__new__(cls)
        layouts = {name.removeprefix("tail."): part for name, part in parts.items() if name.startswith("tail.")}
        kind = RaggedStore if "counts" in parts else DenseStore
        store.codec, store._exact = codec, kind.unpacked(layouts, room)
        n_segments = store._exact.n_rows * store._exact.n_heads
        *store._n_first, store._n_later = parts["counts"].tolist() if "counts" in parts else [0] * (n_segments + 1)
        store._n_blocks = parts["n_blocks"].tolist() if "n_blocks" in parts else [0] * n_segments
        store._blocks = {n: p for n, p in parts.items() if n not in _OWN and not n.startswith("tail.")}
        return store
