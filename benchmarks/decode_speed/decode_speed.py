#!/usr/bin/env python3
"""Milliseconds of a decoded token behind a long context, with coldpress's cache and with transformers' own.

    python -m benchmarks.decode_speed.decode_speed --model pythia-70m --output FILE.json

One prefill fills all caches; then they take turns in a random order, one sample of some tokens at a time, so that what
else the machine does meets all of them. The memory's speed is measured in every round.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from benchmarks.decode_speed.llamacpp import LlamaCpp, write_in_16_bits
from benchmarks.decode_speed.shares import shares
from benchmarks.decode_speed.shares import table as shares_table
from benchmarks.decoding import (
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
    weight_bytes,
    with_dynamic_cache,
    write,
)

from coldpress import AdaKVPress, PressedCache, RotatedBits, SnapKVPress, compiled, use_coldpress
from coldpress.architecture.cache_argument import cache_argument

TITLES = {
    "transformers, full": "DynamicCache, no press",
    "transformers, 0.5": "DynamicCache that holds the pairs that SnapKV keeps at 0.5",
    "transformers, 0.9": "DynamicCache that holds the pairs that SnapKV keeps at 0.9",
    "transformers, empty": "DynamicCache, empty context",
    "coldpress, full": "PressedCache, no press",
    "coldpress, 0.5": "PressedCache, SnapKV at 0.5",
    "coldpress, 0.9": "PressedCache, SnapKV at 0.9",
    "coldpress, heads 0.5": "PressedCache, AdaKV around SnapKV at 0.5",
    "coldpress, heads and layers 0.5": "PressedCache, heads of all layers share 0.5, as KVzip's do",
    "coldpress, 0.5 in 4 bits": "PressedCache, SnapKV at 0.5 in RotatedBits(4, 4)",
    "coldpress, 0.5, compiled": "PressedCache, SnapKV at 0.5, in a compiled() block",
    "coldpress, 0.5 in 4 bits, compiled": "PressedCache, SnapKV at 0.5 in RotatedBits(4, 4), in a compiled() block",
    "coldpress, empty": "PressedCache, empty context",
    "llama.cpp, full": "llama.cpp, 16-bit weights, keys and values, no press",
    "llama.cpp, q8_0": "llama.cpp, 16-bit weights, keys and values in q8_0, no press",
}
GOALS = (
    ("ratio 0.5 against no press in transformers", "transformers, full", "coldpress, 0.5", 1.9),
    ("ratio 0.5 against the same pairs in a DynamicCache", "transformers, 0.5", "coldpress, 0.5", 1.35),
    ("an empty context in transformers against ratio 0.9", "transformers, empty", "coldpress, 0.9", 1 / 1.1),
    ("llama.cpp without a press against ratio 0.5", "llama.cpp, full", "coldpress, 0.5", 1.0),
    ("llama.cpp in q8_0 against ratio 0.5 in 4 bits", "llama.cpp, q8_0", "coldpress, 0.5 in 4 bits", 1.0),
    ("llama.cpp without a press against ratio 0.5, compiled", "llama.cpp, full", "coldpress, 0.5, compiled", 2.0),
    (
        "llama.cpp in q8_0 against ratio 0.5 in 4 bits, compiled",
        "llama.cpp, q8_0",
        "coldpress, 0.5 in 4 bits, compiled",
        1.0,
    ),
)
COMPILED = "coldpress, 0.5", "coldpress, 0.5 in 4 bits"
LLAMA_CPP_BYTES = {"llama.cpp, full": 2.0, "llama.cpp, q8_0": 34 / 32}  # of a number; q8_0 has a scale for 32 of them


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=8192, help="of context")
    parser.add_argument("--new_tokens", type=int, default=12, help="timed in each sample")
    parser.add_argument(
        "--profile", choices=[n for n in TITLES if n.startswith("coldpress")], help="its operations, instead of times"
    )
    parser.add_argument("--llamacpp", action="store_true", help="llama.cpp too, on --gguf's weights in 16 bits")
    parser.add_argument("--compiled", action="store_true", help="ratio 0.5 in a compiled step too, on a second model")
    args = parser.parse_args()
    if args.llamacpp and not (args.gguf and args.dtype == "float16"):
        parser.error("--llamacpp needs --gguf and --dtype float16")
    if args.profile and args.profile.endswith("compiled") and not args.compiled:
        parser.error("a compiled step is profiled with --compiled")
    torch.set_num_threads(args.threads)
    model = make_model(args)
    decoders = make_decoders(args, model)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if args.compiled:
            inside = copy.deepcopy(model)
            stack.enter_context(compiled(inside, new_tokens=args.new_tokens + 2))
            for name in COMPILED:
                cache = decoders[name].cache.fork()
                decoders[f"{name}, compiled"] = Decoder(inside, cache, "coldpress", args.tokens)
        if args.profile:
            record = profile(args, decoders[args.profile])
            write(args, record)
            print(shares_table(record))
            return 0
        if args.llamacpp:
            path = Path(folder, "f16.gguf")
            write_in_16_bits(Path(args.gguf), path)
            ids = text(1, args.tokens, args.seed)
            decoders["llama.cpp, full"] = LlamaCpp(path, ids, args.threads)
            decoders["llama.cpp, q8_0"] = LlamaCpp(path, ids, args.threads, "Q8_0")
        record = measure(args, decoders)
        for name in LLAMA_CPP_BYTES if args.llamacpp else ():
            decoders[name].close()
    write(args, record)
    print(table(record))
    return 0


def make_decoders(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    use_coldpress(model)
    full = PressedCache()
    presses = [SnapKVPress(0.5), SnapKVPress(0.9), AdaKVPress(SnapKVPress(0.5)), SnapKVPress(0.5)]
    half, tenth, heads, packed = full.branches(presses, [None, None, None, RotatedBits(4, 4)])
    with torch.inference_mode():
        model.base_model(text(1, args.tokens, args.seed), **cache_argument(full))
    uneven = full.fork()
    share_unevenly(uneven, 0.5, args.seed)
    caches = {
        "transformers, full": with_dynamic_cache(full), "transformers, 0.5": with_dynamic_cache(half),
        "transformers, 0.9": with_dynamic_cache(tenth), "coldpress, full": full, "coldpress, 0.5": half,
        "coldpress, 0.9": tenth, "coldpress, heads 0.5": heads, "coldpress, heads and layers 0.5": uneven,
        "coldpress, 0.5 in 4 bits": packed,
    }  # fmt: skip
    decoders = {
        name: Decoder(model, cache, "coldpress" if name.startswith("coldpress") else "sdpa", args.tokens)
        for name, cache in caches.items()
    }
    for name in ("transformers, empty", "coldpress, empty"):
        implementation = "coldpress" if name.startswith("coldpress") else "sdpa"
        model.set_attn_implementation(implementation)
        empty = PressedCache() if implementation == "coldpress" else with_dynamic_cache(PressedCache())
        with torch.inference_mode():
            model(text(1, 1, args.seed), **cache_argument(empty))
        decoders[name] = Decoder(model, empty, implementation, 1)
    return decoders


def share_unevenly(cache: PressedCache, ratio: float, seed: int) -> None:
    """Keep random pairs, in numbers that differ between heads and layers as much as KVzip's: from a few to nearly all.

    The shares are drawn from a uniform distribution and scaled to ``1 - ratio``; which pairs are held has no influence
    on the speed.
    """
    layers, random = cache.pressed_layers(), torch.Generator().manual_seed(seed)
    n_rows, n_heads, n_tokens = layers[0].positions().shape
    shares = torch.rand(len(layers), n_heads, generator=random)
    shares = (shares * (1 - ratio) / shares.mean()).clamp(0.01, 1.0)
    for layer, row in zip(layers, shares, strict=True):
        counts = (row * n_tokens).long().clamp(min=1)
        slots = torch.full((n_rows, n_heads, int(counts.max())), -1)
        for head, n in enumerate(counts.tolist()):
            slots[:, head, :n] = torch.randperm(n_tokens, generator=random)[:n].sort().values
        layer.keep(slots)


def measure(args: argparse.Namespace, decoders: dict[str, Any]) -> dict[str, Any]:
    held = {name: stored_bytes(decoder.cache) for name, decoder in decoders.items() if isinstance(decoder, Decoder)}
    model = decoders["transformers, full"].model
    if args.llamacpp:
        layers = decoders["coldpress, full"].cache.pressed_layers()
        numbers = sum(2 * layer.keys.numel() for layer in layers)
        held |= {name: round(numbers * each) for name, each in LLAMA_CPP_BYTES.items()}
    for decoder in decoders.values():  # a compiled step twice: the first time it may still be specialised
        decoder.tokens(args.new_tokens)
        decoder.tokens(1)
    samples, speeds = [], []
    last = -1
    for turn, name in turns(list(decoders), args.rounds, args.seed):
        if turn != last:
            last, speed = turn, round(read_bandwidth(), 2)
            speeds.append(speed)
        ms, cpu = decoders[name].tokens(args.new_tokens)
        samples.append({"round": turn, "name": name, "cpu": cpu, "ms": ms})
        print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    settings = facts(args, model) | {"tokens": args.tokens, "new_tokens": args.new_tokens}
    settings |= {"weight_bytes": weight_bytes(model), "kv_bytes": held}
    if args.llamacpp:
        settings["versions"]["xllamacpp"] = importlib.metadata.version("xllamacpp")
    return {"settings": settings, "read_gb_per_s": speeds, "samples": samples}


def stored_bytes(cache: Any) -> int:
    """Bytes of the pairs that a token reads."""
    if isinstance(cache, PressedCache):
        return cache.kv_bytes()
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def profile(args: argparse.Namespace, decoder: Decoder) -> dict[str, Any]:
    """What decoding spends its time on, by operation."""
    samples = shares(decoder, args.new_tokens, args.profile.endswith("compiled"))
    settings = facts(args, decoder.model) | {"tokens": args.tokens, "new_tokens": args.new_tokens}
    del settings["rounds"]
    return {"settings": settings | {"profile": TITLES[args.profile]}, "samples": samples}


def goals(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was wanted, how much of it at least, and what was measured."""
    settings = record["settings"]
    where = f"{settings['model']}, {settings['dtype']}, {settings['tokens']:,} tokens: one token decoded"
    rows = []
    for title, slow, fast, least in GOALS:
        if slow in settings["kv_bytes"]:
            times = f"at least {least:.2f} times as fast"
            rows.append((f"{where}, {title}", times, spread(ratios(record, slow, fast))))
    return rows


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table, then how it stands with the goals."""
    settings, lines = record["settings"], []
    lines.append(
        "| cache | ms a token | times faster than transformers without a press | MB to read | of the memory's speed % |"
    )
    lines.append("|---|---:|---:|---:|---:|")
    speed = max(record["read_gb_per_s"])
    for name, title in TITLES.items():
        if name not in settings["kv_bytes"]:
            continue
        ms = statistics.median(by_round(record, name).values())
        n_bytes = settings["weight_bytes"] + settings["kv_bytes"][name]
        faster = spread(ratios(record, "transformers, full", name))
        reached = 100 * n_bytes / (ms / 1e3) / (speed * 1e9)
        lines.append(f"| {title} | {ms:.1f} | {faster} | {n_bytes / 1e6:.0f} | {reached:.0f} |")
    lines += ["", "| goal | at least | median (least to most) |", "|---|---:|---:|"]
    for title, slow, fast, least in GOALS:
        if slow in settings["kv_bytes"]:
            lines.append(f"| {title} | {least:.2f} | {spread(ratios(record, slow, fast))} |")
    share = statistics.median(s["cpu"] for s in record["samples"]) / settings["threads"]
    return "\n".join(lines) + (
        f"\n\nContext of {settings['tokens']:,} tokens; a sum over memory reads {speed:.1f} GB/s at best; the process "
        f"got {100 * share:.0f} % of its CPU time. {footer(settings)}"
    )


if __name__ == "__main__":
    sys.exit(main())
