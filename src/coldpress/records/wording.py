"""How names and numbers are written in a sentence, and texts in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldpress.io.terminal import UNSAFE

_PEAKS = {  # how a peak is measured, in words
    "cuda_allocated": "that of the tensors on the device",
    "vmhwm": "that of the process's resident memory, model included (VmHWM)",
    "rss_polled": "that of the process's resident memory, model included, looked at every 2 ms",
    "maxrss_process": "that of the process's resident memory since it started",
}


def clean(text: Any) -> str:
    """Text from a record on one line, without what no page and no file can hold (control characters, lone surrogates).

    The line of a page is no place for direction marks either, which could turn the words around them.
    """
    return UNSAFE.sub("\ufffd", " ".join(str(text).split()))


def capital(text: str) -> str:
    """With a large first letter."""
    return text[0].upper() + text[1:]


def short(name: str) -> str:
    """The last part of a path; hub ids and short names as they are."""
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def windows_words(n: float) -> str:
    """``1 window``, ``1,024 windows``."""
    return f"{n:,.0f} window{'' if n == 1 else 's'}"


def weights_file(record: dict[str, Any]) -> str:
    """The GGUF file that a model's weights are unpacked from, where its name does not say it; else an empty text."""
    file = str(record.get("model_source") or "").rpartition(": ")[2]
    return clean(Path(file).name) if file.endswith(".gguf") and Path(file).name != model_name(record) else ""


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


def percent(value: float, digits: int = 1) -> str:
    """``+2.8 %``."""
    text = number(100 * value, digits)
    return f"{text if text.startswith('-') or not float(text) else f'+{text}'} %"


def three_digits(value: float) -> str:
    """``1.20``, ``67.5``, ``1,254``."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"


def format_bytes(count: int | None) -> str:
    """``1536`` -> ``'1.50 KiB'``, in powers of 1024; ``'n/a'`` for None."""
    if count is None:
        return "n/a"
    if abs(count) < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if abs(value) < 1024 or unit == "TiB":
            break
    return f"{value:.2f} {unit}"


def short_bytes(count: float | None) -> str:
    """Three digits: ``67.5 MiB``."""
    if count is None:
        return ""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while abs(value) >= 999.5 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{three_digits(value)} {unit}"


def aligned(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """The cells of a table, as wide as their columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]


def memory_words(kind: str) -> str:
    """What a peak of this kind is of; the kind itself where it is none of ours."""
    return _PEAKS.get(kind, f"measured by {kind}")


# Markdown


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a paragraph and in a table's cell."""
    text = re.sub(r"([\\`*\[\]<>|#~$&!])", r"\\\1", " ".join(text.split()))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is one
    text = re.sub(r"(?i)\b(https?|ftp|mailto)(?=:)|\bwww(?=\.)", lambda m: f"{m[0]}\u200b", text)
    return re.sub(r"^([-+=]|\d+[.)])(?=\s|$)", r"\\\1", text)


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, of which the first row is the head and the first column a text."""
    rule = ["---", *("---:" for _ in rows[0][1:])]
    head, *body = [[escape(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *body]]


def fenced(lines: Sequence[str]) -> list[str]:
    """Code in Markdown, whatever backticks are in it."""
    fence = "`" * max(3, 1 + max(len(run) for run in re.findall("`*", "".join(lines))))
    return [fence, *lines, fence]
