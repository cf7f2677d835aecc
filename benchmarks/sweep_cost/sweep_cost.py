"""What a grid of presses and ratios costs in one sweep, beside the same points one by one.

One by one, as kvpress's evaluation does it: for every point the context is prefilled under the press and the targets
are scored. In the sweep one prefill of a window serves all points; it also measures the uncompressed cache, KL
divergence and the rest of its metrics. Both score the same tokens, and their losses are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch
from benchmarks.decoding import add_arguments, facts, make_model, text
from torch import Tensor
from transformers import PreTrainedModel

from coldpress import BasePress, PressedCache
from coldpress.bases.registry import make_press
from coldpress.eval.jobs import Point
from coldpress.eval.losses import forward, token_losses
from coldpress.eval.prefix import PrefixRun
from coldpress.eval.windows import plan_prefix
from coldpress.models.supported import use_coldpress

PRESSES = (
    *("random", "knorm", "streaming_llm", "snapkv", "expected_attention", "tova", "keydiff", "pyramidkv"),
    "adakv_snapkv",
)
RATIOS = (0.25, 0.5, 0.75, 0.9)
GOAL = 5.0


def one_by_one(model: PreTrainedModel, window: Tensor, context: int, presses: list[BasePress]) -> list[float]:
    """The sum of the losses under each press, each with a prefill of its own."""
    sums = []
    with torch.inference_mode():
        for press in presses:
            cache = PressedCache(press)
            with press(model):
                forward(model, window[:, :context], cache, keep=1)
            logits = forward(model, window[:, context:-1], cache)
            sums.append(float(token_losses(logits, window[:, context + 1 :]).double().sum()))
    return sums


def in_a_sweep(model: PreTrainedModel, window: Tensor, context: int, presses: list[BasePress]) -> list[float]:
    plan = plan_prefix(window.shape[1], context, window.shape[1] - context)
    run = PrefixRun(model, list(map(Point, presses)), [(window[0], plan)])
    run.run()
    results = [result for _, result in run.results()][1:]
    failed = [result for result in results if isinstance(result, Exception)]
    if failed:
        raise failed[0]
    return [result["per_window"][0]["nll"] for result in results if isinstance(result, dict)]


def measure(args: argparse.Namespace, model: PreTrainedModel, context: int, target: int) -> dict[str, Any]:
    presses = [
        make_press(name, ratio, **({"seed": 0} if name == "random" else {})) for name in PRESSES for ratio in RATIOS
    ]
    points: list[BasePress] = [press for press in presses if press is not None]
    ways = {"one by one": one_by_one, "sweep": in_a_sweep}
    samples, worst, order = [], 0.0, random.Random(args.seed)
    for i in range(args.rounds + 1):
        window = text(1, context + target, seed=args.seed + i)
        sums = {}
        for name in order.sample(list(ways), k=2):
            start = time.perf_counter()
            sums[name] = ways[name](model, window, context, points)
            if i:  # the first window warms up
                samples.append({"window": i, "way": name, "s": round(time.perf_counter() - start, 3)})
        differences = (abs(a - b) / target for a, b in zip(sums["one by one"], sums["sweep"], strict=True))
        worst = max(worst, *differences)
        print(f"C={context} T={target} window {i}/{args.rounds}: {samples[-2:]}", flush=True)
    seconds = {(s["window"], s["way"]): s["s"] for s in samples}
    ratios = [seconds[i, "one by one"] / seconds[i, "sweep"] for i in range(1, args.rounds + 1)]
    return {
        "context_tokens": context, "target_tokens": target, "points": len(points), "samples": samples,
        "speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)],
        "largest_difference_nats": worst,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Markdown: one line for each size of window."""
    lines = ["| context | targets | one by one, s | sweep, s | times as fast |", "|---:|---:|---:|---:|---:|"]
    for case in record["cases"]:
        median = {
            way: statistics.median(s["s"] for s in case["samples"] if s["way"] == way)
            for way in ("one by one", "sweep")
        }
        low, high = case["speedup_range"]
        lines.append(
            f"| {case['context_tokens']:,} | {case['target_tokens']:,} | {median['one by one']:.2f} | "
            f"{median['sweep']:.2f} | {case['speedup']:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def goals(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was wanted, and what was measured at each size of window."""
    rows = []
    for case in record["cases"]:
        low, high = case["speedup_range"]
        what = f"{record['model']}: a sweep of {case['points']} points against one by one"
        sizes = f"{case['context_tokens']:,} + {case['target_tokens']:,} tokens"
        measured = f"{case['speedup']:.2f} ({low:.2f} to {high:.2f})"
        rows.append((f"{what}, {sizes}", f"at least {GOAL:.2f} times as fast", measured))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(rounds=5)
    parser.add_argument("--sizes", nargs="+", default=["1536+512", "1920+128"], help="context and target tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args)
    use_coldpress(model)
    sizes = [[int(n) for n in size.split("+")] for size in args.sizes]
    record = {**facts(args, model), "cases": [measure(args, model, *size) for size in sizes]}
    print(table(record))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
