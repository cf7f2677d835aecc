"""Attention of one token over pairs of which the older ones are codes; for a compiled step, as one operation of torch.

torch.compile leaves the operation as it is: loops that it makes of the unpacking itself are slower than torch's own
operations, a head at a time (``benchmarks/packed/fused.py``).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from coldpress.attend.one_token import products, weighted_sums
from coldpress.stores.codec import TokenCodec
from coldpress.stores.native import CODES, Kind, attend_native, kernel
from coldpress.stores.parts import Sight, of_segments
from coldpress.stores.rotated import RotatedBits
from coldpress.stores.segments import Segments

__all__ = ["CODES", "TRIALS", "PackedPart", "attend_packed", "fastest", "is_read_as_stored", "kernel_for"]

_TRIED, _HEADS = 1024, 8  # codes of each head that a kernel is tried with
_CLOSE = 5e-3  # torch's sums may be rounded to 16 bits
TRIALS: dict[Kind, tuple[float, float]] = {}  # of this process: least milliseconds of the kernel, and of torch
_FEWEST_ALIKE = 2  # segments of a run, on average: fewer are as fast one by one


@torch.autocast("cpu", enabled=False)  # logits and sums are in float32
def attend_packed(
    codec: TokenCodec,
    queries: Tensor,
    exact: Segments,
    codes: Segments,
    n_front: Sequence[int],
    biases: Sequence[Tensor | None],
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of ``queries [S, G, D]``, float32 and scaled: ``[S, G, Dv]``.

    Args:
        codec: of the codes.
        exact: keys and values of each segment as they are.
        codes: those between the first ``n_front[i]`` of these and the others.
        biases: float32 ``[1, n]`` of each segment in the order of its pairs, or None.
        softcap: logits x are softcap * tanh(x / softcap) before the bias.
        sinks: float32 ``[S, G]``, logits that take weight from the pairs and have no value.
    """
    given = queries, exact, codes, n_front, biases, softcap, sinks
    library = kernel_for(codec, exact)
    return _attend_by_torch(codec, *given) if library is None else attend_native(library, *given)


def is_read_as_stored(codec: TokenCodec) -> bool:
    """Whether codes are RotatedBits' and mean what these do; a class made of it may decode them in its own way."""
    own = ("decode_keys", "decode_values", "logits", "sums")
    return isinstance(codec, RotatedBits) and all(getattr(type(codec), n) is getattr(RotatedBits, n) for n in own)


def kernel_for(codec: TokenCodec, exact: Segments) -> ctypes.CDLL | None:
    """The kernel to use; none for keys and values in two types, as autocast makes them."""
    keys, values = exact.buffer("keys"), exact.buffer("values")
    if not is_read_as_stored(codec) or keys.dtype != values.dtype:
        return None
    assert isinstance(codec, RotatedBits)
    return fastest(Kind(keys.dtype, (codec.key_bits, codec.value_bits), (keys.shape[1], values.shape[1])))


@lru_cache(maxsize=64)
def fastest(kind: Kind) -> ctypes.CDLL | None:
    """The kernel for pairs of one kind, tried once; None where it is not right, or torch's operations are faster."""
    library = kernel(kind)
    if library is None:
        return None
    codec, (dim, value_dim) = RotatedBits(*kind.bits), kind.channels
    n_exact, n_codes = _TRIED // 8, _TRIED
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.device("cpu"):  # whatever its caller set
        numbers = torch.arange(_HEADS * n_codes * (dim + value_dim)).float().sin_().view(-1, dim + value_dim)
        keys, values = (part.to(kind.dtype).contiguous() for part in numbers.split([dim, value_dim], dim=1))
        blocks = codec.encode(keys[:, None], values[:, None])
        codes = Segments({name: part[:, 0] for name, part in blocks.items()}, [n_codes] * _HEADS)
        few = {"keys": keys[: _HEADS * n_exact], "values": values[: _HEADS * n_exact]}
        queries = numbers[:_HEADS, None, :dim].contiguous()
        given = queries, Segments(few, [n_exact] * _HEADS), codes, [4] * _HEADS, [None] * _HEADS
        found, took = [], []
        for _ in range(4):  # the first of each is not counted
            for attend in (partial(attend_native, library), partial(_attend_by_torch, codec)):
                start = time.perf_counter()
                found.append(attend(*given))
                took.append(time.perf_counter() - start)
    TRIALS[kind] = 1e3 * min(took[2::2]), 1e3 * min(took[3::2])
    is_right = torch.allclose(found[-2], found[-1], atol=_CLOSE)
    return library if is_right and TRIALS[kind][0] < TRIALS[kind][1] else None


def _attend_by_torch(
    codec: TokenCodec,
    queries: Tensor,
    exact: Segments,
    codes: Segments,
    n_front: Sequence[int],
    biases: Sequence[Tensor | None],
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As :func:`attend_packed`, with torch's operations."""
    runs = exact.runs(codes, n_front)
    if len(runs) == 1:
        return _attend_alike(codec, queries, exact, codes, n_front[0], biases, softcap, sinks)
    if len(runs) <= len(queries) // _FEWEST_ALIKE:  # the heads of a row, mostly
        return torch.cat(
            [
                _attend_alike(
                    codec,
                    queries[i:j],
                    exact.part(i, j),
                    codes.part(i, j),
                    n_front[i],
                    biases[i:j],
                    softcap,
                    None if sinks is None else sinks[i:j],
                )
                for i, j in runs
            ]
        )
    coded, dim = codec.logits(queries, codes), exact.buffer("values").shape[-1]
    outputs, of_codes = [], []
    for i, (own, middle, bias) in enumerate(zip(queries, coded, biases, strict=True)):
        front, n = n_front[i], codes.counts[i]
        first, last = (own @ exact.segment("keys", i).float().T).tensor_split([front], dim=1)
        logits = torch.cat([first, middle, last], dim=1)
        weights = _weights(logits, bias, softcap, None if sinks is None else sinks[i])
        before, middle, after = weights.tensor_split([front, front + n], dim=1)
        of_codes.append(middle)
        outputs.append(torch.cat([before, after], dim=1) @ exact.segment("values", i).float())
    return torch.stack(outputs) + codec.sums(of_codes, codes, dim)


def _attend_alike(
    codec: TokenCodec,
    queries: Tensor,
    exact: Segments,
    codes: Segments,
    n_front: int,
    biases: Sequence[Tensor | None],
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As :func:`attend_packed`, of segments that store as much as each other, in one product for all."""
    n, n_codes, values = exact.counts[0], codes.counts[0], exact.even("values")
    coded = torch.stack(codec.logits(queries, codes))
    logits = torch.cat([products(queries, exact.even("keys").float()), coded], dim=-1)
    bias = None
    if biases[0] is not None:
        first, middle, last = torch.stack([b for b in biases if b is not None]).tensor_split(
            [n_front, n_front + n_codes], dim=-1
        )
        bias = torch.cat([first, last, middle], dim=-1)
    weights = _weights(logits, bias, softcap, sinks)
    output = weighted_sums(weights[..., :n].to(values.dtype), values).float()
    return output + codec.sums(weights[..., n:].unbind(0), codes, values.shape[-1])


def _weights(logits: Tensor, bias: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Weights of pairs of their ``logits [..., G, n]``, with ``bias [..., 1, n]`` and ``sinks [..., G]``."""
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks[..., None]], dim=-1).softmax(-1)[..., :-1]


@torch.library.custom_op("coldpress::attend_packed", mutates_args=())
def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    codes: list[Tensor],
    n_codes: Tensor,
    n_front: Tensor,
    key_bits: int,
    value_bits: int,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    n_segments = len(queries)
    pitch = len(keys) // n_segments
    counts = [end + 1 - i * pitch for i, end in enumerate(at.tolist())]
    exact = Segments.held({"keys": keys, "values": values}, counts)
    coded = Segments.held(dict(zip(CODES, codes, strict=True)), n_codes.tolist())
    lengths = [n + m for n, m in zip(counts, coded.counts, strict=True)]
    biases = [None if bias is None else bias[i, None, :n] for i, n in enumerate(lengths)]
    codec = RotatedBits(key_bits, value_bits)
    return attend_packed(codec, queries, exact, coded, n_front.tolist(), biases, softcap, sinks)


@_attend.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *others: object) -> Tensor:
    return queries.new_empty(*queries.shape[:2], values.shape[1])


class PackedPart(NamedTuple):
    """Segments of pairs, the older ones as codes of RotatedBits; equally far apart, whatever they store.

    Attributes:
        keys, values: ``[S * room, D]``, ``[S * room, Dv]``, those that are as they are.
        at: int64 ``[S]``, the slot of each segment's new pair.
        codes: the tensors of the codes, in the order of CODES.
        n_codes, n_front: int64 ``[S]``, how many codes each segment has, and how many of its pairs come before them.
        bits: of keys and of values.
    """

    keys: Tensor
    values: Tensor
    at: Tensor
    codes: list[Tensor]
    n_codes: Tensor
    n_front: Tensor
    bits: tuple[int, int]

    def going_to(self, at: Tensor) -> PackedPart:
        return self._replace(at=at)

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(0, self.at, keys.reshape(-1, keys.shape[3]))
        self.values.index_copy_(0, self.at, values.reshape(-1, values.shape[3]))
        return keys, values

    def attend(
        self, query: Tensor, sight: Sight, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        queries = query.reshape(self.at.shape[0], -1, query.shape[3]).float() * scaling
        bias = sight.bias
        if sight.positions is not None and sight.oldest is not None:
            n_rows = query.shape[0]
            oldest = sight.oldest[..., 0].expand(n_rows, len(queries) // n_rows).reshape(-1, 1)
            bias = torch.zeros(sight.positions.shape) if bias is None else bias
            bias = bias.masked_fill(sight.positions <= oldest, -torch.inf)
        own = of_segments(sinks, queries)
        stored = self.keys, self.values, self.at, self.codes, self.n_codes, self.n_front
        output = _attend(queries, *stored, *self.bits, bias, softcap, own)
        return output.to(query.dtype).reshape(query.shape[0], 1, query.shape[1], -1)
