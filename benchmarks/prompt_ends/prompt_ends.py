#!/usr/bin/env python3
"""Whether both ends of the prompt should stay while decoding: the text that follows, and facts said at either end.

    python benchmarks/prompt_ends/prompt_ends.py --model smollm2 --data PG19 [--once] --output FILE.json

A prompt says one number in its first line and another in its last. A text follows, while a press
cuts the cache back to its size again and again, or, with --once, after the press has compressed the prompt alone; then
both numbers are asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

PRESSES = ("snapkv", "tova", "h2o", "knorm", "streaming_llm")
FACTS = {"start": "The code of the door is {}.\n\n", "end": "\n\nThe number of the safe is {}.\n\n"}
QUESTIONS = {"start": "\n\nThe code of the door is", "end": "\n\nThe number of the safe is"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo")
    add("--data", default="demo", help="a data set; its test split where it has one")
    add("--press", nargs="+", default=list(PRESSES))
    add("--share", type=float, default=0.1, help="of the budget, at each end")
    add("--budget_tokens", type=int, default=256)
    add("--interval", type=int, default=32, help="tokens between two cuts")
    add("--prompt_tokens", type=int, default=768)
    add("--later_tokens", type=int, default=512)
    add("--once", action="store_true", help="compress the prompt to --budget_tokens, and nothing after it")
    add("--samples", type=int, default=8)
    add("--output", type=Path, required=True)
    record = measure(parser.parse_args())
    print(table(record))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from coldpress import BoundaryPress, DecodingPress, PressedCache, make_press, prefill
    from coldpress.architecture.cache_argument import cache_argument
    from coldpress.commands.calibrating import pick_samples
    from coldpress.io.progress import progress
    from coldpress.loading.datasets import load_corpus
    from coldpress.loading.models import load_model
    from coldpress.records.results import environment

    loaded = load_model(args.model)
    model, tokenizer = loaded.model, loaded.tokenizer

    def encode(text: str) -> torch.Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]

    def logits(ids: torch.Tensor, cache: PressedCache) -> torch.Tensor:
        found = model(ids, use_cache=True, **cache_argument(cache, model)).logits
        return found[0].float().log_softmax(-1)

    def asked(cache: PressedCache, question: str, answer: str) -> dict[str, Any]:
        """Loss of the right number (nats a token), and whether it is what a greedy answer would say."""
        own, ids = encode(question), encode(" " + answer)
        found = logits(torch.cat([own, ids], dim=1), cache.fork())[own.shape[1] - 1 : -1]
        return {
            "nats": -float(found.gather(1, ids[0, :, None]).mean()),
            "right": bool((found.argmax(-1) == ids[0]).all()),
        }

    def run(press: Any, prompt: torch.Tensor, later: torch.Tensor, said: dict[str, str]) -> tuple[Any, dict[str, Any]]:
        cache = PressedCache(press)
        prefill(model, prompt, cache)
        parts = later.split(args.interval, dim=1) if press else (later,)
        found = torch.cat([logits(part, cache) for part in parts])
        pairs = max(layer.positions().shape[-1] for layer in cache.pressed_layers()) if press else None
        return found, {"pairs": pairs} | {end: asked(cache, QUESTIONS[end], said[end]) for end in said}

    corpus = load_corpus(args.data, **({} if args.data == "demo" else {"split": "test"}))
    texts = [encode(document.text)[0] for document in corpus.documents]
    samples, rows = pick_samples(texts, args.samples, args.prompt_tokens + args.later_tokens), []
    with torch.inference_mode():
        for number, ids in enumerate(progress(samples, name="samples")):
            rng = random.Random(number)
            said = {end: f"{rng.randrange(10_000, 100_000)}" for end in FACTS}
            start, end = (encode(FACTS[at].format(said[at])) for at in FACTS)
            middle = ids[None, : args.prompt_tokens - start.shape[1] - end.shape[1]]
            prompt, later = torch.cat([start, middle, end], dim=1), ids[None, args.prompt_tokens :]
            whole, row = run(None, prompt, later, said)
            rows.append({"sample": number, "press": None, "ends": False, **row})
            for name in args.press:
                for ends in (False, True):
                    base = make_press(name, 0.0)
                    base = BoundaryPress(base, share=args.share) if ends else base
                    press = base.with_budget(budget_tokens=args.budget_tokens)
                    if not args.once:
                        press = DecodingPress(base, compression_interval=args.interval, target_size=args.budget_tokens)
                    found, row = run(press, prompt, later, said)
                    kl = float((whole.exp() * (whole - found)).sum(-1).mean())
                    rows.append({"sample": number, "press": name, "ends": ends, "kl": kl, **row})
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "data", "model")}
    record = {"model": Path(loaded.name).name, "data": Path(corpus.name).name, **settings}
    record |= {"env": environment(), "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def table(record: dict[str, Any]) -> str:
    """Markdown: each press without and with both ends."""
    lines = ["| press | KL of the text | number at the start | nats | number at the end | nats |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for press in (None, *record["press"]):
        for ends in (False, True) if press else (False,):
            own = [row for row in record["rows"] if row["press"] == press and row["ends"] == ends]
            cells = [f"`{press}`{', both ends' if ends else ''}" if press else "nothing evicted"]
            cells += [f"{statistics.mean(row['kl'] for row in own):.4f}" if press else ""]
            for end in FACTS:
                n_right = sum(row[end]["right"] for row in own)
                cells += [f"{n_right} of {len(own)}", f"{statistics.mean(row[end]['nats'] for row in own):.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    env = record["env"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['data']}: prompts of {record['prompt_tokens']:,} tokens, "
        f"{record['later_tokens']} after them, cut back to {record['budget_tokens']} "
        f"{'once, before these' if record.get('once') else 'every ' + str(record['interval'])}; "
        f"{record['share']:g} of these at each end. torch {env['torch']}, transformers {env['transformers']}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
