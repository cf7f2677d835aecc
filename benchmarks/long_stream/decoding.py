#!/usr/bin/env python3
"""Presses that evict while decoding, over 100,000 tokens of a book: loss by position, bytes, and pins that must stay.

    python -m benchmarks.long_stream.decoding --dataset pg19 --sample_idx 1 --output FILE.json

Every press holds ``--budget_tokens`` pairs of each head after each chunk, the first ``--pinned`` tokens among them, and
keys move side by side. A press that yields a loss that is not finite, loses a pin or outgrows its bytes is named at the
end, and the exit code is 1. FILE.json is written after each press; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.long_stream.long_stream import BIN, mean

from coldpress import (
    AdaKVPress,
    BasePress,
    CAMPress,
    DecodingPress,
    GKVPress,
    H2OPress,
    KeyformerPress,
    MassCAMPress,
    MorphKVPress,
    PressedCache,
    RaaSPress,
    RKVPress,
    ScissorhandsPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from coldpress.eval.stream import read_stream
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import load_model
from coldpress.loading.tokens import tokenize
from coldpress.records.results import environment

PRESSES: dict[str, BasePress] = {
    "StreamingLLM": StreamingLLMPress(),
    "TOVA": TOVAPress(),
    "SnapKV": SnapKVPress(window_size=16),
    "H2O": H2OPress(),
    "H2O, heads of a layer share": AdaKVPress(H2OPress()),
    "Keyformer": KeyformerPress(),
    "Scissorhands": ScissorhandsPress(),
    "RaaS": RaaSPress(),
    "MorphKV": MorphKVPress(),
    "R-KV": RKVPress(),
    "G-KV": GKVPress(),
    "SnapKV, CaM": SnapKVPress(window_size=16),
    "SnapKV, CaM with mass": SnapKVPress(window_size=16),
}
MERGES = {"SnapKV, CaM": CAMPress, "SnapKV, CaM with mass": MassCAMPress}  # the schedule; DecodingPress for the others
VERSIONS = ("torch", "transformers", "cpu")  # a record of others is not continued
ROOM = 1.25  # times the bytes of the pairs: heads that differ have room in whole blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="pg19")
    parser.add_argument("--sample_idx", type=int, help="the book")
    parser.add_argument("--limit_tokens", type=int, default=100_000)
    parser.add_argument("--budget_tokens", type=int, default=512)
    parser.add_argument("--pinned", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=PRESSES)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record = measure(args)
    print(table(record))
    faults = [f"{name}: {curve['fault']}" for name, curve in record["curves"].items() if curve["fault"]]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    corpus = load_corpus(args.dataset, sample_idx=args.sample_idx)
    loaded = load_model(args.model)
    document = tokenize(corpus, loaded.tokenizer, args.limit_tokens)[0]
    settings = {
        "model": loaded.name, "trained_positions": loaded.max_positions, "book": document.doc_id,
        "tokens": len(document.ids), "chunk": args.chunk, "budget_tokens": args.budget_tokens, "pinned": args.pinned,
        "text_sha256": corpus.text_sha256,
    }  # fmt: skip
    record = {"settings": settings, "env": environment(), "curves": {}}
    if args.output and args.output.exists():
        earlier = json.loads(args.output.read_text(encoding="utf-8"))
        here = (settings, *(record["env"][part] for part in VERSIONS))
        if (earlier["settings"], *(earlier["env"][part] for part in VERSIONS)) != here:
            raise SystemExit(f"{args.output} has other settings or versions; give another --output.")
        record = earlier
    for name in args.only or PRESSES:
        if name in record["curves"]:
            continue
        schedule = MERGES.get(name, DecodingPress)(PRESSES[name], args.chunk, args.budget_tokens)  # type: ignore[arg-type]
        cache = PressedCache(schedule, positions="rerotate", pin=[(0, args.pinned)])
        start = time.perf_counter()
        losses, sizes = [], []
        for new, n_bytes in read_stream(loaded.model, document.ids, cache, args.chunk):
            losses += new.tolist()
            sizes.append(n_bytes)
        bins = [losses[i : i + BIN] for i in range(0, len(losses), BIN)]
        record["curves"][name] = {
            "press": repr(schedule),
            "bins": [{"tokens": len(part), "loss": math.fsum(part) / len(part)} for part in bins],
            "kv_bytes_most": max(sizes),
            "seconds": round(time.perf_counter() - start, 1),
            "git_commit": environment()["git_commit"],
            "fault": fault(args, cache, losses, sizes),
        }
        print(f"{name}: loss {math.fsum(losses) / len(losses):.4f}", file=sys.stderr, flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def fault(args: argparse.Namespace, cache: PressedCache, losses: list[float], sizes: list[int]) -> str | None:
    """What was not finite, outgrew its budget, or was lost; None if nothing."""
    if not all(map(math.isfinite, losses)):
        return "a loss is not finite"
    budget, pins = 0, torch.arange(args.pinned)
    for layer in cache.pressed_layers():
        positions = layer.positions().flatten(0, 1)
        of_a_pair = sum(tensor.shape[-1] * tensor.element_size() for tensor in layer.tensors())
        budget += len(positions) * (args.budget_tokens + args.chunk) * of_a_pair
        if not all(torch.isin(pins, head).all() for head in positions):
            return f"layer {layer.index} has lost a pinned token"
    if max(sizes) > ROOM * budget:
        return f"its keys and values take {max(sizes):,} bytes, and {budget:,} are those of its pairs"
    return None


def table(record: dict[str, Any]) -> str:
    """Perplexity by position, and the most bytes."""
    s = record["settings"]
    edges = [0, 1, 4, 16, 64, 1 << 30]
    names = [f"to {b * BIN:,}" if b < 1 << 30 else "to the end" for b in edges[1:]]
    lines = ["| press | " + " | ".join(f"PPL {name}" for name in names) + " | all | KV most |"]
    lines.append("|---|" + "---:|" * (len(names) + 2))
    for name, curve in record["curves"].items():
        losses = [mean(curve["bins"][a:b]) for a, b in itertools.pairwise(edges)] + [mean(curve["bins"])]
        cells = ["" if loss is None else f"{math.exp(loss):,.1f}" for loss in losses]
        lines.append(f"| {name} | {' | '.join(cells)} | {curve['kv_bytes_most'] / 2**20:.1f} MiB |")
    env = record["env"]
    return "\n".join(lines) + (
        f"\n\nModel {s['model']}, trained on {s['trained_positions']:,} positions; book {s['book']}, {s['tokens']:,} "
        f"tokens; {s['budget_tokens']} pairs of each head after each chunk of {s['chunk']}, the first {s['pinned']} "
        f"tokens pinned. float32, torch {env['torch']}, transformers {env['transformers']}."
    )


if __name__ == "__main__":
    sys.exit(main())
