"""How often a token that reads a part of the pairs is the one that all pairs give, and what its attention misses.

Teacher-forced: each cache is given the book's own next token, whatever it would have written.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coldpress import LayerView, PressedCache, QuestPress, SparQPress
from coldpress.architecture.cache_argument import cache_argument

PRESSES = (
    QuestPress(),
    QuestPress(dense_layers=0),
    QuestPress(read=0.25),
    QuestPress(read=0.5),
    SparQPress(),
    SparQPress(read=0.25),
)
SURE = 0.05  # a missed share that is small
GOAL = 0.99


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="read_little agreement", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--dataset", required=True, help="PG-19: a folder in the hub's layout, or a hub id")
    add("--books", type=int, default=4, help="pieces of as many books are read")
    add("--context", type=int, default=4096, help="tokens before the first one that is compared")
    add("--new_tokens", type=int, default=128, help="compared in each book")
    add("--watch_every", type=int, default=8, help="tokens from one whose missed shares are worked out to the next")
    add("--threads", type=int, default=2)
    add("--output", type=Path, required=True)
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    record = measure(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    samples = ",\n".join("  " + json.dumps(sample) for sample in record["samples"])
    head = json.dumps({name: value for name, value in record.items() if name != "samples"}, indent=1)
    args.output.write_text(head.removesuffix("\n}") + f',\n "samples": [\n{samples}\n ]\n}}\n', encoding="utf-8")
    print(table(record))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from coldpress.io.progress import progress
    from coldpress.loading.datasets import load_corpus
    from coldpress.loading.models import load_model
    from coldpress.records.results import environment

    loaded = load_model(args.model)
    model, tokenizer, n = loaded.model, loaded.tokenizer, args.context + args.new_tokens
    samples: list[dict[str, Any]] = []
    n_books = 0
    for book, document in enumerate(load_corpus(args.dataset, split="test").documents):
        ids = torch.tensor(tokenizer(document.text[: 12 * n], add_special_tokens=False, verbose=False)["input_ids"])
        if n_books == args.books or len(ids) < n:
            continue
        n_books += 1
        piece = ids[len(ids) - n :][None].to(model.device)  # not the title page
        seen: list[dict[str, Tensor]] = []
        watched = [watching(press, seen) for press in PRESSES]
        full = PressedCache()
        caches = [full, *full.branches(watched)]
        with torch.inference_mode():
            model(piece[:, : args.context], use_cache=True, logits_to_keep=1, **cache_argument(full, model))
            for at in progress(range(args.context, n), name=f"book {book}"):
                for cache in caches:
                    seen.clear()
                    is_watched[0] = (at - args.context) % args.watch_every == 0
                    out = model(piece[:, at : at + 1], use_cache=True, **cache_argument(cache, model))
                    own = out.logits[0, -1].float().log_softmax(-1)
                    if cache is full:
                        whole = own
                        continue
                    sample = {
                        "book": book, "token": at, "press": repr(cache_press(cache)),
                        "same": bool(own.argmax() == whole.argmax()),
                        "kl": float((whole.exp() * (whole - own)).sum()),
                    }  # fmt: skip
                    if seen:
                        sample |= shares(seen)
                    samples.append(sample)
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "dataset")}
    settings |= {"model": Path(loaded.name).name, "books": n_books, "dtype": str(model.dtype).removeprefix("torch.")}
    return {"settings": settings, "env": environment(), "samples": samples}


is_watched = [False]  # whether the step under way is one whose missed shares are worked out


def watching(press: Any, seen: list[dict[str, Tensor]]) -> Any:
    """The same press, which notes what each of its queries misses while :data:`is_watched`."""

    class Watching(type(press)):  # type: ignore[misc]
        __doc__, per_head_independent = press.__doc__, True

        def select(self, view: LayerView) -> Tensor | None:
            slots: Tensor | None = super().select(view)
            if is_watched[0] and slots is not None:
                seen.append({"true": self.truly_missed(view, slots), "bound": self.missed(view, slots)})
            return slots

    Watching.__name__ = Watching.__qualname__ = type(press).__name__
    return Watching(**vars(press))


def cache_press(cache: PressedCache) -> Any:
    return cache.session.press


def shares(seen: list[dict[str, Tensor]]) -> dict[str, float]:
    """Over the query heads of all layers that read a part: medians, and how many miss little, truly and for sure."""
    found = {}
    for name in ("true", "bound"):
        own = torch.cat([each[name].flatten() for each in seen])
        found[f"{name}_median"] = round(float(own.median()), 5)
        found[f"{name}_small"] = round(float((own < SURE).float().mean()), 5)
    return found


def table(record: dict[str, Any]) -> str:
    settings, env = record["settings"], record["env"]
    lines = [
        "| reads | same token | mean KL | missed, median | at most, median | misses < 5 % | certified < 5 % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for press in dict.fromkeys(sample["press"] for sample in record["samples"]):
        own = [sample for sample in record["samples"] if sample["press"] == press]
        looked = [sample for sample in own if "true_median" in sample]
        cells = [
            f"{100 * statistics.mean(s['same'] for s in own):.1f} %",
            f"{statistics.mean(s['kl'] for s in own):.4f}",
        ]
        for name in ("true_median", "bound_median"):
            cells.append(f"{100 * statistics.median(s[name] for s in looked):.1f} %")
        for name in ("true_small", "bound_small"):
            cells.append(f"{100 * statistics.mean(s[name] for s in looked):.1f} %")
        lines.append(f"| `{press}` | {' | '.join(cells)} |")
    n = len({(sample["book"], sample["token"]) for sample in record["samples"]})
    return "\n".join(lines) + (
        f"\n\nGoal: the same token in {GOAL:.0%}. {n} tokens of {settings['books']} books of PG-19 behind "
        f"{settings['context']:,} tokens or more; missed shares of every {settings['watch_every']}th. "
        f"{settings['model']}, {settings['dtype']}, torch {env['torch']}, transformers {env['transformers']}."
    )
