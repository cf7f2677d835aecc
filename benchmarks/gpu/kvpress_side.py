"""kvpress on the same shape, in a process of its own: it replaces transformers' attention functions when imported.

python -m benchmarks.gpu.kvpress_side --seconds 60 --output FOLDER
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import inspect
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.record import Record
from benchmarks.gpu.shapes import Sizes, clock, decode_ms, make_model, sizes_of, text
from transformers import DynamicCache


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    sizes = sizes_of(args.tiny)
    record = Record(args.output / "kvpress.json", "kvpress", args.seconds, {"tiny": args.tiny, "device": args.device})
    measure(record, sizes, args.device)
    return 0


def measure(record: Record, sizes: Sizes, device: str) -> None:
    """Seconds and peak memory of a prompt, then milliseconds of a token, round by round."""
    import kvpress

    names = ("torch", "transformers", "kvpress")
    record.note(versions={name: importlib.metadata.version(name) for name in names})
    model, where = make_model(sizes, device), torch.device(device)
    name_of_cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    snap: Any = kvpress.SnapKVPress(compression_ratio=0.5, window_size=sizes.window)
    presses = {
        "DynamicCache": None,
        "SnapKV 0.5": snap,
        "AdaKV 0.5": kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=0.5, window_size=sizes.window)),
    }
    for i, n in enumerate(sizes.contexts):
        share = record.left * (len(sizes.contexts) - 1 - i) / len(sizes.contexts)
        for turn in record.rounds(f"{n} tokens", min(3, sizes.rounds), share):
            for name in random.Random(turn).sample(list(presses), len(presses)):
                try:
                    sample = one(model, presses[name], name_of_cache, n, sizes, where)
                    record.add(round=turn, tokens=n, name=name, **sample)
                except Exception as error:
                    record.fail(f"{n} tokens, {name}", error)
                for layer in model.base_model.layers:
                    layer.self_attn.masked_key_indices = None  # AdaKV's mark would change what comes next
                gc.collect()
                if where.type == "cuda":
                    torch.cuda.empty_cache()
    record.end()


def one(model: Any, press: Any, name_of_cache: str, n: int, sizes: Sizes, where: torch.device) -> dict[str, Any]:
    cache, ids = DynamicCache(), text(1, n, model)
    before = 0
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
    with torch.inference_mode():
        start = clock(where)
        with press(model) if press is not None else nullcontext():
            model.base_model(ids, **{name_of_cache: cache})
        seconds = clock(where) - start
    peak = torch.cuda.max_memory_allocated(where) - before if where.type == "cuda" else None
    ms = decode_ms(model, cache, name_of_cache, n, sizes.new_tokens)
    n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"seconds": round(seconds, 4), "peak_bytes": peak, "kv_bytes": n_bytes, "ms": ms}


if __name__ == "__main__":
    sys.exit(main())
