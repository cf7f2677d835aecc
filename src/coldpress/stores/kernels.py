"""Which way a decoding step reads codes: by torch's kernels (``attend/packed.py``), or by unpacking and multiplying.

At its first use in a process each kernel is timed against the other way, on this machine and on two small shapes; the
slower one is not used. Nothing is saved. The two ways differ by what
:class:`~coldpress.attend.packed.Digits` says, and by rounding in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from coldpress.attend.packed import (
    CHANNELS,
    Digits,
    bag_sums,
    integer_products,
    products_are_right,
    sums_are_right,
)
from coldpress.stores.rows import code_bytes, key_codes, steps_type, value_parts

__all__ = ["VERDICTS", "KeyProducts", "Verdict", "unpacked_products", "unpacked_sums", "value_sums", "verdict"]

_SIZES = (512, 4096)  # pairs of a head, with one query
_SEGMENTS, _DIM = 2, 64
_ROUNDS = 4  # of which the first is not counted
_Places = tuple[tuple[int, int], ...]  # first row and number of rows of each segment


class Verdict(NamedTuple):
    """What a trial of a kernel has found.

    Attributes:
        least: products of a head with its queries from which on the kernel is used: where straight lines through the
            times cross; 0: however few; None: never.
        ms: by the number of products: least milliseconds of the kernel, and of unpacking and multiplying. Empty where
            torch has no such kernel, or it gives wrong numbers.
    """

    least: int | None
    ms: dict[int, tuple[float, float]]


VERDICTS: dict[tuple[str, int, int], Verdict] = {}  # of this process: for keys or values, in bits, by threads


def verdict(side: str, bits: int) -> Verdict:
    """That on the kernel of ``side``, keys or values, in 8, 4 or 2 bits; it is tried where it has not been."""
    kind = side, bits, torch.get_num_threads()
    if kind not in VERDICTS:
        VERDICTS.setdefault(kind, _tried(side, bits))
    return VERDICTS[kind]


def _tried(side: str, bits: int) -> Verdict:
    """The verdict of a trial, which is the same whatever device or mode its caller has set."""
    is_right, ways = {"keys": (products_are_right, _key_ways), "values": (sums_are_right, _value_ways)}[side]
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        if not is_right(bits):
            return Verdict(None, {})
        ms = {n: _least_ms(*ways(n, bits)) for n in _SIZES}
    few, many = _SIZES
    gains = [unpacked - kernel for kernel, unpacked in ms.values()]
    if min(gains) > 0:
        return Verdict(0, ms)
    if gains[1] <= gains[0]:
        return Verdict(None, ms)
    return Verdict(round(few - gains[0] * (many - few) / (gains[1] - gains[0])), ms)


def _least_ms(kernel: Callable[[], Tensor], unpacked: Callable[[], Tensor]) -> tuple[float, float]:
    took: list[float] = []
    for _ in range(_ROUNDS):
        for way in (kernel, unpacked):
            start = time.perf_counter()
            way()
            took.append(1e3 * (time.perf_counter() - start))
    return min(took[2::2]), min(took[3::2])


def _key_ways(n: int, bits: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    query, codes = _numbers(_SEGMENTS, 1, _DIM), _bytes(_SEGMENTS, n, code_bytes(_DIM, bits))
    return lambda: integer_products(Digits.of(query), codes, bits), lambda: unpacked_products(query, codes, bits)


def _value_ways(n: int, bits: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    weights, codes = _numbers(_SEGMENTS, 1, n), _bytes(_SEGMENTS * n, code_bytes(_DIM, bits))
    steps = torch.tensor([1.0, 0.0], dtype=steps_type(bits)).view(torch.uint8)
    rows = torch.cat([codes, steps.expand(len(codes), -1)], dim=1)
    places = tuple((i * n, n) for i in range(_SEGMENTS))
    return (
        lambda: bag_sums(torch.cat(list(weights), dim=1), rows, places, bits),
        lambda: unpacked_sums(list(weights), rows, places, bits, _DIM),
    )


def _numbers(*shape: int) -> Tensor:
    return _bytes(*shape).to(torch.float32) / 256


def _bytes(*shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 37 % 251).to(torch.uint8).view(shape)


# -- keys -------------------------------------------------------------------------------------------------------------


class KeyProducts:
    """Products of ``query [S, G, D]``, float32, with the codes of keys."""

    def __init__(self, query: Tensor, bits: int):
        self.query, self.bits = query, bits

    @cached_property
    def digits(self) -> Digits:
        return Digits.of(self.query)

    def of(self, which: slice, codes: Tensor) -> Tensor:
        """Those of some segments of one length, whose codes are uint8 ``[s, n, W]``: float32 ``[s, G, n]``."""
        query = self.query[which]
        n_products = codes.shape[1] * query.shape[1]
        is_for_integers = query.device.type == "cpu" and query.shape[2] % CHANNELS == 0
        if is_for_integers and _is_faster("keys", self.bits, n_products):
            return integer_products(self.digits.of_segments(which), codes, self.bits)
        return unpacked_products(query, codes, self.bits)


def unpacked_products(query: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Products of ``query [S, G, D]`` with codes, uint8 ``[S, n, W]``, one head unpacked at a time: ``[S, G, n]``."""
    dim = query.shape[2]
    return torch.stack([own @ key_codes(code, bits, dim).T for own, code in zip(query, codes, strict=True)])


# -- values -----------------------------------------------------------------------------------------------------------


def value_sums(weights: Sequence[Tensor], rows: Tensor, places: _Places, bits: int, dim: int) -> Tensor:
    """Sums of rows with the weights of each segment, float32 ``[G, n]``: float32 ``[S, G, dim]``.

    Args:
        rows: uint8 ``[rows, bytes]``.
        places: where the rows of each segment are.
    """
    n_products = sum(own.numel() for own in weights) // len(weights)
    if rows.device.type == "cpu" and _is_faster("values", bits, n_products):
        return bag_sums(torch.cat(list(weights), dim=1), rows, places, bits)[..., :dim]
    return unpacked_sums(weights, rows, places, bits, dim)


def unpacked_sums(weights: Sequence[Tensor], rows: Tensor, places: _Places, bits: int, dim: int) -> Tensor:
    """As :func:`value_sums`, one head unpacked at a time."""
    found = []
    for own, (start, n) in zip(weights, places, strict=True):
        codes, step, least = value_parts(rows[start : start + n], bits, dim)
        found.append((own * step) @ codes + (own @ least)[:, None])
    return torch.stack(found)


def _is_faster(side: str, bits: int, n_products: int) -> bool:
    """Whether the kernel is, of so many products of a head."""
    least = verdict(side, bits).least if n_products else None
    return least is not None and n_products >= least
