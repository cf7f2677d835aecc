#!/usr/bin/env python3
"""Train a small GPT-NeoX language model like the embedded one, from parquet files with a column ``text``.

    python scripts/train_demo_model.py --data books.parquet wiki/ --out models/mine --steps 3000

1. A byte-level BPE tokenizer is trained on the text, unless ``--tokenizer`` names one.
2. The model has Pythia's architecture: parallel residual, rotary embedding on ``--rotary_pct`` of each head.
3. The first three quarters of the steps see windows of half of ``--positions``, the rest all of them.
4. In a third of the windows one to five spans of 12 to 160 tokens repeat an earlier span. It teaches a small
   model to copy from its context, which is what a compressed cache may break.
5. Muon trains the matrices, AdamW the embeddings, the biases and the norms; bfloat16 autocast.

Which windows step n sees depends on ``--seed`` and n alone, so that an interrupted run that goes on with
``--resume`` computes what an uninterrupted one computes. The end of the text is held out; the weights are
saved in float16. Needs the extra ``eval`` (for pyarrow). The exit code is 2 when the input cannot work.
"""

from __future__ import annotations

import argparse
import array
import json
import math
import os
import pickle
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

END, PAD = "<|endoftext|>", "<|padding|>"
ROTARY_BASE = 10_000
COPY_SHARE = 1 / 3  # of the windows
COPY_SPANS = (1, 5)  # spans per such window
COPY_TOKENS = (12, 160)  # tokens per span
SHORT_SHARE = 3 / 4  # of the steps
LINE_CHARACTERS = 2_000  # rows that are shorter on average are lines of one running text
WIKI_TITLE = re.compile(r"^ ?= [^=].* = ?\n?$")
TOKENIZER_BATCH = 16  # documents
# What a resumed run may not change. The number of steps may grow: the schedule then stretches.
FIXED = ("layers", "hidden", "heads", "positions", "rotary_pct", "batch_tokens", "lr", "seed", "dtype")


class InputError(Exception):
    """What the user gave cannot work: one line."""


def say(line: str) -> None:
    print(line, flush=True)


def parquet_files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"--data {path} does not exist")
        found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"--data {path} holds no .parquet files")
        files += found
    return files


def documents(files: list[Path]) -> Iterator[str]:
    """The texts of the files: one per row; where rows are lines, as in WikiText, one per article."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError("pyarrow is needed to read parquet files: pip install pyarrow") from None
    for file in files:
        try:
            table = parquet.ParquetFile(file)
            if "text" not in table.schema_arrow.names:
                raise InputError(f"{file} has no column 'text', only {', '.join(table.schema_arrow.names)}")
            rows = [row for row in table.read(columns=["text"])["text"].to_pylist() if isinstance(row, str)]
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{file} is not a readable parquet file: {str(error).splitlines()[0]}") from None
        if sum(map(len, rows)) >= LINE_CHARACTERS * len(rows):
            yield from rows
            continue
        article: list[str] = []
        for row in rows:
            if WIKI_TITLE.match(row) and article:
                yield "".join(article)
                article = []
            article.append(row if row.endswith("\n") else row + "\n")
        yield "".join(article)


def train_tokenizer(files: list[Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; END gets id 0, PAD id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(files), trainer)
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} holds no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    if missing := [token for token in (END, PAD) if tokenizer.token_to_id(token) is None]:
        raise InputError(f"the tokenizer in {folder} lacks {' and '.join(missing)}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, positions: int, out: Path) -> None:
    """The two files that AutoTokenizer of transformers 4 and 5 reads."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": positions,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": END,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tokenize(files: list[Path], tokenizer: Tokenizer) -> torch.Tensor:
    """All documents as one int32 stream [N], each closed by END."""
    stream = array.array("i")
    end = tokenizer.token_to_id(END)
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch_fast(batch):
            stream.extend(encoding.ids)
            stream.append(end)
        batch.clear()

    for text in documents(files):
        batch.append(text)
        if len(batch) == TOKENIZER_BATCH:
            flush()
    flush()
    return torch.tensor(stream, dtype=torch.int32)


def split(stream: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out tokens: the last hundredth is held out, two windows at least."""
    held = max(2 * positions, min(len(stream) // 100, 64 * positions))
    least = held + 4 * positions
    if len(stream) < least:
        raise InputError(f"too little text: {len(stream):,} tokens; --positions {positions} needs {least:,}")
    return stream[:-held], stream[-held:]


def repeat_spans(window: torch.Tensor, generator: torch.Generator) -> None:
    """Overwrite one to five spans of ``window`` [T] with copies of earlier ones, in place."""

    def draw(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=generator))

    longest = min(COPY_TOKENS[1], len(window) // 4)
    for _ in range(draw(*COPY_SPANS)):
        length = draw(min(COPY_TOKENS[0], longest), longest)
        target = draw(length, len(window) - length)
        source = draw(0, target - length)
        window[target : target + length] = window[source : source + length].clone()


def training_batch(tokens: torch.Tensor, window: int, batch_tokens: int, seed: int, step: int) -> torch.Tensor:
    """The windows [B, window] of one step; the same for the same seed and step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = max(1, batch_tokens // window)
    starts = torch.randint(len(tokens) - window + 1, (rows,), generator=generator)
    batch = torch.stack([tokens[start : start + window] for start in starts.tolist()]).long()
    for row in batch:
        if torch.rand((), generator=generator) < COPY_SHARE:
            repeat_spans(row, generator)
    return batch


def lr_scale(step: int, steps: int) -> float:
    """Up over the first fiftieth, level, down to zero over the last third."""
    warm, decay = max(1, steps // 50), max(1, steps // 3)
    return min(1.0, (step + 1) / warm, (steps - step) / decay)


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> GPTNeoXForCausalLM:
    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.positions,
        rotary_pct=args.rotary_pct,
        rotary_emb_base=ROTARY_BASE,
        bos_token_id=tokenizer.token_to_id(END),
        eos_token_id=tokenizer.token_to_id(END),
    )
    return GPTNeoXForCausalLM(config)


def new_optimizers(model: GPTNeoXForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.01}
    if not hasattr(torch.optim, "Muon"):  # before torch 2.9
        say(f"note: torch {torch.__version__} has no Muon; AdamW trains the matrices too, and less well")
        return [torch.optim.AdamW(matrices + rest, **adamw)]
    # This adjustment gives Muon's updates the size of AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, **adamw)]


def loss_of(model: GPTNeoXForCausalLM, batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    batch = batch.to(model.device)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: GPTNeoXForCausalLM, tokens: torch.Tensor, positions: int, dtype: torch.dtype) -> float:
    """Nats per token over whole windows of ``positions``."""
    model.eval()
    windows = tokens[: len(tokens) // positions * positions].long().view(-1, 1, positions)
    losses = [loss_of(model, window, dtype).item() for window in windows]
    model.train()
    return sum(losses) / len(losses)


def save_checkpoint(file: Path, state: dict) -> None:
    """Written aside and renamed: an interrupted write leaves the former checkpoint whole."""
    aside = file.with_suffix(".tmp")
    with aside.open("wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, file)


def save_model(model: GPTNeoXForCausalLM, args: argparse.Namespace, out: Path) -> None:
    model.to("cpu", torch.float16).save_pretrained(out)
    # transformers 4 reads the rotary settings under these names, transformers 5 inside rope_parameters
    file = out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"rotary_pct": args.rotary_pct, "rotary_emb_base": ROTARY_BASE}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check(args: argparse.Namespace) -> None:
    if args.hidden % args.heads:
        raise InputError(f"--hidden {args.hidden} is not a multiple of --heads {args.heads}")
    rotary = int(args.hidden // args.heads * args.rotary_pct)
    if not 0 < args.rotary_pct <= 1 or rotary < 2 or rotary % 2:
        raise InputError(
            f"--rotary_pct {args.rotary_pct} gives {rotary} rotary dimensions a head; it takes an even number"
        )
    if args.positions < 16:
        raise InputError(f"--positions {args.positions} is too few; 16 or more")
    if args.vocab_size < 258:
        raise InputError(f"--vocab_size {args.vocab_size} is too few: 256 bytes and 2 special tokens")
    if args.lr <= 0:
        raise InputError(f"--lr {args.lr} is not positive")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is not a folder")
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and not checkpoint.is_file():
        raise InputError(f"--resume: {args.out} holds no checkpoint.pt")
    if not args.resume:
        for name in ("checkpoint.pt", "model.safetensors", "config.json"):
            if (args.out / name).exists():
                raise InputError(f"--out {args.out} already holds {name}; add --resume or name another folder")


def load_checkpoint(args: argparse.Namespace, stream: torch.Tensor) -> dict:
    file = args.out / "checkpoint.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError):
        raise InputError(f"--resume: {file} is not a checkpoint of this script") from None
    for name in FIXED:
        before, now = state["settings"][name], getattr(args, name)
        if before != now:
            raise InputError(f"--resume: the checkpoint was made with --{name} {before}, not {now}")
    before, now = state["stream_tokens"], len(stream)
    if before != now:
        raise InputError(f"--resume: the checkpoint was made on {before:,} tokens; --data gives {now:,}")
    if state["step"] > args.steps:
        raise InputError(f"--resume: the checkpoint is at step {state['step']}, past --steps {args.steps}")
    return state


def train(args: argparse.Namespace) -> None:
    check(args)
    files = parquet_files(args.data)
    source = args.out if args.resume else args.tokenizer
    tokenizer = load_tokenizer(source) if source else train_tokenizer(files, args.vocab_size)
    stream = tokenize(files, tokenizer)
    train_tokens, held_out = split(stream, args.positions)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    model = new_model(args, tokenizer).to(device).train()
    optimizers = new_optimizers(model, args.lr)
    start, losses = 0, []
    if args.resume:
        state = load_checkpoint(args, stream)
        start, losses = state["step"], state["held_out_losses"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.positions, args.out)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{millions:.2f} million parameters, vocabulary {tokenizer.get_vocab_size():,}")
    say(f"{len(train_tokens):,} tokens to train on, {len(held_out):,} held out")

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings["data"] = [str(path) for path in args.data]

    since, seen = time.perf_counter(), 0
    for step in range(start, args.steps):
        window = args.positions // 2 if step < args.steps * SHORT_SHARE else args.positions
        batch = training_batch(train_tokens, window, args.batch_tokens, args.seed, step)
        loss = loss_of(model, batch, dtype)
        if not math.isfinite(loss.item()):
            raise InputError(f"the loss is {loss.item()} at step {step}: begin again with a lower --lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_scale(step, args.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.numel()
        done = step + 1
        at = f"step {done}/{args.steps}"
        if done % args.log_every == 0 or done == args.steps:
            speed = seen / (time.perf_counter() - since)
            say(f"{at}  window {window}  loss {loss.item():.4f}  {speed:,.0f} tokens/s")
        if done % args.save_every == 0 or done == args.steps:
            held = held_out_loss(model, held_out, args.positions, dtype)
            losses.append([done, held])
            say(f"{at}  held-out loss {held:.4f}  perplexity {math.exp(held):.2f}")
            state = {
                "step": done,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "settings": settings,
                "stream_tokens": len(stream),
                "held_out_losses": losses,
            }
            save_checkpoint(args.out / "checkpoint.pt", state)

    save_model(model, args, args.out)
    record = {"settings": settings, "training_tokens": len(train_tokens), "held_out_losses": losses}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"saved {args.out}; checkpoint.pt in it is only needed to train on")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Train a small GPT-NeoX language model from parquet files with a column 'text'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--data", type=Path, nargs="+", required=True, metavar="PATH", help="parquet files or their folders")
    add("--out", type=Path, required=True, metavar="DIR", help="where model, tokenizer and checkpoint go")
    add("--tokenizer", type=Path, metavar="DIR", help="with a tokenizer.json; --vocab_size is not used then")
    add("--steps", type=count, default=3000, help="optimiser steps")
    add("--vocab_size", type=count, default=4096, help="tokens of the tokenizer")
    add("--layers", type=count, default=6, help="decoder layers")
    add("--hidden", type=count, default=256, help="hidden size")
    add("--heads", type=count, default=4, help="attention heads")
    add("--positions", type=count, default=1024, help="longest window")
    add("--rotary_pct", type=float, default=0.25, help="share of each head that is rotated")
    add("--batch_tokens", type=count, default=8192, help="tokens per step")
    add("--lr", type=float, default=3e-3, help="learning rate")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="what autocast computes in")
    add("--seed", type=int, default=0, help="of the weights and the windows")
    add("--threads", type=count, default=torch.get_num_threads(), help="of torch on the CPU")
    add("--log_every", type=count, default=20, metavar="STEPS", help="print the loss")
    add("--save_every", type=count, default=200, metavar="STEPS", help="held-out loss and checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    try:
        train(args)
    except (InputError, OSError) as error:
        print(f"train_demo_model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_demo_model: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
