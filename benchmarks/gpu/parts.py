"""The parts of the benchmark, each of which fills a record and stops in time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from benchmarks.gpu.caches import Turn, filled, freed, run_on, turns_of, ways
from benchmarks.gpu.record import Record
from benchmarks.gpu.shapes import Sizes, clock, make_model, text
from transformers import DynamicCache

from coldpress import PressedCache, SnapKVPress, compiled, prefill
from coldpress.architecture.cache_argument import cache_argument
from coldpress.attend.one_token import attend_blocks
from coldpress.eval.memory import MemoryMeter

__all__ = ["PARTS", "attention", "batch", "compiling", "decode", "environment", "prefilling"]


def environment(record: Record, sizes: Sizes, device: str) -> None:
    """The machine, and what it does at best: bytes read and products made in a second."""
    where = torch.device(device)
    properties = torch.cuda.get_device_properties(where) if where.type == "cuda" else None
    record.note(
        device=where.type if properties is None else properties.name,
        memory_bytes=None if properties is None else properties.total_memory,
        cores=os.cpu_count(), platform=platform.machine(), python=platform.python_version(),
        cuda=torch.version.cuda,
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    )  # fmt: skip
    n_bytes, n = (1 << 32, 8192) if properties is not None else (1 << 22, 128)
    memory = torch.ones(n_bytes // 4, device=where)
    square = torch.randn(n, n, device=where, dtype=getattr(torch, sizes.dtype))
    for turn in record.rounds("reading and products", 5):
        start = clock(where)
        memory.sum()
        read = clock(where)
        square @ square
        done = clock(where)
        record.add(
            round=turn, read_gb_per_s=round(n_bytes / (read - start) / 1e9, 1),
            tflop_per_s=round(2 * n**3 / (done - read) / 1e12, 2),
        )  # fmt: skip
    record.end()


def attention(record: Record, sizes: Sizes, device: str) -> None:
    """One layer's attention of one token, in the ways that stores and compiled steps have."""
    where, dtype = torch.device(device), getattr(torch, sizes.dtype)
    heads, group = sizes.config["num_key_value_heads"], sizes.config["num_attention_heads"]
    dim, group = sizes.config["hidden_size"] // group, group // heads
    attend = torch.nn.functional.scaled_dot_product_attention
    for n in sizes.contexts:
        with freed():
            keys, values = (torch.randn(1, heads, n, dim, device=where, dtype=dtype) for _ in range(2))
            query = torch.randn(1, heads, group, dim, device=where, dtype=dtype)
            hidden = torch.arange(n, device=where) >= n - 64
            bias = torch.zeros(1, 1, 1, n, device=where, dtype=dtype).masked_fill(hidden, -torch.inf)
            segment = torch.arange(heads, device=where).repeat_interleave(n // 128)
            used = torch.full((len(segment),), 128, device=where)
            rows = [states.reshape(-1, dim) for states in (keys, values)]

            def products(
                keys: Any = keys, values: Any = values, query: Any = query, bias: Any = bias, n: int = n
            ) -> Any:
                """In pieces of the keys, so that more of the processors have work."""
                logits = (query @ keys.transpose(2, 3) * dim**-0.5).float() + bias
                weights = logits.softmax(-1).to(values.dtype)
                pieces = weights.unflatten(3, (-1, 128)).transpose(2, 3) @ values.unflatten(2, (-1, 128))
                return pieces.float().sum(2)

            variants: dict[str, Callable[[], Any]] = {
                "sdpa": lambda q=query, k=keys, v=values: attend(q, k, v),  # type: ignore[misc]
                "sdpa, mask": lambda q=query, k=keys, v=values, b=bias: attend(q, k, v, b),  # type: ignore[misc]
                "two products": products,
                "blocks": lambda q=query, r=rows, s=segment, u=used: attend_blocks(  # type: ignore[misc]
                    q[0], *r, s, u, 128, dim**-0.5
                ),
            }
            n_bytes = keys.nbytes + values.nbytes
            take_turns(record, f"{n} tokens", variants, sizes.rounds, n_bytes, where, tokens=n)
    record.end()


def take_turns(
    record: Record,
    title: str,
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    n_bytes: int,
    where: torch.device,
    **point: Any,
) -> None:
    """Milliseconds of one of ten calls in a row, and the bytes a second that this comes to."""
    with torch.inference_mode():
        for name in list(calls):
            try:
                calls[name]()
            except (RuntimeError, NotImplementedError) as error:
                record.fail(f"{title}, {name}", error)
                del calls[name]
        for turn in record.rounds(title, rounds):
            for name in random.Random(turn).sample(list(calls), len(calls)):
                start = clock(where)
                for _ in range(10):
                    calls[name]()
                ms = 1e2 * (clock(where) - start)
                record.add(round=turn, name=name, ms=round(ms, 4), gb_per_s=round(n_bytes / ms / 1e6, 1), **point)


def decode(record: Record, sizes: Sizes, device: str) -> None:
    """Milliseconds of a token from every cache."""
    model = made(record, sizes, device)
    for i, n in enumerate(sizes.contexts):
        try:
            with freed():
                turns = turns_of(model, sizes, n)
                record.note(kv_bytes=record.said.get("kv_bytes", {}) | {n: {k: t.kv_bytes for k, t in turns.items()}})
                share = record.left * (len(sizes.contexts) - 1 - i) / (len(sizes.contexts) - i)
                in_turns(record, model, f"{n} tokens", turns, sizes, share, tokens=n)
                del turns
        except torch.OutOfMemoryError as error:
            record.fail(f"{n} tokens", error)
    record.end()


def compiling(record: Record, sizes: Sizes, device: str) -> None:
    """The same with a compiled step, beside the same caches outside of it; what is refused says why."""
    model = made(record, sizes, device)
    for n in sizes.contexts:
        try:
            with freed():
                caches = filled(model, sizes, n, list(FIRST))
                for name in FIRST:
                    if record.left < 0:
                        record.fail(f"{n} tokens, {name}", TimeoutError("no time was left"))
                        continue
                    turns = {name: Turn(caches[name], n), f"{name}, compiled": Turn(caches[name], n, True)}
                    in_turns(record, model, f"{n} tokens, {name}", turns, sizes, 0.0, tokens=n)
                    known = record.said.get("differences", {})
                    record.note(differences=known | {f"{n} tokens, {name}": difference(model, turns)})
                del caches, turns
        except torch.OutOfMemoryError as error:
            record.fail(f"{n} tokens", error)
    record.end()


FIRST = ("SnapKV 0.5", "AdaKV 0.5", "no press", "k8v4")  # one after the other, as torch.compile takes its time


def difference(model: Any, turns: dict[str, Turn]) -> float | None:
    """The largest difference of the logits of a token, compiled and outside, over the largest of them."""
    if len(turns) < 2:
        return None  # it was refused
    token = text(1, 1, model, seed=1)
    logits = []
    run_on(model, "coldpress")
    with torch.inference_mode():
        for turn in turns.values():
            with compiled(model, tell=None) if turn.is_compiled else nullcontext():
                logits.append(model(token, **cache_argument(turn.cache)).logits.float())
            turn.cache.crop(-1)
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def in_turns(
    record: Record, model: Any, title: str, turns: dict[str, Turn], sizes: Sizes, until: float, **point: Any
) -> None:
    """Samples of all caches, once a round in a random order; those that cannot be decoded from are left out."""
    for name in list(turns):
        start = time.monotonic()
        try:
            turns[name].ms(model, 1)
        except Exception as error:  # out of memory, refused by a compiled step, a kernel that is missing
            record.fail(f"{title}, {name}", error)
            del turns[name]
            continue
        if turns[name].is_compiled:
            first = {"first_call_s": round(time.monotonic() - start, 1), "compile_s": turns[name].compile_s}
            record.note(compiled=record.said.get("compiled", {}) | {title: first})
        print(f"    {title}, {name}: ready ({record.left:.0f} s left)", flush=True)
        if record.left < 0:
            break
    for turn in record.rounds(title, sizes.rounds, until):
        for name in random.Random(turn).sample(list(turns), len(turns)):
            ms = turns[name].ms(model, sizes.new_tokens)
            record.add(round=turn, name=name, ms=ms, **point)


def prefilling(record: Record, sizes: Sizes, device: str) -> None:
    """Seconds and peak memory of a prompt, in one piece and in pieces."""
    model = made(record, sizes, device)
    where = next(model.parameters()).device
    for i, n in enumerate(sizes.contexts):
        short = SnapKVPress(0.0, window_size=sizes.window, budget_tokens=n // 4)
        chosen = ways(sizes)
        made_by: dict[str, Callable[[], Any]] = {
            "DynamicCache": DynamicCache,
            **{name: lambda w=chosen[name]: PressedCache(w[0], storage=w[1]) for name in list(chosen)[:4]},  # type: ignore[misc]
            "SnapKV, a quarter": lambda s=short: PressedCache(s),  # type: ignore[misc]
            "SnapKV, a quarter, pieces": lambda s=short: PressedCache(s, chunk_tokens=sizes.chunk),  # type: ignore[misc]
        }
        ids = text(1, n, model)
        for name in list(made_by) if not i else []:
            one_prefill(model, made_by[name], ids[:, : 2 * sizes.window], where)
        share = record.left * (len(sizes.contexts) - 1 - i) / (len(sizes.contexts) - i) * 1.5
        for turn in record.rounds(f"{n} tokens", min(3, sizes.rounds), min(share, record.left * 0.8)):
            for name in random.Random(turn).sample(list(made_by), len(made_by)):
                if record.left < 0:
                    record.fail(f"{n} tokens, {name}", TimeoutError(f"no time left in round {turn}"))
                    continue
                try:
                    record.add(round=turn, tokens=n, name=name, **one_prefill(model, made_by[name], ids, where))
                except Exception as error:
                    record.fail(f"{n} tokens, {name}", error)
                    del made_by[name]
    record.end()


def one_prefill(model: Any, make: Callable[[], Any], ids: Any, where: torch.device) -> dict[str, Any]:
    """By the backbone, without logits."""
    with freed(), torch.inference_mode():
        cache = make()
        is_ours = isinstance(cache, PressedCache)
        run_on(model, "coldpress" if is_ours else "sdpa")
        with MemoryMeter(where) as meter:
            start = clock(where)
            if is_ours:
                prefill(model.base_model, ids, cache)
            else:
                model.base_model(ids, **cache_argument(cache))
            seconds = clock(where) - start
        reading = meter.result
        return {
            "seconds": round(seconds, 4), "peak_bytes": reading.delta_bytes, "peak_kind": reading.kind,
            "kv_bytes": Turn(cache, 0).kv_bytes,
        }  # fmt: skip


def batch(record: Record, sizes: Sizes, device: str) -> None:
    """Tokens a second of all rows together, of caches that fit into a number of bytes.

    Rows are copies of one text: what is computed does not depend on what is in them.
    """
    model = made(record, sizes, device)
    n, held = sizes.batch_tokens, {}
    one = turns_of(model, sizes, n)
    for n_rows in sizes.batches:
        held[n_rows] = {name: turn.kv_bytes * n_rows for name, turn in one.items()}
        record.note(kv_bytes=held, budget_bytes=sizes.budget_bytes)
        fit = [name for name in one if held[n_rows][name] <= sizes.budget_bytes]
        for name in set(one) - set(fit):
            record.fail(
                f"{n_rows} rows, {name}",
                MemoryError(f"{held[n_rows][name]:,} bytes are over the budget of {sizes.budget_bytes:,}"),
            )
        with freed():
            turns = {}
            for name in fit:
                try:
                    turns[name] = Turn(rows_of(one[name].cache, n_rows), n, n_rows=n_rows)
                except torch.OutOfMemoryError as error:
                    record.fail(f"{n_rows} rows, {name}", error)
            later = record.left * (len(sizes.batches) - 1 - sizes.batches.index(n_rows)) / len(sizes.batches)
            in_turns(record, model, f"{n_rows} rows", turns, sizes, later, rows=n_rows)
            del turns
    record.end()


def rows_of(cache: Any, n_rows: int) -> Any:
    """A cache of as many rows of the same pairs."""
    if isinstance(cache, PressedCache):
        own: Any = cache.fork()
    else:
        own = DynamicCache()
        for i, layer in enumerate(cache.layers):
            own.update(layer.keys.clone(), layer.values.clone(), i)
    if n_rows > 1:
        own.batch_repeat_interleave(n_rows)
    return own


def made(record: Record, sizes: Sizes, device: str) -> Any:
    model = make_model(sizes, device)
    clock(torch.device(device))
    record.note(model_s=record.said["seconds"], weights_bytes=sum(p.nbytes for p in model.parameters()))
    print(f"    model made ({record.left:.0f} s left)", flush=True)
    return model


PARTS: dict[str, Callable[[Record, Sizes, str], None]] = {
    "environment": environment,
    "attention": attention,
    "decode": decode,
    "prefill": prefilling,
    "batch": batch,
    "compiled": compiling,
}
