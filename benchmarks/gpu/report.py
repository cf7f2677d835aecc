"""The records of a run as tables; what is missing is said."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import read

__all__ = ["report"]

PARTS = ("environment", "tests", "attention", "decode", "prefill", "batch", "kvpress", "compiled")


def report(folder: Path) -> str:
    """All parts of a run as Markdown."""
    records = {name: said for name in PARTS if (said := read(folder / f"{name}.json")) is not None}
    blocks = [_environment(records.get("environment", {})), _ends(records)]
    tables = {
        "attention": ("One layer's attention of one token", _by_name("ms", "gb_per_s")),
        "decode": ("A decoded token", _by_name("ms", against="DynamicCache")),
        "compiled": ("A decoded token, compiled and not", _by_name("ms", against="the same outside")),
        "prefill": ("A prompt", _by_name("seconds", "peak_bytes", "kv_bytes", against="DynamicCache")),
        "batch": ("Batches", _by_name("ms", by="rows", against="DynamicCache")),
        "kvpress": ("kvpress", _by_name("seconds", "ms", "peak_bytes", "kv_bytes", against="DynamicCache")),
    }
    for name, (title, table) in tables.items():
        if records.get(name, {}).get("samples"):
            blocks.append(f"## {title}\n\n{table(records[name])}")
    return "\n\n".join(blocks) + "\n"


def _environment(said: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in said.get("versions", {}).items())
    samples = said.get("samples", [])
    best = ""
    if samples:
        read_speed, products = (max(s[key] for s in samples) for key in ("read_gb_per_s", "tflop_per_s"))
        best = f"; at best {read_speed:,.0f} GB/s read and {products:,.1f} TFLOP/s multiplied"
    what = "Random weights of an 8B model's shape" if not said.get("settings", {}).get("tiny") else "A TINY model"
    return f"{what} on {said.get('device', 'an unknown device')}, {versions}{best}."


def _ends(records: dict[str, Any]) -> str:
    """How each part ended, how many rounds there were, and what was not measured, with the reason."""
    lines = ["| part | ended | seconds | rounds | not measured |", "|---|---|---:|---|---|"]
    for name in PARTS:
        said = records.get(name)
        if said is None:
            lines.append(f"| {name} | not run |  |  |  |")
            continue
        rounds = ", ".join(f"{what}: {n['done']} of {n['planned']}" for what, n in said["rounds"].items())
        failed = "; ".join(f"{what}: {why}".replace("|", "/") for what, why in said["failed"].items())
        counts = ", ".join(f"{n} {word}" for word, n in said.get("counts", {}).items() if n)
        lines.append(f"| {name} | {said['status']} | {said.get('process_s', '')} | {counts or rounds} | {failed} |")
    compiled = records.get("compiled", {})
    lines += [""] if compiled.get("compiled") else []
    for title, times in compiled.get("compiled", {}).items():
        far = compiled.get("differences", {}).get(title)
        said_of_it = "" if far is None else f"; logits are off by {far:.1g} of the largest"
        lines.append(f"- {title}: the first compiled token took {times['first_call_s']} s{said_of_it}")
    return "\n".join(lines)


def _by_name(*keys: str, by: str = "tokens", against: str | None = None) -> Any:
    """A table of medians by name and context, and how many times faster than another the first of ``keys`` is."""

    def table(said: dict[str, Any]) -> str:
        titles = {"ms": "ms a token", "gb_per_s": "GB/s", "peak_bytes": "peak GB", "kv_bytes": "KV GB"}
        head = [by, "cache", *(titles.get(key, key) for key in keys)]
        head += ["tokens a second"] if by == "rows" else []
        head += [f"times faster than {against} (least to most)"] if against else []
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        samples = said["samples"]
        for at in dict.fromkeys(s[by] for s in samples):
            for name in dict.fromkeys(s["name"] for s in sorted(samples, key=lambda s: s["name"]) if s[by] == at):
                values = {key: _rounds(samples, key, **{by: at, "name": name}) for key in keys}
                cells = [f"{at:,}", name, *(_said(key, list(values[key].values())) for key in keys)]
                if by == "rows":
                    cells.append(f"{1e3 * at / statistics.median(values[keys[0]].values()):,.0f}")
                if against:
                    with_this = name.removesuffix(", compiled") if against == "the same outside" else against
                    other = _rounds(samples, keys[0], **{by: at, "name": with_this})
                    ratios = [other[turn] / own for turn, own in values[keys[0]].items() if turn in other]
                    cells.append(_spread(ratios))
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    return table


def _rounds(samples: list[dict[str, Any]], key: str, **point: Any) -> dict[int, float]:
    """A number of each round; the median where a sample has several."""
    found = {}
    for sample in samples:
        value = sample.get(key)
        if value is not None and all(sample.get(name) == wanted for name, wanted in point.items()):
            found[sample["round"]] = statistics.median(value) if isinstance(value, list) else value
    return found


def _said(key: str, values: list[float]) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    return f"{middle / 1e9:,.3g}" if key.endswith("bytes") else f"{middle:,.4g}"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""
