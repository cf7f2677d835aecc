#!/usr/bin/env python3
"""What pairs in few bits cost in loss on real text: one by one and rotated, or in KIVI's groups.

    python -m benchmarks.packed.loss --model FOLDER_OR_GGUF --dataset FOLDER --output FILE.json
    python -m benchmarks.packed.loss --share 0.125 ...    fewer pairs, fewer bits, and both, in as many bytes
    python -m benchmarks.packed.loss --share 0.125 --press NAME --dataset source ...    of coldpress's own code

Every cache is given the pairs of one prefill, and the same tokens are scored after them in one forward pass: the
differences are paired, with the window as the unit of sampling. Each head's newest 128 pairs are as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coldpress import AdaKVPress, Codec, KVBits, Mixed, PressedCache, RotatedBits, SnapKVPress, make_press
from coldpress.architecture.cache_argument import cache_argument
from coldpress.core.press import Press
from coldpress.loading.datasets import load_corpus
from coldpress.loading.models import load_model
from coldpress.loading.tokens import tokenize
from coldpress.models.block import prefilling
from coldpress.records.metrics import paired_difference
from coldpress.records.results import environment

ROOT = Path(__file__).resolve().parents[2]

CODECS: dict[str, Codec] = {
    **{f"rotated, keys {k}, values {v}": RotatedBits(k, v) for k, v in ((8, 8), (8, 4), (4, 4), (8, 2), (4, 2))},
    **{f"KIVI, {bits}": KVBits(bits) for bits in (8, 4, 2)},
}
# in one share of the bytes: the newest 32 pairs of each head are as they are, for 128 are more than a sixteenth
IN_A_SHARE: dict[str, Codec | None] = {
    "fewer pairs": None,
    **{f"both, keys {k}, values {v}": RotatedBits(k, v, newest=32) for k, v in ((8, 8), (8, 4), (4, 4), (4, 2))},
    "both, Mixed": Mixed(),
    "fewer bits, rotated, 2": RotatedBits(2, 2, newest=32),
    "fewer bits, KIVI, 2": KVBits(2, residual_tokens=32),
}


def in_a_share(name: str, press: str, n_bytes: int) -> Press | None:
    """The press of a row of IN_A_SHARE, SnapKV among all heads of a layer; none where bits alone are fewer."""
    if name.startswith("fewer bits"):
        return None
    if press == "snapkv":
        return AdaKVPress(SnapKVPress(budget_bytes=n_bytes))
    return make_press(press, 0.0, budget_bytes=n_bytes)


def windows_of(args: argparse.Namespace, tokenizer: Any) -> tuple[list[torch.Tensor], str, str]:
    """The windows of a text, its name and its SHA-256; ``source`` is coldpress's own code."""
    width = args.context_tokens + args.target_tokens
    if args.dataset == "source":
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        name, digest = "source", hashlib.sha256(text.encode()).hexdigest()
    else:
        corpus = load_corpus(args.dataset, subset=args.subset, split="test", sample_idx=args.sample_idx)
        ids = torch.cat([part.ids for part in tokenize(corpus, tokenizer, args.windows * width)])
        name, digest = Path(args.dataset).name + (f"/{args.subset}" if args.subset else ""), corpus.text_sha256
    return [ids[i * width : (i + 1) * width][None] for i in range(min(args.windows, len(ids) // width))], name, digest


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model, device="cpu", dtype=args.dtype)
    model, context = loaded.model, args.context_tokens
    windows, text, text_sha256 = windows_of(args, loaded.tokenizer)
    codecs: dict[str, Any] = CODECS if args.share is None else IN_A_SHARE
    names = [name for name in codecs if not args.only or name in args.only]
    presses: list[Press | None] = [None] * len(names)
    if args.share is not None:
        whole = PressedCache()
        model.base_model(input_ids=windows[0][:, :context], **cache_argument(whole), use_cache=True)
        presses = [in_a_share(name, args.press, int(args.share * whole.kv_bytes())) for name in names]
    losses: dict[str, list[float]] = {name: [] for name in ("", *names)}
    divergences: dict[str, list[float]] = {name: [] for name in names}
    n_bytes: dict[str, int] = {}
    for done, window in enumerate(windows, 1):
        full = PressedCache()
        caches = dict(zip(names, full.branches(presses, [codecs[name] for name in names]), strict=True))
        with prefilling(model, full, *caches.values()):
            model.base_model(input_ids=window[:, :context], **cache_argument(full), use_cache=True)
        expected = None
        for name, cache in {"": full, **caches}.items():
            n_bytes[name] = cache.kv_bytes()
            found = model(window[:, context:-1], **cache_argument(cache), use_cache=True).logits[0].float()
            found = found.log_softmax(-1)
            losses[name].append(-float(found.gather(1, window[0, context + 1 :, None]).double().sum()))
            if expected is None:
                expected = found
            else:
                divergences[name].append(float((expected.exp() * (expected - found)).sum(-1).double().mean()))
        print(f"{done}/{len(windows)} windows", file=sys.stderr, flush=True)
    counts = [args.target_tokens - 1] * len(windows)
    rows = []
    for name in names:
        paired = paired_difference(counts, losses[name], losses[""])
        rows.append(
            {
                "cache": name,
                "bytes": n_bytes[name],
                "delta_nll": paired.delta,
                "delta_nll_ci95": paired.ci95,
                "kl": math.fsum(divergences[name]) / len(windows),
                "nll_per_window": losses[name],
            }
        )
    return {
        "model": Path(args.model).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": text,
        "text_sha256": text_sha256,
        "context_tokens": context,
        "target_tokens": args.target_tokens,
        **({} if args.share is None else {"share": args.share, "press": args.press}),
        "windows": len(windows),
        "loss": math.fsum(losses[""]) / sum(counts),
        "bytes": n_bytes[""],
        "nll_per_window": losses[""],
        "rows": rows,
        "env": environment(),
    }


def table(record: dict[str, Any]) -> str:
    """One line a cache."""
    lines = ["| cache, bits | bytes | of all | ΔNLL ± 95 % CI | PPL | KL |", "|---|---:|---:|---:|---:|---:|"]
    for row in record["rows"]:
        low, high = row["delta_nll_ci95"]
        lines.append(
            f"| {row['cache']} | {row['bytes']:,} | {row['bytes'] / record['bytes']:.1%} | {row['delta_nll']:+.4f} ± "
            f"{(high - low) / 2:.4f} | {math.expm1(row['delta_nll']):+.2%} | {row['kl']:.5f} |"
        )
    lines += compared(record) if "share" in record else []
    env = record["env"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['dtype']}; {record['windows']} windows of {record['text']}, "
        f"{record['context_tokens']} tokens of context and {record['target_tokens']} of targets; loss "
        f"{record['loss']:.4f} and {record['bytes']:,} bytes as it is; torch {env['torch']}, transformers "
        f"{env['transformers']}."
    )


def compared(record: dict[str, Any], both: Sequence[str] = (), alone: Sequence[str] = ()) -> list[str]:
    """Each cache that has fewer pairs and fewer bits against those that have one of the two alone, window by window."""
    counts = [record["target_tokens"] - 1] * record["windows"]
    losses = {row["cache"]: row["nll_per_window"] for row in record["rows"]}
    alone = alone or [name for name in losses if not name.startswith("both")]
    lines = ["", f"| paired, nats a token | {' | '.join(f'against {name}' for name in alone)} |"]
    lines.append("|---|" + "---:|" * len(alone))
    for name in both or [name for name in losses if name not in alone]:
        found = [paired_difference(counts, losses[name], losses[other]) for other in alone]
        cells = [f"{one.delta:+.4f} [{one.ci95[0]:+.4f}, {one.ci95[1]:+.4f}]" for one in found if one.ci95]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def mixed(records: list[dict[str, Any]]) -> str:
    """Pairs and bits by Mixed against one of the two alone: a line for each model and text, from their records."""
    alone = ("fewer pairs", "fewer bits, rotated, 2", "fewer bits, KIVI, 2")
    lines = [f"| model, text | Mixed, ΔNLL ± 95 % CI | {' | '.join(f'against {name}' for name in alone)} |"]
    lines.append("|---|---:|" + "---:|" * len(alone))
    for record in records:
        (row,) = (row for row in record["rows"] if row["cache"] == "both, Mixed")
        low, high = row["delta_nll_ci95"]
        cells = compared(record, ["both, Mixed"], alone)[-1].split(" | ", 1)[1]
        model, text = record["model"], record["text"].rpartition("/")[2]
        lines.append(f"| {model}, {text} | {row['delta_nll']:+.4f} ± {(high - low) / 2:.4f} | {cells}")
    first, env = records[0], records[0]["env"]
    windows = ", ".join(f"{n} of {model}" for model, n in {one["model"]: one["windows"] for one in records}.items())
    return "\n".join(lines) + (
        f"\n\n`{first['press']}` in {first['share']:g} of the bytes, {first['dtype']}; windows of "
        f"{first['context_tokens']} tokens of context and {first['target_tokens']} of targets: {windows}. `source` is "
        f"coldpress's own code. torch "
        f"{env['torch']}, transformers {env['transformers']}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--subset")
    parser.add_argument("--sample_idx", type=int)
    parser.add_argument("--context_tokens", type=int, default=768)
    parser.add_argument("--target_tokens", type=int, default=257)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=[*CODECS, *IN_A_SHARE])
    parser.add_argument("--share", type=float, help="of the bytes of all pairs, that each cache may take")
    parser.add_argument("--press", default="snapkv", help="with --share: which pairs stay")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record = measure(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
