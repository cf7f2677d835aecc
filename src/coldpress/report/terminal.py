"""Tables of result records, for the terminal and for Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from coldpress.backends import BUDGETS, NO_PRESS
from coldpress.io.terminal import printable
from coldpress.records.reading import (
    bits_of,
    interval_of_score,
    is_plain,
    measured,
    names_of_tasks,
    noise_of,
    size_of,
    task_name,
    task_of,
    unanswered,
    written,
)
from coldpress.records.schema import FIELDS, is_number
from coldpress.records.wording import aligned, memory_words, short, weights_file, windows_words

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], str | None]]  # its head, and what stands in a record's line


def _formed(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)


def _interval(record: Record) -> str | None:
    ci = record.get("delta_nll_ci95")
    return _formed(record.get("delta_nll"), "{:+.4f}" + ("" if ci is None else f" ± {(ci[1] - ci[0]) / 2:.4f}"))


def _of(name: str) -> Column:
    """The column of a registered field."""
    unit = FIELDS[name].unit[0]

    def cell(record: Record) -> str | None:
        value, spread = measured(record, name)
        if value is None:
            return None
        ends = "" if spread is None else f" ({' to '.join(f'{written(name, end)}{unit}' for end in spread)})"
        return f"{written(name, value)}{unit}{ends}"

    return FIELDS[name].head, cell


def _under(name: str, head: str, digits: int) -> Column:
    """A number of the loss under a press; where it is the uncompressed model's own, a sentence says it."""

    return head, lambda record: None if is_plain(record) else _formed(record.get(name), f"{{:.{digits}f}}")


def _size_name(records: Sequence[Record]) -> str:
    """What the sizes in a table are: ratios, budgets, or both."""
    has_budget = any(r.get(name) is not None for r in records for name in BUDGETS)
    has_ratio = any(r.get("compression_ratio") is not None for r in records if r["press"] != NO_PRESS)
    return "ratio" if not has_budget else "ratio or budget" if has_ratio else "budget"


QUALITY: tuple[Column, ...] = (
    _of("effective_compression_ratio"),
    _of("read_ratio"),
    _under("loss", "loss", 4),
    _under("ppl", "PPL", 3),
    ("ΔNLL ± 95 % CI", _interval),
    _of("same_top1"),
    _of("kld"),
    _of("kv_bytes_baseline"),
    _of("kv_bytes"),
    ("status", lambda r: None if r["status"] == "ok" else r["status"]),
)
STREAM: tuple[Column, ...] = (
    ("positions", lambda r: r.get("position_mode") if r.get("nll_by_position") else None),
    ("tokens", lambda r: f"{r['scored_tokens']:,}" if r.get("nll_by_position") else None),
    _of("kv_bytes_max"),
)
SPEED = tuple(
    map(
        _of,
        (
            *("prefill_tokens_per_s", "ttft_s", "tpot_ms", "tpot_ms_baseline", "decode_speedup"),
            *("generation_tokens_per_s", "peak_mem_bytes", "peak_mem_delta_bytes"),
        ),
    )
)


def table(records: Sequence[Record]) -> str:
    """Markdown tables, one line a record: quality and sizes, then speed and memory, as far as they were measured."""
    quality = QUALITY
    if any(r.get("nll_by_position") for r in records):
        own = ("loss", "PPL", "status")
        quality = (*STREAM, *(column for column in QUALITY if column[0] in own))
    parts = (
        _table(records, quality),
        _table(records, _buckets(records)),
        *(_table(records, own) for own in _task_columns(records)),
        _table(_compared(records), COMPARED),
        _table(records, _speed(records)),
    )
    return "\n\n".join(text for text in parts if text)


def _speed(records: Sequence[Record]) -> list[Column]:
    """Without what the line of the uncompressed cache says."""
    is_told = any(r["press"] == NO_PRESS and not bits_of(r) and r.get("tpot_ms") is not None for r in records)
    return [column for column in SPEED if not (is_told and column[0] == FIELDS["tpot_ms_baseline"].head)]


def _buckets(records: Sequence[Record]) -> tuple[Column, ...]:
    """A column for each bucket of positions in which a stream was scored."""
    names = dict.fromkeys(name for r in records for name in r.get("nll_by_position") or ())
    names = dict.fromkeys(sorted(names, key=lambda name: int(name.partition("-")[0])))

    def cell(name: str, record: Record) -> str | None:
        return _formed((record.get("nll_by_position") or {}).get(name), "{:.3f}")

    return tuple((f"loss at {name}", partial(cell, name)) for name in names)


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
    lines = aligned([header, *body])
    rule = ["-" * (len(cell) + 1) + (":" if i else "-") for i, cell in enumerate(lines[0])]
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|{'|'.join(rule)}|", *rest])


def describe(record: Record) -> str:
    """What a table's numbers were measured on, in one paragraph."""
    env = record["env"]
    subset = f"/{record['subset']}" if record.get("subset") else ""
    file = weights_file(record)
    parts = [
        f"model {short(record['model'])} ({record['num_params'] / 1e6:.1f} M parameters"
        f"{f' of {file}' if file else ''}, {record['dtype']}, "
        f"{record['device']}, {record['attn_implementation']})",
        f"text {short(record['dataset'])}{subset}, sha256 {record['text_sha256'][:12]}, "
        f"{record['total_tokens']:,} tokens",
        f"protocol {record['protocol']}",
    ]
    if record.get("windows"):
        parts.append(f"{windows_words(record['windows'])}, {record['scored_tokens']:,} scored tokens")
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
        parts.append(f"peak memory is {memory_words(record['peak_mem_kind'])}")
    threads = f"{env['threads']} thread{'' if env['threads'] == 1 else 's'}"
    parts.append(f"transformers {env['transformers']}, torch {env['torch']}, {env['cpu']}, {threads}")
    return printable("; ".join(parts))


def show(records: Sequence[Record]) -> str:
    """The records of one run as text: what they were measured on, their tables, and who removed nothing."""
    parts = [describe(next((r for r in records if r["status"] == "ok"), records[0])), table(records)]
    parts += _of_tasks(records) + _baseline(records) + _unanswered(records) + _noisy(records)
    late = dict.fromkeys(r["press"] for r in records if _goes_on(r))
    if late:
        parts.append(
            "Achieved ratio and KV are those right after the prefill; of what goes on while decoding "
            f"({printable(', '.join(late))}) those at the end of generation, KV before likewise."
        )
    whole = dict.fromkeys(r["press"] for r in records if _is_whole(r))
    if whole:
        parts.append(f"Nothing to remove, as their parameters or budgets say: {printable(', '.join(whole))}.")
    plain = dict.fromkeys(f"{r['press']} {size_of(r)}".strip() for r in records if _is_newest_alone(r))
    if plain:
        parts.append(
            "Nothing is in few bits right after the prompt, as no head keeps more than the newest pairs, which stay as "
            f"they are (--kv_residual_tokens): {printable(', '.join(plain))}."
        )
    return "\n\n".join(parts)


def _baseline(records: Sequence[Record]) -> list[str]:
    """The uncompressed model's own loss, where no line of the table says it."""
    if any(r["press"] == NO_PRESS and r["status"] == "ok" and not bits_of(r) for r in records):
        return []
    for record in records:
        if is_plain(record) and record.get("ppl") is not None:
            loss, ppl = record["loss"], record["ppl"]
            return [f"The uncompressed model has loss {loss:.4f}, PPL {ppl:.3f}; no press touches this."]
        if record.get("delta_nll") is not None and record.get("baseline_loss") is not None:
            said = "ΔNLL is the difference to the uncompressed cache on the same tokens"
            return [f"{said}: loss {record['baseline_loss']:.4f}, PPL {record['baseline_ppl']:.3f}."]
    return []


def _of_tasks(records: Sequence[Record]) -> list[str]:
    """How many questions a score is of, and what is good."""
    tasks = [task for r in records for task in r.get("tasks") or ()]
    counts = sorted({task["n"] for task in tasks if task.get("score") is not None and task.get("n")})
    said = []
    if counts:
        n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        said.append(f"Scores: of {n} question{'' if counts == [1] else 's'} each, more is better.")
    if any(task.get("answer_nll") is not None for task in tasks):
        said.append("Nats: of a token of the right answer, less is better.")
    return [" ".join(said)] if said else []


def _unanswered(records: Sequence[Record]) -> list[str]:
    names, said = unanswered(records), "The uncompressed model scores 0, so these scores say nothing about a press"
    return [printable(f"{said}: {', '.join(names)}.")] if names else []


def _noisy(records: Sequence[Record]) -> list[str]:
    """That the machine was busy with something else while it was timed."""
    ends = noise_of(records)
    said = "Rounds of the uncompressed cache took from {} to {} ms a token"
    said += ": the machine was not quiet, and times say nothing."
    return [] if ends is None else [said.format(*(written("tpot_ms", end) for end in ends))]


def _goes_on(record: Record) -> bool:
    """Whether its sizes are those of the end of generation: more tokens were seen than the timed context has."""
    seen, context = record.get("kv_len_before"), record.get("context_tokens")
    return record["press"] != NO_PRESS and seen is not None and context is not None and seen > context


def _is_whole(record: Record) -> bool:
    """Whether a press had nothing to do, though no ratio of 0 was asked for."""
    asked = record["press"] != NO_PRESS and not bits_of(record) and record.get("compression_ratio") != 0
    is_same = record.get("kv_bytes") is not None and record["kv_bytes"] == record.get("kv_bytes_baseline")
    return asked and is_same and record.get("effective_compression_ratio") == 0


def _is_newest_alone(record: Record) -> bool:
    """Whether few bits were asked for, and no head stores more than the newest pairs, which stay as they are."""
    config, stored = record.get("kv_bits_config") or {}, record.get("kv_len_after")
    newest = config.get("residual_tokens", config.get("newest"))
    if not isinstance(stored, list) or not stored or not is_number(newest):
        return False
    return all(is_number(n) and n <= newest for n in stored)


# Tasks: a column for each, and each length


def _task_columns(records: Sequence[Record]) -> list[list[Column]]:
    """The columns of two tables: scores, and nats a token of the answers."""

    def cell(name: str, key: str, form: str, record: Record) -> str | None:
        return _formed(task_of(record, name).get(key), form)

    names = names_of_tasks(records)
    return [
        [(name, partial(cell, name, "score", "{:.1%}")) for name in names],
        [(f"{name}, nats", partial(cell, name, "answer_nll", "{:.3f}")) for name in names],
    ]


# Benchmarks: a line for each press and task, beside the uncompressed cache


def _compared(records: Sequence[Record]) -> list[Record]:
    """A record of one task each, for all that a benchmark compares with the uncompressed cache."""
    pressed = [r for r in records if r["press"] != NO_PRESS or bits_of(r)]
    return [{**r, "tasks": [e]} for r in pressed for e in r.get("tasks") or () if e.get("same_answers") is not None]


def _of_task(key: str, form: str) -> Callable[[Record], str | None]:
    return lambda record: _formed(record["tasks"][0].get(key), form)


def _difference(record: Record) -> str | None:
    """Of the scores, with its interval."""
    entry = record["tasks"][0]
    if entry.get("score") is None or entry.get("score_base") is None:
        return None
    ci = interval_of_score(entry)
    return f"{entry['score'] - entry['score_base']:+.1%}" + ("" if ci is None else f" [{ci[0]:+.1%}, {ci[1]:+.1%}]")


COMPARED: tuple[Column, ...] = (
    ("task", lambda record: task_name(record["tasks"][0])),
    ("questions", _of_task("n", "{:,}")),
    ("uncompressed", _of_task("score_base", "{:.1%}")),
    ("under the press", _of_task("score", "{:.1%}")),
    ("difference [95 % CI]", _difference),
    ("right with the press only", _of_task("gained", "{:,}")),
    ("right uncompressed only", _of_task("lost", "{:,}")),
    ("McNemar p", _of_task("mcnemar_p", "{:.2g}")),
    ("same answers", _of_task("same_answers", "{:.0%}")),
)
