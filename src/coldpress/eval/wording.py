"""How numbers are written in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coldpress.eval.memory import format_bytes
from coldpress.eval.report import short
from coldpress.eval.sections import Entry
from coldpress.io.terminal import UNSAFE

__all__ = [
    "at_words",
    "cache_words",
    "clean",
    "error_words",
    "has_rounds",
    "listed",
    "model_name",
    "number",
    "ppl_words",
    "rounds_words",
    "short_bytes",
    "speed_words",
    "three_digits",
]


def clean(text: Any) -> str:
    """Text from a record on one line, without what no page and no file can hold (control characters, lone surrogates).

    The line of a page is no place for direction marks either, which could turn the words around them.
    """
    return UNSAFE.sub("\ufffd", " ".join(str(text).split()))


def model_name(record: dict[str, Any]) -> str:
    return clean(short(record["model"]))


def listed(names: Sequence[str], most: int = 6) -> str:
    """``a, b and c``; of many the first ones and how many more."""
    names = [clean(name) for name in names]
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def at_words(size: str) -> str:
    """``at ratio 0.5``, ``with 128 tokens``."""
    return f"at ratio {size}" if size.replace(".", "", 1).isdigit() else f"with {size}" if size else "at no set size"


def number(value: float, digits: int = 4) -> str:
    """With so many decimals, and no minus before zero."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if not float(text) else text


def three_digits(value: float) -> str:
    """``1.20``, ``67.5``, ``1,254``."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"


def short_bytes(count: float | None) -> str:
    """Three digits: ``67.5 MiB``."""
    if count is None:
        return ""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while abs(value) >= 999.5 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{three_digits(value)} {unit}"


def _percent(value: float, decimals: int) -> str:
    text = number(100 * value, decimals)
    return text if text.startswith("-") or not float(text) else f"+{text}"


def ppl_words(entry: Entry) -> str:
    """``changes PPL by +0.4 % [0.1, 0.7]``, the brackets holding the 95 % interval."""
    change, ci = entry.ppl_change, entry.ppl_change_ci
    if change is None:
        return "has no loss to compare"
    if entry.equals_baseline:
        return "leaves every loss exactly as it was"
    if not math.isfinite(change):
        return "multiplies PPL beyond all bounds"
    if change > 9:  # percentages of thousands say less
        low_high = "" if ci is None else f" [{1 + ci[0]:.3g}, {1 + ci[1]:.3g}]"
        return f"multiplies PPL by {1 + change:.3g}{low_high}"
    width = abs(change) if ci is None else (ci[1] - ci[0]) / 2
    decimals = 1 if width >= 0.001 else 2 if width >= 0.0001 else 3
    between = "" if ci is None else f" [{number(100 * ci[0], decimals)}, {number(100 * ci[1], decimals)}]"
    level = ", within the error bars of no change" if ci is not None and ci[0] <= 0 <= ci[1] else ""
    return f"changes PPL by {_percent(change, decimals)} %{between}{level}"


_SHARES = (
    (1 / 2, "halves the KV cache"),
    (1 / 4, "cuts the KV cache to a quarter"),
    (1 / 10, "cuts the KV cache to a tenth"),
)


def cache_words(entry: Entry) -> str | None:
    """``halves the KV cache``; None where its bytes are not known."""
    kept = entry.kept_bytes
    if kept is None:
        return None
    sizes = f"({format_bytes(entry.kv_bytes_baseline)} to {format_bytes(entry.kv_bytes)})"
    if kept >= 0.995:
        return "leaves the KV cache as large as it was"
    for share, words in _SHARES:
        if abs(kept - share) <= 0.02 * share:
            return f"{words} {sizes}"
    return f"leaves {100 * kept:.0f} % of the KV cache {sizes}"


def speed_words(entry: Entry) -> str | None:
    """``decodes 1.2 times as fast``, if all rounds agree that it is faster; None where it was not timed."""
    times = entry.decode_speedup
    if times is None:
        return None if entry.timed is None else speed_words(entry.timed)
    context = f" with {entry.context:,} tokens of context" if entry.context else ""
    if not has_rounds(entry):
        return f"was {times:.2f} times as fast in the one round that is recorded{context}"
    rounds, spread = rounds_words(entry), entry.decode_speedup_spread
    if spread["min"] <= 1 <= spread["max"]:
        return f"decodes as fast as before{context}, to within the rounds ({times:.2f} times; {rounds})"
    return f"decodes {times:.2f} times as fast{context} ({rounds})"


def has_rounds(entry: Entry) -> bool:
    """Whether its decoding was timed more than once, against that of the baseline."""
    spread = entry.decode_speedup_spread
    return spread is not None and spread["min"] < spread["max"]


def rounds_words(entry: Entry) -> str:
    """How far the rounds of a timing lie apart; those with a spread only."""
    spread, n = entry.decode_speedup_spread, entry.record.get("repetitions")
    return f"{f'{n} ' if isinstance(n, int) else ''}rounds from {spread['min']:.2f} to {spread['max']:.2f}"


def error_words(entry: Entry) -> str:
    """``failed: ValueError: ...`` or how far an interrupted run came."""
    if entry.record["status"] == "failed":
        said = clean(entry.record.get("error") or "no error is recorded")
        return f"failed: {said if len(said) <= 200 else said[:197] + '...'}"
    if entry.record["status"] == "interrupted":
        windows = entry.record.get("windows")
        return "was interrupted" + (f" after {windows:g} windows" if windows else "")
    return f"has the status {clean(entry.record['status'])[:40]}"
