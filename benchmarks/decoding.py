"""What the benchmarks of decoding share: models, caches of one text in several forms, a clock for single tokens."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXConfig, LlamaConfig, PreTrainedModel

from coldpress import PressedCache
from coldpress.architecture.cache_argument import cache_argument
from coldpress.records.results import environment

MODELS = ("pythia-70m", "smollm2-135m")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNTIMED = 2  # tokens before those that are timed: the first one moves a compressed cache to a buffer with room


def add_arguments(parser: argparse.ArgumentParser, model: str = "pythia-70m") -> None:
    parser.add_argument("--model", choices=MODELS, default=model)
    parser.add_argument("--gguf", help="SmolLM2-135M's weights; random weights of its shape without")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layers", type=int, help="fewer layers, to look at something quickly")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """Random weights of the true shape, or those of a GGUF file."""
    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    if args.gguf:
        path = Path(args.gguf)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        if args.layers:
            model.base_model.layers = model.base_model.layers[: args.layers]
            model.config.num_hidden_layers = args.layers
    elif args.model == "pythia-70m":
        config: Any = GPTNeoXConfig(
            hidden_size=512, num_hidden_layers=args.layers or 6, num_attention_heads=8, intermediate_size=2048,
            rotary_pct=0.25, vocab_size=50304, max_position_embeddings=65536,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        config = LlamaConfig(
            hidden_size=576, num_hidden_layers=args.layers or 30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, vocab_size=49152, max_position_embeddings=65536, rope_theta=100_000.0,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def text(n_rows: int, n_tokens: int, seed: int) -> Tensor:
    return torch.randint(0, 10_000, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def with_dynamic_cache(cache: PressedCache) -> DynamicCache:
    """The same pairs in transformers' own cache; heads that hold fewer are padded."""
    own = DynamicCache()
    for layer in cache.pressed_layers():
        assert layer.keys is not None and layer.values is not None
        own.update(layer.keys.clone(), layer.values.clone(), layer.index)
    return own


@dataclass
class Decoder:
    """A model and a cache from which it decodes.

    Attributes:
        implementation: of attention: "coldpress" or transformers' "sdpa".
        n_seen: tokens of each row before the first new one, padding included.
        mask: bool ``[B, n_seen]`` where rows are padded; for the stored slots, where they are fewer than the tokens.
    """

    model: PreTrainedModel
    cache: Any
    implementation: str
    n_seen: int
    mask: Tensor | None = None

    def tokens(self, n: int) -> tuple[list[float], float]:
        """Decode n tokens and forget them: milliseconds of each, and the share of the CPU time that the process got."""
        if self.model.config._attn_implementation != self.implementation:
            self.model.set_attn_implementation(self.implementation)
        n_rows = 1 if self.mask is None else self.mask.shape[0]
        token = torch.full((n_rows, 1), 5)
        at = torch.full((n_rows, 1), self.n_seen) if self.mask is None else self.mask.sum(-1, keepdim=True)
        times, cpu_start, start = [], 0.0, 0.0
        with torch.inference_mode():
            for i in range(UNTIMED + n):
                mask = None
                if self.mask is not None:
                    mask = torch.cat([self.mask, self.mask.new_ones(n_rows, i + 1)], dim=-1).long()
                if i == UNTIMED:
                    start, cpu_start = time.perf_counter(), time.process_time()
                before = time.perf_counter()
                self.model(token, attention_mask=mask, **cache_argument(self.cache), position_ids=at + i)
                times.append(1e3 * (time.perf_counter() - before))
            cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
            self.cache.crop(-(UNTIMED + n))
        return [round(t, 3) for t in times[UNTIMED:]], round(cpu / wall, 3)


def read_bandwidth(n_bytes: int = 1 << 28) -> float:
    """GB/s at which one sum over memory is read, best of five."""
    memory = torch.ones(n_bytes // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - start)
    return n_bytes / min(seconds) / 1e9


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that every token reads: all but the input embeddings, unless the output shares them."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings is not None
    tied = output is not None and output.weight is embeddings.weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not embeddings.weight)


def facts(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """What a reader has to know of a run; nothing that names a machine or a folder."""
    return {
        "model": args.model, "weights": Path(args.gguf).name if args.gguf else "random", "dtype": args.dtype,
        "layers": model.config.num_hidden_layers, "rounds": args.rounds, "threads": args.threads, "seed": args.seed,
        "cores": os.cpu_count(), "cpu": environment()["cpu"], "platform": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }  # fmt: skip


def by_round(record: dict[str, Any], name: str) -> dict[int, float]:
    """Median milliseconds of a token in each round."""
    return {s["round"]: statistics.median(s["ms"]) for s in record["samples"] if s["name"] == name}


def ratios(record: dict[str, Any], slow: str, fast: str) -> list[float]:
    """How many times faster ``fast`` was than ``slow``, round by round."""
    above, below = by_round(record, slow), by_round(record, fast)
    return [above[turn] / below[turn] for turn in above if turn in below]


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def footer(settings: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    cpu = f" of {settings['cpu']}" if settings.get("cpu") else ""
    rounds = f"{settings['rounds']} rounds, " if "rounds" in settings else ""
    return (
        f"{settings['model']}, {settings['layers']} layers, {settings['weights']} weights, {settings['dtype']}, "
        f"{settings['threads']} CPU thread{'s' * (settings['threads'] > 1)}{cpu}, "
        f"{rounds}{versions}."
    )


def write(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """As JSON with one sample per line."""
    if args.output:
        samples = ",\n".join("  " + json.dumps(s) for s in record["samples"])
        head = json.dumps({k: v for k, v in record.items() if k != "samples"}, indent=1)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        whole = head.removesuffix("\n}") + f',\n "samples": [\n{samples}\n ]\n}}\n'
        args.output.write_text(whole, encoding="utf-8")


def turns(names: list[str], rounds: int, seed: int) -> Iterator[tuple[int, str]]:
    """Every name once a round, in a random order."""
    import random

    order = random.Random(seed)
    for turn in range(rounds):
        yield from ((turn, name) for name in order.sample(names, len(names)))
