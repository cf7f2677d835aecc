"""From the records of a recommendation to what is printed: the table, the rule, two names, and how to use them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.bases.registry import make_press
from coldpress.eval.advice import Row, Scored, advise, rule_of, table_of, words_of
from coldpress.eval.excerpts import source_of
from coldpress.eval.report import short, table
from coldpress.eval.settings import STREAM_CHUNK, AdviceSettings
from coldpress.eval.uses import USES
from coldpress.io.terminal import printable

__all__ = ["recommendation"]

Record = dict[str, Any]
WIDTH = 100  # of a line
OF_A_POINT = ("press", "compression_ratio", "budget_tokens", "kv_bits")


def recommendation(settings: AdviceSettings, records: Sequence[Record], minutes: float, is_cut: bool) -> str:
    """The table and the two names.

    Args:
        settings: what was asked for.
        records: of the windows and of the questions of each press, and of streams.
        minutes: that it took.
        is_cut: whether the time was up before all was measured.
    """
    use = USES[settings.use]
    streams = [record for record in records if record["protocol"].startswith("stream")]
    by_key: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record not in streams:
            by_key.setdefault(tuple(record[name] for name in OF_A_POINT), []).append(record)
    failed = {record["press"] for record in records if record["status"] == "failed"}
    whole = [found for found in by_key.values() if len(found) == 2 and found[0]["press"] not in failed]
    base = next((found for found in whole if _is_base(found[0])), None)
    if base is None or len(whole) < 2:
        return "Nothing was measured of which anything could be said; the errors above say why."
    has_sizes = len(settings.compression_ratio) > 1
    n_rounds = min(len(found[0]["samples"] or ()) for found in whole)  # the last one may have been cut
    rows = {_row(found, n_rounds, has_sizes): found[0] for found in whole if found is not base}
    plain = _row(base, n_rounds)
    advice = advise(plain, list(rows), settings.margin, use.by_time)
    first = base[0]
    n_windows, n_questions = len(next(iter(rows)).windows), len(plain.right)
    size = "" if settings.context_tokens else f" with --context_tokens {first['context_tokens']}"
    up = f"; the time was up, the same command{size} adds more" if is_cut else ""
    counts = f"{n_windows} windows of {first['context_tokens']:,} + {first['target_tokens']} tokens"
    said = [
        f"{short(first['model'])} on {short(settings.data or '')}, for {settings.use}: {use.about}.",
        f"{counts}, {n_questions} questions and {n_rounds} timed round{'' if n_rounds == 1 else 's'}, "
        f"{_sizes(settings, rows.values())}, in {minutes:.1f} min{up}.",
        table_of(plain, list(rows), advice),
        "compress: seconds that the first token comes later than without a press; ms: of each token after the first.",
    ]
    if streams:
        said += ["Read on, with the kept keys moved side by side:", table(streams)]
    said += [rule_of(plain, settings.margin), *words_of(plain, list(rows), advice, use.by_time)]
    if advice.cheap is not None:
        named = dict.fromkeys([advice.best[0], advice.cheap])
        how = [f"  {line}" for row in named for line in _how(settings, rows[row])]
        said.append("\n".join(["To use it:" if len(named) == 1 else "To use them:", *how]))
        if settings.use == "qa":
            said.append("compress reads as much of a text as the model was trained on, and says where it cuts it.")
    return "\n\n".join(part if "\n" in part else fill(printable(part), WIDTH) for part in said)


def _is_base(record: Record) -> bool:
    return record["press"] == NO_PRESS and record["kv_bits"] is None


def _sizes(settings: AdviceSettings, records: Any) -> str:
    budgets = [*dict.fromkeys(r["budget_tokens"] for r in records if r["budget_tokens"])]
    if budgets:
        return f"{' and '.join(map(str, budgets))} tokens stored"
    return f"ratio {' and '.join(f'{ratio:g}' for ratio in settings.compression_ratio)}"


def _row(records: Sequence[Record], n_rounds: int, has_size: bool = False) -> Row:
    """Of the record of the windows and that of the questions of one press."""
    windows, asked = records
    label = windows["press"]
    if has_size and label != NO_PRESS:
        size = windows["budget_tokens"] or windows["compression_ratio"]
        label += "" if size is None else f" {size:g}"
    if windows["kv_bits"] is not None:
        label = str(windows["kv_bits"]) if label == NO_PRESS else f"{label} {windows['kv_bits']}"
    found = windows["per_window"] or ()
    samples = (windows["samples"] or ())[:n_rounds]
    first = [s["prefill_ns"] / 1e9 for s in samples]
    decode = [s["decode_ns"] / (s["n_tokens"] - 1) / 1e6 for s in samples]
    return Row(
        label,
        tuple(Scored(w["n"], w["nll"], w["nll_base"], w["kld"]) for w in found if "kld" in w),
        tuple(row["score"] == 1 for row in asked["per_example"] or ()),
        windows["kv_bytes"],
        statistics.median(first) if first else None,
        statistics.median(decode) if decode else None,
    )


def _how(settings: AdviceSettings, record: Record) -> list[str]:
    """The lines that use what a record measured."""
    name, bits = record["press"], record["kv_bits"]
    ratio = None if name == NO_PRESS else record["compression_ratio"]
    press = f"--model {settings.model} --press {name}"
    press += "" if ratio is None else f" --compression_ratio {ratio:g}"
    press += "" if bits is None else f" --kv_bits {bits}"
    if settings.use == "qa":
        text = source_of(settings.data or "").get("text_file", "TEXT.txt")
        return [
            f"coldpress compress {press} --text_file {text} --output {name}.safetensors",
            f'coldpress ask {name}.safetensors "QUESTION"',
        ]
    if settings.use == "chat":
        return [f"coldpress chat {press} --chunk_tokens {USES['chat'].chunk_tokens}"]
    if settings.use == "throughput":
        return [f"coldpress serve {press}"]
    schedule = f"compression_interval={STREAM_CHUNK}, target_size={record['budget_tokens']}"
    return [f'coldpress.PressedCache(DecodingPress({make_press(name, 0.0)!r}, {schedule}), positions="rerotate")']
