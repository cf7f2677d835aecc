#!/usr/bin/env python3
"""How many rows fit into one budget of bytes of cache, and how many tokens a second they decode together.

    python -m benchmarks.batch.budget --output FILE.json

Each way to store a prompt gets as many rows as its bytes allow; then the batches take turns in a random order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.decoding import (
    UNTIMED,
    Decoder,
    add_arguments,
    by_round,
    facts,
    footer,
    make_model,
    ratios,
    spread,
    text,
    turns,
    with_dynamic_cache,
    write,
)
from torch import Tensor

from coldpress import PressedCache, SnapKVPress, use_coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.stores.codec import Codec
from coldpress.stores.rotated import RotatedBits

CYCLE = 8  # lengths of prompts, from the longest to half of it; further rows begin again


@dataclass(frozen=True)
class Way:
    """One way to store a prompt.

    Attributes:
        title: of its row in the table.
        ratio: share of the pairs that SnapKV removes, 0: no press.
        storage: how the pairs are stored, None: as they are.
        is_transformers: in transformers' own cache, read by its own attention.
    """

    title: str
    ratio: float = 0.0
    storage: Codec | None = None
    is_transformers: bool = False

    def cache(self) -> PressedCache:
        """An empty one."""
        return PressedCache(SnapKVPress(self.ratio) if self.ratio else None, storage=self.storage)


WAYS = {
    "transformers": Way("DynamicCache, no press", is_transformers=True),
    "whole": Way("PressedCache, no press"),
    "half": Way("SnapKV 0.5", 0.5),
    "quarter": Way("SnapKV 0.75", 0.75),
    "half k8v4": Way("SnapKV 0.5, 8 and 4 bits", 0.5, RotatedBits(8, 4)),
    "quarter k8v4": Way("SnapKV 0.75, 8 and 4 bits", 0.75, RotatedBits(8, 4)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--budget_bytes", type=int, default=1 << 28, help="of the keys and values of a batch")
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest prompt; the shortest has half of them")
    parser.add_argument("--new_tokens", type=int, default=6, help="timed in each sample")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args)
    use_coldpress(model)
    decoders, rows, n_bytes = {}, {}, {}
    for name, way in WAYS.items():
        decoders[name], n_bytes[name] = batch(args, model, way)
        mask = decoders[name].mask
        assert mask is not None
        rows[name] = mask.shape[0]
        decoders[name].tokens(1)
    samples: list[dict[str, Any]] = []
    for turn, name in turns(list(WAYS), args.rounds, args.seed):
        ms, cpu = decoders[name].tokens(args.new_tokens)
        samples.append({"round": turn, "name": name, "cpu": cpu, "ms": ms})
        print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    settings = facts(args, model) | {"tokens": args.tokens, "new_tokens": args.new_tokens}
    settings |= {"budget_bytes": args.budget_bytes, "rows": rows, "kv_bytes": n_bytes}
    record = {"settings": settings, "samples": samples}
    write(args, record)
    print(table(record))
    return 0


def batch(args: argparse.Namespace, model: Any, way: Way) -> tuple[Decoder, int]:
    """As many rows as fit, their prompts read: ready to decode, and the bytes of their keys and values."""
    _, of_a_cycle = filled(args, model, way, CYCLE)
    n_rows = args.budget_bytes * CYCLE // of_a_cycle
    while n_rows:
        decoder, n_bytes = filled(args, model, way, n_rows)
        if n_bytes <= args.budget_bytes:
            return decoder, n_bytes
        n_rows -= 1
    raise SystemExit(f"{way.title}: a row does not fit into {args.budget_bytes:,} bytes; give more --budget_bytes.")


def filled(args: argparse.Namespace, model: Any, way: Way, n_rows: int) -> tuple[Decoder, int]:
    """``n_rows`` prompts read, and the bytes of their pairs and of the tokens that are timed, room to grow included."""
    mask = padding(n_rows, args.tokens)
    pressed = way.cache()
    model.set_attn_implementation("coldpress")
    with torch.inference_mode():
        model.base_model(
            text(n_rows, args.tokens, args.seed), attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **cache_argument(pressed),
        )  # fmt: skip
    if not way.is_transformers:
        decoder = Decoder(model, pressed, "coldpress", args.tokens, mask)
        decoder.tokens(args.new_tokens)
        return decoder, pressed.kv_bytes()
    own = with_dynamic_cache(pressed)
    pairs = [tensor for layer in own.layers for tensor in (layer.keys, layer.values)]
    n_slots = args.tokens + args.new_tokens + UNTIMED
    n_bytes = sum(tensor.nbytes for tensor in pairs) * n_slots // args.tokens
    return Decoder(model, own, "sdpa", args.tokens, mask), n_bytes


def padding(n_rows: int, n_tokens: int) -> Tensor:
    """Which tokens are there, bool ``[rows, tokens]``: rows of different lengths, padded on the left."""
    lengths = torch.linspace(n_tokens, n_tokens // 2, CYCLE).long()[torch.arange(n_rows) % CYCLE]
    return torch.arange(n_tokens) >= n_tokens - lengths[:, None]


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    settings = record["settings"]
    lines = [
        "| cache | rows | MB | tokens a second | times transformers' (least to most) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, way in WAYS.items():
        n_rows = settings["rows"][name]
        ms = statistics.median(by_round(record, name).values())
        more = n_rows / settings["rows"]["transformers"]
        faster = spread([more * ratio for ratio in ratios(record, "transformers", name)])
        n_mb = settings["kv_bytes"][name] / 1e6
        lines.append(f"| {way.title} | {n_rows} | {n_mb:.0f} | {1e3 * n_rows / ms:.0f} | {faster} |")
    return "\n".join(lines) + (
        f"\n\n{settings['budget_bytes'] / 1e6:.0f} MB for keys and values; prompts of {settings['tokens'] // 2:,} to "
        f"{settings['tokens']:,} tokens, padded on the left. {footer(settings)}"
    )


if __name__ == "__main__":
    sys.exit(main())
