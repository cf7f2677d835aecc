"""Hand-made result records for the tests of the report: numbers that are easy to reckon with, and odd texts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ENV = {"python": "3.11", "transformers": "5.0", "torch": "2.0", "cpu": "a CPU", "threads": 2, "loadavg": [0.1]}
COMMON: Record = {
    **{"schema_version": 1, "status": "ok", "error": None, "model": "models/tiny", "num_params": 7e6, "env": ENV},
    **{"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa", "dataset": "wikitext"},
    **{"subset": "wikitext-103-raw-v1", "text_sha256": "ab" * 32, "total_tokens": 1234, "settings": {}},
    **{"command": "coldpress ppl --press all", "timestamp": "2026-01-01T00:00:00Z"},
}
BASE_LOSS = 3.0
TOKENS = 100  # scored in each window
MIB = 1 << 20


def record(press: str, ratio: float | None = 0.0, deltas: list[float] | None = None, **more: Any) -> Record:
    """A prefix record whose windows lose ``deltas`` nats a token against the baseline."""
    from coldpress.records.metrics import paired_difference

    deltas = [0.0] * 8 if deltas is None else deltas
    losses = [TOKENS * (BASE_LOSS + d) for d in deltas]
    base = [TOKENS * BASE_LOSS] * len(deltas)
    found = paired_difference([TOKENS] * len(deltas), losses, base)
    made = {
        **COMMON,
        **{"protocol": "prefix-C768-T256-S1024", "press": press, "compression_ratio": ratio},
        **{"windows": len(deltas), "scored_tokens": TOKENS * len(deltas), "loss": sum(losses) / TOKENS / len(deltas)},
        "per_window": [
            {"id": i, "n": TOKENS, "nll": a, "nll_base": b} for i, (a, b) in enumerate(zip(losses, base, strict=True))
        ],
        **{"effective_compression_ratio": ratio, "kv_bytes_baseline": 8 * MIB},
        "kv_bytes": round(8 * MIB * (1 - (ratio or 0))),
        "nll_by_distance": {"1-16": 3.0 + deltas[0], "17-64": 3.0 + deltas[-1]},
    }  # fmt: skip
    made["ppl"] = math.exp(made["loss"])
    if press != "no_press":
        ci = None if found.ci95 is None else [*found.ci95]
        made |= {"delta_nll": found.delta, "delta_nll_ci95": ci, "baseline_loss": BASE_LOSS, "baseline_ppl": math.e**3}
        made |= {
            "ppl_ratio_ci95": None if ci is None else [math.exp(x) for x in ci],
            "same_top1": 0.9,
            "kld": {"mean": 0.01},
        }
    return {**made, **more}


def spread(delta: float, noise: float, n: int = 8) -> list[float]:
    """``n`` windows about ``delta``, half of them ``noise`` above it and half below."""
    return [delta + (noise if i % 2 else -noise) for i in range(n)]


def failed(press: str, ratio: float, error: str = "ValueError: no room") -> Record:
    nothing = dict.fromkeys(("windows", "scored_tokens", "loss", "ppl", "delta_nll", "delta_nll_ci95", "per_window"))
    return (
        record(press, ratio) | nothing | {"status": "failed", "error": error, "kv_bytes": None, "nll_by_distance": None}
    )


def timed(press: str, ratio: float, context: int, speedup: float, noise: float = 0.05) -> Record:
    """A record of the protocol ``speed``."""
    more = {
        **{
            "protocol": "speed",
            "context_tokens": context,
            "generated_tokens": 8,
            "settings": {"context_limit": context},
        },
        **{"tpot_ms": 4.0 / speedup, "ttft_s": context / 1e4, "decode_tokens_per_s": 250 * speedup, "repetitions": 5},
        **{"peak_mem_bytes": 100 * MIB + context, "peak_mem_kind": "vmhwm", "windows": None, "scored_tokens": None},
        "tpot_ms_spread": {"min": 3.9 / speedup, "max": 4.1 / speedup},
        "ttft_s_spread": {"min": context / 1.1e4, "max": context / 0.9e4},
    }
    compared = {
        "decode_speedup": speedup,
        "decode_speedup_spread": {"min": speedup - noise, "max": speedup + noise},
    }
    none = dict.fromkeys(
        ("delta_nll", "delta_nll_ci95", "loss", "ppl", "per_window", "nll_by_distance", "baseline_loss")
    )
    return record(press, ratio) | none | more | (compared if press != "no_press" else {})


def tasked(press: str, ratio: float, cost: float) -> Record:
    """A record of needles at two lengths, and of a probe without a score."""
    tasks = []
    for length in (512, 1024):
        depths = [
            {"depth": d, "n": 5, "score": 1 - cost, "answer_nll": 0.5 + cost * d, "answer_nll_base": 0.5}
            for d in (0.0, 0.5, 1.0)
        ]
        needle = {"task": "needle", "length": length, "n": 15, "score": 1 - cost, "score_base": 1.0, "by_depth": depths}
        tasks.append({**needle, "delta_score_ci95": [-cost - 0.05, -cost + 0.05]})
        probe = {
            "task": "span",
            "length": length,
            "n": 15,
            "score": None,
            "answer_nll": 1 + cost,
            "answer_nll_base": 1.0,
        }
        more = {"delta_answer_nll": cost, "delta_answer_nll_ci95": [cost - 0.1, cost + 0.1], "by_depth": depths}
        tasks.append({**probe, **more})
    none = dict.fromkeys(("delta_nll", "delta_nll_ci95", "loss", "ppl", "per_window", "nll_by_distance", "windows"))
    return record(press, ratio) | none | {"protocol": "tasks-needle-v1", "tasks": tasks, "scored_tokens": None}


def stream(press: str, budget: int | None, losses: list[float]) -> Record:
    none = dict.fromkeys(("delta_nll", "delta_nll_ci95", "per_window", "nll_by_distance", "windows"))
    loss = sum(losses) / len(losses)
    more = {
        **{
            "protocol": "stream-K64",
            "ppl_mode": "streaming",
            "loss": loss,
            "ppl": math.exp(loss),
            "budget_tokens": budget,
        },
        **{"nll_by_position": {"1-255": loss, "256-511": loss + 0.1}, "position_mode": "rerotate", "kv_bytes_max": MIB},
        "per_document": [{"id": i, "n": TOKENS, "nll": TOKENS * x} for i, x in enumerate(losses)],
        "scored_tokens": TOKENS * len(losses),
    }
    return record(press, None) | none | more


NASTY = "<script>alert(1)</script> | a_b_ *c* `d` $x$ ]( https://evil.example &amp; \x00\u202e\ud800"


def everything() -> list[Record]:
    """Each kind of record, several protocols, failures, and texts full of marks."""
    quality = [record("no_press", 0.0)]
    for ratio, cost in ((0.25, 0.002), (0.5, 0.02), (0.75, 0.2)):
        quality += [
            record("snapkv", ratio, spread(cost, cost / 10)),
            record("knorm", ratio, spread(3 * cost, cost / 10)),
            record("random", ratio, spread(5 * cost, cost / 10)),
            record("streaming_llm", ratio, spread(2 * cost, cost / 10)),
        ]
    quality += [failed("tova", 0.5, f"ValueError: {NASTY}"), failed(NASTY, 0.75)]
    quality += [record("keydiff", 0.5, [0.0] * 8)]
    quality += [record("cur", 0.5, spread(0.1, 0.01, n=3), status="interrupted")]
    other = [r | {"protocol": "prefix-C96-T32-S128"} for r in quality[:6]]
    speed = [timed("no_press", 0.0, n, 1.0) for n in (256, 1024)]
    speed += [timed("snapkv", 0.5, n, 1.2) for n in (256, 1024)] + [timed("knorm", 0.5, n, 1.01) for n in (256, 1024)]
    tasks = [tasked("no_press", 0.0, 0.0)] + [tasked("snapkv", r, r / 2) for r in (0.5, 0.75)]
    tasks += [tasked("knorm", r, 0.01) for r in (0.5, 0.75)]
    streams = [stream("no_press", None, [3.0, 3.1, 3.2]), stream("snapkv", 128, [3.1, 3.2, 3.3])]
    streams += [stream("streaming_llm", 128, [3.3, 3.4, 3.5]), stream("knorm", 128, [3.1, 3.25, 3.2])]
    plain = [record("no_press", 0.0, protocol="strided-L1024-S512", nll_by_distance=None)]
    named = [r | {"model": NASTY, "dataset": NASTY, "subset": None, "command": f"ppl '{NASTY}'"} for r in quality[:4]]
    return [*quality, *other, *speed, *tasks, *streams, *plain, *named]


def many(n_presses: int = 36, seed: int = 0) -> list[Record]:
    """A sweep of many presses over four ratios."""
    draw = random.Random(seed)
    records = [record("no_press", 0.0, [0.0] * 20)]
    for name in ["random", "streaming_llm", *(f"press_{i:02d}" for i in range(n_presses - 2))]:
        own = draw.uniform(0.01, 0.2)
        for ratio in (0.25, 0.5, 0.75, 0.9):
            noise = [own * ratio**2 * (1 + 0.2 * draw.gauss(0, 1)) for _ in range(20)]
            records.append(record(name, ratio, noise))
    return records


def write(folder: Path, records: list[Record]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(records):
        (folder / f"{i:04d}.json").write_text(json.dumps(one), encoding="utf-8")
    return folder
