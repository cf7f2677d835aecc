"""PackedStore: pairs that a codec has encoded one by one; the first and the newest ones are as they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from coldpress.attend.segments import attend_segments, segment_bias
from coldpress.core.pick import pick
from coldpress.errors import CacheError
from coldpress.stores.base import Store
from coldpress.stores.codec import TokenCodec, form_of
from coldpress.stores.packed_part import CODES, PackedPart, attend_packed, is_read_as_stored, kernel_for
from coldpress.stores.parts import Part, whole_blocks
from coldpress.stores.ragged import pad_segments
from coldpress.stores.rotated import RotatedBits
from coldpress.stores.segments import Segments

__all__ = ["PackedStore"]

_FEWEST = 16  # encoded pairs of a head, on average, from which on a decoding step reads them as they are
_COUNTS = ("n_first", "n_front", "n_exact", "n_codes")


class PackedStore(Store):
    """The pairs of each segment: the first ones and the newest as they are, and codes of those between them.

    A segment is what one KV head of one row stores, in its own number: ``n_first`` pairs, then those of later tokens,
    as many in every segment. As codes are of single pairs, evicting pairs takes the codes of the others along.

    Args:
        codec: how pairs are encoded.
        keys, values: ``[B, Hkv, T, D]``, and any number in slots that a head does not use.
        n_first: int64 ``[B, Hkv]``, how many of the first slots each head uses.
        n_later: how many slots of later tokens come after these.
    """

    name = "packed"
    is_ragged = True
    moves_pairs = True
    keeps_codes = True

    def __init__(self, codec: TokenCodec, keys: Tensor, values: Tensor, n_first: Tensor, n_later: int):
        self.codec, self._shape = codec, n_first.shape
        self._dims = keys.shape[3], values.shape[3]
        slot, n_padded = torch.arange(keys.shape[2], device=keys.device), keys.shape[2] - n_later
        is_used = (slot < n_first[..., None]) | (slot >= n_padded)
        self._n_first, self._n_later = n_first.flatten().tolist(), n_later
        counts = [n + n_later for n in self._n_first]
        self._exact = Segments({"keys": keys[is_used], "values": values[is_used]}, counts)
        form = form_of(codec, self._dims, keys.dtype)
        nothing = {name: part.new_empty(0, *part.shape[2:], device=keys.device) for name, part in form.items()}
        self._codes = Segments(nothing, [0] * len(counts))
        self._n_front = [0] * len(counts)
        self.encode()

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        return max(self._n_first) + self._n_later

    @property
    def n_first(self) -> int:
        return max(self._n_first)

    def _n_tail(self) -> list[int]:
        """Pairs of each segment after those in codes."""
        return [n - front for n, front in zip(self._exact.counts, self._n_front, strict=True)]

    @property
    def n_rows(self) -> int:
        return self._shape[0]

    @property
    def n_heads(self) -> int:
        return self._shape[1]

    @property
    def device(self) -> torch.device:
        return self._exact.device

    @property
    def room(self) -> int:
        return self._exact.room

    @property
    def keys(self) -> Tensor:
        return self._padded(0)

    @property
    def values(self) -> Tensor:
        return self._padded(1)

    def _padded(self, which: int) -> Tensor:
        padded = pad_segments(self._segments(which), self._n_first, self._n_later)
        return padded.unflatten(0, (self.n_rows, self.n_heads))

    def _segments(self, which: int) -> list[Tensor]:
        """Keys (0) or values (1) of each segment in the order of its slots, ``[n, D]`` each: copies."""
        name, codes = ("values" if which else "keys"), self._codes
        exact = [self._exact.segment(name, i) for i in range(len(self._n_first))]
        if not codes.total:
            return exact
        blocks = {part: codes.flat(part)[:, None] for part in codes.names()}
        coded = exact[0].new_empty(codes.total, 1, self._dims[which])
        (self.codec.decode_values if which else self.codec.decode_keys)(blocks, coded)
        parts = zip(exact, coded[:, 0].split(codes.counts), self._n_front, strict=True)
        return [torch.cat([own[:front], middle, own[front:]]) for own, middle, front in parts]

    def tensors(self) -> tuple[Tensor, ...]:
        return *self._exact.tensors(), *self._codes.tensors()

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        if n > min(self._n_tail()):
            return super().newest(n)
        spans = self._exact.spans()
        keys, values = (
            torch.stack([self._exact.buffer(name)[span.stop - n : span.stop] for span in spans]).unflatten(
                0, (self.n_rows, self.n_heads)
            )
            for name in ("keys", "values")
        )
        return keys, values

    # -- what comes and goes ------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        new = {"keys": keys.flatten(0, 2), "values": values.flatten(0, 2)}
        n_new = keys.shape[2]
        room = 0 if is_tight else self.codec.batch_tokens
        self._exact.append(new, [n_new] * len(self._n_first), room)
        self._n_later += n_new

    def encode(self) -> None:
        codec, exact = self.codec, self._exact
        fronts = [
            front if n_codes else min(codec.first_tokens, n)
            for front, n_codes, n in zip(self._n_front, self._codes.counts, exact.counts, strict=True)
        ]
        waits = self._n_later > 0
        n_new = [codec.n_new(n - front, waits) for n, front in zip(exact.counts, fronts, strict=True)]
        if not any(n_new):
            return
        self._n_front = [front if n else old for front, n, old in zip(fronts, n_new, self._n_front, strict=True)]
        spans = [(front, front + m, n) for front, m, n in zip(fronts, n_new, exact.counts, strict=True)]
        oldest = exact.take([torch.arange(first, stop) for first, stop, _ in spans])
        keys, values = (oldest.flat(name).detach()[:, None] for name in ("keys", "values"))
        new = {name: part[:, 0] for name, part in codec.encode(keys, values).items()}
        self._codes.append(new, n_new, None if self._codes.total else 0)
        self._exact = exact.take([torch.cat([torch.arange(a), torch.arange(b, n)]) for a, b, n in spans])

    def taken(self, slots: Tensor, keys: Tensor, values: Tensor) -> PackedStore:
        at = slots.clamp(min=0)
        is_new = (keys != pick(self.keys, at)).any(-1) | (values != pick(self.values, at)).any(-1)
        in_codes, in_front = self._places(slots)
        is_kept, is_coded = slots >= 0, in_codes >= 0
        other, counts = copy.copy(self), [n > 0 for n in self._codes.counts]
        other._n_first, other._n_later = is_kept.sum(-1).flatten().tolist(), 0
        fronts = in_front.sum(-1).flatten().tolist()
        other._n_front = [n if has_codes else 0 for n, has_codes in zip(fronts, counts, strict=True)]
        own = zip(in_codes.flatten(0, 1), is_coded.flatten(0, 1), strict=True)
        other._codes = self._codes.take([rows[chosen].cpu() for rows, chosen in own])
        is_exact = is_kept & ~is_coded
        exact = {"keys": keys[is_exact].detach(), "values": values[is_exact].detach()}
        other._exact = Segments(exact, is_exact.sum(-1).flatten().tolist())
        changed = is_new & is_coded
        if bool(changed.any()):
            blocks = self.codec.encode(keys[changed].detach()[:, None], values[changed].detach()[:, None])
            for name in other._codes.names():
                other._codes.buffer(name)[is_new[is_coded]] = blocks[name][:, 0]
        return other

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Which row of its segment's codes each of ``slots`` is, -1 for none, and whether it is one of the first pairs.

        Args:
            slots: int64 ``[B, Hkv, n]``, -1 for none.
        """
        n_first, front, n_codes = (
            torch.tensor(counts, device=slots.device).view(*self._shape, 1)
            for counts in (self._n_first, self._n_front, self._codes.counts)
        )
        longest = max(self._n_first)
        row = torch.where(slots < longest, slots, slots - longest + n_first)
        is_coded = (slots >= 0) & (row >= front) & (row < front + n_codes)
        return (row - front).masked_fill(~is_coded, -1), (slots >= 0) & (row < front)

    def settle(self, n_first: int, order: Tensor, to: Tensor, stays: Tensor, n: int) -> None:
        m, n_later = stays.shape[2], self._n_later
        own = [flags + [True] * (n_later - m) for flags in stays.flatten(0, 1).tolist()]
        self._n_first = [n + sum(flags[:m]) for n, flags in zip(self._n_first, own, strict=True)]
        self._n_later = n_later - m
        if all(map(all, own)):
            return
        of_exact, of_codes, fronts = [], [], []
        for flags, front, n_tail, n_codes in zip(own, self._n_front, self._n_tail(), self._codes.counts, strict=True):
            tail = min(n_tail, n_later)
            before, newest = flags[: n_later - tail], flags[n_later - tail :]
            coded = min(n_codes, len(before))
            first, middle = before[: len(before) - coded], before[len(before) - coded :]
            whole = [True] * (n_tail - tail) + newest
            of_exact.append(first + whole if first else whole)
            of_codes.append(middle)
            fronts.append(front - first.count(False))
        self._exact.drop(of_exact)
        self._codes.drop(of_codes)
        self._n_front = fronts

    def crop(self, n: int) -> None:
        dropped, tails = self.n - n, self._n_tail()
        self._n_later -= dropped
        if dropped <= min(tails):
            self._exact.crop(dropped)
            return
        of_codes = [min(max(0, dropped - tail), n) for tail, n in zip(tails, self._codes.counts, strict=True)]
        self._codes = self._codes.take(
            [torch.arange(n - gone) for n, gone in zip(self._codes.counts, of_codes, strict=True)]
        )
        exact = [n - dropped + gone for n, gone in zip(self._exact.counts, of_codes, strict=True)]
        self._exact = self._exact.take([torch.arange(n) for n in exact])
        self._n_front = [min(front, n) for front, n in zip(self._n_front, exact, strict=True)]

    def without_first(self, n: int) -> Store:
        other, longest = copy.copy(self), max(self._n_first)
        gone = [first + n - longest for first in self._n_first]
        exact, codes, fronts = [], [], []
        for i, m in enumerate(gone):
            front, n_codes, n_exact = self._n_front[i], self._codes.counts[i], self._exact.counts[i]
            of_front = min(m, front)
            of_codes = min(m - of_front, n_codes)
            of_tail = m - of_front - of_codes
            exact.append(torch.cat([torch.arange(of_front, front), torch.arange(front + of_tail, n_exact)]))
            codes.append(torch.arange(of_codes, n_codes))
            fronts.append(front - of_front)
        other._exact, other._codes, other._n_front = self._exact.take(exact), self._codes.take(codes), fronts
        other._n_first, other._n_later = [0] * len(gone), self._n_later - (n - longest)
        return other

    def index_rows(self, rows: Tensor) -> None:
        chosen = [row * self.n_heads + head for row in rows.tolist() for head in range(self.n_heads)]
        self._exact, self._codes = self._exact.of(chosen), self._codes.of(chosen)
        self._n_first, self._n_front = ([own[i] for i in chosen] for own in (self._n_first, self._n_front))
        self._shape = torch.Size((len(rows), self.n_heads))

    def shared(self) -> PackedStore:
        other = copy.copy(self)
        other._exact, other._codes = self._exact.shared(), self._codes.shared()
        return other

    def own(self, capacity: int | None = None) -> None:
        more = None if capacity is None else capacity - self.n
        self._exact.own(None if more is None else [n + more for n in self._exact.counts])
        self._codes.own()

    # -- attention ----------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        biases: Sequence[Tensor | None] = [None] * len(self._n_first)
        if bias is not None:
            own = bias.expand(self.n_rows, self.n_heads, -1, -1).flatten(0, 1)
            lengths = [n + self._n_later for n in self._n_first]
            counts = torch.tensor(self._n_first, device=bias.device)
            own = segment_bias(own, counts, max(self._n_first), self._n_later, max(lengths))
            biases = [part[:, :n] for part, n in zip(own, lengths, strict=True)]
        if self._reads_codes(query):
            return self._attend_once(query, biases, scaling)
        return attend_segments(query, self._segments(0), self._segments(1), biases, scaling)

    def _reads_codes(self, query: Tensor) -> bool:
        """Whether this is a decoding step on the CPU that needs no gradients, over enough codes."""
        grows = torch.is_grad_enabled() and (query.requires_grad or self._exact.buffer("keys").requires_grad)
        is_step = query.shape[2] == 1 and query.device.type == "cpu" and not grows
        return is_step and self._codes.total >= _FEWEST * len(self._n_first)

    def _attend_once(self, query: Tensor, biases: Sequence[Tensor | None], scaling: float) -> Tensor:
        """Attention of one query per head, over codes as they are."""
        queries = query.reshape(len(self._n_first), -1, query.shape[3]).float() * scaling  # [S, G, D]
        output = attend_packed(self.codec, queries, self._exact, self._codes, self._n_front, biases)
        return output.to(query.dtype).view(query.shape[0], 1, query.shape[1], -1)

    # -- a compiled step ----------------------------------------------------------------------------------------------

    def part(self, n_more: int) -> Part | None:
        exact, codes, codec = self._exact, self._codes, self.codec
        if self.device.type != "cpu" or not isinstance(codec, RotatedBits) or not is_read_as_stored(codec):
            return None
        if kernel_for(codec, exact) is None:  # found out now, so that no step has to
            codec.try_kernels()
        if exact.pitch is None or exact.room < 1:
            most = codec.first_tokens + codec.exact_tokens + codec.batch_tokens  # then some are encoded
            exact.own([whole_blocks(max(max(exact.counts) + 1, most))] * len(exact.counts))
        if codes.pitch is None or codes.is_borrowed or not codes.total:  # no rows at all are a form by themselves
            codes.own([whole_blocks(max(codes.counts) + n_more)] * len(codes.counts))
        n_codes, n_front = (torch.tensor(counts) for counts in (codes.counts, self._n_front))
        for name in CODES:  # their number is a variable of the compiled step
            torch._dynamo.maybe_mark_dynamic(codes.buffer(name), 0)
        return PackedPart(
            keys=exact.buffer("keys"),
            values=exact.buffer("values"),
            at=self.next_slots(),
            codes=[codes.buffer(name) for name in CODES],
            n_codes=n_codes,
            n_front=n_front,
            bits=(codec.key_bits, codec.value_bits),
        )

    def next_slots(self) -> Tensor:
        return torch.tensor([span.stop for span in self._exact.spans()])

    def part_bias(self, bias: Tensor) -> Tensor:
        own = bias.expand(*self._shape, -1).flatten(0, 1)
        longest, later = max(self._n_first), own[:, max(self._n_first) :]
        assert self._exact.pitch is not None
        flat = bias.new_zeros(len(own), longest + self._n_later + self._exact.pitch)
        for i, n in enumerate(self._n_first):
            flat[i, :n], flat[i, n : n + self._n_later] = own[i, :n], later[i]
        return _of_any_length(flat)

    def part_positions(self, positions: Tensor, last: Tensor) -> Tensor:
        found = self.part_bias(positions)
        n_used = torch.tensor(self._n_first)[:, None] + self._n_later
        more = torch.arange(found.shape[1], dtype=torch.int32) + 1 - n_used.int()
        return _of_any_length(torch.where(more > 0, last.expand(*self._shape, -1).flatten(0, 1) + more, found))

    def commit(self, n: int) -> None:
        self._exact.commit(n)
        self._n_later += n

    # -- files --------------------------------------------------------------------------------------------------------

    def packed(self) -> dict[str, Tensor]:
        counts = (self._n_first, self._n_front, self._exact.counts, self._codes.counts)
        parts = {name: torch.tensor(n).view(self._shape) for name, n in zip(_COUNTS, counts, strict=True)}
        parts |= {f"exact.{name}": self._exact.flat(name) for name in ("keys", "values")}
        taken = [name for name in self._codes.names() if name in parts]
        if taken:
            raise CacheError(f"{type(self.codec).__name__} calls a tensor {taken[0]!r}, which a file has already.")
        return parts | {name: self._codes.flat(name) for name in self._codes.names()}

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int, codec: TokenCodec) -> PackedStore:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = cls.__new__(cls)
        n_first, n_front, n_exact, n_codes = (parts[name].flatten().tolist() for name in _COUNTS)
        keys, values = parts["exact.keys"], parts["exact.values"]
        others = (*_COUNTS, "exact.keys", "exact.values")
        store.codec, store._shape = codec, parts["n_first"].shape
        store._dims = keys.shape[1], values.shape[1]
        store._n_first, store._n_later = n_first, n_exact[0] + n_codes[0] - n_first[0]
        store._n_front = n_front
        store._exact = Segments({"keys": keys, "values": values}, n_exact)
        store._codes = Segments({name: part for name, part in parts.items() if name not in others}, n_codes)
        if room:
            store._exact.own([n + room for n in n_exact])
        return store


def _of_any_length(rows: Tensor) -> Tensor:
    """``rows [S, n]``, n of which is a variable of the compiled step: it grows whenever pairs are encoded."""
    torch._dynamo.maybe_mark_dynamic(rows, 1)
    return rows
