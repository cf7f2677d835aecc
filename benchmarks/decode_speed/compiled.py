#!/usr/bin/env python3
"""Milliseconds of a decoded token with a compiled step, and with its parts, against the same cache outside of it.

    python -m benchmarks.decode_speed.compiled --output FILE.json

Models with the same weights decode from the same pairs, SnapKV's at ratio 0.5: as they are; with weights that lie by
columns; in a ``compiled()`` block; and in transformers' own cache, which also holds everything once. In the block are
also half of the pairs where heads keep different numbers, SnapKV's in few bits, and all pairs, as they are and in few
bits, which take their turns outside too.
All take turns in a random order, one sample of some tokens at a time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
from benchmarks.decode_speed.decode_speed import share_unevenly
from benchmarks.decoding import (
    DTYPES,
    Decoder,
    add_arguments,
    by_round,
    facts,
    footer,
    make_model,
    ratios,
    read_bandwidth,
    spread,
    text,
    turns,
    with_dynamic_cache,
    write,
)
from torch.nn.functional import linear

from coldpress import AdaKVPress, PressedCache, RotatedBits, SnapKVPress, compiled, use_coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.models.columns import OneRow, by_columns

TITLES = {
    "transformers, full": "DynamicCache, no press",
    "transformers, 0.5": "DynamicCache that holds the same pairs",
    "eager": "outside",
    "columns": "weights by columns, not compiled",
    "compiled": "in a compiled() block",
    "eager, heads": "outside, AdaKV around SnapKV at 0.5",
    "compiled, heads": "in a compiled() block, AdaKV around SnapKV at 0.5",
    "compiled, heads and layers": "in a compiled() block, heads of all layers share 0.5, as KVzip's do",
    "eager, k8v4": "outside, SnapKV at 0.5 in RotatedBits(8, 4)",
    "compiled, k8v4": "in a compiled() block, SnapKV at 0.5 in RotatedBits(8, 4)",
    "eager, full": "outside, no press",
    "compiled, full": "in a compiled() block, no press",
    "eager, full k4v4": "outside, no press, in RotatedBits(4, 4)",
    "compiled, full k4v4": "in a compiled() block, no press, in RotatedBits(4, 4)",
}


COLDPRESS = ("eager", "columns", "compiled")
GOALS = (
    ("compiled, AdaKV 0.5 against SnapKV 0.5", "compiled", "compiled, heads", 0.95),
    ("compiled, heads and layers 0.5 against SnapKV 0.5", "compiled", "compiled, heads and layers", 0.95),
    ("SnapKV 0.5 in RotatedBits(8, 4), compiled against outside", "eager, k8v4", "compiled, k8v4", 1.0),
    ("compiled, SnapKV 0.5 in RotatedBits(8, 4) against the same pairs", "compiled", "compiled, k8v4", 1.0),
    ("no press, in RotatedBits(4, 4) against the pairs as they are", "eager, full", "eager, full k4v4", 1.0),
    (
        "compiled, no press, in RotatedBits(4, 4) against the pairs as they are",
        "compiled, full",
        "compiled, full k4v4",
        1.3,
    ),
    ("compiled, ratio 0.5 against no press in transformers", "transformers, full", "compiled", 4.0),
    ("compiled, ratio 0.5 against the same pairs in a DynamicCache", "transformers, 0.5", "compiled", 1.35),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=8192, help="of context")
    parser.add_argument("--new_tokens", type=int, default=12, help="timed in each sample")
    parser.add_argument(
        "--weights", action="store_true", help="instead: GB/s at which linear layers of one row are read"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.weights:
        print(weights(args))
        return 0
    record = measure(args)
    write(args, record)
    print(table(record))
    return 0


def weights(args: argparse.Namespace) -> str:
    """For the shapes of Pythia-70M, best of ``--rounds``; each reads more weights than a processor holds."""
    by_rows = torch.compile(linear)
    lines = [
        "| weight | by rows | by rows, torch.compile | by columns | by columns, embedding_bag |",
        "|---|---:|---:|---:|---:|",
    ]
    for n_out, n_in in ((50304, 512), (1536, 512), (512, 512), (2048, 512), (512, 2048)):
        rows = [torch.randn(n_out, n_in, dtype=DTYPES[args.dtype]) for _ in range(max(1, 50_000_000 // (n_out * n_in)))]
        columns = [weight.t().contiguous().t() for weight in rows]
        x, mode = torch.randn(1, 1, n_in, dtype=DTYPES[args.dtype]), OneRow(args.threads)
        n_bytes = sum(weight.nbytes for weight in rows)
        ways = ((linear, rows), (by_rows, rows), (linear, columns), (mode.linear, columns))
        best = [float("inf")] * len(ways)
        with torch.inference_mode():
            for _ in range(args.rounds):
                for i, (product, held) in enumerate(ways):
                    start = time.perf_counter()
                    for weight in held:
                        product(x, weight)
                    best[i] = min(best[i], time.perf_counter() - start)
        lines.append(f"| {n_out} x {n_in} | " + " | ".join(f"{n_bytes / t / 1e9:.1f}" for t in best) + " |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = make_model(args)
    use_coldpress(model)
    full = PressedCache()
    bits = RotatedBits(8, 4)
    half, heads, packed, whole = full.branches(
        [SnapKVPress(0.5), AdaKVPress(SnapKVPress(0.5)), SnapKVPress(0.5), None], [None, None, bits, RotatedBits(4, 4)]
    )
    with torch.inference_mode():
        model.base_model(text(1, args.tokens, args.seed), **cache_argument(full))
    own = {"transformers, full": with_dynamic_cache(full), "transformers, 0.5": with_dynamic_cache(half)}
    decoders = {name: Decoder(copy.deepcopy(model), half.fork(), "coldpress", args.tokens) for name in COLDPRESS}
    uneven = full.fork()
    share_unevenly(uneven, 0.5, args.seed)
    more = {"heads": heads, "heads and layers": uneven, "k8v4": packed, "full": full, "full k4v4": whole}
    for name, cache in more.items():
        for where in ("eager", "compiled"):
            if f"{where}, {name}" in TITLES:
                decoders[f"{where}, {name}"] = Decoder(decoders[where].model, cache.fork(), "coldpress", args.tokens)
    decoders |= {name: Decoder(copy.deepcopy(model), cache, "sdpa", args.tokens) for name, cache in own.items()}
    del full, half, heads, packed, whole, uneven
    samples, speeds, last = [], [], -1
    with ExitStack() as stack:
        stack.enter_context(by_columns(decoders["columns"].model))
        done = stack.enter_context(compiled(decoders["compiled"].model, new_tokens=args.new_tokens + 2))
        compile_s = {}
        for name, decoder in (*decoders.items(), ("compiled", decoders["compiled"])):
            before = done.compile_s
            decoder.tokens(args.new_tokens)
            compile_s.setdefault(name, round(done.compile_s - before, 1))
        differences = {
            name: largest_difference(decoders[name.replace("compiled", "eager")], decoders[name])
            for name in ("compiled", "compiled, heads", "compiled, k8v4", "compiled, full k4v4")
        }
        for turn, name in turns(list(decoders), args.rounds, args.seed):
            if turn != last:
                last = turn
                speeds.append(round(read_bandwidth(), 2))
            ms, cpu = decoders[name].tokens(args.new_tokens)
            samples.append({"round": turn, "name": name, "cpu": cpu, "ms": ms})
    settings = facts(args, model) | {"tokens": args.tokens, "new_tokens": args.new_tokens}
    settings |= {
        "compile_s": compile_s["compiled"],
        "compile_s_of": {name: seconds for name, seconds in compile_s.items() if name.startswith("compiled")},
        "largest_difference_of_logits": differences["compiled"],
        "largest_differences": differences,
    }
    return {"settings": settings, "read_gb_per_s": speeds, "samples": samples}


def largest_difference(one: Decoder, other: Decoder) -> float:
    """Between the logits of a token after the same cache."""
    with torch.inference_mode():
        logits = [d.model(torch.full((1, 1), 5), **cache_argument(d.cache)).logits for d in (one, other)]
    for decoder in (one, other):
        decoder.cache.crop(-1)
    return float((logits[0] - logits[1]).abs().max())


def goals(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was wanted, how much of it at least, and what was measured."""
    settings = record["settings"]
    where = f"{settings['model']}, {settings['dtype']}, {settings['tokens']:,} tokens: one token decoded"
    return [
        (f"{where}, {title}", f"at least {least:.2f} times as fast", spread(found))
        for title, slow, fast, least in GOALS
        if (found := ratios(record, slow, fast))
    ]


def table(record: dict[str, Any]) -> str:
    settings = record["settings"]
    lines = ["| step | ms a token | times faster: median (least to most) |", "|---|---:|---:|"]
    for name, title in TITLES.items():
        if not by_round(record, name):
            continue
        ms = statistics.median(by_round(record, name).values())
        lines.append(f"| {title} | {ms:.1f} | {spread(ratios(record, 'eager', name))} |")
    share = statistics.median(s["cpu"] for s in record["samples"]) / settings["threads"]
    lines += ["", "| goal | at least | median (least to most) |", "|---|---:|---:|"]
    for title, slow, fast, least in GOALS:
        if found := ratios(record, slow, fast):
            lines.append(f"| {title} | {least:.2f} | {spread(found)} |")
    return "\n".join(lines) + (
        f"\n\nContext of {settings['tokens']:,} tokens, SnapKV at 0.5; compiling took {settings['compile_s']:.0f} s; "
        f"logits differ by {settings['largest_difference_of_logits']:.1g} at most; a sum over memory reads "
        f"{max(record['read_gb_per_s']):.1f} GB/s at best; the process got {100 * share:.0f} % of its CPU time. "
        f"{footer(settings)}"
    )


if __name__ == "__main__":
    sys.exit(main())
