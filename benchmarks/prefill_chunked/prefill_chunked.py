#!/usr/bin/env python3
"""Time and peak memory of a long prefill, in one piece and in pieces with compression between them, in one run.

    python -m benchmarks.prefill_chunked.prefill_chunked --model pythia-70m --output FILE.json

Every sample is one prefill of the backbone (no logits) in a process of its own, so that no sample's memory is another
one's: the model is made, warmed up on a few tokens, and then the prompt goes in, whole (``whole``: the press compresses
each layer after its attention), whole without a press (``no_press``), or in pieces (``pieces``). Processes run one by
one, lengths and methods in a random order within each round.

A sample has the seconds of the prefill, compression included; the peak of the process's memory above what the model
takes; the most bytes that keys and values took at any time; and what they take at the end.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.decoding import MODELS, make_model, write

METHODS = ("whole", "pieces", "no_press")
WARMUP_TOKENS = 64
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--gguf", help="SmolLM2-135M's weights; random weights of its shape without")
    parser.add_argument("--layers", type=int, help="fewer layers, in less time")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--budget_tokens", type=int, default=2048)
    parser.add_argument("--chunk_tokens", type=int, default=512)
    parser.add_argument("--press", nargs="+", default=["snapkv"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["whole", "pieces"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sample", help=argparse.SUPPRESS)  # in a process of its own
    parser.set_defaults(dtype="float32")
    args = parser.parse_args()
    if args.sample:
        print(json.dumps(sample(args, json.loads(args.sample))))
        return 0
    record = measure(args)
    write(args, record)
    print(table(record))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all samples; the record holds every one of them."""
    points = [
        {"method": method, "press": press, "tokens": tokens}
        for tokens in args.tokens
        for method in args.method
        for press in (args.press if method != "no_press" else [None])
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    order, samples = random.Random(args.seed), []
    for turn in range(args.rounds):
        for point in order.sample(points, len(points)):
            command = [
                sys.executable,
                "-m",
                "benchmarks.prefill_chunked.prefill_chunked",
                *sys.argv[1:],
                "--sample",
                json.dumps(point),
            ]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            samples.append({"round": turn, **point, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    settings = {
        "model": args.model, "weights": Path(args.gguf).name if args.gguf else "random", "layers": args.layers,
        "tokens": args.tokens, "budget_tokens": args.budget_tokens, "chunk_tokens": args.chunk_tokens,
        "press": args.press, "method": args.method, "rounds": args.rounds, "threads": args.threads, "seed": args.seed,
        "platform": platform.machine(),
    }  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"settings": settings, "versions": versions, "samples": samples}


def sample(args: argparse.Namespace, point: dict[str, Any]) -> dict[str, Any]:
    """One prefill."""
    import torch
    import transformers

    import coldpress
    from coldpress.eval.memory import MemoryMeter

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    model = make_model(args)
    coldpress.use_coldpress(model)
    press = coldpress.make_press(point["press"], 0.0, budget_tokens=args.budget_tokens) if point["press"] else None
    ids = torch.randint(0, 10_000, (1, point["tokens"]), generator=torch.Generator().manual_seed(args.seed))

    def cache_of() -> Any:
        return coldpress.PressedCache(press, chunk_tokens=args.chunk_tokens if point["method"] == "pieces" else None)

    coldpress.prefill(model.base_model, ids[:, :WARMUP_TOKENS], cache_of())
    cache, most = cache_of(), 0

    def look(layer: Any, call: Any) -> None:
        nonlocal most
        most = max(most, cache.kv_bytes())

    cache.session.on_attention = look
    with MemoryMeter(torch.device("cpu")) as meter:
        start = time.perf_counter()
        coldpress.prefill(model.base_model, ids, cache)
        seconds = time.perf_counter() - start
    reading = meter.result
    return {
        "seconds": round(seconds, 4), "peak_bytes": reading.delta_bytes, "peak_kind": reading.kind,
        "kv_peak_bytes": most, "kv_bytes": cache.kv_bytes(), "kept": cache.stored_lengths(),
    }  # fmt: skip


# -- what the record says -----------------------------------------------------------------------------------------


def of(record: dict[str, Any], key: str, **point: Any) -> list[float]:
    """That number of every sample of a point, by round."""
    found = [s for s in record["samples"] if all(s[name] == value for name, value in point.items())]
    return [s[key] for s in sorted(found, key=lambda s: s["round"])]


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table: medians over the rounds, and pieces over the whole of the same round."""
    settings = record["settings"]
    lines = [
        "| tokens | press | prefill | seconds (least to most) | peak MiB | most KV MiB | KV MiB at the end "
        "| time / whole | peak / whole |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for tokens in settings["tokens"]:
        for press in [*settings["press"], None]:
            for method in METHODS:
                point = {"tokens": tokens, "press": press, "method": method}
                seconds = of(record, "seconds", **point)
                if not seconds:
                    continue
                sizes = [of(record, key, **point) for key in ("peak_bytes", "kv_peak_bytes", "kv_bytes")]
                ratios = ["", ""]
                if method == "pieces":
                    whole = {**point, "method": "whole"}
                    ratios = [
                        _ratio(of(record, key, **point), of(record, key, **whole)) for key in ("seconds", "peak_bytes")
                    ]
                shown = {"pieces": f"pieces of {settings['chunk_tokens']}", "whole": "one piece"}.get(method, "dense")
                cells = [
                    f"{tokens:,}", f"`{press}`" if press else "none", shown,
                    f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
                    *(f"{statistics.median(size) / MIB:,.0f}" for size in sizes), *ratios,
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    layers = f", {settings['layers']} layers" if settings["layers"] else ""
    return "\n".join(lines) + (
        f"\n\n{settings['model']}{layers}, {settings['weights']} weights, float32, budget of "
        f"{settings['budget_tokens']:,} tokens, {settings['threads']} CPU threads, {settings['rounds']} rounds, "
        f"{versions}."
    )


def goals(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was wanted of the longest prompt, how much of it at most, and what was measured."""
    settings, rows = record["settings"], []
    longest = max(settings["tokens"])
    where = f"{settings['model']}, {longest:,} tokens in pieces of {settings['chunk_tokens']}"
    for press in settings["press"]:
        for key, what, most in (("seconds", "time", 0.5), ("peak_bytes", "peak memory", 0.25)):
            own, whole = (of(record, key, tokens=longest, press=press, method=method) for method in ("pieces", "whole"))
            title = f"{where}, `{press}`: {what} against one piece"
            rows.append((title, f"at most {most:.2f}", _ratio(own, whole)))
    return rows


def _ratio(own: list[float], whole: list[float]) -> str:
    """Median, least and most of the rounds; "" where there is nothing to compare with."""
    ratios = [a / b for a, b in zip(own, whole, strict=False)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


if __name__ == "__main__":
    sys.exit(main())
