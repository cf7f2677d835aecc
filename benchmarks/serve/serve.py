#!/usr/bin/env python3
"""What a server of compressed snapshots saves: time to a first token, documents in memory, and that nothing grows.

    python -m benchmarks.serve.serve first --model SmolLM2-135M.gguf --dataset PG19 --output FILE.json
    python -m benchmarks.serve.serve documents ...
    python -m benchmarks.serve.serve steady ...

``first`` asks ``coldpress serve`` and ``transformers serve`` in processes of their own, in turn. ``documents`` and
``steady`` serve from their own process, over HTTP; the llama.cpp beside them is that of the package xllamacpp.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

QUESTION = "\n\nIn one sentence: who speaks here, and of what?"
STORED = ((0.0, None), (0.5, 4), (0.75, 4))  # ratio removed, bits


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("part", choices=("first", "documents", "steady"))
    add("--model", default="demo")
    add("--dataset", required=True, help="long texts, test split")
    add("--tokens", type=int, help="of a document (first: 6000, documents: 4000, steady: 500)")
    add("--documents", type=int, default=32)
    add("--budget_mib", type=int, default=1024)
    add("--clients", type=int, default=8)
    add("--new_tokens", type=int, default=16)
    add("--rounds", type=int, default=3, help="questions to each server in first")
    add("--requests", type=int, default=2000, help="in steady, of which a tenth comes before the first measure")
    add("--llama", action="store_true", help="in documents: llama.cpp's server too")
    add("--threads", type=int, default=2)
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    measure = {"first": first, "documents": documents, "steady": steady}[args.part]
    args.tokens = args.tokens or {"first": 6000, "documents": 4000, "steady": 500}[args.part]

    import torch

    from coldpress.records.results import environment

    torch.set_num_threads(args.threads)
    record = {"part": args.part, "model": Path(args.model).name, "tokens": args.tokens, "threads": args.threads}
    record |= measure(args)
    record["env"] = environment()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return 0


# -- first: time to the first token ------------------------------------------------------------------------------------


def first(args: argparse.Namespace) -> dict[str, Any]:
    loaded, texts = _loaded(args, 1)
    text, times = texts[0], dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        _save(loaded, folder)
        del loaded
        command = [sys.executable, "-m", "coldpress.cli", "serve", "--port", "0", "--press", "snapkv"]
        command += ["--model", folder, "--served_name", "served", "--compression_ratio", "0.5", "--device", "cpu"]
        theirs = [shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers", "serve"]
        port = _free_port()
        theirs += [folder, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
        with _process(command) as own, _process(theirs, f"http://127.0.0.1:{port}") as other:
            whole = [{"role": "user", "content": text + QUESTION}]
            times["coldpress, first question"] = [_first_token_s(own, "served", whole)]
            begun = time.perf_counter()
            body = {"messages": [{"role": "user", "content": text}]}
            made = httpx.post(f"{own}/v1/snapshots", json=body, timeout=None).raise_for_status().json()
            times["coldpress, snapshot made"] = [time.perf_counter() - begun]
            asked = [{"role": "user", "content": QUESTION}]
            _first_token_s(own, "served", asked, snapshot=made["id"])
            _first_token_s(other, folder, [{"role": "user", "content": "Who?"}])  # it has loaded the model then
            for _ in range(args.rounds):
                for name, ask in (
                    ("coldpress, later question", lambda: _first_token_s(own, "served", asked, snapshot=made["id"])),
                    ("transformers serve, whole text", lambda: _first_token_s(other, folder, whole)),
                ):
                    times.setdefault(name, []).append(ask())
    return {"samples_s": times, "snapshot": {name: made[name] for name in ("tokens", "bytes", "press")}}


def _save(loaded: Any, folder: str) -> None:
    """Write a model that may come from a GGUF file as what both servers read."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(loaded.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=loaded.model.dtype)
    plain.load_state_dict(loaded.model.state_dict())
    plain.generation_config = loaded.model.generation_config
    plain.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _first_token_s(url: str, model: str, messages: Any, **more: Any) -> float:
    """Seconds from a request to the first text of its answer."""
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": 4, "temperature": 0, **more}
    begun = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=None) as response:
        if response.status_code != 200:
            raise SystemExit(f"{url} answers {response.status_code}: {response.read()[:500]!r}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:]).get("choices")
                if choices and choices[0]["delta"].get("content"):
                    return time.perf_counter() - begun
    raise SystemExit(f"{url} has answered without a text")


def _free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return int(at.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], url: str | None = None) -> Iterator[str]:
    """A server in a process of its own; its address, which it prints unless it is given."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    output = subprocess.PIPE if url is None else subprocess.DEVNULL
    started = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, text=True, env=env)
    try:
        if url is None:
            assert started.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", started.stdout.readline())
            if found is None:
                raise SystemExit(f"{command[2]} has not started")
            url = found[0]
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if started.poll() is not None:
                raise SystemExit(f"{' '.join(command[:3])} has ended with {started.returncode}")
            time.sleep(0.5)
        yield url
    finally:
        started.terminate()
        started.wait(30)


# -- documents: how many stay in memory --------------------------------------------------------------------------------


def documents(args: argparse.Namespace) -> dict[str, Any]:
    """Each document is read once, and stored in the ways of ``STORED`` from that one reading."""
    from coldpress import PressedCache, SnapKVPress, Snapshots
    from coldpress.models.block import prefilling
    from coldpress.models.prompts import prefill
    from coldpress.serving.snapshot import Snapshot

    loaded, texts = _loaded(args, args.documents)
    presses = [SnapKVPress(ratio) if ratio else None for ratio, _ in STORED]
    read: list[list[PressedCache]] = [[] for _ in STORED]  # of the document that is declared next

    class FromOneReading(Snapshots):
        ready: list[PressedCache]

        def _built(self, snapshot: Snapshot) -> PressedCache:
            return self.ready.pop(0) if self.ready else super()._built(snapshot)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        held = []
        for (ratio, bits), press, ready in zip(STORED, presses, read, strict=True):
            held.append(
                FromOneReading(
                    loaded.model, loaded.tokenizer, press, kv_bits=bits,
                    budget_bytes=args.budget_mib << 20, folder=Path(folder) / f"{ratio}",
                )
            )  # fmt: skip
            held[-1].ready = ready
        begun = time.perf_counter()
        for text in texts:
            declared = [{"role": "user", "content": text}]
            ids, _ = held[0]._ids(declared)
            full = PressedCache()
            branches = full.branches(presses, [bits for _, bits in STORED])
            import torch

            with torch.no_grad(), prefilling(loaded.model, full, *branches):
                prefill(loaded.model.base_model, torch.tensor([ids]), full)
            for snapshots, ready, branch in zip(held, read, branches, strict=True):
                ready.append(branch)
                snapshots.add(declared)
        made_s = time.perf_counter() - begun
        for (ratio, bits), snapshots in zip(STORED, held, strict=True):
            ids = [snapshot.id for snapshot in reversed(list(snapshots))]
            n_bytes = sorted(snapshot.memory_bytes for snapshot in snapshots if snapshot.tier == "memory")
            built = snapshots.built
            with _served(loaded, snapshots, args.clients) as url:
                messages = [{"role": "user", "content": QUESTION}]
                bodies = [{"messages": messages, "snapshot": key} for key in ids]
                answers, seconds = _asked(url, bodies, args)
            rows.append(
                {"server": "coldpress", "ratio": ratio, "bits": bits, "resident": len(n_bytes),
                 "bytes_each": n_bytes[len(n_bytes) // 2] if n_bytes else None, "requests": len(answers),
                 "tokens": sum(n for n, _ in answers), "seconds": seconds, "read_again": snapshots.built - built,
                 "first_token_s": [s for _, s in answers]}
            )  # fmt: skip
    if args.llama:
        rows.append(_llama(args, texts))
    return {
        "documents": len(texts),
        "budget_mib": args.budget_mib,
        "clients": args.clients,
        "made_s": made_s,
        "rows": rows,
    }


def _asked(url: str, bodies: list[dict[str, Any]], args: argparse.Namespace) -> tuple[list[tuple[int, float]], float]:
    """Ask all of them by several clients in turn: tokens and seconds to the first one of each, and seconds in all."""

    def ask(body: dict[str, Any]) -> tuple[int, float]:
        more = {"stream": True, "max_tokens": args.new_tokens, "temperature": 0}
        begun, first_s, n = time.perf_counter(), None, 0
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | more, timeout=None) as response:
            if response.status_code != 200:
                raise SystemExit(f"{url} answers {response.status_code}: {response.read()[:500]!r}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices")
                    if choices and choices[0]["delta"].get("content"):
                        first_s = first_s or time.perf_counter() - begun
                        n += 1
        return n, first_s or 0.0

    begun = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        found = list(pool.map(ask, bodies))
    return found, time.perf_counter() - begun


def _llama(args: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """llama.cpp's server, whose prompt cache has as many bytes; a round of all documents comes before the measured one.

    Of the measured round only as many documents as there are clients are asked, as each may be read anew.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.port = _free_port()
    params.n_parallel, params.n_ctx = args.clients, args.clients * (args.tokens + 512)
    params.cache_ram_mib = args.budget_mib
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    url = server.listening_address
    bodies = [{"messages": [{"role": "user", "content": text + QUESTION}]} for text in texts]
    _, made_s = _asked(url, bodies, args)
    answers, seconds = _asked(url, bodies[: args.clients], args)
    return {"server": "llama.cpp", "ratio": 0.0, "bits": None, "resident": None, "bytes_each": None,
            "requests": len(answers), "tokens": sum(n for n, _ in answers), "seconds": seconds, "made_s": made_s,
            "first_token_s": [s for _, s in answers]}  # fmt: skip


# -- steady: nothing changes, nothing grows ----------------------------------------------------------------------------


def steady(args: argparse.Namespace) -> dict[str, Any]:
    import psutil

    from coldpress import SnapKVPress, Snapshots

    loaded, texts = _loaded(args, 1)
    snapshots = Snapshots(loaded.model, loaded.tokenizer, SnapKVPress(0.5))
    snapshot = snapshots.add([{"role": "user", "content": texts[0]}])
    bodies = [{"messages": [{"role": "user", "content": f"{QUESTION} {i}"}], "snapshot": snapshot.id} for i in range(9)]
    rss, digests, tokens, seconds, n_done = [], [_digest(snapshot)], 0, 0.0, 0
    args.new_tokens = min(args.new_tokens, 2)
    with _served(loaded, snapshots, args.clients) as url:
        for n in (args.requests // 10, args.requests):
            answers, took = _asked(url, [bodies[i % len(bodies)] for i in range(n_done, n)], args)
            n_done, tokens, seconds = n, tokens + sum(n for n, _ in answers), seconds + took
            rss.append({"requests": n, "rss_bytes": psutil.Process().memory_info().rss})
            digests.append(_digest(snapshot))
    return {"clients": args.clients, "rss": rss, "digests": digests, "seconds": seconds, "new_tokens": tokens}


def _digest(snapshot: Any) -> str:
    """A hash over what a snapshot stores and where it stands."""
    found = hashlib.sha256()
    for layer in snapshot.fork().pressed_layers():
        for tensor in (*layer.tensors(), layer.positions()):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


# -- all of them -------------------------------------------------------------------------------------------------------


def _loaded(args: argparse.Namespace, n: int) -> tuple[Any, list[str]]:
    """The model, and ``n`` texts of as many tokens: pieces of books, one after the other."""
    from coldpress.loading.datasets import load_corpus
    from coldpress.loading.models import load_model

    loaded, texts = load_model(args.model, device="cpu"), list[str]()
    for document in load_corpus(args.dataset, split="test").documents:
        ids = loaded.tokenizer(document.text[: 8 * n * args.tokens], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        for start in range(0, len(ids) - args.tokens, args.tokens):
            texts.append(loaded.tokenizer.decode(ids[start : start + args.tokens]))
            if len(texts) == n:
                return loaded, texts
    raise SystemExit(f"{args.dataset} has fewer than {n} times {args.tokens} tokens")


@contextlib.contextmanager
def _served(loaded: Any, snapshots: Any, n_clients: int) -> Iterator[str]:
    """A server of this process; its address."""
    from coldpress.serving.app import make_app
    from coldpress.serving.listening import Listener, bound
    from coldpress.serving.service import Limits, Service

    no_press: Callable[[dict[str, Any]], None] = lambda given: None  # noqa: E731
    loaded.model.generation_config.eos_token_id = []  # answers of one length
    limits, is_there = Limits(running=n_clients, time_s=7200.0, idle_s=3600.0), threading.Event()
    service = Service(loaded.model, loaded.tokenizer, "served", snapshots, limits, no_press)
    with bound("127.0.0.1", 0) as at:
        listener = Listener(make_app(service), service, is_there.set)
        thread = threading.Thread(target=listener.listen, args=(at,))
        thread.start()
        try:
            is_there.wait(60)
            yield f"http://127.0.0.1:{at.getsockname()[1]}"
        finally:
            listener.should_exit = True
            thread.join()


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    env = record["env"]
    said = f"{record['model']}, float32, {record['threads']} CPU threads; torch {env['torch']}"
    said += f", transformers {env['transformers']}."
    return f"{_TABLES[record['part']](record)}\n\n{said}"


def _first_table(record: dict[str, Any]) -> str:
    samples = record["samples_s"]
    later = statistics.median(samples["coldpress, later question"])
    lines = ["| what | to the first token, s (least to most) | times a later question |", "|---|---:|---:|"]
    for name, taken in samples.items():
        middle = statistics.median(taken)
        spread = f" ({min(taken):.2f} to {max(taken):.2f})" if len(taken) > 1 else ""
        lines.append(f"| {name} | {middle:.2f}{spread} | {middle / later:.1f} |")
    held = record["snapshot"]
    lines += ["", f"A document of {record['tokens']:,} tokens; `{held['press']}` stores it in {held['bytes']:,} bytes."]
    return "\n".join(lines)


def _documents_table(record: dict[str, Any]) -> str:
    lines = [
        "| server | removed | bits | in memory | bytes each | read again | tokens/s | to the first token, median s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        resident = "" if row["resident"] is None else f"{row['resident']} of {record['documents']}"
        each = "" if row["bytes_each"] is None else f"{row['bytes_each']:,}"
        bits = {"coldpress": 32, "llama.cpp": 16}[row["server"]] if row["bits"] is None else row["bits"]
        lines.append(
            f"| {row['server']} | {row['ratio']:.0%} | {bits} | {resident} | {each} | {row.get('read_again', '')} | "
            f"{row['tokens'] / row['seconds']:.1f} | {statistics.median(row['first_token_s']):.2f} |"
        )
    lines += [
        "",
        f"{record['documents']} documents of {record['tokens']:,} tokens under {record['budget_mib']:,} MiB, asked in "
        f"turn by {record['clients']} clients; what is not in memory comes from files.",
    ]
    return "\n".join(lines)


def _steady_table(record: dict[str, Any]) -> str:
    lines = ["| requests | bytes of the snapshot | resident memory of the process |", "|---:|---|---:|"]
    for row, digest in zip(record["rss"], record["digests"][1:], strict=True):
        same = "unchanged" if digest == record["digests"][0] else "CHANGED"
        lines.append(f"| {row['requests']:,} | {same} | {row['rss_bytes']:,} |")
    rate = record["new_tokens"] / record["seconds"]
    return "\n".join([*lines, "", f"{record['clients']} clients, {rate:.1f} new tokens a second over all of them."])


_TABLES = {"first": _first_table, "documents": _documents_table, "steady": _steady_table}


if __name__ == "__main__":
    raise SystemExit(main())
