"""Tables of result records, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coldpress.eval.memory import format_bytes
from coldpress.presses.base import BUDGETS
from coldpress.presses.registry import NO_PRESS

__all__ = ["describe", "show", "size_of", "table"]

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


def _is_plain(record: Record) -> bool:
    """Whether the perplexity beside a press is the uncompressed model's own."""
    return (record["press"] != NO_PRESS or bits_of(record) != "") and str(record.get("protocol", "")).startswith(
        "strided"
    )


def size_of(record: Record) -> str:
    """How much a press was asked to keep: its ratio or budget; an empty text for a press that has neither."""
    if record.get("budget_tokens") is not None:
        return f"{record['budget_tokens']:,} tokens"
    if record.get("budget_bytes") is not None:
        return format_bytes(record["budget_bytes"])
    ratio = record.get("compression_ratio")
    return "" if ratio is None else f"{ratio:g}"


def bits_of(record: Record) -> str:
    """In how many bits what was kept is held; an empty text where it is as it was."""
    return "" if record.get("kv_bits") is None else f"{record['kv_bits']}"


def _size_name(records: Sequence[Record]) -> str:
    """What the sizes in a table are: ratios, budgets, or both."""
    has_budget = any(r.get(name) is not None for r in records for name in BUDGETS)
    has_ratio = any(r.get("compression_ratio") is not None for r in records if r["press"] != NO_PRESS)
    return "ratio" if not has_budget else "ratio or budget" if has_ratio else "budget"


Column = tuple[str, Callable[[Record], str | None]]
QUALITY: tuple[Column, ...] = (
    ("achieved", _number("effective_compression_ratio", "{:.3f}")),
    ("loss", _number("loss", "{:.4f}")),
    ("PPL", lambda r: None if _is_plain(r) else _number("ppl", "{:.3f}")(r)),
    ("PPL uncompressed", lambda r: _number("ppl", "{:.3f}")(r) if _is_plain(r) else None),
    ("ΔNLL ± 95 % CI", _interval),
    ("same top-1", _number("same_top1", "{:.1%}")),
    ("KL", _number("kld_mean", "{:.4f}")),
    ("KV before", _bytes("kv_bytes_baseline")),
    ("KV after", _bytes("kv_bytes")),
    ("status", lambda r: None if r["status"] == "ok" else r["status"]),
)
SPEED: tuple[Column, ...] = (
    ("prefill tok/s", _number("prefill_tokens_per_s", "{:.0f}")),
    ("TTFT s", _number("ttft_s", "{:.3f}")),
    ("TPOT ms", _number("tpot_ms", "{:.2f}")),
    ("generation tok/s", _number("generation_tokens_per_s", "{:.1f}")),
    ("decode speed-up", _number("decode_speedup", "{:.2f}x")),
    ("peak memory", _bytes("peak_mem_bytes")),
    ("above start", _bytes("peak_mem_delta_bytes")),
)


def table(records: Sequence[Record]) -> str:
    """Markdown tables, one line a record: quality and sizes, then speed and memory, as far as they were measured."""
    flat = [{**r, "kld_mean": (r.get("kld") or {}).get("mean")} for r in records]
    return "\n\n".join(text for text in (_table(flat, QUALITY), _table(flat, SPEED)) if text)


def _table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """The columns that a record fills, for the records that fill one; an empty text when none does."""
    cells = [[cell(r) or "" for _, cell in columns] for r in records]
    used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    if not used:
        return ""
    size = _size_name(records)
    has_bits = any(map(bits_of, records))
    header = ["press", size, *(["bits"] if has_bits else []), *(columns[i][0] for i in used)]
    body = [
        [record["press"], "" if size == "budget" and record["press"] == NO_PRESS else size_of(record)]
        + ([bits_of(record)] if has_bits else [])
        + [row[i] for i in used]
        for record, row in zip(records, cells, strict=True)
        if any(row)
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, body)])


def _short(name: str) -> str:
    """The last part of a path; hub ids and short names as they are."""
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def describe(record: Record) -> str:
    """What a table's numbers were measured on, in one paragraph."""
    env = record["env"]
    subset = f"/{record['subset']}" if record["subset"] else ""
    parts = [
        f"model {_short(record['model'])} ({record['num_params'] / 1e6:.1f} M parameters, {record['dtype']}, "
        f"{record['device']}, {record['attn_implementation']})",
        f"text {_short(record['dataset'])}{subset}, sha256 {record['text_sha256'][:12]}, "
        f"{record['total_tokens']:,} tokens",
        f"protocol {record['protocol']}",
    ]
    if record.get("windows"):
        parts.append(f"{record['windows']} windows, {record['scored_tokens']:,} scored tokens")
    if record.get("generated_tokens"):
        context = record.get("speed_context_tokens") or record["context_tokens"]
        parts.append(f"timed with {context:,} tokens of context and {record['generated_tokens']} generated ones")
    if record.get("peak_mem_kind"):
        parts.append(f"peak memory by {record['peak_mem_kind']}")
    parts.append(f"transformers {env['transformers']}, torch {env['torch']}, {env['cpu']}, {env['threads']} threads")
    return "; ".join(parts)


def show(records: Sequence[Record]) -> str:
    """The records of one run as text: what they were measured on, their tables, and who removed nothing."""
    parts = [describe(next((r for r in records if r["status"] == "ok"), records[0])), table(records)]
    whole = dict.fromkeys(r["press"] for r in records if _is_whole(r))
    if whole:
        parts.append(f"Nothing to remove, as their parameters or budgets say: {', '.join(whole)}.")
    return "\n\n".join(parts)


def _is_whole(record: Record) -> bool:
    """Whether a press had nothing to do, though no ratio of 0 was asked for."""
    asked = record["press"] != NO_PRESS and not bits_of(record) and record.get("compression_ratio") != 0
    is_same = record.get("kv_bytes") is not None and record["kv_bytes"] == record.get("kv_bytes_baseline")
    return asked and is_same and record.get("effective_compression_ratio") == 0
