"""KVBits, Codes and the stores that hold most of their pairs as integers of few bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from coldpress.errors import CacheError
from coldpress.ragged import RaggedStore, attend_segments, pad_segments
from coldpress.store import DenseStore, is_frozen

if TYPE_CHECKING:
    from coldpress.presses.base import BasePress

__all__ = ["BITS", "Codes", "KVBits", "QuantizedRaggedStore", "QuantizedStore", "check_quantisable"]

BITS = (8, 4, 2)
_BLOCK_ELEMENTS = 1 << 22  # of float32 copies that are held at once while pairs are quantised (16 MiB)
_Q = TypeVar("_Q", bound="_Quantized")


@dataclass(frozen=True)
class KVBits:
    """How a cache holds its pairs in few bits; ``PressedCache(kv_bits=4)`` stands for ``kv_bits=KVBits(4)``.

    Keys are quantised per channel over group_size tokens, values per token over group_size channels (of as many as
    divide them, at most). A group is held as integers q of 0 .. 2^bits - 1, with its least number m and a step s:
    m + s * q. Each head's newest residual_tokens pairs stay as they are, and so do those that make no whole group.

    Args:
        bits: 8, 4 or 2.
        group_size: numbers that share a step, at least 1.
        residual_tokens: newest pairs of each head that stay in full precision, at least 0.

    Raises:
        CacheError: numbers that cannot be meant.
    """

    bits: int
    group_size: int = 64
    residual_tokens: int = 128

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise CacheError(f"kv_bits must be 8, 4 or 2, or a KVBits of these, got {self.bits!r}.")
        for name, least in (("group_size", 1), ("residual_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CacheError(f"KVBits: {name} must be an integer of at least {least}, got {value!r}.")

    @classmethod
    def of(cls, given: int | KVBits | None) -> KVBits | None:
        """What ``kv_bits=`` was given, which may be the number of bits alone."""
        return given if given is None or isinstance(given, KVBits) else cls(given)

    def n_groups(self, n_tokens: int) -> int:
        """How many groups of the first of ``n_tokens`` tokens are older than the newest ones that stay as they are."""
        return max(0, (n_tokens - self.residual_tokens) // self.group_size)

    def channels(self, n_channels: int) -> int:
        """How many of ``n_channels`` channels of a value share a step."""
        fitting = [n for n in range(8, self.group_size + 1) if n_channels % n == 0]
        return fitting[-1] if fitting else n_channels


def check_quantisable(press: BasePress | None, kv_bits: KVBits | None) -> None:
    """Raise :class:`CacheError` if what ``press`` keeps cannot be held in few bits."""
    from coldpress.presses.base import parts

    if press is None or kv_bits is None:
        return
    if press.goes_on:
        raise CacheError(
            f"{type(press).__name__} evicts pairs while decoding, and kv_bits holds keys in groups of tokens that "
            "cannot be taken apart without quantising them again; use a press that stops after the prefill, or no "
            "kv_bits."
        )
    if any(getattr(part, "key_channel_compression_ratio", 0) for part in parts(press)):
        raise CacheError(
            f"{type(press).__name__} holds keys in fewer channels and kv_bits in fewer bits; both at once are not "
            "supported: use one of them."
        )


@dataclass(frozen=True, eq=False)
class Codes:
    """N blocks of ``[g, C]`` numbers as integers of few bits; immutable, so that forks may share them.

    Attributes:
        packed: uint8 ``[N, g, ceil(C * bits / 8)]``; of a byte, the lowest bits belong to the first channels.
        scale: the steps: ``[N, 1, C]``, each for the g tokens of a channel, or ``[N, g, C / size]``, each for ``size``
            channels of a token. bfloat16 where the numbers were float32: a step that is rounded up costs nothing else.
        zero: the least numbers, likewise, in the type that the numbers had: so they are exact.
        bits: of an integer.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, numbers: Tensor, bits: int, size: int | None) -> Codes:
        """Quantise ``numbers [N, g, C]`` over the tokens of each block or, with ``size``, over so many channels."""
        numbers = numbers.detach()
        n_each = max(1, _BLOCK_ELEMENTS // max(1, numbers[:1].numel()))
        parts = [_quantised(part, bits, size) for part in numbers.split(n_each)]
        packed, scale, zero = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(packed, scale, zero, bits)

    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory."""
        return self.packed, self.scale, self.zero

    def write(self, out: Tensor) -> None:
        """Fill ``out [..., g, C]``, the N blocks in as many dimensions as it has before these two."""
        lead = out.shape[:-2]
        packed = self.packed.view(*lead, *self.packed.shape[1:])
        width = packed.shape[-1]
        for i in range(8 // self.bits):
            part = out[..., i * width : (i + 1) * width]
            own = packed[..., : part.shape[-1]] >> (i * self.bits) if i else packed[..., : part.shape[-1]]
            part.copy_(own if self.bits == 8 else own & (2**self.bits - 1))
        scale, zero = (each.view(*lead, *each.shape[1:]).to(out.dtype) for each in (self.scale, self.zero))
        if scale.shape[-2] == out.shape[-2] and scale.shape[-1] != out.shape[-1]:
            out = out.unflatten(-1, (scale.shape[-1], -1))
            scale, zero = scale[..., None], zero[..., None]
        torch.addcmul(zero, out, scale, out=out)

    def numbers(self, dtype: torch.dtype, n_channels: int) -> Tensor:
        """``[N, g, C]``: what is held, as far as it is known."""
        out = torch.empty(*self.packed.shape[:2], n_channels, dtype=dtype, device=self.packed.device)
        self.write(out)
        return out

    def take(self, blocks: Tensor) -> Codes:
        """The blocks ``blocks``, int64 ``[N']``, in this order."""
        packed, scale, zero = (each.index_select(0, blocks) for each in self.tensors())
        return Codes(packed, scale, zero, self.bits)

    def and_then(self, other: Codes) -> Codes:
        """With the blocks of ``other`` after these."""
        packed, scale, zero = (torch.cat(pair) for pair in zip(self.tensors(), other.tensors(), strict=True))
        return Codes(packed, scale, zero, self.bits)


def _quantised(numbers: Tensor, bits: int, size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed integers, steps and least numbers of ``numbers [N, g, C]``, as :class:`Codes` holds them."""
    most = 2**bits - 1
    kind = torch.bfloat16 if numbers.dtype == torch.float32 else numbers.dtype
    groups = numbers.float() if size is None else numbers.float().unflatten(-1, (-1, size))
    dim = 1 if size is None else -1
    zero = groups.amin(dim, keepdim=True)
    step = (groups.amax(dim, keepdim=True) - zero) / most
    scale = (step * (1 + torch.finfo(kind).eps)).to(kind)  # rounded up, so that the largest number gets the last code
    step = scale.float()
    codes = ((groups - zero) / step.where(step > 0, 1.0)).round_().clamp_(0, most).to(torch.uint8)
    if size is not None:
        codes, scale, zero = codes.flatten(-2), scale[..., 0], zero[..., 0]
    per_byte = 8 // bits
    width = -(-numbers.shape[-1] // per_byte)
    codes = pad(codes, (0, per_byte * width - numbers.shape[-1]))
    packed = codes[..., :width].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        packed |= codes[..., i * width : (i + 1) * width] << (i * bits)
    return packed, scale, zero.to(numbers.dtype)


class _Quantized:
    """What the two stores have in common: segments, each of some blocks of g coded pairs and then others as they are.

    A segment is what one KV head of one row holds. The pairs of a block are quantised once, when they are no longer
    among the newest, and its codes are never made again.

    Attributes:
        how: bits, group size and newest pairs that stay.
    """

    _tail: DenseStore | RaggedStore
    _kind: type[DenseStore] | type[RaggedStore]  # of the tail

    @property
    def n(self) -> int:
        """Slots in use."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy."""
        raise NotImplementedError

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a copy."""
        raise NotImplementedError

    def __init__(self, how: KVBits):
        self.how = how
        self._codes: tuple[Codes, Codes] | None = None  # keys and values, the blocks of each segment in order
        self._n_blocks: list[int] = []  # of each segment

    @property
    def n_rows(self) -> int:
        return self._tail.n_rows

    @property
    def n_heads(self) -> int:
        return self._tail.n_heads

    @property
    def device(self) -> torch.device:
        return self._tail.device

    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory."""
        codes = () if self._codes is None else (*self._codes[0].tensors(), *self._codes[1].tensors())
        return *self._tail.tensors(), *codes

    @property
    def room(self) -> int:
        """Tokens that can be added before the buffers have to be copied."""
        return self._tail.room

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last ``n`` slots."""
        return self.keys[:, :, self.n - n :], self.values[:, :, self.n - n :]

    def packed(self) -> dict[str, Tensor]:
        """What it takes to make the store again, by name, and nothing of the room to grow."""
        parts = {f"tail.{name}": tensor for name, tensor in self._tail.packed().items()}
        parts["how"] = torch.tensor([self.how.bits, self.how.group_size, self.how.residual_tokens])
        if self._codes is not None:
            parts["n_blocks"] = torch.tensor(self._n_blocks)
            for which, codes in zip(("keys", "values"), self._codes, strict=True):
                parts |= {f"{which}.{name}": getattr(codes, name) for name in ("packed", "scale", "zero")}
        return parts

    @classmethod
    def unpacked(cls: type[_Q], parts: dict[str, Tensor], room: int) -> _Q:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = cls.__new__(cls)
        how = KVBits(*parts["how"].tolist())
        _Quantized.__init__(store, how)
        tail = {name.removeprefix("tail."): tensor for name, tensor in parts.items() if name.startswith("tail.")}
        store._tail = cls._kind.unpacked(tail, room)
        if "n_blocks" in parts:
            store._n_blocks = parts["n_blocks"].tolist()
            keys, values = (
                Codes(parts[f"{which}.packed"], parts[f"{which}.scale"], parts[f"{which}.zero"], how.bits)
                for which in ("keys", "values")
            )
            store._codes = keys, values
        return store

    def shared(self: _Q) -> _Q:
        """A store of the same pairs that goes its own way; nothing is copied until one of the two is written to."""
        other = copy.copy(self)
        other._tail = self._tail.shared()
        return other

    def buffers_for(self, n_tokens: int) -> None:
        """None: nothing else can be written into these buffers."""
        return None

    def _add(self, keys: Tensor, values: Tensor, n_new: list[int]) -> None:
        """Quantise the blocks ``keys [N, g, D]``, ``values [N, g, Dv]``, ``n_new`` for each segment in order."""
        how = self.how
        new = Codes.of(keys, how.bits, None), Codes.of(values, how.bits, how.channels(values.shape[-1]))
        if self._codes is None:
            self._codes, self._n_blocks = new, n_new
            return
        n_old, at, blocks = sum(self._n_blocks), 0, []
        at_new = n_old
        for old, more in zip(self._n_blocks, n_new, strict=True):
            blocks += [*range(at, at + old), *range(at_new, at_new + more)]
            at, at_new = at + old, at_new + more
        order = torch.tensor(blocks, device=self.device)
        self._codes = tuple(own.and_then(other).take(order) for own, other in zip(self._codes, new, strict=True))  # type: ignore[assignment]
        self._n_blocks = [old + more for old, more in zip(self._n_blocks, n_new, strict=True)]

    def _take_rows(self, rows: Tensor) -> None:
        """Hold the coded blocks of the rows ``rows``."""
        if self._codes is None:
            return
        n_heads, starts = self.n_heads, [0]
        for n in self._n_blocks:
            starts.append(starts[-1] + n)
        chosen = [row * n_heads + head for row in rows.tolist() for head in range(n_heads)]
        blocks = torch.tensor([at for i in chosen for at in range(starts[i], starts[i + 1])], device=self.device).long()
        self._codes = self._codes[0].take(blocks), self._codes[1].take(blocks)
        self._n_blocks = [self._n_blocks[i] for i in chosen]


class QuantizedStore(_Quantized):
    """The first pairs of every row and head in few bits, the others in a :class:`DenseStore`.

    ``keys`` and ``values`` are copies, made for the attention of one layer at a time.

    Args:
        store: the pairs, the store's own from now on.
        how: bits, group size and newest pairs that stay.
    """

    _tail: DenseStore
    _kind = DenseStore

    def __init__(self, store: DenseStore, how: KVBits):
        super().__init__(how)
        self._tail = store
        self.quantise()

    @property
    def n_coded(self) -> int:
        """Slots whose pairs are in few bits: the first ones."""
        return self._n_blocks[0] * self.how.group_size if self._n_blocks else 0

    @property
    def n(self) -> int:
        return self.n_coded + self._tail.n

    @property
    def n_exact(self) -> int:
        """The newest slots whose pairs are as they were, in every row and head."""
        return self._tail.n

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy."""
        return self._whole(0, self._tail.keys)

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a copy."""
        return self._whole(1, self._tail.values)

    def _whole(self, which: int, tail: Tensor) -> Tensor:
        if self._codes is None:
            return tail
        n_coded = self.n_coded
        whole = tail.new_empty(*tail.shape[:2], n_coded + tail.shape[2], tail.shape[3])
        self._codes[which].write(whole[:, :, :n_coded].unflatten(2, (-1, self.how.group_size)))
        whole[:, :, n_coded:] = tail
        return whole

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        """Add the pairs ``[B, Hkv, Q, D]`` of Q new tokens, as they are."""
        tail = self._tail
        needed = tail.n + keys.shape[2]
        if tail.is_borrowed or is_frozen(tail.tensors()[1]) or needed > tail.tensors()[1].shape[2]:
            tail.own(max(needed, self.how.residual_tokens + self.how.group_size))
        tail.append(keys, values)

    def quantise(self) -> None:
        """Quantise the oldest of the pairs that are held as they are, in whole groups, and leave the newest."""
        m, g, tail = self.how.n_groups(self._tail.n), self.how.group_size, self._tail
        if m:
            keys, values = (part[:, :, : m * g].unflatten(2, (m, g)).flatten(0, 2) for part in (tail.keys, tail.values))
            self._add(keys, values, [m] * (self.n_rows * self.n_heads))
            self._tail = tail.without_first(m * g)

    def crop(self, n: int) -> None:
        """Forget the slots from ``n`` on, which are among the ``n_exact`` newest."""
        self._tail.crop(n - self.n_coded)

    def index_rows(self, rows: Tensor) -> None:
        """Hold the rows ``rows`` of what is held, int64 ``[B']``."""
        self._take_rows(rows)
        self._tail.index_rows(rows)

    def droppable(self, n: int) -> int:
        """How many of the first ``n`` slots :meth:`without_first` can leave out: coded ones go in whole blocks."""
        return n if n >= self.n_coded else n // self.how.group_size * self.how.group_size

    def without_first(self, n: int) -> QuantizedStore:
        """A store of the slots from ``n`` on, which :meth:`droppable` allows, in memory of its own."""
        other = copy.copy(self)
        n_coded = self.n_coded
        if n >= n_coded:
            other._codes, other._n_blocks = None, []
            other._tail = self._tail.without_first(n - n_coded)
            return other
        assert self._codes is not None
        n_blocks, first = self._n_blocks[0], n // self.how.group_size
        blocks = torch.arange(len(self._n_blocks) * n_blocks, device=self.device).view(-1, n_blocks)[:, first:]
        other._codes = self._codes[0].take(blocks.flatten()), self._codes[1].take(blocks.flatten())
        other._n_blocks = [n_blocks - first] * len(self._n_blocks)
        other._tail = self._tail.without_first(0)
        return other


class QuantizedRaggedStore(_Quantized):
    """Rows and heads that hold different numbers of pairs: the first of each in few bits, the others as they are.

    Each segment is quantised in groups of its own pairs, so that it holds what it would hold alone. As slots its pairs
    are those of :class:`~coldpress.ragged.RaggedStore`.

    Args:
        store: the pairs, the store's own from now on.
        how: bits, group size and newest pairs that stay.
    """

    _tail: RaggedStore
    _kind = RaggedStore

    def __init__(self, store: RaggedStore, how: KVBits):
        super().__init__(how)
        self._tail = store
        self._n_first, self._n_later = store.counts(), store.n_later
        self.quantise()

    @property
    def n(self) -> int:
        """Slots in use, as the longest segment counts them."""
        return max(self._n_first) + self._n_later

    @property
    def n_first(self) -> int:
        """Slots for the pairs that are not of later tokens."""
        return max(self._n_first)

    @property
    def has_gaps(self) -> bool:
        """Whether some head holds fewer pairs than another one."""
        return min(self._n_first) < max(self._n_first)

    @property
    def n_exact(self) -> int:
        """The newest slots whose pairs are as they were, in every row and head."""
        return self._tail.n_later

    def packed(self) -> dict[str, Tensor]:
        """What it takes to make the store again, by name, and nothing of the room to grow."""
        return super().packed() | {"counts": torch.tensor([*self._n_first, self._n_later])}

    @classmethod
    def unpacked(cls, parts: dict[str, Tensor], room: int) -> QuantizedRaggedStore:
        """The store that was :meth:`packed`, in tensors of its own, with room for ``room`` more tokens."""
        store = super().unpacked(parts, room)
        *store._n_first, store._n_later = parts["counts"].tolist()
        return store

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, n, D]``: a copy, zero where a head holds fewer pairs."""
        return self._padded(0)

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, n, Dv]``: a copy, zero where a head holds fewer pairs."""
        return self._padded(1)

    def _padded(self, which: int) -> Tensor:
        padded = pad_segments(self._segments(which), self._n_first, self._n_later)
        return padded.unflatten(0, (self.n_rows, self.n_heads))

    def _segments(self, which: int) -> list[Tensor]:
        """What each segment holds, ``[n, D]`` each."""
        flat = self._tail.tensors()[which]
        tails = [flat[span] for span in self._tail.spans()]
        if self._codes is None:
            return tails
        coded = self._codes[which].numbers(flat.dtype, flat.shape[1]).flatten(0, 1)
        parts = coded.split([n * self.how.group_size for n in self._n_blocks])
        return [torch.cat(pair) if len(pair[0]) else pair[1] for pair in zip(parts, tails, strict=True)]

    def append(self, keys: Tensor, values: Tensor, is_tight: bool = False) -> None:
        """Add the pairs ``[B, Hkv, Q, D]`` of Q new tokens, as they are."""
        longest = max(span.stop - span.start for span in self._tail.spans())
        until_next = self.how.residual_tokens + self.how.group_size - longest
        self._tail.append(keys, values, room=max(keys.shape[2], until_next))
        self._n_later += keys.shape[2]

    def quantise(self) -> None:
        """Quantise the oldest of the pairs that are held as they are, in whole groups, and leave the newest."""
        g, spans = self.how.group_size, self._tail.spans()
        n_new = [self.how.n_groups(span.stop - span.start) for span in spans]
        if not any(n_new):
            return
        first = [slice(span.start, span.start + n * g) for span, n in zip(spans, n_new, strict=True) if n]
        keys, values = (torch.cat([flat[s] for s in first]).unflatten(0, (-1, g)) for flat in self._tail.tensors())
        self._add(keys, values, n_new)
        self._tail = self._tail.without_first([n * g for n in n_new])

    def crop(self, n: int) -> None:
        """Forget the slots from ``n`` on, which are among the ``n_exact`` newest."""
        dropped = self.n - n
        self._tail.crop(self._tail.n - dropped)
        self._n_later -= dropped

    def index_rows(self, rows: Tensor) -> None:
        """Hold the rows ``rows`` of what is held, int64 ``[B']``."""
        self._take_rows(rows)
        chosen = [row * self.n_heads + head for row in rows.tolist() for head in range(self.n_heads)]
        self._n_first = [self._n_first[i] for i in chosen]
        self._tail.index_rows(rows)

    def attend(self, query: Tensor, scaling: float | None) -> Tensor:
        """Attention of the newest tokens over what each head holds: as :meth:`RaggedStore.attend`."""
        return attend_segments(query, self._segments(0), self._segments(1), scaling)
