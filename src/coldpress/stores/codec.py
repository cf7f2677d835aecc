"""Codec: how the older pairs of a cache are stored, in blocks that are encoded once. TokenCodec: one pair a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from coldpress.errors import CacheError
from coldpress.stores.segments import Segments

__all__ = ["Blocks", "Codec", "TokenCodec", "check_codec", "codec_of", "decoded", "form_of"]

_MOST_TOKENS = 1 << 16  # of a block: no less of a head is decoded at once

Blocks = Mapping[str, Tensor]  # N blocks: tensors by name, the first dimension of each is N


class Codec(ABC):
    """What a cache is given as ``storage=``; derive from it, and make what it needs to know fields of a dataclass.

    Each head's newest pairs stay as they are: ``exact_tokens`` of them, and those that make no whole block. Older ones
    are encoded block by block and never again.

    Attributes:
        block_tokens: pairs of one head that are encoded together, g.
        exact_tokens: newest pairs of each head that stay as they are, at least 0.
        evictable: pairs are encoded one by one, so a press may evict some of them while decoding.
        chooses: it has several :attr:`codecs`, of which a layer takes one.
    """

    evictable: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    names: ClassVar[Mapping[bool, str]] = {False: "coded", True: "coded ragged"}  # in files: heads differ or not

    block_tokens: int
    exact_tokens: int

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """What a layer may be stored by: this codec alone, unless it leaves the choice to the layer (Mixed)."""
        return (self,)

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """Encode N blocks, ``keys [N, g, D]`` and ``values [N, g, Dv]``; names tell keys and values apart."""

    @abstractmethod
    def decode_keys(self, blocks: Blocks, out: Tensor) -> None:
        """Fill ``out [..., g, D]``, the N blocks in as many dimensions as it has before these two."""

    @abstractmethod
    def decode_values(self, blocks: Blocks, out: Tensor) -> None:
        """Fill ``out [..., g, Dv]``, likewise."""

    def n_groups(self, n_tokens: int) -> int:
        """How many blocks of the first of ``n_tokens`` tokens are older than the newest ones that stay as they are."""
        return max(0, (n_tokens - self.exact_tokens) // self.block_tokens)

    def n_encoded(self, n_tokens: int) -> int:
        """How many of a head's ``n_tokens`` pairs are encoded when they are stored."""
        return self.n_groups(n_tokens) * self.block_tokens

    def described(self) -> dict[str, Any]:
        """What a file says of it: the name of its class and its parameters."""
        return {"class": _name(type(self)), "parameters": dict(vars(self))}


class TokenCodec(Codec):
    """A codec whose blocks are single pairs, ``[N, 1, D]``: they come, go and move, and none is encoded twice.

    Its pairs are in a :class:`~coldpress.stores.packed.PackedStore`. Of each head the first ones stay as they are too,
    those that it stores when some of its pairs are encoded for the first time. Queries of a decoding step go to
    :meth:`logits` and :meth:`sums`; what is here decodes the pairs of one head at a time.

    Attributes:
        first_tokens: first pairs of each head that stay as they are, at least 0.
        batch_tokens: as long as fewer pairs of a head that came one by one are older than the newest ones, they wait as
            they are.
    """

    evictable = True
    names: ClassVar[Mapping[bool, str]] = {False: "packed", True: "packed"}

    block_tokens = 1
    first_tokens: int = 0
    batch_tokens: int = 64

    def n_new(self, n_tail: int, waits: bool) -> int:
        """How many of a head's ``n_tail`` pairs after the first ones are encoded now."""
        n_older = max(0, n_tail - self.exact_tokens)
        return 0 if waits and n_older < self.batch_tokens else n_older

    def n_encoded(self, n_tokens: int) -> int:
        return self.n_new(n_tokens - min(self.first_tokens, n_tokens), waits=False)

    def logits(self, query: Tensor, held: Segments) -> list[Tensor]:
        """Products of ``query [S, G, D]``, float32, and the keys of each segment: float32 ``[G, n]`` each."""
        found = []
        for i, own in enumerate(query):
            key = query.new_empty(held.counts[i], 1, query.shape[-1])
            self.decode_keys(_blocks_of(held, i), key)
            found.append(own @ key[:, 0].T)
        return found

    def sums(self, weights: Sequence[Tensor], held: Segments, dim: int) -> Tensor:
        """Sums of the values of each segment, ``[n, dim]``, with weights, float32 ``[G, n]``: ``[S, G, dim]``."""
        found = []
        for i, own in enumerate(weights):
            value = own.new_empty(held.counts[i], 1, dim)
            self.decode_values(_blocks_of(held, i), value)
            found.append(own @ value[:, 0])
        return torch.stack(found)


def _blocks_of(held: Segments, i: int) -> Blocks:
    return {name: held.segment(name, i)[:, None] for name in held.names()}


def codec_of(said: Mapping[str, Any]) -> Codec:
    """The codec that was :meth:`Codec.described`. Looks among the classes that exist; nothing is imported.

    Raises:
        CacheError: there is no such class, or it does not take these parameters.
    """
    cls = next((cls for cls in _subclasses(Codec) if _name(cls) == said["class"]), None)  # type: ignore[type-abstract]
    if cls is None:
        raise CacheError(
            f"There is no codec {said['class']} here; import the module {said['class'].partition(':')[0]}."
        )
    try:
        return check_codec(cls(**said["parameters"]))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # of a type that it does not expect
        raise CacheError(f"{said['class']} does not take the parameters that are given: {error}.") from error


def check_codec(codec: Codec) -> Codec:
    """``codec``; raise :class:`CacheError` unless its numbers of tokens are integers in range."""
    for name, least, most in (("block_tokens", 1, _MOST_TOKENS), ("exact_tokens", 0, 2**40)):
        value = getattr(codec, name, None)
        if type(value) is not int or not least <= value <= most:
            raise CacheError(f"{type(codec).__name__}: {name} must be an integer in {least} .. {most}, got {value!r}.")
    return codec


def form_of(codec: Codec, dims: Sequence[int], dtype: torch.dtype) -> Blocks:
    """One block of zeros, encoded: the names, dtypes and shapes that all blocks of such keys and values have."""
    keys, values = (torch.zeros(1, codec.block_tokens, dim, dtype=dtype) for dim in dims)
    return codec.encode(keys, values)


def _name(cls: type[Codec]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _subclasses(cls: type[Codec]) -> Iterator[type[Codec]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def decoded(codec: Codec, blocks: Blocks, which: int, n: int, like: Tensor) -> Tensor:
    """Keys (``which`` 0) or values (1) of ``n`` blocks: ``[n, g, D]`` in the dtype of ``like [..., D]``."""
    out = torch.empty(n, codec.block_tokens, like.shape[-1], dtype=like.dtype, device=like.device)
    (codec.decode_values if which else codec.decode_keys)(blocks, out)
    return out
