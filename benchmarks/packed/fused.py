#!/usr/bin/env python3
"""Loops that torch.compile makes of unpacking codes, against torch's own operations on them, for one token.

    python -m benchmarks.packed.fused

Products of one query with keys in 8 bits, and weighted sums of values in 4 bits, of eight heads of 64 channels. All
ways take turns, in a random order, and the processor's time of this process is counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from benchmarks.decoding import turns
from torch import Tensor

from coldpress.attend.packed import bag_sums
from coldpress.stores.rows import least_and_step, rows_of

HEADS, DIM = 8, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of each head")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = ways(args.tokens)
    ms: dict[str, list[float]] = {name: [] for name in found}
    with torch.inference_mode():
        for own, fused in (("keys, a head at a time", "keys, compiled"), ("values, one operation", "values, compiled")):
            torch.testing.assert_close(found[fused](), found[own](), atol=1e-3, rtol=1e-3)
        for _, name in turns(list(found), args.rounds, 0):
            start = time.process_time()
            found[name]()
            ms[name].append(1e3 * (time.process_time() - start))
    print("| way | ms: median (least) |\n|---|---:|")
    for name, samples in ms.items():
        print(f"| {name} | {statistics.median(samples):.2f} ({min(samples):.2f}) |")
    print(f"\n{args.tokens:,} pairs of each of {HEADS} heads, {args.threads} CPU thread, torch {torch.__version__}.")
    return 0


def ways(n: int) -> dict[str, Callable[[], Tensor]]:
    """By name: products ``[HEADS, n]`` and sums ``[HEADS, DIM]``."""
    torch.manual_seed(0)
    query, weights = torch.randn(HEADS, DIM), torch.randn(HEADS, n).softmax(-1)
    key, value = torch.randn(HEADS * n, DIM), torch.randn(HEADS * n, DIM)
    codes, least, step = least_and_step(key, 8, torch.float16)
    signed = (codes ^ 128).view(torch.int8).view(HEADS, n, DIM)  # less 128
    least, step = least.view(HEADS, n).float(), step.view(HEADS, n).float()
    rows = rows_of(value, 4)
    places = tuple((i * n, n) for i in range(HEADS))

    def finished(products: Tensor) -> Tensor:
        return products * step + query.sum(-1, keepdim=True) * (least + 128 * step)

    def key_loops() -> Tensor:
        return finished((signed.view(torch.uint8) ^ 128).float().sub(128).mul(query[:, None]).sum(-1))

    def value_loops() -> Tensor:
        held = rows.view(HEADS, n, -1)
        steps = held[..., DIM // 2 :].contiguous().view(torch.float16).float()
        own = (weights * steps[..., 0])[..., None]
        low, high = ((held[..., : DIM // 2] >> shift) & 15 for shift in (0, 4))
        sums = torch.stack([(part.float() * own).sum(1) for part in (low, high)], -1).flatten(1)
        return sums + (weights * steps[..., 1]).sum(-1, keepdim=True)

    def key_heads() -> Tensor:
        return finished(torch.stack([signed[i].float() @ query[i] for i in range(HEADS)]))

    return {
        "keys, a head at a time": key_heads,
        "keys, compiled": torch.compile(key_loops, fullgraph=True),
        "values, one operation": lambda: bag_sums(weights.view(1, -1), rows, places, 4)[:, 0],
        "values, compiled": torch.compile(value_loops, fullgraph=True),
    }


if __name__ == "__main__":
    sys.exit(main())
