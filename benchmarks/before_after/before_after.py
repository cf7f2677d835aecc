"""Whether decoding has become slower: milliseconds of a token with two source trees, in turns.

    python -m benchmarks.before_after.before_after --before OTHER/src --model pythia-70m --output FILE.json

Each tree has a process of its own, with the same model, the same text and the same caches. One decodes while the other
waits, in a random order, so that what else the machine does meets both. Uses nothing of coldpress that is not public.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parents[2] / "src"
TREES = ("before", "after")
CASES = {
    "no press": {},
    "SnapKV 0.5": {"press": "snapkv"},
    "AdaKV around SnapKV 0.5": {"press": "adakv_snapkv"},
    "SnapKV 0.5, evicting while decoding": {"press": "decoding_snapkv"},
    "8 bits": {"kv_bits": 8},
}
UNTIMED = 2  # tokens before those that are timed: the first one moves a compressed cache to a buffer with room


def work(args: argparse.Namespace) -> int:
    """Decode what is asked for, a line of JSON each: the worker of one tree."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    import coldpress

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    if args.gguf:
        path = Path(args.gguf)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    else:
        config = GPTNeoXConfig(
            hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
            rotary_pct=0.25, vocab_size=50304, max_position_embeddings=65536,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.eval()
    coldpress.use_coldpress(model)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    ids = torch.randint(0, 10_000, (1, args.tokens), generator=torch.Generator().manual_seed(args.seed))
    caches = {}
    with torch.inference_mode():
        for case in args.cases:
            options = CASES[case]
            given: dict[str, Any] = dict(options)
            press = coldpress.make_press(given.pop("press"), 0.5) if "press" in given else None
            caches[case] = coldpress.PressedCache(press, **given)
            model(ids, **{name: caches[case]}, logits_to_keep=1)
        print("ready", flush=True)
        for line in sys.stdin:
            case, n = json.loads(line)
            cache, token, times = caches[case].fork(), torch.full((1, 1), 5), []
            for _ in range(UNTIMED + n):
                start = time.perf_counter()
                model(token, **{name: cache})
                times.append(1e3 * (time.perf_counter() - start))
            print(json.dumps([round(ms, 3) for ms in times[UNTIMED:]]), flush=True)
    return 0


class Worker:
    """The process of one tree."""

    def __init__(self, src: Path, args: argparse.Namespace):
        options = [f"--{name}={value}" for name, value in vars(args).items() if value and name in SHARED]
        options += ["--cases", *args.cases]
        env = {**os.environ, "PYTHONPATH": str(src)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--work", *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True,
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.ask, self.answer = self.process.stdin, self.process.stdout
        if self.answer.readline().strip() != "ready":
            raise SystemExit(f"The process of {src} ended; its error stands above.")

    def tokens(self, case: str, n: int) -> list[float]:
        """Milliseconds of ``n`` tokens."""
        print(json.dumps([case, n]), file=self.ask, flush=True)
        times: list[float] = json.loads(self.answer.readline())
        return times

    def close(self) -> None:
        self.ask.close()
        self.process.wait()


SHARED = ("gguf", "dtype", "tokens", "threads", "seed")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    workers = {"before": Worker(args.before, args), "after": Worker(SRC, args)}
    order, samples = random.Random(args.seed), []
    for turn in range(args.rounds):
        pairs = [(case, tree) for case in args.cases for tree in order.sample(TREES, 2)]
        for case, tree in pairs:
            ms = workers[tree].tokens(case, args.new_tokens)
            samples.append({"round": turn, "case": case, "tree": tree, "ms": ms})
    for worker in workers.values():
        worker.close()
    settings = {
        "model": args.model, "weights": Path(args.gguf).name if args.gguf else "random", "dtype": args.dtype,
        "tokens": args.tokens, "new_tokens": args.new_tokens, "rounds": args.rounds, "threads": args.threads,
        "cases": args.cases, "before": args.commit, "cores": os.cpu_count(), "platform": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    return {"settings": settings, "samples": samples}


def medians(record: dict[str, Any], case: str, tree: str) -> list[float]:
    """Median milliseconds of a token in each round."""
    own = (s for s in record["samples"] if s["case"] == case and s["tree"] == tree)
    return [statistics.median(sample["ms"]) for sample in own]


def table(record: dict[str, Any]) -> str:
    """Markdown: how many times as fast the later tree is, by medians over the rounds, and in single rounds."""
    rows = ["| cache | before, ms | after, ms | before / after | single rounds |", "|---|---:|---:|---:|---|"]
    for case in record["settings"]["cases"]:
        before, after = (medians(record, case, tree) for tree in TREES)
        each = [a / b for a, b in zip(before, after, strict=True)]
        own, other = statistics.median(before), statistics.median(after)
        rows.append(f"| {case} | {own:.2f} | {other:.2f} | {own / other:.3f} | {min(each):.2f} to {max(each):.2f} |")
    s = record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
    about = (
        f"{s['model']}, {s['weights']} weights, {s['dtype']}, {s['tokens']:,} tokens of context, {s['rounds']} rounds"
    )
    return "\n".join([*rows, "", f"{about}, {s['threads']} CPU threads; before: {s['before']}; {versions}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="src folder of the other version")
    parser.add_argument("--commit", default="", help="what that version is called in the table")
    parser.add_argument("--model", default="pythia-70m", help="what the model is called in the table")
    parser.add_argument("--gguf", help="weights of another model; random ones of Pythia-70M's shape without")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=8192, help="of context")
    parser.add_argument("--new_tokens", type=int, default=12, help="timed in each sample")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    if args.before is None:
        parser.error("--before names the src folder of the other version")
    record = measure(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
