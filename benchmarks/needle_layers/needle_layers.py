#!/usr/bin/env python3
"""Which layers keep a hidden sentence, and whether it is the budgets of layers that find it again.

    python benchmarks/needle_layers/needle_layers.py --model smollm2 --output FILE.json

Needles as in ``coldpress tasks --task niah_single``. ``with the layers of`` gives the first press, layer by layer, as
many pairs as the second one keeps there of the same example.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

PRESSES = ("adakv_snapkv", "defensive", "layer_defensive", "sampled_defensive")
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--compression_ratio", type=float, default=0.8)
    add("--task_tokens", type=int, default=2048)
    add("--task_examples", type=int, default=10)
    add("--output", type=Path, required=True)
    record = measure(parser.parse_args())
    print(table(record))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from coldpress import BasePress, DefensiveKVPress, PerLayerCompressionPress, PressedCache, SnapKVPress, make_press
    from coldpress.architecture.cache_argument import cache_argument
    from coldpress.eval.material import Material
    from coldpress.eval.tasks import Example, make_examples
    from coldpress.io.progress import progress
    from coldpress.loading.models import load_model
    from coldpress.models.block import prefilling
    from coldpress.records.results import environment

    loaded = load_model(args.model)
    model = loaded.model

    def fed(ids: tuple[int, ...], cache: PressedCache) -> torch.Tensor:
        row = torch.tensor([ids], device=model.device)
        return model(row, use_cache=True, **cache_argument(cache, model)).logits[0].float().log_softmax(-1)

    def answer_nats(example: Example, cache: PressedCache) -> float:
        answer = torch.tensor(example.answer_ids, device=model.device)
        found = fed((*example.question_ids, *example.answer_ids), cache)[-len(answer) - 1 : -1]
        return -float(found.gather(1, answer[:, None]).mean())

    def by_layer(example: Example, cache: PressedCache) -> tuple[list[float], list[float]]:
        """Share of the pairs, and of the needle's, that each layer keeps."""
        first, end = example.hidden_at[0]
        kept = [layer.positions()[0] for layer in cache.pressed_layers()]
        shares = [float((at >= 0).sum()) / (len(at) * example.length) for at in kept]
        return shares, [float(((at >= first) & (at < end)).sum()) / (len(at) * (end - first)) for at in kept]

    examples = make_examples(
        Material(loaded.tokenizer), ["niah_single"], [args.task_tokens], DEPTHS, args.task_examples
    )
    rows: list[dict[str, Any]] = []

    def measured(example: Example, presses: dict[str, BasePress]) -> dict[str, list[float]]:
        full = PressedCache()
        branches = full.branches(list(presses.values()))
        with prefilling(model, full, *branches):
            fed(example.context_ids, full)
        shares = {}
        for name, cache in zip(presses, branches, strict=True):
            shares[name], needle = by_layer(example, cache)
            nats = answer_nats(example, cache)
            rows.append(
                {"example": example.index, "press": name, "nats": nats, "shares": shares[name], "needle": needle}
            )
        return shares

    with torch.no_grad():
        for example in progress(examples, name="needles"):
            shares = measured(example, {name: make_press(name, args.compression_ratio) for name in PRESSES})
            ratios = [max(0.0, 1 - share) for share in shares["layer_defensive"]]
            moved = {"snapkv": SnapKVPress(), "defensive": DefensiveKVPress()}
            measured(
                example,
                {
                    f"{name}, with the layers of layer_defensive": PerLayerCompressionPress(press, ratios)
                    for name, press in moved.items()
                },
            )
    asked = vars(args) | {"output": args.output.name, "model": loaded.name}
    record = {**asked, "env": environment(), "rows": rows}
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def table(record: dict[str, Any]) -> str:
    """What each press keeps of the needle, the loss of the right answer, and layers apart."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["press"], []).append(row)
    n_layers = len(record["rows"][0]["shares"])
    thirds = [range(i * n_layers // 3, (i + 1) * n_layers // 3) for i in range(3)]
    head = " | ".join(f"layers {part[0]} to {part[-1]}: pairs, needle" for part in thirds)
    lines = [f"| press | nats | needle | {head} |", "|---|---:|---:|---:|---:|---:|"]
    for name, own in rows.items():
        cells = [f"{_mean(own, 'shares', part):.0%}, {_mean(own, 'needle', part):.0%}" for part in thirds]
        nats = statistics.fmean(row["nats"] for row in own)
        lines.append(f"| {name} | {nats:.3f} | {_mean(own, 'needle', range(n_layers)):.0%} | {' | '.join(cells)} |")
    env, n = record["env"], len(next(iter(rows.values())))
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {n} needles in {record['task_tokens']:,} tokens, ratio "
        f"{record['compression_ratio']:g}; torch {env['torch']}, transformers {env['transformers']}."
    )


def _mean(rows: list[dict[str, Any]], name: str, layers: range) -> float:
    return statistics.fmean(row[name][layer] for row in rows for layer in layers)


if __name__ == "__main__":
    raise SystemExit(main())
