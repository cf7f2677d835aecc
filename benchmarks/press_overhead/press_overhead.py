#!/usr/bin/env python3
"""What each press adds to a prefill, in coldpress and in kvpress, in one run.

    python benchmarks/press_overhead/press_overhead.py --model smollm2-135m --output FILE.json

kvpress replaces transformers' attention functions when it is imported, so each library gets a process of its own, and
this program makes them take turns: one prefill at a time, in a random order that mixes libraries and presses. Both
processes use the interpreter that runs this file; without kvpress in it, coldpress is measured alone.

A sample is one prefill of the backbone (no logits) with a press at ``--compression_ratio``: its seconds in all, and the
seconds of them in which the layers were compressed (everything between a layer's attention and its output projection or
hook: reading the pairs, scoring, choosing, copying what is kept).
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from coldpress.architecture.cache_argument import cache_argument

LIBRARIES = ("coldpress", "kvpress")
NO_PRESS = "no_press"
MODELS = {"pythia-70m": ("coldpress",), "smollm2-135m": LIBRARIES}  # kvpress does not know GPT-NeoX
WARMUP_TOKENS = 512
BASELINES = 3  # prefills without a press in each round
EAGER = "observed_attention"  # kvpress takes its weights from eager attention; its cost is not in the hook


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--gguf", help="SmolLM2-135M's weights; random weights of its shape without")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="fewer layers, to look at one press quickly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compression_ratio", type=float, default=0.5)
    parser.add_argument(
        "--press", nargs="+", help="or all; default: those that need neither artefacts nor a second pass"
    )
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, help="default: both where the model allows it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profile", metavar="PRESS", help="instead: what one coldpress press spends its time on")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args)
        return 0
    if args.profile:
        print(profile(args))
        return 0
    record = measure(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(as_json(record) + "\n", encoding="utf-8")
    print(table(record))
    return 0


# -- the parent: who runs when ------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all samples; the record holds every one of them."""
    from coldpress import catalogue

    calls = {info.name: info.call for info in catalogue()}
    free = [info for info in catalogue() if info.at_prefill and info.kind == "training-free"]
    names = args.press or [info.name for info in free if not info.in_block]
    if names == ["all"]:
        names = [info.name for info in free]
    outside = [info.name for info in free if info.in_block and info.name in names]
    libraries = [name for name in args.library or MODELS[args.model] if importlib.util.find_spec(name)]
    workers = {library: Worker(library, args) for library in libraries}
    try:
        facts = {library: worker.ask(None) for library, worker in workers.items()}
        can = {library: {NO_PRESS} for library in libraries}
        for name in [NO_PRESS, *names]:
            for library, worker in workers.items():
                answer = worker.ask({"call": calls.get(name), "name": name, "n_tokens": WARMUP_TOKENS})
                if answer["seconds"] is not None:
                    can[library].add(name)
        for worker in workers.values():
            worker.ask({"call": None, "name": NO_PRESS, "n_tokens": args.tokens})
        order = random.Random(args.seed)
        samples = []
        for turn in range(args.rounds):
            todo = names + [NO_PRESS] * BASELINES
            order.shuffle(todo)
            for name in todo:
                for library in order.sample(libraries, len(libraries)):
                    if name not in can[library]:
                        continue
                    question = {"call": calls.get(name), "name": name, "n_tokens": args.tokens}
                    answer = workers[library].ask(question)
                    samples.append({"round": turn, "library": library, "press": name, **answer})
                    print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    first = facts[libraries[0]]
    if any(other[key] != first[key] for other in facts.values() for key in ("torch", "transformers")):
        raise SystemExit("the two processes do not run the same torch and transformers")
    settings = {
        "model": args.model, "weights": Path(args.gguf).name if args.gguf else "random", "tokens": args.tokens,
        "compression_ratio": args.compression_ratio, "rounds": args.rounds, "threads": args.threads,
        "layers": args.layers, "seed": args.seed, "libraries": libraries, "platform": platform.machine(),
        "calls": {name: calls[name] for name in names}, "outside": outside,
    }  # fmt: skip
    versions = {key: value for f in facts.values() for key, value in f.items()}
    return {"settings": settings, "versions": versions, "samples": samples}


class Worker:
    """A process with one library and one model, which runs one prefill per question."""

    def __init__(self, library: str, args: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", library, "--model", args.model, "--threads", str(args.threads),
                   "--compression_ratio", str(args.compression_ratio), "--seed", str(args.seed)]  # fmt: skip
        command += ["--gguf", args.gguf] if args.gguf else []
        command += ["--layers", str(args.layers)] if args.layers else []
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, question: dict[str, Any] | None) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker stopped; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# -- the worker: one prefill --------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> None:
    """Answer the questions on standard input, one line each."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    press_of, prefill, clock = (with_coldpress if args.worker == "coldpress" else with_kvpress)(args)
    ids = torch.randint(0, 10_000, (1, 1 << 16), generator=torch.Generator().manual_seed(args.seed))
    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            if args.worker == "kvpress":
                versions["kvpress"] = importlib.metadata.version("kvpress")
            answer: dict[str, Any] = versions
        else:
            press = press_of(question["call"]) if question["call"] else None
            answer = {"seconds": None, "in_press": None}
            if press is not None or not question["call"]:
                gc.collect()
                clock.seconds = 0.0
                with torch.no_grad():
                    seconds = prefill(ids[:, : question["n_tokens"]], press, question["name"])
                answer = {"seconds": round(seconds, 6), "in_press": round(clock.seconds, 6) if press else 0.0}
        print(json.dumps(answer), file=answers, flush=True)


class Clock:
    """Seconds spent in one method of a class."""

    def __init__(self, cls: type, method: str):
        self.seconds = 0.0
        inner = getattr(cls, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(cls, method, timed)


def profile(args: argparse.Namespace) -> str:
    """Torch's operations inside the press, by their share of its time, over all layers of one prefill."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record_operations

    from coldpress import catalogue
    from coldpress.cache.layer import PressedLayer

    torch.set_num_threads(args.threads)
    press_of, prefill, _ = with_coldpress(args)
    press = press_of({info.name: info.call for info in catalogue()}[args.profile])
    ids = torch.randint(0, 10_000, (1, args.tokens), generator=torch.Generator().manual_seed(args.seed))
    inner, spent = PressedLayer.after_attention, Counter[str]()

    def profiled(*arguments: Any) -> None:
        with record_operations(activities=[ProfilerActivity.CPU]) as recorded:
            inner(*arguments)
        for row in recorded.key_averages():
            spent[row.key] += row.self_cpu_time_total

    with torch.no_grad():
        prefill(ids, press, args.profile)
        PressedLayer.after_attention = profiled  # type: ignore[method-assign]
        prefill(ids, press, args.profile)
    total = sum(spent.values())
    shares = [f"{name.removeprefix('aten::')} {100 * t / total:.0f} %" for name, t in spent.most_common(5)]
    return f"{args.profile}: {', '.join(shares)}"


Setup = tuple[Callable[[str], Any], Callable[..., float], Clock]


def with_coldpress(args: argparse.Namespace) -> Setup:
    import coldpress
    from coldpress.cache.layer import PressedLayer
    from coldpress.core.press import parts
    from coldpress.loading.models import load_model

    model = make_model(args)
    coldpress.use_coldpress(model)
    clock = Clock(PressedLayer, "after_attention")

    @functools.cache
    def words() -> Any:
        """The tokenizer of the words that ask a model to read again."""
        return load_model(args.gguf or "demo", dtype="float32").tokenizer

    def press_of(call: str) -> Any:
        press = eval(call, {**vars(coldpress.public), "compression_ratio": args.compression_ratio})
        if not any(part.needs_model for part in parts(press)):
            return press
        return press.prepared(model, words())

    def prefill(ids: Any, press: Any, name: str) -> float:
        cache = coldpress.PressedCache()
        start = time.perf_counter()
        with press(model) if press is not None else nullcontext():
            model.base_model(ids, **cache_argument(cache))
        return time.perf_counter() - start

    return press_of, prefill, clock


def with_kvpress(args: argparse.Namespace) -> Setup:
    import kvpress
    from transformers import DynamicCache

    model = make_model(args)
    clock = Clock(kvpress.BasePress, "forward_hook")

    def press_of(call: str) -> Any:
        """The same class with the same parameters, less those that kvpress does not have; None without the class."""

        class Classes(dict):  # type: ignore[type-arg]
            def __missing__(self, name: str) -> Any:
                cls = getattr(kvpress, name)
                known = inspect.signature(cls).parameters
                return lambda *a, **k: cls(*a, **{key: value for key, value in k.items() if key in known})

        if call.startswith("FinchPress"):
            return None  # kvpress's wants a tokenizer and a delimiter in the text
        try:
            return eval(call, {"__builtins__": {}}, Classes(compression_ratio=args.compression_ratio))
        except AttributeError:
            return None

    def prefill(ids: Any, press: Any, name: str) -> float:
        model.set_attn_implementation("eager" if name == EAGER else "sdpa")
        cache = DynamicCache()
        start = time.perf_counter()
        with press(model) if press is not None else nullcontext():
            model.base_model(ids, **cache_argument(cache))
        seconds = time.perf_counter() - start
        for layer in model.base_model.layers:
            layer.self_attn.masked_key_indices = None  # AdaKV's mark would change the next prefill
        return seconds

    return press_of, prefill, clock


def make_model(args: argparse.Namespace) -> Any:
    """Random weights, or those of a GGUF file, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

    torch.manual_seed(args.seed)
    if args.gguf:
        path = Path(args.gguf)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        if args.layers:
            model.base_model.layers = model.base_model.layers[: args.layers]
            model.config.num_hidden_layers = args.layers
        return model.eval()
    if args.model == "pythia-70m":
        config: Any = GPTNeoXConfig(
            hidden_size=512, num_hidden_layers=args.layers or 6, num_attention_heads=8, intermediate_size=2048,
            rotary_pct=0.25, vocab_size=50304, max_position_embeddings=8192,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            hidden_size=576, num_hidden_layers=args.layers or 30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192, rope_theta=100_000.0,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# -- what the record says -----------------------------------------------------------------------------------------


def is_outside(record: dict[str, Any], library: str, name: str) -> bool:
    """Whether the press works where no layer is compressed: after the last one, in another run, or in attention."""
    return name in record["settings"].get("outside", ()) or (library == "kvpress" and name == EAGER)


def baselines(record: dict[str, Any], library: str) -> dict[int, float]:
    """Median seconds of each round's prefills without a press."""
    seconds: dict[int, list[float]] = {}
    for sample in record["samples"]:
        if sample["library"] == library and sample["press"] == NO_PRESS:
            seconds.setdefault(sample["round"], []).append(sample["seconds"])
    return {turn: statistics.median(values) for turn, values in seconds.items()}


def shares(record: dict[str, Any], library: str, name: str) -> dict[int, float]:
    """What the press added in each round, in per cent of the rest of the same prefill."""
    base, found = baselines(record, library), {}
    for sample in record["samples"]:
        if sample["library"] == library and sample["press"] == name:
            whole = sample["seconds"]
            added = whole - base[sample["round"]] if is_outside(record, library, name) else sample["in_press"]
            found[sample["round"]] = 100 * added / (whole - added)
    return found


def summary(record: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """For every press and library: milliseconds added, in per cent of the rest of the same prefill, and their spread.

    ``added_ms`` and ``percent`` are medians over the rounds of the time in which layers were compressed; for a press
    that works elsewhere too (``is_outside``) they are differences to the round's prefills without a press.
    ``end_to_end`` is such a difference, in per cent, for every press.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for library in record["settings"]["libraries"]:
        mine = [s for s in record["samples"] if s["library"] == library]
        base = baselines(record, library)
        for name in [NO_PRESS, *record["settings"]["calls"]]:
            samples = [s for s in mine if s["press"] == name]
            if not samples:
                continue
            differences = [s["seconds"] - base[s["round"]] for s in samples]
            added = differences if is_outside(record, library, name) else [s["in_press"] for s in samples]
            percent = list(shares(record, library, name).values())
            found.setdefault(name, {})[library] = {
                "prefill_ms": 1e3 * statistics.median(s["seconds"] for s in samples),
                "added_ms": 1e3 * statistics.median(added),
                "percent": statistics.median(percent),
                "low": min(percent),
                "high": max(percent),
                "end_to_end": statistics.median(
                    100 * d / base[s["round"]] for d, s in zip(differences, samples, strict=True)
                ),
            }
    return found


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table, presses sorted by what coldpress's add."""
    found, settings = summary(record), record["settings"]
    libraries = settings["libraries"]
    head, rule = "| press |", "|---|"
    for library in libraries:
        head += f" {library}: ms added | % (least to most) | end to end % |"
        rule += "---:|---:|---:|"
    if len(libraries) == 2:
        head, rule = head + " coldpress / kvpress |", rule + "---:|"
    lines = [head, rule]
    own = libraries[0]
    for name in sorted(settings["calls"], key=lambda n: found[n][own]["percent"]):
        line = f"| `{name}` |"
        for library in libraries:
            row = found[name].get(library)
            if row is None:
                line += " not in it | | |"
            else:
                spread = f"{row['percent']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
                line += f" {row['added_ms']:.0f} | {spread} | {row['end_to_end']:+.1f} |"
        if len(libraries) == 2:
            line += f" {versus(record, name)} |"
        lines.append(line)
    prefills = ", ".join(f"{found[NO_PRESS][lib]['prefill_ms']:,.0f} ms in {lib}" for lib in libraries)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    layers = f" through {settings['layers']} layers" if settings["layers"] else ""
    return "\n".join(lines) + (
        f"\n\nPrefill of {settings['tokens']:,} tokens{layers} without a press: {prefills}. Ratio "
        f"{settings['compression_ratio']}, {settings['weights']} weights, float32, {settings['threads']} CPU "
        f"thread{'s' * (settings['threads'] > 1)}, {settings['rounds']} rounds, {versions}."
    )


def versus(record: dict[str, Any], name: str) -> str:
    """coldpress's share of a prefill over kvpress's in the same round: median, least and most; "" without both."""
    by_round = [shares(record, library, name) for library in LIBRARIES]
    ratios = [by_round[0][turn] / by_round[1][turn] for turn in by_round[0] if turn in by_round[1]]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def as_json(record: dict[str, Any]) -> str:
    """Readable, with one sample per line."""
    samples = ",\n".join("  " + json.dumps(s) for s in record["samples"])
    head = json.dumps({k: v for k, v in record.items() if k != "samples"}, indent=1)
    return head.removesuffix("\n}") + f',\n "samples": [\n{samples}\n ]\n}}'


if __name__ == "__main__":
    sys.exit(main())
