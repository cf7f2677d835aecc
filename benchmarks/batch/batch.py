#!/usr/bin/env python3
"""Tokens a second behind padded prompts of different lengths, in batches, with coldpress's cache and transformers'.

    python -m benchmarks.batch.batch --output FILE.json

One prefill of each batch fills all caches; then they take turns in a random order.
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
    spread,
    text,
    turns,
    with_dynamic_cache,
    write,
)

from coldpress import AdaKVPress, PressedCache, SnapKVPress, use_coldpress
from coldpress.architecture.cache_argument import cache_argument
from coldpress.cache.layer import PressedLayer
from coldpress.stores.dense import DenseStore

TITLES = {
    "transformers, full": "DynamicCache, no press",
    "coldpress, full": "PressedCache, no press",
    "coldpress, 0.5": "PressedCache, SnapKV",
    "coldpress, heads 0.5": "PressedCache, AdaKV around SnapKV",
    "padded, heads 0.5": "the same pairs, padded to the longest head and masked",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest prompt; the shortest has half of them")
    parser.add_argument("--new_tokens", type=int, default=6, help="timed in each sample")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args)
    use_coldpress(model)
    samples: list[dict[str, Any]] = []
    held: dict[str, int] = {}
    for n_rows in args.batch:
        samples += measure(args, model, n_rows, held)
    settings = facts(args, model) | {"batch": args.batch, "tokens": args.tokens, "new_tokens": args.new_tokens}
    record = {"settings": settings | {"kv_bytes": held}, "samples": samples}
    write(args, record)
    print(table(record))
    return 0


def measure(args: argparse.Namespace, model: Any, n_rows: int, held: dict[str, int]) -> list[dict[str, Any]]:
    lengths = torch.linspace(args.tokens, args.tokens // 2, n_rows).long()
    mask = torch.arange(args.tokens) >= args.tokens - lengths[:, None]  # padding on the left
    full = PressedCache()
    half, heads = full.branches([SnapKVPress(0.5), AdaKVPress(SnapKVPress(0.5))])
    model.set_attn_implementation("coldpress")
    with torch.inference_mode():
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        model.base_model(
            text(n_rows, args.tokens, args.seed), attention_mask=mask.long(), position_ids=position,
            **cache_argument(full),
        )  # fmt: skip
    caches: dict[str, Any] = {
        "coldpress, full": full, "coldpress, 0.5": half, "coldpress, heads 0.5": heads,
        "padded, heads 0.5": padded(heads), "transformers, full": with_dynamic_cache(full),
    }  # fmt: skip
    decoders = {}
    for name, cache in caches.items():
        if isinstance(cache, PressedCache):
            held[f"{n_rows}: {name}"] = cache.kv_bytes()
        implementation = "sdpa" if name.startswith("transformers") else "coldpress"
        decoders[name] = Decoder(model, cache, implementation, args.tokens, mask)
        decoders[name].tokens(1)
    samples = []
    for turn, name in turns(list(decoders), args.rounds, args.seed):
        ms, cpu = decoders[name].tokens(args.new_tokens)
        samples.append({"round": turn, "name": f"{n_rows}: {name}", "cpu": cpu, "ms": ms})
        print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    return samples


def padded(cache: PressedCache) -> PressedCache:
    """The same pairs in tensors as long as the longest head, the rest of which is masked."""
    other = cache.fork()
    for layer in other.pressed_layers():
        assert isinstance(layer, PressedLayer) and layer.keys is not None and layer.values is not None
        layer.slots.store = DenseStore(layer.keys, layer.values)
    return other


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    settings = record["settings"]
    lines = [
        "| batch | cache | tokens a second | times transformers' (least to most) | MB held |",
        "|---:|---|---:|---:|---:|",
    ]
    for n_rows in settings["batch"]:
        for name, title in TITLES.items():
            key = f"{n_rows}: {name}"
            ms = statistics.median(by_round(record, key).values())
            faster = spread(ratios(record, f"{n_rows}: transformers, full", key))
            n_bytes = settings["kv_bytes"].get(key, settings["kv_bytes"][f"{n_rows}: coldpress, full"])
            lines.append(f"| {n_rows} | {title} | {1e3 * n_rows / ms:.0f} | {faster} | {n_bytes / 1e6:.0f} |")
    return "\n".join(lines) + (
        f"\n\nPrompts of {settings['tokens'] // 2:,} to {settings['tokens']:,} tokens, padded on the left; ratio 0.5. "
        f"{footer(settings)}"
    )


if __name__ == "__main__":
    sys.exit(main())
