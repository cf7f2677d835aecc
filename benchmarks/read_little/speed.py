"""Milliseconds of a decoded token that reads a part of the pairs, against one that reads all.

The pairs are drawn: how long reading takes depends on which slots are read, and drawn ones lie everywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
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
    write,
)

from coldpress import PressedCache, QuestPress, SparQPress, use_coldpress
from coldpress.architecture.cache_argument import cache_argument

PRESSES = {
    "all pairs": None,
    "Quest": QuestPress(),
    "Quest in all layers": QuestPress(dense_layers=0),
    "SparQ": SparQPress(),
}
GOAL = 1.3
FIRST = 16  # tokens that the model reads itself


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="read_little speed", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of context")
    parser.add_argument("--new_tokens", type=int, default=6, help="timed in each sample")
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    record = measure(args)
    write(args, record)
    print(table(record))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = make_model(args)
    use_coldpress(model)
    samples: list[dict[str, Any]] = []
    speeds: list[float] = []
    for n in args.tokens:
        decoders = {
            name: Decoder(model, filled(model, press, n, args.seed), "coldpress", n) for name, press in PRESSES.items()
        }
        for decoder in decoders.values():
            decoder.tokens(args.new_tokens)
        last = -1
        for turn, name in turns(list(decoders), args.rounds, args.seed):
            if turn != last:
                last = turn
                speeds.append(round(read_bandwidth(), 2))
            ms, cpu = decoders[name].tokens(args.new_tokens)
            samples.append({"round": turn, "name": f"{name} {n}", "cpu": cpu, "ms": ms})
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    settings = facts(args, model) | {"tokens": args.tokens, "new_tokens": args.new_tokens}
    settings["presses"] = {name: repr(press) for name, press in PRESSES.items() if press is not None}
    return {"settings": settings, "read_gb_per_s": speeds, "samples": samples}


def filled(model: Any, press: Any, n: int, seed: int) -> PressedCache:
    """A cache of ``n`` tokens, most of whose pairs are drawn."""
    cache, random = PressedCache(press), torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        model(text(1, FIRST, seed), **cache_argument(cache))
        for layer in cache.pressed_layers():
            states = layer.keys
            assert states is not None
            shape = (*states.shape[:2], n - FIRST, states.shape[3])
            keys, values = (torch.randn(shape, generator=random).to(states.dtype) for _ in range(2))
            layer.slots.append(keys, values)
    return cache


def table(record: dict[str, Any]) -> str:
    settings = record["settings"]
    head = " | ".join(f"{n:,}: ms | times faster than all pairs" for n in settings["tokens"])
    lines = [f"| reads | {head} |", "|---|" + "---:|---:|" * len(settings["tokens"])]
    for name in PRESSES:
        cells = []
        for n in settings["tokens"]:
            ms = statistics.median(by_round(record, f"{name} {n}").values())
            cells.append(f"{ms:.1f} | {spread(ratios(record, f'all pairs {n}', f'{name} {n}'))}")
        press = f"`{settings['presses'][name]}`" if name in settings["presses"] else name
        lines.append(f"| {press} | {' | '.join(cells)} |")
    share = statistics.median(s["cpu"] for s in record["samples"]) / settings["threads"]
    return "\n".join(lines) + (
        f"\n\nMedian (least to most) of the rounds' ratios; goal: {GOAL} at every length. A sum over memory reads "
        f"{max(record['read_gb_per_s']):.1f} GB/s at best; the process got {100 * share:.0f} % of its CPU time. "
        f"{footer(settings)}"
    )
