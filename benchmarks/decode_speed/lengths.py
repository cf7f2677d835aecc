#!/usr/bin/env python3
"""Milliseconds of a decoded token behind contexts of several lengths, beside the time that reading memory alone takes.

    python -m benchmarks.decode_speed.lengths --model smollm2-135m --gguf FILE.gguf --llamacpp --output FILE.json

At each length one prefill fills all caches, which take turns in a random order, a few tokens at a time. ``--plot``
draws a record that was written before.
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
from benchmarks.decode_speed.decode_speed import stored_bytes
from benchmarks.decode_speed.llamacpp import LlamaCpp, write_in_16_bits
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

from coldpress import PressedCache, SnapKVPress, compiled, use_coldpress
from coldpress.architecture.cache_argument import cache_argument

RATIO = 0.75
TITLES = {
    "transformers": "transformers, all pairs",
    "same pairs": "transformers, the pairs that SnapKV keeps (as kvpress decodes)",
    "llama.cpp": "llama.cpp, all pairs, weights and pairs in 16 bits",
    "coldpress": "coldpress, SnapKV",
    "compiled": "coldpress, SnapKV, in a compiled() block",
}
LIMIT = "reading SnapKV's pairs and the weights once, at the memory's speed"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096, 7168], help="of context")
    parser.add_argument("--new_tokens", type=int, default=6, help="timed in each sample")
    parser.add_argument("--llamacpp", action="store_true", help="llama.cpp too, on --gguf's weights in 16 bits")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RECORD", "PICTURE"), help="draw a record, and no more")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads(args.plot[0].read_text(encoding="utf-8")), args.plot[1])
        return 0
    if args.llamacpp and not args.gguf:
        parser.error("--llamacpp needs --gguf")
    torch.set_num_threads(args.threads)
    record = measure(args)
    write(args, record)
    print(table(record))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    eager = make_model(args)
    inside = copy.deepcopy(eager)
    use_coldpress(eager)
    use_coldpress(inside)
    samples: list[dict[str, Any]] = []
    speeds: list[float] = []
    held: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder, "f16.gguf")
        if args.llamacpp:
            write_in_16_bits(Path(args.gguf), path)
        stack.enter_context(compiled(inside, new_tokens=args.new_tokens + 2))
        for n in args.tokens:
            decoders, held[str(n)] = make_decoders(args, eager, inside, n)
            if args.llamacpp:
                decoders["llama.cpp"] = LlamaCpp(path, text(1, n, args.seed), args.threads)
            for decoder in decoders.values():
                decoder.tokens(args.new_tokens)
            last = -1
            for turn, name in turns(list(decoders), args.rounds, args.seed):
                if turn != last:
                    last = turn
                    speeds.append(round(read_bandwidth(), 2))
                ms, cpu = decoders[name].tokens(args.new_tokens)
                samples.append({"round": turn, "name": f"{name} {n}", "cpu": cpu, "ms": ms})
            if args.llamacpp:
                decoders["llama.cpp"].close()
    settings = facts(args, eager) | {"tokens": args.tokens, "new_tokens": args.new_tokens, "ratio": RATIO}
    settings |= {"weight_bytes": weight_bytes(eager), "kv_bytes": held}
    if args.llamacpp:
        settings["versions"]["xllamacpp"] = importlib.metadata.version("xllamacpp")
    return {"settings": settings, "read_gb_per_s": speeds, "samples": samples}


def make_decoders(args: argparse.Namespace, eager: Any, inside: Any, n: int) -> tuple[dict[str, Any], int]:
    """All that decodes behind ``n`` tokens, and the bytes of the pairs that SnapKV keeps of them."""
    full = PressedCache()
    (kept,) = full.branches([SnapKVPress(RATIO)])
    eager.set_attn_implementation("coldpress")
    with torch.inference_mode():
        eager.base_model(text(1, n, args.seed), **cache_argument(full))
    decoders: dict[str, Any] = {
        "transformers": Decoder(eager, with_dynamic_cache(full), "sdpa", n),
        "same pairs": Decoder(eager, with_dynamic_cache(kept), "sdpa", n),
        "coldpress": Decoder(eager, kept, "coldpress", n),
        "compiled": Decoder(inside, kept.fork(), "coldpress", n),
    }
    return decoders, stored_bytes(kept)


def points(record: dict[str, Any], name: str) -> list[float]:
    """Median milliseconds of a token behind each length."""
    return [statistics.median(by_round(record, f"{name} {n}").values()) for n in record["settings"]["tokens"]]


def limits(record: dict[str, Any]) -> list[float]:
    """Milliseconds in which the pairs that SnapKV keeps and the weights are read once."""
    settings, speed = record["settings"], max(record["read_gb_per_s"])
    return [(settings["weight_bytes"] + settings["kv_bytes"][str(n)]) / speed / 1e6 for n in settings["tokens"]]


def measured(record: dict[str, Any]) -> list[str]:
    names = {sample["name"].rpartition(" ")[0] for sample in record["samples"]}
    return [name for name in TITLES if name in names]


def table(record: dict[str, Any]) -> str:
    """Milliseconds of a token by length, then how many times faster than transformers at the longest one."""
    settings = record["settings"]
    longest = settings["tokens"][-1]
    head = " | ".join(f"{n:,}" for n in settings["tokens"])
    lines = [f"| ms a token behind | {head} | times faster than transformers at {longest:,} |"]
    lines.append("|---|" + "---:|" * (len(settings["tokens"]) + 1))
    for name in measured(record):
        cells = " | ".join(f"{ms:.1f}" for ms in points(record, name))
        faster = spread(ratios(record, f"transformers {longest}", f"{name} {longest}"))
        lines.append(f"| {TITLES[name]} | {cells} | {faster} |")
    lines.append(f"| {LIMIT} | {' | '.join(f'{ms:.1f}' for ms in limits(record))} | |")
    share = statistics.median(s["cpu"] for s in record["samples"]) / settings["threads"]
    return "\n".join(lines) + (
        f"\n\nSnapKV removes {settings['ratio']:.0%}; a sum over memory reads {max(record['read_gb_per_s']):.1f} GB/s "
        f"at best; the process got {100 * share:.0f} % of its CPU time. {footer(settings)}"
    )


def plot(record: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings = record["settings"]
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name in measured(record):
        axes.plot(settings["tokens"], points(record, name), marker="o", label=TITLES[name])
    axes.plot(settings["tokens"], limits(record), color="0.5", linestyle="--", label=LIMIT)
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings["tokens"], [f"{n:,}" for n in settings["tokens"]])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms a decoded token")
    axes.set_title(f"{settings['model']}, {settings['dtype']}, {settings['threads']} CPU threads; SnapKV at {RATIO}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
