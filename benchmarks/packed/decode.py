#!/usr/bin/env python3
"""Milliseconds of a decoded token behind a long context, with pairs in few bits and with the same pairs as they are.

    python -m benchmarks.packed.decode --model pythia-70m --tokens 8192 --output FILE.json

One prefill fills all caches; then they take turns in a random order, a few tokens at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from benchmarks.decoding import Decoder, add_arguments, by_round, facts, footer, make_model, ratios, spread, text, turns
from benchmarks.decoding import write as write_record

from coldpress import Codec, KVBits, PressedCache, RotatedBits, SnapKVPress, use_coldpress
from coldpress.architecture.cache_argument import cache_argument

PLAIN, HALF = "as they are", "SnapKV 0.5"
CACHES: dict[str, tuple[float, Codec | None]] = {
    PLAIN: (0.0, None),
    "rotated, keys 8, values 8": (0.0, RotatedBits(8, 8)),
    "rotated, keys 8, values 4": (0.0, RotatedBits(8, 4)),
    "rotated, keys 4, values 4": (0.0, RotatedBits(4, 4)),
    "KIVI, 8": (0.0, KVBits(8)),
    "KIVI, 4": (0.0, KVBits(4)),
    HALF: (0.5, None),
    "SnapKV 0.5, rotated, keys 8, values 4": (0.5, RotatedBits(8, 4)),
}


def make_decoders(args: argparse.Namespace, model: Any) -> dict[str, Decoder]:
    use_coldpress(model)
    full, names = PressedCache(), [name for name in CACHES if name != PLAIN]
    presses = [SnapKVPress(CACHES[name][0]) if CACHES[name][0] else None for name in names]
    branches = full.branches(presses, [CACHES[name][1] for name in names])
    with torch.inference_mode():
        model.base_model(text(1, args.tokens, args.seed), **cache_argument(full))
    caches = {PLAIN: full, **dict(zip(names, branches, strict=True))}
    return {name: Decoder(model, caches[name], "coldpress", args.tokens) for name in CACHES}


def measure(args: argparse.Namespace, decoders: dict[str, Decoder]) -> dict[str, Any]:
    held = {name: decoder.cache.kv_bytes() for name, decoder in decoders.items()}
    for decoder in decoders.values():
        decoder.tokens(1)
    samples = []
    for turn, name in turns(list(decoders), args.rounds, args.seed):
        ms, cpu = decoders[name].tokens(args.new_tokens)
        samples.append({"round": turn, "name": name, "cpu": cpu, "ms": ms})
    settings = facts(args, decoders[PLAIN].model) | {"tokens": args.tokens, "new_tokens": args.new_tokens}
    return {"settings": settings | {"kv_bytes": held}, "samples": samples}


def table(record: dict[str, Any]) -> str:
    """One line a cache, against the one that holds the same pairs as they are."""
    settings = record["settings"]
    lines = ["| pairs, bits | bytes | ms a token | times faster than as they are |", "|---|---:|---:|---:|"]
    for name in CACHES:
        if name in settings["kv_bytes"]:
            ms = statistics.median(by_round(record, name).values())
            base = HALF if name.startswith(HALF) else PLAIN
            faster = spread(ratios(record, base, name))
            lines.append(f"| {name} | {settings['kv_bytes'][name]:,} | {ms:.1f} | {faster} |")
    share = statistics.median(s["cpu"] for s in record["samples"]) / settings["threads"]
    return "\n".join(lines) + (
        f"\n\nContext of {settings['tokens']:,} tokens; the process got {100 * share:.0f} % of its CPU time. "
        f"{footer(settings)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=8192, help="of context")
    parser.add_argument("--new_tokens", type=int, default=6, help="timed in each sample")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = measure(args, make_decoders(args, make_model(args)))
    write_record(args, record)
    print(table(json.loads(json.dumps(record))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
