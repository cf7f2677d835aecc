"""The leaderboard as one HTML page with sortable tables and Pareto plots, and as Markdown; both from the same rows."""

from __future__ import annotations

import html
import math
from importlib import resources
from typing import Any

from benchmarks.leaderboard.goals import goals
from benchmarks.leaderboard.plan import AT_ONE_RATIO, LEFT_OUT
from benchmarks.leaderboard.rank import boards, windows_of

from coldpress.records.wording import listed
from coldpress.report.figures import VARIABLES

HOW = (
    "Ranks are by mean KL, in nats a token, between the next-token distributions behind the compressed and behind "
    "the whole cache. Brackets after a rank are its 95 % interval in a paired bootstrap over windows of all "
    "texts; two presses are compared on the windows that both were measured on. A few tokens make most of a mean, "
    "so the median over tokens is beside it. The loss is the paired difference to the whole cache with its 95 % "
    "interval over windows (Student's t). Presses with few windows take a second pass over the text, or fit: "
    "their means are of fewer windows than those of others, and only their ranks are comparable.",
    "Agreement: share of tokens where the most likely one is the same. Needles: share of the answers found, at "
    f"ratio {AT_ONE_RATIO}. Prefill (compression included) and the time of a token after it: at {AT_ONE_RATIO}, "
    "with one thread beside another process on another core.",
    "Not on the board: presses that compress while decoding only; calibrated and trained ones, which need files; and "
    + "; ".join(f"{name} ({why})" for name, why in LEFT_OUT.items())
    + ".",
)
_STYLE = (
    "table{font-size:75%}td,th{padding:.15em .45em;text-align:right}code{font-size:85%;overflow-wrap:anywhere}"
    "details{max-width:60em}.plot svg{max-width:47.5rem}"
)
_COLUMNS = "rank", "press", "KL", "median", "loss", "agree", "bytes", "windows", "needles", "prefill, s", "token, ms"


def markdown(document: dict[str, Any]) -> str:
    """A table for each model and ratio, and what was measured."""
    found = boards(document["rows"])
    if not found:
        return "Not measured yet."
    parts = _goals(document["rows"], next(iter(found))[0])
    for (model, ratio), board in found.items():
        texts = _texts(board)
        parts += [f"### {_title(model, ratio)}", ""]
        heads = [head for name in _COLUMNS for head in _spread(name, texts)]
        parts += [f"| {' | '.join(heads)} |", f"| {' | '.join('---' if h == 'press' else '---:' for h in heads)} |"]
        for row in board:
            shown = (f"`{c}`" if head == "press" else c for head, (c, _) in zip(heads, _cells(row, texts), strict=True))
            parts.append(f"| {' | '.join(shown)} |")
        parts += ["", *(f"{said}\n" for said in _whole(board, "`"))]
    return "\n".join([*parts, *(f"{said}\n" for said in HOW), _about(document)])


def _goals(rows: list[dict[str, Any]], model: str) -> list[str]:
    """What is new here beside the best that kvpress has, on the model that the board is about."""
    found = goals(windows_of(rows, model))
    if not found:
        return []
    lines = [f"### {_name(model)}: KL of what is new here, as a part of that of the best that kvpress has", ""]
    lines += [
        "| at | best of kvpress | best of the new | part [95 % interval] | goal |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    return [*lines, *(f"| {' | '.join(row)} |" for row in found), ""]


def page(document: dict[str, Any]) -> str:
    """One file, nothing fetched from anywhere, every text escaped."""
    assets = resources.files("coldpress") / "assets" / "report"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = ["<h1>KV-cache compression: the leaderboard</h1>"]
    found = boards(document["rows"])
    if not found:
        body.append("<p>Not measured yet.</p>")
    for model in dict.fromkeys(model for model, _ in found):
        own = {ratio: board for (of, ratio), board in found.items() if of == model}
        ratios = sorted(own, key=lambda ratio: not ratio)  # presses without a ratio come last
        body += [_html_table(_title(model, ratio), own[ratio]) for ratio in ratios]
        body += [f"<h2>{html.escape(_name(model))}: KL against bytes</h2>", _pareto(own)]
    body += ["<h2>How to read this</h2>", *(f"<p>{html.escape(said)}</p>" for said in (*HOW, _about(document)))]
    light, dark = ("".join(f"{name}:{shades[i]};" for name, shades in VARIABLES.items()) for i in (0, 1))
    colours = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>coldpress leaderboard</title><style>{style}{colours}{_STYLE}</style>{''.join(body)}"
        f"<script>{script}</script></html>\n"
    )


def _texts(board: list[dict[str, Any]]) -> list[str]:
    return sorted({text for row in board for text in row["texts"]})


def _spread(name: str, texts: list[str]) -> list[str]:
    """The heads of a column: the loss has one for each text."""
    return [f"loss, {text}" for text in texts] if name == "loss" else [name]


def _whole(board: list[dict[str, Any]], quote: str = "") -> list[str]:
    """A sentence about presses without a rank, as what they keep is the whole cache; none where there are none."""
    names = [f"{quote}{row['press']}{quote}" for row in board if row["rank"] is None]
    if not names:
        return []
    it_has = "they have" if len(names) > 1 else "it has"
    return [f"{listed(names, most=len(names))} removed nothing of these texts: {it_has} no rank."]


def _cells(row: dict[str, Any], texts: list[str]) -> list[tuple[str, float | str]]:
    """What is shown, and what is sorted by, in the order of the columns."""
    rank = row["rank"]
    cells: list[tuple[str, float | str]] = [
        ("", "") if rank is None else ("{} [{}, {}]".format(rank, *row["rank_ci95"]), rank),
        (row["press"], row["press"]),
        (f"{row['kld']:.4f}", row["kld"]),
    ]
    medians = [of["kld"]["median"] for of in row["texts"].values()]
    median = sum(medians) / len(medians)
    cells.append((f"{median:.4f}", median))
    for text in texts:
        of = row["texts"].get(text)
        if of is None:
            cells.append(("", ""))
            continue
        ends = of.get("delta_nll_ci95")
        shown = f"{of['delta_nll']:+.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
        cells.append((shown, of["delta_nll"]))
    cells += [(f"{row['same_top1']:.3f}", row["same_top1"]), (f"{row['bytes']:.3f}", row["bytes"])]
    cells.append((str(row["windows"]), row["windows"]))
    for name, form in (("score", ".2f"), ("ttft_s", ".2f"), ("tpot_ms", ".0f")):
        value = row[name]
        cells.append(("", "") if value is None else (format(value, form), value))
    return cells


def _html_table(title: str, board: list[dict[str, Any]]) -> str:
    texts = _texts(board)
    heads = "".join(f"<th>{html.escape(head)}</th>" for name in _COLUMNS for head in _spread(name, texts))
    rows, again = [], []
    for row in board:
        cells = (f'<td data-v="{html.escape(str(key))}">{html.escape(shown)}</td>' for shown, key in _cells(row, texts))
        rows.append(f"<tr>{''.join(cells)}</tr>")
        again += [f"<li><code>{html.escape(of['command'])}</code></li>" for of in row["texts"].values()]
    return (
        f'<h2>{html.escape(title)}</h2><div class="scroll" tabindex="0" role="group" aria-label="{html.escape(title)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{''.join(f'<p>{html.escape(said)}</p>' for said in _whole(board))}"
        f"<details><summary>commands that measure each row again</summary><ul>{''.join(again)}</ul></details>"
    )


def _pareto(by_ratio: dict[float, list[dict[str, Any]]]) -> str:
    """KL against bytes, both logarithmic: a point for each press and ratio; a line joins what nothing beats in both."""
    points = [
        (row["bytes"], row["kld"], row["press"]) for board in by_ratio.values() for row in board if row["kld"] > 0
    ]
    if not points:
        return ""
    width, height, pad = 760, 420, 60
    logs = [(math.log10(b), math.log10(k)) for b, k, _ in points]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*logs, strict=True))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = ((v - a) / ((b - a) or 1) for v, a, b in ((x, x0, x1), (y, y0, y1)))
        return round(pad + across * (width - 2 * pad), 1), round(height - pad - up * (height - 2 * pad), 1)

    best, front = math.inf, []
    for (x, y), (_, _, press) in sorted(zip(logs, points, strict=True), key=lambda pair: pair[0]):
        if y < best:
            best = y
            front.append((*at(x, y), press))
    marks = [
        f'<circle cx="{at(x, y)[0]}" cy="{at(x, y)[1]}" r="3" fill="currentColor" fill-opacity=".45">'
        f"<title>{html.escape(press)}: {b:.3f} of the bytes, KL {k:.4f}</title></circle>"
        for (x, y), (b, k, press) in zip(logs, points, strict=True)
    ]
    line = " ".join(f"{x},{y}" for x, y, _ in front)
    names = [_label(x + 5, y - 5, press, 10, "start") for x, y, press in front]
    shares = (share for share in (0.05, 0.1, 0.25, 0.5, 1.0) if x0 - 0.01 <= math.log10(share) <= x1 + 0.01)
    ticks = [_label(at(math.log10(share), y0)[0], height - 25, f"{share:g}") for share in shares]
    powers = (power for power in range(math.floor(y0), math.ceil(y1) + 1) if y0 <= power <= y1)
    ticks += [_label(pad - 8, at(x0, power)[1] + 4, f"{10.0**power:g}", anchor="end") for power in powers]
    ticks.append(_label(width / 2, height - 6, "bytes of the cache, as a share of the whole one", 12))
    ticks.append(_label(6, 16, "mean KL, nats", 12, "start"))
    return (
        f'<div class="plot"><svg viewBox="0 0 {width} {height}" role="img" aria-label="KL against bytes">'
        f'<polyline points="{line}" fill="none" stroke="currentColor"/>{"".join([*marks, *names, *ticks])}</svg></div>'
    )


def _label(x: float, y: float, text: str, size: int = 11, anchor: str = "middle") -> str:
    said = html.escape(text)
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="currentColor">{said}</text>'


def _name(model: str) -> str:
    return "SmolLM2-135M-Instruct" if model == "smollm2" else model.rstrip("/").rpartition("/")[2]


def _title(model: str, ratio: float) -> str:
    return f"{_name(model)}, {f'ratio {ratio:g}' if ratio else 'presses without a ratio'}"


def _about(document: dict[str, Any]) -> str:
    """Windows, tokens and versions, in one sentence."""
    parts = []
    scored = [row for row in document["rows"] if row["protocol"].startswith("prefix") and row.get("windows")]
    for model in dict.fromkeys(row["model"] for row in scored):
        own = [row for row in scored if row["model"] == model]
        texts = {}
        for row in own:
            name = row.get("subset") or row["dataset"].rstrip("/").rpartition("/")[2]
            texts[name] = max(texts.get(name, (0, 0)), (row["windows"], row["scored_tokens"]))
        said = ", ".join(
            f"{n} windows ({tokens:,} scored tokens) of {text}" for text, (n, tokens) in sorted(texts.items())
        )
        cut = any(row["status"] == "interrupted" for row in own)
        sizes = f"{own[0]['context_tokens']} tokens of context and {own[0]['target_tokens']} after them"
        late = "; its time ran out before all of its windows were measured" if cut else ""
        parts.append(f"{_name(model)}: {said}; {sizes}, {own[0]['dtype']}{late}.")
    env = document["env"]
    return " ".join([*parts, f"torch {env['torch']}, transformers {env['transformers']}, {env['cpu']}."])
