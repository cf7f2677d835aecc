#!/usr/bin/env python3
"""What caches with heads of different lengths take in memory, in coldpress and in kvpress, and how fast they decode.

    python -m benchmarks.head_wise_memory.head_wise_memory --output FILE.json

Each cache is made in a process of its own, so that the resident memory that it adds is its own too. kvpress needs
kvpress in the environment, and a model that it knows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.batch.batch import padded
from benchmarks.decode_speed.decode_speed import share_unevenly
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

from coldpress.architecture.cache_argument import cache_argument

PRESSES = ("adakv", "critical_adakv", "kvzip", "duo_attention", "dms")
SPEEDS = {
    "transformers, full": "DynamicCache, no press",
    "coldpress, full": "PressedCache, no press",
    "coldpress, adakv": "AdaKV at 0.5, heads one after the other",
    "padded, adakv": "the same pairs, padded to the longest head and masked",
    "coldpress, uneven": "heads of all layers share 0.5, one after the other",
    "padded, uneven": "the same pairs, padded to the longest head and masked",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, "smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024, help="of context where memory is measured")
    parser.add_argument("--decode_tokens", type=int, default=4096, help="of context where decoding is timed")
    parser.add_argument("--new_tokens", type=int, default=6, help="timed in each sample")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--worker", nargs=2, metavar=("LIBRARY", "PRESS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        library, name = args.worker
        print(json.dumps({"library": library, "press": name, **memory(args, library, name, args.ratio[0])}))
        return 0
    caches = []
    libraries = ["coldpress"] + ["kvpress"] * bool(importlib.util.find_spec("kvpress"))
    for library in libraries:
        for name in PRESSES:
            if library == "kvpress" and name not in ("adakv", "critical_adakv"):
                continue
            for ratio in args.ratio:
                caches.append(in_own_process(args, library, name, ratio))
                print(json.dumps(caches[-1]), file=sys.stderr, flush=True)
    model = make_model(args)
    samples = decoding(args, model)
    settings = facts(args, model) | {"tokens": args.tokens, "decode_tokens": args.decode_tokens}
    if "kvpress" in libraries:
        settings["versions"]["kvpress"] = importlib.metadata.version("kvpress")
    record = {"settings": settings | {"new_tokens": args.new_tokens}, "caches": caches, "samples": samples}
    write(args, record)
    print(table(record))
    return 0


# -- memory -------------------------------------------------------------------------------------------------------


def in_own_process(args: argparse.Namespace, library: str, name: str, ratio: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.head_wise_memory.head_wise_memory", "--worker", library, name]
    command += ["--model", args.model, "--dtype", args.dtype, "--threads", str(args.threads), "--ratio", str(ratio)]
    command += ["--tokens", str(args.tokens), "--seed", str(args.seed)]
    command += ["--gguf", args.gguf] if args.gguf else []
    command += ["--layers", str(args.layers)] if args.layers else []
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return found


def memory(args: argparse.Namespace, library: str, name: str, ratio: float) -> dict[str, Any]:
    """Bytes of the full and of the compressed cache, by their tensors and by what the process holds."""
    model = make_model(args)
    ids = text(1, args.tokens, args.seed)
    model.base_model(ids[:, :16])  # what the first call allocates is not the cache's
    made = (with_coldpress if library == "coldpress" else with_kvpress)(model, ids, name, ratio)
    full, _ = next(made)
    bytes_of_all = full.kv_bytes() if library == "coldpress" else storage_bytes(full)
    del full
    next(made)  # lets go of it too
    before = resident()
    cache, achieved = next(made)
    held = cache.kv_bytes() if library == "coldpress" else storage_bytes(cache)
    return {
        "ratio": ratio, "achieved": achieved, "full_bytes": bytes_of_all, "bytes": held,
        "resident_bytes": resident() - before,
    }  # fmt: skip


def with_coldpress(model: Any, ids: torch.Tensor, name: str, ratio: float) -> Iterator[tuple[Any, float]]:
    from coldpress import PressedCache, use_coldpress

    use_coldpress(model)
    with torch.inference_mode():
        cache = PressedCache()
        model.base_model(ids, **cache_argument(cache))
        press = press_of(cache, model, name, ratio)
        yield cache, 0.0
        del cache
        yield None, 0.0
        cache = PressedCache()
        with press(model):
            model(ids, **cache_argument(cache), logits_to_keep=1)
        yield cache, cache.achieved_ratio()


def press_of(cache: Any, model: Any, name: str, ratio: float) -> Any:
    """The press, so that it removes about ``ratio``. Bytes do not depend on what a pattern or a threshold means."""
    from coldpress import (
        AdaKVPress,
        CriticalAdaKVPress,
        DMSPress,
        DuoAttentionPress,
        KnormPress,
        KVzipPress,
        SnapKVPress,
    )

    layers = cache.pressed_layers()
    if name == "adakv":
        return AdaKVPress(SnapKVPress(ratio))
    if name == "critical_adakv":
        return CriticalAdaKVPress(SnapKVPress(ratio))
    if name == "kvzip":
        return KVzipPress(ratio).prepared(model, Words())
    if name == "duo_attention":
        gates = torch.rand(len(layers), layers[0].keys.shape[1]).tolist()
        return DuoAttentionPress(ratio, pattern=gates, sink_size=16, recent_size=64)
    norms = torch.cat([layer.keys.norm(dim=-1).flatten() for layer in layers])
    window = 128
    threshold = -norms.sort().values[
        int((1 - min(1.0, ratio * cache.seen_tokens / (cache.seen_tokens - window))) * (len(norms) - 1))
    ]
    return DMSPress(KnormPress(), threshold=float(threshold), sliding_window_size=window)


class Words:
    """A tokenizer for KVzip's instruction, which weights that are random do not understand anyway."""

    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [sum(map(ord, word)) % 900 + 3 for word in text.replace("\n", " \n ").split(" ") if word]


def with_kvpress(model: Any, ids: torch.Tensor, name: str, ratio: float) -> Iterator[tuple[Any, float]]:
    import kvpress
    from transformers import DynamicCache

    inner = kvpress.SnapKVPress(ratio)
    press = kvpress.AdaKVPress(inner) if name == "adakv" else kvpress.CriticalAdaKVPress(inner)
    with torch.inference_mode():
        cache = DynamicCache()
        model.base_model(ids, **cache_argument(cache))
        yield cache, 0.0
        del cache
        yield None, 0.0
        cache = DynamicCache()
        with press(model):
            model.base_model(ids, **cache_argument(cache))
        yield cache, ratio


def storage_bytes(cache: Any) -> int:
    """Bytes of the distinct storages of transformers' own cache."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident() -> int:
    """Bytes of memory that the process holds, after what is free was given back."""
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status says nothing of resident memory")


# -- speed --------------------------------------------------------------------------------------------------------


def decoding(args: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    from coldpress import AdaKVPress, PressedCache, SnapKVPress, use_coldpress

    use_coldpress(model)
    full = PressedCache()
    (heads,) = full.branches([AdaKVPress(SnapKVPress(0.5))])
    with torch.inference_mode():
        model.base_model(text(1, args.decode_tokens, args.seed), **cache_argument(full))
    uneven = full.fork()
    share_unevenly(uneven, 0.5, args.seed)
    caches = {
        "transformers, full": with_dynamic_cache(full), "coldpress, full": full, "coldpress, adakv": heads,
        "padded, adakv": padded(heads), "coldpress, uneven": uneven, "padded, uneven": padded(uneven),
    }  # fmt: skip
    decoders = {}
    for name, cache in caches.items():
        implementation = "sdpa" if name.startswith("transformers") else "coldpress"
        decoders[name] = Decoder(model, cache, implementation, args.decode_tokens)
        decoders[name].tokens(1)
    samples = []
    for turn, name in turns(list(decoders), args.rounds, args.seed):
        ms, cpu = decoders[name].tokens(args.new_tokens)
        samples.append({"round": turn, "name": name, "cpu": cpu, "ms": ms})
        print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    return samples


def goals(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was wanted, how much of it at most, and what was measured."""
    over = {
        library: [
            c["bytes"] / c["full_bytes"] / (1 - c["achieved"]) for c in record["caches"] if c["library"] == library
        ]
        for library in ("coldpress", "kvpress")
    }
    measured = f"{min(over['coldpress']):.3f} to {max(over['coldpress']):.3f}"
    if over["kvpress"]:
        measured += f" (kvpress: {min(over['kvpress']):.2f} to {max(over['kvpress']):.2f})"
    title = f"{record['settings']['model']}: bytes left over pairs left, after presses by head"
    return [(title, "at most 1.02", measured)]


def table(record: dict[str, Any]) -> str:
    """The record as two Markdown tables: memory, then speed."""
    settings = record["settings"]
    lines = [
        "| press | library | ratio asked for | pairs left % | bytes left % | bytes over pairs "
        "| resident memory added, MB | held by tensors, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in record["caches"]:
        pairs, held = 1 - c["achieved"], c["bytes"] / c["full_bytes"]
        lines.append(
            f"| `{c['press']}` | {c['library']} | {c['ratio']} | {100 * pairs:.2f} | {100 * held:.2f} "
            f"| {held / pairs:.4f} | {c['resident_bytes'] / 1e6:.1f} | {c['bytes'] / 1e6:.1f} |"
        )
    lines += ["", "| cache | ms a token | times faster than transformers without a press |", "|---|---:|---:|"]
    for name, title in SPEEDS.items():
        ms = statistics.median(by_round(record, name).values())
        lines.append(f"| {title} | {ms:.1f} | {spread(ratios(record, 'transformers, full', name))} |")
    for name in ("adakv", "uneven"):
        against = spread(ratios(record, f"padded, {name}", f"coldpress, {name}"))
        lines.append(f"| {name}: one after the other against padded | | {against} |")
    return "\n".join(lines) + (
        f"\n\nMemory at {settings['tokens']:,} tokens, decoding behind {settings['decode_tokens']:,}. "
        f"{footer(settings)}"
    )


if __name__ == "__main__":
    sys.exit(main())
