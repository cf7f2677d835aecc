"""Tables of result records, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coldpress.eval.memory import format_bytes

__all__ = ["describe", "table"]

Record = dict[str, Any]


def _interval(record: Record) -> str | None:
    delta, ci = record.get("delta_nll"), record.get("delta_nll_ci95")
    if delta is None:
        return None
    return f"{delta:+.4f}" if ci is None else f"{delta:+.4f} ± {(ci[1] - ci[0]) / 2:.4f}"


def _number(key: str, form: str) -> Callable[[Record], str | None]:
    return lambda record: None if record.get(key) is None else form.format(record[key])


def _bytes(key: str) -> Callable[[Record], str | None]:
    return lambda record: None if record.get(key) is None else format_bytes(record[key])


COLUMNS: tuple[tuple[str, Callable[[Record], str | None]], ...] = (
    ("press", lambda r: r["press"]),
    ("ratio", _number("compression_ratio", "{:g}")),
    ("achieved", _number("effective_compression_ratio", "{:.3f}")),
    ("PPL", _number("ppl", "{:.3f}")),
    ("ΔNLL ± 95 % CI", _interval),
    ("same top-1", _number("same_top1", "{:.1%}")),
    ("KL", _number("kld_mean", "{:.4f}")),
    ("KV cache", _bytes("kv_bytes")),
    ("prefill tok/s", _number("prefill_tokens_per_s", "{:.0f}")),
    ("TTFT s", _number("ttft_s", "{:.3f}")),
    ("TPOT ms", _number("tpot_ms", "{:.2f}")),
    ("decode tok/s", _number("decode_tokens_per_s", "{:.1f}")),
    ("decode speed-up", _number("decode_speedup", "{:.2f}x")),
    ("peak memory", _bytes("peak_mem_delta_bytes")),
    ("status", lambda r: None if r["status"] == "ok" else r["status"]),
)


def table(records: Sequence[Record]) -> str:
    """A Markdown table, one line a record; columns that no record fills are left out."""
    flat = [{**r, "kld_mean": (r.get("kld") or {}).get("mean")} for r in records]
    rows = [[cell(r) or "" for _, cell in COLUMNS] for r in flat]
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    header = [COLUMNS[i][0] for i in used]
    body = [[row[i] for i in used] for row in rows]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, body)])


def _short(name: str) -> str:
    """The last part of a path; hub ids and short names as they are."""
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def describe(record: Record) -> str:
    """What a table's numbers were measured on, in one paragraph."""
    env = record["env"]
    parts = [
        f"model {_short(record['model'])} ({record['num_params'] / 1e6:.1f} M parameters, {record['dtype']}, {record['device']}, "
        f"{record['attn_implementation']})",
        f"text {_short(record['dataset'])}{'/' + record['subset'] if record['subset'] else ''}, sha256 {record['text_sha256'][:12]}, "
        f"{record['total_tokens']:,} tokens",
        f"protocol {record['protocol']}",
        f"transformers {env['transformers']}, torch {env['torch']}, {env['cpu']}, {env['threads']} threads",
    ]
    if record.get("windows"):
        parts.insert(3, f"{record['windows']} windows, {record['scored_tokens']:,} scored tokens")
    return "; ".join(parts)
