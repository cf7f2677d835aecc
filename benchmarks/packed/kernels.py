#!/usr/bin/env python3
"""Torch's operations on packed rows against unpacking them, for one token that attends to stored pairs.

    python -m benchmarks.packed.kernels --output FILE.json    with --rounds 0 the last of these alone

Products of queries with keys and weighted sums of values, of three heads of 64 channels. All ways take turns, in a
random order; a ratio is of two of them in one round. Then what coldpress has found out by itself, as in any process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.decoding import ratios, spread, turns, write
from torch import Tensor
from torch.nn.functional import embedding_bag

from coldpress.attend.packed import Digits, bag_sums, integer_products
from coldpress.records.results import environment
from coldpress.stores.kernels import verdict
from coldpress.stores.native import Kind
from coldpress.stores.packed_part import TRIALS, fastest
from coldpress.stores.rows import code_bytes, least_and_step, packed_codes, rows_of, steps_type, unpacked_codes

HEADS, DIM = 3, 64
KEYS = {
    "keys": "keys as they are, bmm",
    "keys 8 unpack": "8 bits, unpacked, then bmm",
    "keys 8 int8pack": "8 bits, `_weight_int8pack_mm` in float32",
    "keys 8 int8pack bfloat16": "8 bits, `_weight_int8pack_mm` in bfloat16",
    "keys 8 int": "8 bits, `_int_mm`, queries in two digits of 8 bits",
    "keys 4 unpack": "4 bits, unpacked by `embedding_bag_4bit_unpack`, then bmm",
    "keys 4 shifts": "4 bits, unpacked by shifts, then bmm",
    "keys 4 int": "4 bits, `_int_mm` of even and odd channels",
}
VALUES = {
    "values": "values as they are, `embedding_bag`",
    "values 8 unpack": "8 bits, unpacked, then bmm",
    "values 8 op": "8 bits, `embedding_bag_byte_rowwise_offsets`",
    "values 4 unpack": "4 bits, unpacked by `embedding_bag_4bit_unpack`, then bmm",
    "values 4 op": "4 bits, `embedding_bag_4bit_rowwise_offsets`",
}


def ways(n: int, group: int, dtype: torch.dtype, seed: int) -> dict[str, Callable[[], Tensor]]:
    """By name: float32 products ``[heads, group, n]`` or sums ``[heads, group, DIM]``, and what they should be."""
    torch.manual_seed(seed)
    query, key, value = torch.randn(HEADS, group, DIM), torch.randn(HEADS, n, DIM), torch.randn(HEADS, n, DIM)
    weights = torch.randn(HEADS, group, n).softmax(-1)
    own_key, own_value = key.to(dtype), value.to(dtype)
    columns = query.contiguous().transpose(1, 2)  # with other strides bmm is slow
    symmetric = key.abs().amax(-1) / 127
    signed = (key / symmetric[..., None]).round().to(torch.int8)
    codes8 = (signed.view(torch.uint8)).contiguous()
    codes4, least4, step4 = (
        part.unflatten(0, (HEADS, n)) for part in least_and_step(key.flatten(0, 1), 4, torch.float16)
    )
    packed4, low, step = packed_codes(codes4, 4), least4.float(), step4.float()
    rows = {bits: rows_of(value.flatten(0, 1), bits) for bits in (8, 4)}
    places = tuple((i * n, n) for i in range(HEADS))
    all_weights = weights.transpose(0, 1).flatten(1)  # [group, heads * n]
    at = torch.arange(HEADS * n, dtype=torch.int32)
    starts = torch.arange(HEADS, dtype=torch.int32) * n

    def with_steps(products: Tensor) -> Tensor:
        return products * step[:, None] + low[:, None] * query.sum(-1, keepdim=True)

    def int8pack(kind: torch.dtype) -> Tensor:
        found = [torch._weight_int8pack_mm(query[i].to(kind), signed[i], symmetric[i].to(kind)) for i in range(HEADS)]
        return torch.stack(found).float()

    def unpacked_sums(bits: int) -> Tensor:
        n_bytes = code_bytes(DIM, bits)
        steps = rows[bits][:, n_bytes:].contiguous().view(steps_type(bits)).float().view(HEADS, n, 2)
        codes = unpacked_codes(rows[bits][:, :n_bytes], bits, DIM).view(HEADS, n, DIM)
        return torch.bmm(weights * steps[:, None, :, 0], codes) + weights @ steps[..., 1:]

    def plain_sums() -> Tensor:
        sums = [
            embedding_bag(at, own_value.flatten(0, 1), starts, mode="sum", per_sample_weights=own.to(dtype))
            for own in all_weights
        ]
        return torch.stack(sums, 1).float()

    def unpacked8(codes: Tensor) -> Tensor:
        return codes.view(torch.int8).float()

    def shifted() -> Tensor:
        numbers = torch.stack([packed4 & 15, packed4 >> 4], dim=-1).flatten(-2).float()
        return with_steps(torch.bmm(numbers, columns).transpose(1, 2))

    return {
        "keys": lambda: torch.bmm(own_key.float(), columns).transpose(1, 2),
        "keys 8 unpack": lambda: torch.bmm(unpacked8(codes8), columns).transpose(1, 2) * symmetric[:, None],
        "keys 8 int8pack": lambda: int8pack(torch.float32),
        "keys 8 int8pack bfloat16": lambda: int8pack(torch.bfloat16),
        "keys 8 int": lambda: integer_products(Digits.of(query), codes8, 8) * symmetric[:, None],
        "keys 4 unpack": lambda: with_steps(torch.bmm(unpacked_codes(packed4, 4, DIM), columns).transpose(1, 2)),
        "keys 4 shifts": shifted,
        "keys 4 int": lambda: with_steps(integer_products(Digits.of(query), packed4, 4)),
        "values": plain_sums,
        "values 8 unpack": lambda: unpacked_sums(8),
        "values 8 op": lambda: bag_sums(all_weights, rows[8], places, 8),
        "values 4 unpack": lambda: unpacked_sums(4),
        "values 4 op": lambda: bag_sums(all_weights, rows[4], places, 4),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    samples, errors, cases = [], {}, []
    for dtype in args.dtypes if args.rounds else ():
        for n in args.tokens:
            for group in args.groups:
                found = ways(n, group, getattr(torch, dtype), args.seed)
                case = f"{dtype} {n} {group}"
                cases.append({"case": case, "dtype": dtype, "tokens": n, "group": group})
                with torch.inference_mode():
                    outputs = {name: way() for name, way in found.items()}
                    for name, output in outputs.items():
                        plain = name.rsplit(" ", 1)[0] if name.endswith("bfloat16") else name
                        twin = " ".join([*plain.split()[:2], "unpack"])
                        if twin in outputs:
                            errors[f"{case} {name}"] = float((output - outputs[twin]).abs().max())
                    for turn, name in turns(list(found), args.rounds, args.seed):
                        start = time.perf_counter()
                        found[name]()
                        ms = [round(1e3 * (time.perf_counter() - start), 4)]
                        samples.append({"case": case, "round": turn, "name": name, "ms": ms})
    settings = {"threads": args.threads, "rounds": args.rounds, "cases": cases, "torch": torch.__version__}
    settings["cpu"] = environment()["cpu"]
    settings["vnni"] = bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
    made = {"verdicts": verdicts(), "compiled": of_compiled()}
    return {"settings": settings, "errors": errors, **made, "samples": samples}


def verdicts() -> list[dict[str, Any]]:
    """Of each kernel: from how many products of a head on it is used here, and the milliseconds of its trial."""
    kinds = [(side, bits) for side in ("keys", "values") for bits in (8, 4, 2)]
    found = [(side, bits, verdict(side, bits)) for side, bits in kinds]
    return [
        {"of": side, "bits": bits, "least": own.least, "ms": {n: [round(x, 4) for x in ms] for n, ms in own.ms.items()}}
        for side, bits, own in found
    ]


def of_compiled() -> list[dict[str, Any]]:
    """Of whole attention, milliseconds of the trial of each compiled kernel and of torch's, and whether it is used."""
    kinds = [Kind(kind, bits, (DIM, DIM)) for kind in (torch.float32, torch.bfloat16) for bits in ((8, 4), (4, 4))]
    used = {kind: fastest(kind) is not None for kind in kinds}
    return [
        {"dtype": str(kind.dtype).removeprefix("torch."), "bits": kind.bits, "is_used": is_used,
         "ms": [round(ms, 4) for ms in TRIALS.get(kind, ())]}
        for kind, is_used in used.items()
    ]  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """What was measured, if anything was, and what was found out by itself, if it was asked."""
    settings = record["settings"]
    parts = [_of_ways(record)] if record["samples"] else []
    parts += [_of_verdicts(record["verdicts"])] if "verdicts" in record else []
    parts += [_of_compiled(record["compiled"])] if "compiled" in record else []
    cpu = f" of {settings['cpu']}" if settings.get("cpu") else ""
    return "\n\n".join(parts) + (
        f" {settings['threads']} CPU thread{cpu}, {'with' if settings['vnni'] else 'without'} VNNI; "
        f"torch {settings['torch']}."
    )


def _of_ways(record: dict[str, Any]) -> str:
    """How many times faster each way is than the pairs as they are, by case; and how far it is off unpacked codes."""
    cases = record["settings"]["cases"]
    parts = []
    for titles, plain in ((KEYS, "keys"), (VALUES, "values")):
        heads = [f"{c['dtype']}, {c['tokens'] // 1024}k, {c['group']}" for c in cases]
        lines = [f"| {plain} | {' | '.join(heads)} | off by at most |", "|---|" + "---:|" * (len(cases) + 1)]
        for name, title in titles.items():
            cells = []
            for case in cases:
                own = {"samples": [s for s in record["samples"] if s["case"] == case["case"]]}
                if name == plain:
                    cells.append(f"{statistics.median(s['ms'][0] for s in own['samples'] if s['name'] == name):.2f} ms")
                else:
                    cells.append(spread(ratios(own, plain, name)).split(" ")[0])
            off = [record["errors"].get(f"{case['case']} {name}") for case in cases]
            most = max((x for x in off if x is not None), default=None)
            lines.append(f"| {title} | {' | '.join(cells)} | {'' if most is None else f'{most:.0e}'} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + (
        f"\n\nHeads of {DIM} channels, {HEADS} of them; columns: type of the pairs as they are, pairs, query heads of "
        f"each. Medians of ratios in one round, {record['settings']['rounds']} rounds;"
    )


def _of_compiled(found: list[dict[str, Any]]) -> str:
    """How long attention to codes took, by a compiled kernel and by torch's operations."""
    lines = ["| attention to codes of keys and values, other pairs in | compiled kernel | torch's | used |"]
    lines += ["|---|---:|---:|---|"]
    for own in found:
        cells = [f"{ms:.3f} ms" for ms in own["ms"]] or ["there is none", ""]
        bits = " and ".join(map(str, own["bits"]))
        lines.append(f"| {bits} bits, {own['dtype']} | {' | '.join(cells)} | {'yes' if own['is_used'] else 'no'} |")
    return "\n".join(lines) + "\n\nEight heads with one query each, 1,024 codes and 128 other pairs of each head."


def _of_verdicts(found: list[dict[str, Any]]) -> str:
    """How long each kernel took, and unpacking and multiplying, and from how many products on the kernel is used."""
    sizes = list(next(own["ms"] for own in found if own["ms"]))
    titles = [f"{int(n):,} pairs, {way}" for n in sizes for way in ("kernel", "unpacked")]
    lines = [f"| codes of | {' | '.join(titles)} | kernel is used from |", "|---|" + "---:|" * (len(titles) + 1)]
    for own in found:
        cells = [f"{ms:.3f} ms" for n in sizes for ms in own["ms"].get(n, ())] or ["there is none", *[""] * 3]
        least = "never" if own["least"] is None else f"{own['least']:,} products" if own["least"] else "one product"
        lines.append(f"| {own['of']}, {own['bits']} bits | {' | '.join(cells)} | {least} |")
    return "\n".join(lines) + "\n\nTwo heads with one query each; products are pairs of a head times its queries."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = measure(args)
    write(args, record)
    print(table(json.loads(json.dumps(record))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
