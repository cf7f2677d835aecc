"""Tables of result records, for the terminal and for Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from coldpress.bases.registry import NO_PRESS
from coldpress.bases.scorer import BUDGETS
from coldpress.eval.memory import format_bytes
from coldpress.eval.task_columns import Column, task_columns
from coldpress.io.terminal import printable

__all__ = ["asked", "bits_of", "check_record", "describe", "groups", "is_number", "short", "show", "size_of", "table"]

Record = dict[str, Any]


def _interval(record: Record) -> str | None:
    delta, ci = record.get("delta_nll"), record.get("delta_nll_ci95")
    if delta is None:
        return None
    return f"{delta:+.4f}" if ci is None else f"{delta:+.4f} ± {(ci[1] - ci[0]) / 2:.4f}"


def _number(key: str, form: str) -> Callable[[Record], str | None]:
    return lambda record: None if record.get(key) is None else form.format(record[key])


def _spread(key: str, form: str) -> Callable[[Record], str | None]:
    """A number with the smallest and the largest of its rounds, where these are recorded."""

    def cell(record: Record) -> str | None:
        value, spread = record.get(key), record.get(f"{key}_spread")
        if value is None or spread is None or spread["min"] == spread["max"]:
            return None if value is None else form.format(value)
        return f"{form.format(value)} ({form.format(spread['min'])} to {form.format(spread['max'])})"

    return cell


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
    """In how many bits what was kept is stored; an empty text where it is as it was."""
    return "" if record.get("kv_bits") is None else f"{record['kv_bits']}"


def _size_name(records: Sequence[Record]) -> str:
    """What the sizes in a table are: ratios, budgets, or both."""
    has_budget = any(r.get(name) is not None for r in records for name in BUDGETS)
    has_ratio = any(r.get("compression_ratio") is not None for r in records if r["press"] != NO_PRESS)
    return "ratio" if not has_budget else "ratio or budget" if has_ratio else "budget"


QUALITY: tuple[Column, ...] = (
    ("achieved", _number("effective_compression_ratio", "{:.3f}")),
    ("read", _number("read_ratio", "{:.3f}")),
    ("loss", lambda r: None if _is_plain(r) else _number("loss", "{:.4f}")(r)),
    ("loss uncompressed", lambda r: _number("loss", "{:.4f}")(r) if _is_plain(r) else None),
    ("PPL", lambda r: None if _is_plain(r) else _number("ppl", "{:.3f}")(r)),
    ("PPL uncompressed", lambda r: _number("ppl", "{:.3f}")(r) if _is_plain(r) else None),
    ("ΔNLL ± 95 % CI", _interval),
    ("same top-1", _number("same_top1", "{:.1%}")),
    ("KL", _number("kld_mean", "{:.4f}")),
    ("KV before", _bytes("kv_bytes_baseline")),
    ("KV after", _bytes("kv_bytes")),
    ("status", lambda r: None if r["status"] == "ok" else r["status"]),
)
STREAM: tuple[Column, ...] = (
    ("positions", lambda r: r.get("position_mode") if r.get("nll_by_position") else None),
    ("tokens", lambda r: f"{r['scored_tokens']:,}" if r.get("nll_by_position") else None),
    ("KV most", _bytes("kv_bytes_max")),
)
SPEED: tuple[Column, ...] = (
    ("prefill tok/s", _number("prefill_tokens_per_s", "{:.0f}")),
    ("TTFT s", _number("ttft_s", "{:.3f}")),
    ("TPOT ms", _spread("tpot_ms", "{:.2f}")),
    ("TPOT uncompressed", _number("tpot_ms_baseline", "{:.2f}")),
    ("decode speed-up", _spread("decode_speedup", "{:.2f}x")),
    ("generation tok/s", _number("generation_tokens_per_s", "{:.1f}")),
    ("peak memory", _bytes("peak_mem_bytes")),
    ("above start", _bytes("peak_mem_delta_bytes")),
)


def table(records: Sequence[Record]) -> str:
    """Markdown tables, one line a record: quality and sizes, then speed and memory, as far as they were measured."""
    flat = [{**r, "kld_mean": (r.get("kld") or {}).get("mean")} for r in records]
    quality = QUALITY
    if any(r.get("nll_by_position") for r in records):
        own = ("loss", "PPL", "status")
        quality = (*STREAM, *(column for column in QUALITY if column[0] in own))
    parts = (
        _table(flat, quality),
        _table(flat, _buckets(records)),
        *(_table(records, own) for own in task_columns(records)),
        _table(flat, SPEED),
    )
    return "\n\n".join(text for text in parts if text)


def _buckets(records: Sequence[Record]) -> tuple[Column, ...]:
    """A column for each bucket of positions in which a stream was scored."""
    names = dict.fromkeys(name for r in records for name in r.get("nll_by_position") or ())
    names = dict.fromkeys(sorted(names, key=lambda name: int(name.partition("-")[0])))

    def column(name: str) -> Column:
        def cell(record: Record) -> str | None:
            loss = (record.get("nll_by_position") or {}).get(name)
            return None if loss is None else f"{loss:.3f}"

        return f"loss at {name}", cell

    return tuple(column(name) for name in names)


def _table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """The columns that a record fills, for the records that fill one; an empty text when none does."""
    cells = [[printable(cell(r) or "") for _, cell in columns] for r in records]
    used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    if not used:
        return ""
    size = _size_name(records)
    has_bits = any(map(bits_of, records))
    header = ["press", size, *(["bits"] if has_bits else []), *(printable(columns[i][0]) for i in used)]
    body = [
        [printable(record["press"]), "" if size == "budget" and record["press"] == NO_PRESS else size_of(record)]
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


def short(name: str) -> str:
    """The last part of a path; hub ids and short names as they are."""
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def describe(record: Record) -> str:
    """What a table's numbers were measured on, in one paragraph."""
    env = record["env"]
    subset = f"/{record['subset']}" if record.get("subset") else ""
    parts = [
        f"model {short(record['model'])} ({record['num_params'] / 1e6:.1f} M parameters, {record['dtype']}, "
        f"{record['device']}, {record['attn_implementation']})",
        f"text {short(record['dataset'])}{subset}, sha256 {record['text_sha256'][:12]}, "
        f"{record['total_tokens']:,} tokens",
        f"protocol {record['protocol']}",
    ]
    if record.get("windows"):
        parts.append(f"{record['windows']} windows, {record['scored_tokens']:,} scored tokens")
    if record.get("generated_tokens"):
        context = record.get("speed_context_tokens") or record["context_tokens"]
        settings = record.get("settings") or {}
        may_stop = (settings.get("min_new_tokens") or sys.maxsize) < (settings.get("max_new_tokens") or 0)
        n_generated = f"up to {settings['max_new_tokens']}" if may_stop else record["generated_tokens"]
        timed = f"timed with {context:,} tokens of context and {n_generated} generated ones"
        n = settings.get("repetitions")
        timed += f", {n} repetition{'s' if n > 1 else ''}" if n else ""
        timed += ", decoding only" if settings.get("speed_decode_only") else ""
        parts.append(f"{timed}, compiled" if settings.get("compile") else timed)
    if record.get("peak_mem_kind"):
        parts.append(f"peak memory by {record['peak_mem_kind']}")
    threads = f"{env['threads']} thread{'' if env['threads'] == 1 else 's'}"
    parts.append(f"transformers {env['transformers']}, torch {env['torch']}, {env['cpu']}, {threads}")
    return printable("; ".join(parts))


def show(records: Sequence[Record]) -> str:
    """The records of one run as text: what they were measured on, their tables, and who removed nothing."""
    parts = [describe(next((r for r in records if r["status"] == "ok"), records[0])), table(records)]
    parts += _baseline(records) + _unanswered(records)
    late = dict.fromkeys(r["press"] for r in records if _goes_on(r))
    if late:
        parts.append(
            "Achieved ratio and KV are those right after the prefill; of what goes on while decoding "
            f"({printable(', '.join(late))}) those at the end of generation, KV before likewise."
        )
    whole = dict.fromkeys(r["press"] for r in records if _is_whole(r))
    if whole:
        parts.append(f"Nothing to remove, as their parameters or budgets say: {printable(', '.join(whole))}.")
    return "\n\n".join(parts)


_TEXTS = ("press", "status", "protocol", "model", "dataset", "dtype", "device", "attn_implementation", "text_sha256")
_MAYBE_TEXTS = ("subset", "ppl_mode", "peak_mem_kind", "position_mode")
_NUMBERS = ("num_params", "total_tokens")
_MAYBE_NUMBERS = (
    *("compression_ratio", *BUDGETS, "windows", "scored_tokens", "loss", "ppl", "baseline_loss"),
    *("baseline_ppl", "delta_nll", "same_top1", "effective_compression_ratio", "context_tokens"),
    *("speed_context_tokens", "generated_tokens", "kv_bytes", "kv_bytes_baseline", "kv_bytes_max", "kv_len_before"),
    *("prefill_tokens_per_s", "ttft_s", "tpot_ms", "generation_tokens_per_s", "decode_speedup", "peak_mem_bytes"),
    *("peak_mem_delta_bytes", "tpot_ms_baseline"),
)
_SPREADS = ("tpot_ms_spread", "decode_speedup_spread")
_TOGETHER = {  # where the first is there, so is one of the others
    "windows": ("scored_tokens",),
    "nll_by_position": ("scored_tokens",),
    "generated_tokens": ("speed_context_tokens", "context_tokens"),
    "baseline_loss": ("baseline_ppl",),
}
_ENV = ("transformers", "torch", "cpu", "threads")


def check_record(record: Record) -> None:
    """Raise ValueError, with the field's name, where a table could not show what a file holds."""

    def check(name: str, value: Any, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {repr(value)[:40]}")

    for name in (*_TEXTS, *_MAYBE_TEXTS):
        value: Any = record.get(name)
        check(name, value, isinstance(value, str) or (value is None and name in _MAYBE_TEXTS), "a text")
    for name in (*_NUMBERS, *_MAYBE_NUMBERS):
        value = record.get(name)
        check(name, value, is_number(value) or (value is None and name in _MAYBE_NUMBERS), "a number")
    bits = record.get("kv_bits")
    check("kv_bits", bits, bits is None or is_number(bits) or isinstance(bits, str), "a number, or a name as k8v4")
    ci: Any = record.get("delta_nll_ci95")
    env: Any = record.get("env")
    settings: Any = record.get("settings")
    is_pair = isinstance(ci, list) and len(ci) == 2 and all(map(is_number, ci))
    check("delta_nll_ci95", ci, ci is None or is_pair, "two numbers")
    check("env", env, isinstance(env, dict) and all(_is_simple(env.get(key, ())) for key in _ENV), "an environment")
    settings_fit = isinstance(settings, dict) and all(
        value is None or isinstance(value, bool) or is_number(value) for value in _of_speed(settings)
    )
    check("settings", settings, settings is None or settings_fit, "an object of settings")
    for name in _SPREADS:
        value = record.get(name)
        fits = isinstance(value, dict) and all(is_number(value.get(end)) for end in ("min", "max"))
        check(name, value, value is None or fits, "an object with min and max")
    for name in ("kld", "nll_by_position"):
        value = record.get(name)
        fits = isinstance(value, dict) and all(x is None or is_number(x) for x in value.values())
        if name == "nll_by_position" and fits:
            fits = all(key.partition("-")[0].isdecimal() and len(key) < 40 for key in value)
        check(name, value, value is None or fits, "an object of numbers")
    tasks: Any = record.get("tasks")
    check("tasks", tasks, tasks is None or (isinstance(tasks, list) and all(map(_is_task, tasks))), "a list of tasks")
    for name, others in _TOGETHER.items():
        if record.get(name):
            check(" or ".join(others), None, any(record.get(other) is not None for other in others), f"beside {name}")


_COUNTED = ("same_answers", "gained", "lost", "mcnemar_p")


def _is_task(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("task"), str) or not is_number(entry.get("length")):
        return False
    return all(
        entry.get(key) is None or is_number(entry[key]) for key in ("score", "score_base", "answer_nll", *_COUNTED)
    )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or is_number(value)


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """The records that may share a table: those of which :func:`describe` says the same; each group sorted.

    A press that failed has measured nothing, and stands with those that were asked for the same.
    """
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Record]]] = {}
    for record in records:
        outcome: tuple[Any, ...] = (record.get("windows"), record.get("scored_tokens"))
        if record["status"] == "failed":
            outcome = ()
        elif record.get("ppl_mode") == "streaming":  # how far each press reads stands in its row
            outcome = ("stream",)
        found.setdefault(asked(record), {}).setdefault(outcome, []).append(record)
    grouped = []
    for outcomes in found.values():
        failed = outcomes.pop((), [])
        first, *rest = list(outcomes.values()) or [[]]
        grouped += [sorted(group, key=_order) for group in ([*first, *failed], *rest)]
    return grouped


def asked(record: Record) -> tuple[Any, ...]:
    """What a caption says that is known before anything is measured."""
    settings, env = record.get("settings") or {}, record["env"]
    return (
        *(record.get(k) for k in ("protocol", "model", "num_params", "dtype", "device", "attn_implementation")),
        *(record.get(k) for k in ("ppl_mode", "dataset", "subset", "text_sha256", "total_tokens")),
        *([] if settings.get("ppl_only") else _of_speed(settings)),
        *(env[k] for k in _ENV),
    )


def _of_speed(settings: dict[str, Any]) -> list[Any]:
    names = (
        "context_limit",
        "max_new_tokens",
        "min_new_tokens",
        "repetitions",
        "warmup",
        "speed_decode_only",
        "compile",
    )
    return [settings.get(name) for name in names]


def _order(record: Record) -> tuple[Any, ...]:
    """No press before the presses, these by name; sizes as numbers, ratios before budgets."""
    sizes = [record.get(name) for name in ("compression_ratio", *BUDGETS)]
    return record["press"] != NO_PRESS, record["press"], [(size is None, size or 0) for size in sizes]


def _baseline(records: Sequence[Record]) -> list[str]:
    """What the differences are differences to, where no line of the table says it."""
    compared = [r for r in records if r.get("delta_nll") is not None and r.get("baseline_loss") is not None]
    if not compared or any(r["press"] == NO_PRESS and r["status"] == "ok" for r in records):
        return []
    loss, ppl = compared[0]["baseline_loss"], compared[0]["baseline_ppl"]
    return [f"ΔNLL is the difference to the uncompressed cache on the same tokens: loss {loss:.4f}, PPL {ppl:.3f}."]


def _unanswered(records: Sequence[Record]) -> list[str]:
    """The tasks that the uncompressed model itself cannot do, of which no press can lose anything."""
    entries = [entry for r in records for entry in r.get("tasks") or () if entry.get("score_base") == 0]
    names = dict.fromkeys(f"{entry['task']} at {entry['length']:,}" for entry in entries)
    said = "The uncompressed model scores 0, so these scores say nothing about a press"
    return [printable(f"{said}: {', '.join(names)}.")] if names else []


def _goes_on(record: Record) -> bool:
    """Whether its sizes are those of the end of generation: more tokens were seen than the timed context has."""
    seen, context = record.get("kv_len_before"), record.get("context_tokens")
    return record["press"] != NO_PRESS and seen is not None and context is not None and seen > context


def _is_whole(record: Record) -> bool:
    """Whether a press had nothing to do, though no ratio of 0 was asked for."""
    asked = record["press"] != NO_PRESS and not bits_of(record) and record.get("compression_ratio") != 0
    is_same = record.get("kv_bytes") is not None and record["kv_bytes"] == record.get("kv_bytes_baseline")
    return asked and is_same and record.get("effective_compression_ratio") == 0
