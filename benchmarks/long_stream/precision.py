#!/usr/bin/env python3
"""What positions far from 0, and moving a key again and again, cost in precision.

    python benchmarks/long_stream/precision.py [--output FILE.json]

Far: attention logits of queries at position P over the 1,024 keys before it, rotated by a model's own arithmetic
(angles in float32, cosines in the dtype of the states), against the same at positions 0 .. 1,024 in float64. Drift:
keys that are moved up 64 positions at a time, by ``LayerView.side_by_side``'s arithmetic, against one rotation in
float64: with what the dtype cannot hold remembered beside the key, and without.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIM, KEYS, STEP = 64, 1024, 64
TITLES = {"far": "query at position", "drift": "times moved"}
THETA = 1.0 / 10_000.0 ** (torch.arange(0, DIM, 2).float() / DIM)


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = states.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def far(place: int, dtype: torch.dtype) -> float:
    """Root mean square error of the logits."""
    random = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(n, DIM, generator=random).to(dtype) for n in (KEYS, 64))

    def logits(keys_at: Tensor, queries_at: Tensor, exact: bool) -> Tensor:
        sides = []
        for states, at in ((keys, keys_at), (queries, queries_at)):
            angle = at.double()[:, None] * THETA.double() if exact else at.float()[:, None] * THETA
            kind = torch.float64 if exact else dtype
            sides.append(turned(states.to(kind), angle.cos().to(kind), angle.sin().to(kind)).double())
        return sides[1] @ sides[0].T * DIM**-0.5

    at = torch.arange(KEYS)
    exact = logits(at, torch.full((64,), KEYS), True)
    return float((logits(at + place - KEYS, torch.full((64,), place), False) - exact).square().mean().sqrt())


def drift(n_moves: int, dtype: torch.dtype, remembers: bool) -> float:
    """Mean relative error of a key."""
    first = torch.randn(512, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys, fine = first, torch.zeros_like(first)
    angle = STEP * THETA
    for _ in range(n_moves):
        exact = turned(keys.float() + fine.float(), angle.cos(), angle.sin())
        keys = exact.to(dtype)
        if remembers and dtype != torch.float32:
            fine = (exact - keys.float()).to(dtype)
    angle = n_moves * STEP * THETA.double()
    true = turned(first.double(), angle.cos(), angle.sin())
    return float(((keys.double() - true).norm(dim=-1) / true.norm(dim=-1)).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    short = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    places = (KEYS, 2_048, 30_000, 200_000, 1_000_000)
    record: dict[str, Any] = {
        "far": {p: {n: far(p, d) for n, d in zip(short, dtypes, strict=True)} for p in places},
        "drift": {
            n: {
                name + (" remembered" if own else ""): drift(n, d, own)
                for name, d in zip(short, dtypes, strict=True)
                for own in ((False, True) if d != torch.float32 else (False,))
            }
            for n in (1, 10, 100, 1_000)
        },
        "torch": torch.__version__,
    }
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for part in TITLES:
        print(f"{table(record, part)}\n")
    return 0


def table(record: dict[str, Any], part: str) -> str:
    """One part of the record as a Markdown table."""
    rows = record[part]
    names = list(next(iter(rows.values())))
    lines = ["| " + " | ".join([TITLES[part], *names]) + " |", "|" + "---:|" * (len(names) + 1)]
    for key, cells in rows.items():
        lines.append(f"| {int(key):,} | " + " | ".join(f"{cells[name]:.1e}" for name in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
