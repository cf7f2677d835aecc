#!/usr/bin/env python3
"""Whether a bound on KL holds: thresholds of QualityPress from one kind of text, documents of that kind and of others.

    python benchmarks/kl_bound/kl_bound.py --model demo --calibrate_on WIKITEXT --split validation \\
        --check_on wikitext-2=WIKITEXT books=PG19 --output FILE.json

Each checked document is a piece of text of its own. ``source`` is a kind that is always there: coldpress's own code.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo")
    add("--press", default="defensive")
    add("--calibrate_on", required=True, help="a data set")
    add("--split", default="train", help="of it")
    add("--check_on", nargs="+", required=True, metavar="KIND[=DATASET]", help="test splits; source needs no data set")
    add("--max_kl", nargs="+", type=float, default=[0.02, 0.05])
    add("--risk", type=float, default=0.05)
    add("--n_samples", type=int, default=200)
    add("--n_documents", type=int, default=100, help="of each kind")
    add("--sample_tokens", type=int, default=768)
    add("--output", type=Path, required=True)
    record = measure(parser.parse_args())
    print(json.dumps({name: value for name, value in record.items() if name != "documents"}, indent=1))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from coldpress import QualityPress, make_press
    from coldpress.architecture.cache_argument import cache_argument
    from coldpress.cache.pressed import PressedCache
    from coldpress.commands.calibrating import pick_samples
    from coldpress.io.artefacts import Artefact
    from coldpress.io.progress import progress
    from coldpress.learned.calibration import calibrate
    from coldpress.loading.datasets import load_corpus
    from coldpress.loading.models import load_model
    from coldpress.models.block import prefilling
    from coldpress.records.results import environment

    loaded = load_model(args.model)
    model, tokenizer = loaded.model, loaded.tokenizer

    def samples(texts: list[str], n: int) -> list[torch.Tensor]:
        ids = [torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
        return pick_samples(ids, n, args.sample_tokens)

    def texts_of(kind: str) -> list[str]:
        name, _, dataset = kind.partition("=")
        if name == "source":
            return ["\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))]
        return [document.text for document in load_corpus(dataset, split="test").documents]

    press = make_press(args.press, 0.0)
    own = load_corpus(args.calibrate_on, split=args.split)
    seen = samples([document.text for document in own.documents], args.n_samples)
    tensors = calibrate(QualityPress(press, risk=args.risk), model, seen, lambda s: progress(s, name="calibration"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    file = args.output.with_suffix(".safetensors")
    Artefact("quality", tensors).save(file)
    presses = [QualityPress(press, max_kl=kl, risk=args.risk, thresholds=file) for kl in args.max_kl]
    documents: list[dict[str, Any]] = []
    for kind in args.check_on:
        for ids in progress(samples(texts_of(kind), args.n_documents), name=kind.partition("=")[0]):
            n = len(ids) - len(ids) // 8
            prompt, rest = ids[None, :n].to(model.device), ids[None, n:].to(model.device)
            full = PressedCache()
            branches = full.branches(presses)
            with torch.no_grad():
                with prefilling(model, full, *branches):
                    model(prompt, use_cache=True, **cache_argument(full, model))
                logits = [
                    model(rest, use_cache=True, **cache_argument(cache, model)).logits.float().log_softmax(-1)
                    for cache in (full, *branches)
                ]
            for kl, cache, found in zip(args.max_kl, branches, logits[1:], strict=True):
                off = float((logits[0].exp() * (logits[0] - found)).sum(-1).mean())
                documents.append(
                    {"kind": kind.partition("=")[0], "max_kl": kl, "kl": off, "ratio": cache.achieved_ratio()}
                )
    file.unlink()
    asked = vars(args) | {
        "output": args.output.name,
        "calibrate_on": Path(own.name).name,
        "model": Path(loaded.name).name,
    }
    asked["check_on"] = [kind.partition("=")[0] for kind in args.check_on]
    record = {
        **asked,
        "n_samples": len(seen),
        "thresholds": tensors["thresholds"][0].tolist(),
        "summary": summary(documents),
        "env": environment(),
        "documents": documents,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table: a row for each kind of text and bound."""
    lines = [
        "| text | bound on KL | documents | above it | mean KL | removed, mean |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["summary"]:
        lines.append(
            f"| {row['kind']} | {row['max_kl']:g} | {row['n']} | {row['exceed']} | {row['mean_kl']:.4f} | "
            f"{row['mean_ratio']:.0%} |"
        )
    env = record["env"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['press']}, risk {record['risk']:g}. {record['n_samples']} samples "
        f"of {record['sample_tokens']} tokens of {record['calibrate_on']} ({record['split']}); an eighth is scored. "
        f"torch {env['torch']}, transformers {env['transformers']}."
    )


def summary(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many documents of each kind exceed the bound, and what is removed of them."""
    found = []
    for kind, kl in dict.fromkeys((each["kind"], each["max_kl"]) for each in documents):
        own = [each for each in documents if (each["kind"], each["max_kl"]) == (kind, kl)]
        found.append(
            {
                "kind": kind,
                "max_kl": kl,
                "n": len(own),
                "exceed": sum(each["kl"] > kl for each in own),
                "mean_kl": sum(each["kl"] for each in own) / len(own),
                "mean_ratio": sum(each["ratio"] for each in own) / len(own),
            }
        )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
