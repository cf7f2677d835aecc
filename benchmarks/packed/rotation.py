#!/usr/bin/env python3
"""Whether to rotate: loss on real text with keys and values in few bits per token, rotated or as they are.

    python -m benchmarks.packed.rotation --model FOLDER_OR_GGUF --dataset FOLDER --output FILE.json

The pairs of one prefill, but for the first 4 and the newest 128 tokens, are rounded as RotatedBits would store them,
with and without the rotation, and the same tokens are scored after them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coldpress import PressedCache
from coldpress.architecture.cache_argument import cache_argument
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import load_model
from coldpress.loading.tokens import tokenize
from coldpress.records.metrics import paired_difference
from coldpress.records.results import environment
from coldpress.stores.hadamard import rotated
from coldpress.stores.rows import least_and_step, steps_type

FIRST, NEWEST = 4, 128
# bits of keys and values, 16 for as they are, and whether they are rotated
CASES = {
    f"{keys} / {values}{', rotated' * turns}": (keys, values, turns)
    for keys, values in ((16, 4), (16, 2), (4, 16), (2, 16))
    for turns in (True, False)
}


def rounded(states: Tensor, bits: int, turns: bool) -> Tensor:
    """``states [B, Hkv, T, D]`` as they come back from ``bits`` a number with a step for each token of a head."""
    if bits == 16:
        return states
    rows = states.flatten(0, -2)
    codes, least, step = least_and_step(rotated(rows) if turns else rows, bits, steps_type(bits))
    back = least.float()[:, None] + step.float()[:, None] * codes
    return (rotated(back) if turns else back).view(states.shape).to(states.dtype)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model, device="cpu", dtype="float32")
    model, context, width = loaded.model, args.context_tokens, args.context_tokens + args.target_tokens
    corpus = load_corpus(args.dataset, subset=args.subset, split="test", sample_idx=args.sample_idx)
    ids = torch.cat([part.ids for part in tokenize(corpus, loaded.tokenizer, args.windows * width)])
    windows = [ids[i * width : (i + 1) * width][None] for i in range(min(args.windows, len(ids) // width))]
    losses: dict[str, list[float]] = {name: [] for name in ("", *CASES)}
    middle = slice(FIRST, context - NEWEST)
    for done, window in enumerate(windows, 1):
        full = PressedCache()
        model.base_model(input_ids=window[:, :context], **cache_argument(full), use_cache=True)
        for name in losses:
            cache = full.fork()
            for layer in cache.pressed_layers() if name else ():
                keys, values = layer.keys.clone(), layer.values.clone()
                key_bits, value_bits, turns = CASES[name]
                keys[:, :, middle] = rounded(keys[:, :, middle], key_bits, turns)
                values[:, :, middle] = rounded(values[:, :, middle], value_bits, turns)
                layer.store(keys, values, layer.positions())
            found = model(window[:, context:-1], **cache_argument(cache), use_cache=True).logits[0].float()
            nll = -found.log_softmax(-1).gather(1, window[0, context + 1 :, None]).double().sum()
            losses[name].append(float(nll))
        print(f"{done}/{len(windows)} windows", file=sys.stderr, flush=True)
    counts = [args.target_tokens - 1] * len(windows)
    rows = []
    for name in CASES:
        paired = paired_difference(counts, losses[name], losses[""])
        own = {"cache": name, "delta_nll": paired.delta, "delta_nll_ci95": paired.ci95}
        rows.append(own | {"nll_per_window": losses[name]})
    return {
        "model": Path(args.model).name,
        "text": Path(args.dataset).name + (f"/{args.subset}" if args.subset else ""),
        "text_sha256": corpus.text_sha256,
        "context_tokens": context,
        "target_tokens": args.target_tokens,
        "windows": len(windows),
        "loss": sum(losses[""]) / sum(counts),
        "nll_per_window": losses[""],
        "rows": rows,
        "env": environment(),
    }


def table(record: dict[str, Any]) -> str:
    """One line a case."""
    lines = ["| bits of keys / values | ΔNLL ± 95 % CI |", "|---|---:|"]
    for row in record["rows"]:
        low, high = row["delta_nll_ci95"]
        lines.append(f"| {row['cache']} | {row['delta_nll']:+.4f} ± {(high - low) / 2:.4f} |")
    env = record["env"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, float32; {record['windows']} windows of {record['text']}, {record['context_tokens']} "
        f"tokens of context and {record['target_tokens']} of targets; loss {record['loss']:.4f} as it is; torch "
        f"{env['torch']}, transformers {env['transformers']}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--subset")
    parser.add_argument("--sample_idx", type=int)
    parser.add_argument("--context_tokens", type=int, default=768)
    parser.add_argument("--target_tokens", type=int, default=257)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record = measure(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
