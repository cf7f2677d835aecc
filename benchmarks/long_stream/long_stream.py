#!/usr/bin/env python3
"""Loss and memory of a model that reads a whole book, with four ways to hold what it has read.

    python benchmarks/long_stream/long_stream.py --dataset pg19 --sample_idx 3 --output FILE.json
    python benchmarks/long_stream/long_stream.py --plot FILE.json        draws FILE.png (needs matplotlib)

Every token of the book but the first is scored once, from what the cache holds before its chunk and the tokens of the
chunk before it (``coldpress.eval.stream.read_stream``). The model's own cache at the true positions grows without end;
it is read as far as ``--full_tokens``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

BIN = 1024  # tokens of one point of the curves
CURVES = ("rerotated", "true positions", "window only", "sinks at true positions")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="pg19")
    parser.add_argument("--sample_idx", type=int, help="the book")
    parser.add_argument("--limit_tokens", type=int, help="read no more of the book")
    parser.add_argument("--full_tokens", type=int, default=16_384, help="what the growing cache reads of it")
    parser.add_argument("--budget_tokens", type=int, help="default: the trained positions less a chunk")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if args.plot:
        draw(json.loads(args.plot.read_text(encoding="utf-8")), args.plot.with_suffix(".png"))
        return 0
    record = measure(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All curves, point by point."""
    import torch

    from coldpress import DecodingPress, PressedCache, StreamingLLMPress
    from coldpress.eval.plan import tokenize
    from coldpress.eval.stream import read_stream
    from coldpress.loading.datasets import load_corpus
    from coldpress.loading.models import load_model
    from coldpress.records.results import environment

    corpus = load_corpus(args.dataset, sample_idx=args.sample_idx)
    loaded = load_model(args.model)
    doc_id, ids, *_ = tokenize(corpus, loaded.tokenizer, args.limit_tokens)[0]
    trained = loaded.max_positions
    assert trained is not None
    budget = args.budget_tokens or trained - args.chunk
    schedule = DecodingPress(StreamingLLMPress(), args.chunk, budget)
    window = DecodingPress(StreamingLLMPress(n_sink=0), args.chunk, budget)
    caches = dict(
        zip(
            CURVES,
            (
                (PressedCache(schedule, positions="rerotate"), len(ids)),
                (PressedCache(), min(len(ids), args.full_tokens)),
                (PressedCache(window, positions="rerotate"), len(ids)),
                (PressedCache(schedule), len(ids)),
            ),
            strict=True,
        )
    )
    curves = {}
    with torch.inference_mode():
        for name, (cache, n) in caches.items():
            losses, sizes = [], []
            for new, n_bytes in read_stream(loaded.model, ids[:n], cache, args.chunk):
                losses += new.tolist()
                sizes += [n_bytes] * len(new)
            points = [
                {
                    "tokens": len(part),
                    "loss": math.fsum(part) / len(part),
                    "kv_bytes_most": max(sizes[start : start + BIN]),
                }
                for start in range(0, len(losses), BIN)
                for part in [losses[start : start + BIN]]
            ]
            loss = math.fsum(losses) / len(losses)
            curves[name] = {
                "scored_tokens": len(losses),
                "loss": loss,
                "stored": cache.stored_lengths(),
                "bins": points,
            }
            print(f"{name}: {len(losses):,} tokens, loss {loss:.4f}", file=sys.stderr, flush=True)
            cache.reset()
    settings = {
        "model": loaded.name, "trained_positions": trained, "book": doc_id, "tokens": len(ids), "chunk": args.chunk,
        "budget_tokens": budget, "bin_tokens": BIN, "text_sha256": corpus.text_sha256,
    }  # fmt: skip
    return {"settings": settings, "env": environment(), "curves": curves}


def mean(points: list[dict[str, Any]]) -> float | None:
    n = sum(p["tokens"] for p in points)
    return math.fsum(p["tokens"] * p["loss"] for p in points) / n if n else None


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table: perplexity by position, and the bytes."""
    s = record["settings"]
    first = s["trained_positions"] // BIN
    edges = [0, first, 4 * first, 16 * first, 1 << 30]
    names = [f"to {b * BIN:,}" if b < 1 << 30 else "to the end" for b in edges[1:]]
    lines = ["| cache | tokens | " + " | ".join(f"PPL {name}" for name in names) + " | KV at 1,024 | KV most |"]
    lines.append("|---|" + "---:|" * (len(names) + 3))
    for name in CURVES:
        curve = record["curves"][name]
        means = [mean(curve["bins"][a:b]) for a, b in itertools.pairwise(edges)]
        cells = ["" if loss is None else f"{math.exp(loss):,.1f}" for loss in means]
        sizes = [point["kv_bytes_most"] / 2**20 for point in curve["bins"]]
        lines.append(
            f"| {name} | {curve['scored_tokens']:,} | {' | '.join(cells)} | {sizes[0]:.1f} MiB | {max(sizes):.1f} MiB |"
        )
    env = record["env"]
    return "\n".join(lines) + (
        f"\n\nModel {s['model']}, trained on {s['trained_positions']:,} positions; book {s['book']}, {s['tokens']:,} "
        "tokens; "
        f"{s['budget_tokens']} pairs of each head are kept, chunks of {s['chunk']}. float32, torch {env['torch']}, "
        f"transformers {env['transformers']}."
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Loss above, bytes below, over the positions of the book."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    s = record["settings"]
    styles = dict(zip(CURVES, ("-", "-", "--", ":"), strict=True))
    colours = dict(zip(CURVES, ("#0b6e4f", "#c1292e", "#1f78b4", "#8a6d00"), strict=True))
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, constrained_layout=True)
    for name in CURVES:
        bins = record["curves"][name]["bins"]
        ends = [BIN * i + point["tokens"] for i, point in enumerate(bins)]
        look = {"linestyle": styles[name], "color": colours[name], "label": name, "linewidth": 1.6}
        above.plot(ends, [point["loss"] for point in bins], **look)
        below.plot(ends, [point["kv_bytes_most"] / 2**20 for point in bins], **look)
    for axes in (above, below):
        axes.axvline(s["trained_positions"], color="0.6", linewidth=1)
        axes.grid(alpha=0.25)
    above.set_ylabel(f"loss, nats a token ({BIN:,}-token means)")
    above.legend(frameon=False)
    above.set_title(
        f"Book {s['book']}, read to its end; the model was trained on {s['trained_positions']:,} positions (line)"
    )
    below.set_ylabel("keys and values, MiB")
    below.set_ylim(bottom=0)
    below.set_xlabel("position in the book, tokens")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
