"""What holding the cache in few bits costs and saves, beside transformers' QuantizedCache at the same bits.

    python benchmarks/quantised/quantised.py --model FOLDER_OR_GGUF --dataset FOLDER --output FILE.json
    python benchmarks/quantised/quantised.py --table FILE.json ...

Every cache is given the same contexts, and the same targets are scored after them in one forward pass: the difference
of losses, the Kullback-Leibler divergence and the root mean square error of the logits are against the cache that holds
all as it is. Bytes are those of the tensors that hold the pairs, steps and zero points included, right after the
context. Caches whose package is missing are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coldpress import KVBits, PressedCache
from coldpress.architecture.cache_argument import cache_argument
from coldpress.eval.plan import tokenize
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import load_model
from coldpress.records.metrics import paired_difference
from coldpress.records.results import environment


def candidates(config: Any, bits: list[int]) -> Iterator[tuple[str, int, Any]]:
    """Names, bits and makers of caches; both libraries in groups of 64, then coldpress as it is by default."""
    from transformers.cache_utils import QuantizedCache

    for n in bits:
        for backend, sizes in (("quanto", (4, 2)), ("hqq", (8, 4, 2))):
            if n not in sizes:
                continue
            axis = 0 if backend == "quanto" else 1  # each backend's own numbering

            def make(backend: str = backend, n: int = n, axis: int = axis) -> Any:
                return QuantizedCache(backend, config, nbits=n, axis_key=axis, axis_value=axis)

            try:
                make()
            except ImportError as error:
                print(f"left out: {backend}: {' '.join(str(error).split())}")
            else:
                yield f"transformers, {backend}", n, make
        for group, residual in ((64, 0), (32, 0), (64, 128), (32, 128)):
            yield f"coldpress, groups of {group}, newest {residual} as they are", n, KVBits(n, group, residual)


def n_bytes(cache: Any) -> int:
    """Bytes of the distinct storages of all tensors that a cache's layers hold."""
    if isinstance(cache, PressedCache):
        return cache.kv_bytes()
    found: dict[int, int] = {}
    seen: set[int] = set()

    def look(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        inner = [getattr(thing, name, None) for name in ("_data", "_scale", "_shift")]
        if any(isinstance(part, Tensor) for part in inner):  # a quantised tensor is made of others
            for part in inner:
                look(part)
        elif isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for part in thing.values():
                look(part)
        elif isinstance(thing, (list, tuple)):
            for part in thing:
                look(part)

    for layer in cache.layers:
        for part in vars(layer).values():
            look(part)
    return sum(found.values())


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores of every cache on the windows of the text."""
    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    model, context = loaded.model, arguments.context_tokens
    corpus = load_corpus(arguments.dataset, subset=arguments.subset, split="test", sample_idx=arguments.sample_idx)
    width = context + arguments.target_tokens
    ids = torch.cat([part.ids for part in tokenize(corpus, loaded.tokenizer, arguments.windows * width)])
    windows = [ids[i * width : (i + 1) * width][None].to(loaded.device) for i in range(len(ids) // width)]
    makers = list(candidates(model.config, arguments.bits))

    def fill(cache: Any, full: PressedCache) -> Any:
        """The prefill's pairs, as the model would have handed them over."""
        for i, layer in enumerate(full.pressed_layers()):
            cache.update(layer.keys, layer.values, i)
        return cache

    def logits(cache: Any, window: Tensor) -> Tensor:
        # coldpress's backend hands caches of other classes on to transformers' own attention
        return model(window[:, context:-1], **cache_argument(cache), use_cache=True).logits[0].float()

    sums: list[dict[str, Any]] = [
        {"cache": name, "bits": n, "nll": [], "kl": [], "square": [], "bytes": 0} for name, n, _ in makers
    ]
    base: list[float] = []
    plain = 0
    for window in windows:
        full, ours = PressedCache(), [how for _, _, how in makers if isinstance(how, KVBits)]
        branches = full.branches([None] * len(ours), ours)
        model.base_model(input_ids=window[:, :context], **cache_argument(full), use_cache=True)  # the one prefill
        own_caches = iter(branches)
        caches = [next(own_caches) if isinstance(how, KVBits) else fill(how(), full) for _, _, how in makers]
        plain = full.kv_bytes()
        expected = logits(full, window)
        wanted = window[0, context + 1 :, None]
        log_probs = expected.log_softmax(-1)
        base.append(-float(log_probs.gather(1, wanted).double().sum()))
        for own in sums:
            cache = caches.pop(0)
            own["bytes"] = n_bytes(cache)
            found = logits(cache, window)
            theirs = found.log_softmax(-1)
            own["nll"].append(-float(theirs.gather(1, wanted).double().sum()))
            own["kl"].append(float((log_probs.exp() * (log_probs - theirs)).sum(-1).double().mean()))
            own["square"].append(float((found - expected).square().double().mean()))
        print(f"{len(base)}/{len(windows)} windows", flush=True)
    counts = [arguments.target_tokens - 1] * len(windows)
    rows = []
    for own in sums:
        paired = paired_difference(counts, own["nll"], base)
        rows.append(
            {
                **{name: own[name] for name in ("cache", "bits", "bytes")},
                "delta_nll": paired.delta,
                "delta_nll_ci95": paired.ci95,
                "kl": math.fsum(own["kl"]) / len(windows),
                "logits_rmse": math.sqrt(math.fsum(own["square"]) / len(windows)),
                "per_window": {"nll": own["nll"], "nll_base": base},
            }
        )
    return {
        "model": Path(arguments.model).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": Path(arguments.dataset).name + (f"/{arguments.subset}" if arguments.subset else ""),
        "text_sha256": corpus.text_sha256,
        "context_tokens": context,
        "target_tokens": arguments.target_tokens,
        "windows": len(windows),
        "loss": math.fsum(base) / sum(counts),
        "bytes": plain,
        "rows": rows,
        "env": environment(),
    }


def table(record: dict[str, Any]) -> str:
    """One line a cache."""
    lines = [
        "| bits | cache | bytes | of all | ΔNLL ± 95 % CI | KL | RMSE of logits |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        ci = row["delta_nll_ci95"]
        half = "" if ci is None else f" ± {(ci[1] - ci[0]) / 2:.4f}"
        lines.append(
            f"| {row['bits']} | {row['cache']} | {row['bytes']:,} | {row['bytes'] / record['bytes']:.1%} "
            f"| {row['delta_nll']:+.4f}{half} | {row['kl']:.5f} | {row['logits_rmse']:.4f} |"
        )
    env = record["env"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['dtype']}; {record['windows']} windows of {record['text']}, "
        f"{record['context_tokens']} tokens of context and {record['target_tokens']} of targets; loss "
        f"{record['loss']:.4f} and {record['bytes']:,} bytes as it is; torch {env['torch']}, transformers "
        f"{env['transformers']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", help="print the tables of these results instead")
    parser.add_argument("--model")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--subset")
    parser.add_argument("--sample_idx", type=int)
    parser.add_argument("--context_tokens", type=int, default=768)
    parser.add_argument("--target_tokens", type=int, default=257)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(table(json.loads(Path(name).read_text())) for name in arguments.table))
        return
    record = measure(arguments)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
