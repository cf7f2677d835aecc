#!/usr/bin/env python3
"""Write the generated parts of the documents: the list of presses and the tables of committed results.

    python scripts/generate_docs.py            write them
    python scripts/generate_docs.py --check    exit with 1 if a document is not what it would write

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. NAME is one of

- ``presses DOCUMENT``: the table of presses, whose classes lead to their sections in that document;
- ``ten DOCUMENT``: a short table of ten presses that differ in kind, which leads there too;
- ``headline RATIO``: what presses cost at that ratio, in perplexity and in tasks, on SmolLM2-135M;
- ``press sections``: those sections;
- ``results FOLDER``: the table of the JSON files in benchmarks/FOLDER;
- ``quality RATIO``: what each press costs at that ratio on every model and text of benchmarks/quality;
- ``past_eviction``: KL, loss and bytes of fitted caches and of the presses that they go past;
- ``leaderboard``: the ranking of presses at each ratio;
- ``parity``: the comparison with kvpress; ``faults``: the tests of kvpress's faults;
- ``saves``: what compression saves in time and memory, as ratios within one run;
- ``mixed``: fewer pairs, fewer bits and both by Mixed in as many bytes;
- ``goals``: what the benchmarks of savings were to show, and what they do;
- ``sweepcost``, ``overhead``, ``chunked``, ``quantised``, ``packed``, ``decode``, ``compiled``, ``shares``,
  ``headwise``, ``lengths``, ``batch``, ``budget``, ``stream``, ``decoding``, ``far``, ``drift``, ``klbound``, ``ends``,
  ``serve``, ``readspeed``, ``agreement``, ``needlelayers`` or ``startup`` with a FILE: the table of FILE.json in the
  results of that benchmark.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import runpy
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import coldpress.presses  # noqa: F401  makes the presses known
from coldpress.bases.listing import KINDS, keeps, python_only, traits
from coldpress.bases.registry import PressInfo, catalogue, make_press, press_classes
from coldpress.core.press import parts as parts_of
from coldpress.errors import ColdpressError
from coldpress.records.results import read_results
from coldpress.report.terminal import describe, table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "README.zh-CN.md",
    "docs/presses.md",
    "docs/parity.md",
    "docs/leaderboard.md",
    "benchmarks/README.md",
    "benchmarks/quality/README.md",
    "benchmarks/past_eviction/README.md",
    "benchmarks/sweep_cost/README.md",
    "benchmarks/press_overhead/README.md",
    "benchmarks/prefill_chunked/README.md",
    "benchmarks/long_stream/README.md",
    "benchmarks/quantised/README.md",
    "benchmarks/packed/README.md",
    "benchmarks/decode_speed/README.md",
    "benchmarks/head_wise_memory/README.md",
    "benchmarks/batch/README.md",
    "benchmarks/startup/README.md",
    "benchmarks/kl_bound/README.md",
    "benchmarks/needle_layers/README.md",
    "benchmarks/prompt_ends/README.md",
    "benchmarks/read_little/README.md",
    "benchmarks/serve/README.md",
)
PART = re.compile(r"(<!-- generated: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def presses(document: str) -> str:
    """The catalogue as a Markdown table, by kind, then the classes without a name."""
    lines = [
        "| name | class | keeps | paper | kind | decodes | heads | layers | again | seconds |",
        "|---|---|---|---|---|:-:|:-:|:-:|:-:|---:|",
    ]
    added = seconds_added()
    for info in [*sorted(catalogue(), key=lambda info: list(KINDS).index(info.kind)), *python_only()]:
        name = f"`{info.name}`" if info.name else "–"
        made = parts_of(make_press(info.name, 0.5 * info.has_ratio)) if info.name else ()
        again = any(part.needs_model for part in made)
        marks = " | ".join("✓" if has else "" for has in (info.can_rechoose, info.per_head, info.per_layer, again))
        lines.append(
            f"| {name} | [{info.class_name}]({document}#{info.class_name.lower()}) | {_markdown(keeps(info))} "
            f"| {_paper(info)} | {info.kind.removeprefix('training-')} | {marks} | {added.get(info.name, '')} |"
        )
    return "\n".join([*lines, "", added.get("about", "")]).rstrip()


SMOLLM2_LAYERS = 30


def seconds_added() -> dict[str, str]:
    """What each press adds to the prefill of a whole model, in seconds, and ``about``: which; empty unless measured."""
    folder = ROOT / "benchmarks" / "press_overhead"
    path = folder / "results" / "smollm2-135m-all.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    found = runpy.run_path(str(folder / "press_overhead.py"))["summary"](record)
    settings = record["settings"]
    times = SMOLLM2_LAYERS // settings["layers"]  # what one layer takes, all do
    whole = times * found.pop("no_press")["coldpress"]["prefill_ms"] / 1e3
    said = {name: f"{times * row['coldpress']['added_ms'] / 1e3:.1f}" for name, row in found.items()}
    about = (
        f"Seconds beside the {whole:.1f} that SmolLM2-135M takes for {settings['tokens']:,} tokens, float32, "
        f"{settings['threads']} CPU threads, half of the pairs removed: {times} times what {settings['layers']} of its "
        f"{SMOLLM2_LAYERS} layers take."
    )
    return {**said, "about": about}


TEN = (
    *("snapkv", "adakv_snapkv", "expected_attention", "sampled_defensive", "keydiff", "streaming_llm", "decoding_h2o"),
    *("kvzip", "attention_matching_kvzip", "qfilter"),
)


def ten(document: str) -> str:
    """Ten presses: what they keep, and what they need."""
    found = {info.name: info for info in catalogue()}
    lines = ["| press | keeps | needs |", "|---|---|---|"]
    for name in TEN:
        info = found[name]
        needs = "nothing else"
        if info.kind == "calibrated":
            needs = "numbers of the model, measured once"
        elif info.in_block:
            runs_again = any(part.needs_model for part in parts_of(make_press(name, 0.5)))
            needs = "a second pass over the prompt" if runs_again else "all layers of a prompt at once"
        link = f"[`{name}`]({document}#{info.class_name.lower()})"
        lines.append(f"| {link} | {_markdown(keeps(info))} | {needs} |")
    return "\n".join(lines)


def press_sections() -> str:
    """Everything about each class and its names, one section a class."""
    names: dict[str, list[PressInfo]] = {}
    for info in catalogue():
        names.setdefault(info.class_name, []).append(info)
    return "\n\n".join(_section(info, names.get(info.class_name, [])) for info in press_classes())


def _section(info: PressInfo, named: list[PressInfo]) -> str:
    kind = f"**{info.kind}**; {'; '.join(traits(info))}".replace("'with press(model):'", "`with press(model):`")
    parts = [f"### {info.class_name}", _markdown(info.summary), kind + ".", *map(_markdown, info.details)]
    lines = [f"- Python: `{info.call}`"]
    if [one.call for one in named] == [info.call.replace("compression_ratio=0.0", "compression_ratio")]:
        lines.append(f"- Name: `{named[0].name}`")
    else:
        lines += [f"- `{one.name}`: `{one.call}`" for one in named]
    lines += [f"- {tag}: {_markdown(said)}." for tag, said in (("Source", info.source),) if said]
    lines += [f"- {_markdown(said)}" for said in info.differs]
    lines += [f"- {tag}: {_markdown(said)}." for tag, said in (("Needs", info.needs), ("Cost", info.cost)) if said]
    parts.append("\n".join(lines))
    if any(p.text for p in info.parameters):
        rows = [
            f"| `{p.name}` | {f'`{p.default}`' if p.default else ''} | {_markdown(p.text)} |" for p in info.parameters
        ]
        parts.append("\n".join(["| parameter | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _paper(info: PressInfo) -> str:
    """A link to the paper, or to what stands for one."""
    if not info.link:
        return ""
    host = info.link.split("/")[2]
    names = {"arxiv.org": info.link.rpartition("/")[2], "openreview.net": "OpenReview", "github.com": "kvpress"}
    return f"[{names[host]}]({info.link})"


def _markdown(text: str) -> str:
    """A docstring's text: arXiv numbers are links, and nothing outside code is taken for markup."""
    parts = re.split(r"(``[^`]+``)", text)
    for i, part in enumerate(parts):
        if part.startswith("``"):
            parts[i] = part[1:-1].replace("|", "\\|")
        else:
            part = re.sub(r"([*|<>\[\]]|\b_(?!\w)|(?<!\w)_)", r"\\\1", part)
            parts[i] = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", part)
    return "".join(parts)


def results(folder: str) -> str:
    """The table of the results in benchmarks/``folder``, sorted by ratio and loss, with what they were measured on."""
    records = read_results(ROOT / "benchmarks" / folder)
    if not records:
        raise ColdpressError(f"benchmarks/{folder} holds no results")
    records.sort(
        key=lambda r: (
            r["compression_ratio"] or 0.0,
            -(r.get("kv_bits") or 16),
            r["loss"] if r["loss"] is not None else 0.0,
        )
    )
    return f"{table(records)}\n\n{describe(records[0])}."


def unmeasured(records: Sequence[dict[str, Any]]) -> str:
    """What stands in a cell without a number, of the records that would have one: nothing was asked, or it failed."""
    return "failed" if any(r["status"] == "failed" for r in records) else "–"


def versions(records: Iterable[dict[str, Any]]) -> str:
    """The versions behind a table; where its rows differ, of which presses they are, but for those of the most."""
    found: dict[str, list[str]] = {}
    for r in records:
        own = found.setdefault(f"torch {r['env']['torch']}, transformers {r['env']['transformers']}", [])
        own += [r["press"]] if r["press"] not in own else []
    first, *rest = sorted(found, key=lambda said: -len(found[said]))
    return "; ".join([first, *(f"{said} ({', '.join(f'`{press}`' for press in found[said])})" for said in rest)])


def quality(ratio: str) -> str:
    """Change of perplexity with its interval, a row for each press and a column for each model and text."""
    folder = ROOT / "benchmarks" / "quality" / "results"
    records = [r for r in read_results(folder) if r["protocol"].startswith("prefix")] if folder.is_dir() else []

    def column(r: dict[str, Any]) -> tuple[str, str]:
        return Path(r["model"]).name.split(".")[0], r["subset"] or Path(r["dataset"]).name

    asked = [r for r in records if r["compression_ratio"] == float(ratio) and r["delta_nll"] is not None]
    if not asked:
        return "Not measured yet."
    columns = sorted({column(r) for r in asked}, key=lambda c: ("SmolLM2" not in c[0], c))
    by_press: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for r in asked:
        by_press.setdefault(r["press"], {})[column(r)] = r

    def mean(press: str) -> float:
        return sum(r["delta_nll"] for r in by_press[press].values()) / len(by_press[press])

    def change(press: str, where: tuple[str, str]) -> str:
        r = by_press[press].get(where)
        if r is None:
            at_ratio = [r for r in records if r["compression_ratio"] == float(ratio) and r["press"] == press]
            return unmeasured([r for r in at_ratio if column(r) == where])
        low, high = (100 * (end - 1) for end in r["ppl_ratio_ci95"])
        return f"{100 * math.expm1(r['delta_nll']):+.1f} % [{low:.1f}, {high:.1f}]"

    base = [next(r for r in asked if column(r) == c) for c in columns]
    rows = [
        [f"press at {ratio}", *(f"{model}, {text}" for model, text in columns)],
        ["---", *("---:" for _ in columns)],
        *([f"`{press}`", *(change(press, c) for c in columns)] for press in sorted(by_press, key=mean)),
        ["PPL of `no_press`", *(f"{r['baseline_ppl']:.2f}" for r in base)],
        ["windows, scored tokens", *(f"{r['windows']}, {r['scored_tokens']:,}" for r in base)],
    ]
    about = dict.fromkeys(f"{column(r)[0]}: `{r['protocol']}`, {r['dtype']}" for r in base)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"{'; '.join(about)}; {versions(asked)}."])


HEADLINE_TASKS = {"niah_single": "one needle", "niah_multikey": "one of several needles", "vt": "variables traced"}


def headline(ratio: str) -> str:
    """Perplexity and tasks of the presses that were measured in both, on SmolLM2-135M."""
    folder = ROOT / "benchmarks" / "quality" / "results"
    records = [r for r in read_results(folder) if "SmolLM2" in r["model"] and r["compression_ratio"] == float(ratio)]
    texts = {"wikitext-103-v1": "WikiText-103", "pg19": "PG-19"}
    ppl: dict[str, dict[str, dict[str, Any]]] = {}
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    about = ""
    for r in records:
        text = r["subset"] or Path(r["dataset"]).name
        if r["protocol"].startswith("prefix") and text in texts:
            ppl.setdefault(r["press"], {})[text] = r
        elif r["protocol"].startswith("tasks"):
            tasks[r["press"]] = {task["task"]: task for task in r["tasks"]}
            about = f"tasks: {r['tasks'][0]['length']} tokens, {r['tasks'][0]['n']} questions each"
    both = sorted(ppl.keys() & tasks, key=lambda press: ppl[press]["wikitext-103-v1"]["delta_nll"])
    if not both:
        return "Not measured yet."

    def change(r: dict[str, Any]) -> str:
        low, high = (round(100 * (end - 1)) for end in r["ppl_ratio_ci95"])
        return f"{100 * math.expm1(r['delta_nll']):+.0f} % [{low}, {high}]"

    one = tasks[both[0]]
    rows = [
        [f"press at {ratio}", *(f"PPL, {title}" for title in texts.values()), *HEADLINE_TASKS.values()],
        ["---", *("---:" for _ in (*texts, *HEADLINE_TASKS))],
        [
            "no press",
            *(f"{ppl[both[0]][text]['baseline_ppl']:.1f}" for text in texts),
            *(f"{100 * one[task]['score_base']:.0f} %" for task in HEADLINE_TASKS),
        ],
    ]
    for press in both:
        scores = (f"{100 * tasks[press][task]['score']:.0f} %" for task in HEADLINE_TASKS)
        rows.append([f"`{press}`", *(change(ppl[press][text]) for text in texts), *scores])
    first = ppl[both[0]]["wikitext-103-v1"]
    sizes = f"PPL: {first['context_tokens']:,} tokens of context; {about}"
    about = f"SmolLM2-135M-Instruct, its Q4_1 weights in {first['dtype']}; {sizes}."
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", about])


def past_eviction() -> str:
    """KL and change of the loss, and bytes, of each press of benchmarks/past_eviction at each ratio."""
    folder = ROOT / "benchmarks" / "past_eviction" / "results"
    records = read_results(folder) if folder.is_dir() else []
    asked = [r for r in records if r["compression_ratio"] and r["delta_nll"] is not None]
    if not asked:
        return "Not measured yet."
    ratios = sorted({r["compression_ratio"] for r in asked})
    found = {(r["press"], r["compression_ratio"]): r for r in asked}

    def cells(press: str, ratio: float) -> list[str]:
        r = found.get((press, ratio))
        if r is None:
            return [unmeasured([r for r in records if (r["press"], r["compression_ratio"]) == (press, ratio)])] * 4
        low, high = r["delta_nll_ci95"]
        loss = f"{r['delta_nll']:+.3f} [{low:.3f}, {high:.3f}]"
        kl = [f"{r['kld'][name]:.4f}" for name in ("mean", "median")]
        return [*kl, loss, f"{r['kv_bytes'] / r['kv_bytes_baseline']:.3f}"]

    titles = [title.format(ratio) for ratio in ratios for title in ("KL at {}", "median", "loss at {}", "bytes at {}")]
    names = sorted({press for press, _ in found}, key=lambda press: found[press, ratios[0]]["kld"]["mean"])
    rows = [["press", *titles], ["---", *("---:" for _ in titles)]]
    rows += [[f"`{press}`", *(cell for ratio in ratios for cell in cells(press, ratio))] for press in names]
    one = asked[0]
    about = (
        f"{Path(one['model']).name.split('.')[0]}, `{one['protocol']}`, {one['dtype']}, {one['windows']} windows of as "
        f"many books, {one['scored_tokens']:,} scored tokens; {versions(asked)}."
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", about])


def unseen() -> str:
    """KL of each press of benchmarks/past_eviction/unseen over the windows of all texts, and the goals on them."""
    from benchmarks.leaderboard.goals import goals
    from benchmarks.leaderboard.rank import condensed, windows_of

    folder = ROOT / "benchmarks" / "past_eviction" / "unseen"
    records = [r for r in read_results(folder) if r["compression_ratio"]] if folder.is_dir() else []
    if not records:
        return "Not measured yet."
    rows = condensed(records)["rows"]
    (model,) = {row["model"] for row in rows}
    windows = windows_of(rows, model)
    ratios = sorted(windows)
    presses = sorted(windows[ratios[0]], key=lambda press: statistics.mean(windows[ratios[0]][press].values()))
    head = [f"{what} at {ratio}" for ratio in ratios for what in ("KL", "median of windows", "windows")]
    lines = [f"| press | {' | '.join(head)} |", f"| --- |{' ---: |' * len(head)}"]
    for press in presses:
        cells = []
        for ratio in ratios:
            own = [*windows[ratio][press].values()]
            cells += [f"{statistics.mean(own):.4f}", f"{statistics.median(own):.4f}", str(len(own))]
        lines.append(f"| `{press}` | {' | '.join(cells)} |")
    one = records[0]
    texts = ", ".join(sorted({Path(row["dataset"]).stem for row in rows}))
    about = f"{model}, `{one['protocol']}`, {one['dtype']}; {texts}; torch {one['env']['torch']}, transformers "
    reached = [
        "| at | best of kvpress | best of the new | part [95 % interval] | goal |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    reached += [f"| {' | '.join(row)} |" for row in goals(windows)]
    return "\n".join([*reached, "", *lines, "", f"{about}{one['env']['transformers']}."])


def leaderboard() -> str:
    """The tables of benchmarks/leaderboard."""
    from benchmarks.leaderboard.board import markdown

    path = ROOT / "benchmarks" / "leaderboard" / "results" / "leaderboard.json"
    return markdown(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else "Not measured yet."


def parity() -> str:
    """The tables of the committed comparison with kvpress."""
    from benchmarks.parity.report import RESULTS, read, tables

    return tables(read(RESULTS))


FAULT = re.compile(r"(?P<letter>Table|[A-M]\d?): (?P<sentence>.+)", re.DOTALL)


def faults() -> str:
    """The tests whose docstrings begin with the letter of a fault of kvpress, sorted by it."""
    rows = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            found = FAULT.fullmatch(doc) if doc else None
            if found:
                where = f"`{path.relative_to(ROOT)}::{node.name}`"
                sentence = " ".join(found["sentence"].split())
                rows.append((found["letter"], f"| {found['letter']} | {sentence} | {where} |"))
    rows.sort(key=lambda row: row[0])  # stable: by file and line within a letter
    return "\n".join(["| fault | what kvpress does | test |", "|---|---|---|", *(line for _, line in rows)])


def measured(benchmark: str, script: str, name: str, *parts: str) -> str:
    """The table of a result of benchmarks/``benchmark``, or of a part of it, made by the script that measures it."""
    folder = ROOT / "benchmarks" / benchmark
    path = folder / "results" / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    made: str = runpy.run_path(str(folder / script))["table"](json.loads(path.read_text(encoding="utf-8")), *parts)
    return made


def mixed() -> str:
    """A budget in bytes that Mixed spends over pairs and bits, against one of the two alone."""
    folder = ROOT / "benchmarks" / "packed"
    paths = sorted((folder / "results").glob("loss-mixed-*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    made: str = runpy.run_path(str(folder / "loss.py"))["mixed"](records)
    return made


GOALS = (
    ("decode_speed", "decode_speed.py", "pythia-70m"),
    *(("decode_speed", "compiled.py", f"compiled_{dtype}") for dtype in ("float32", "bfloat16")),
    ("decode_speed", "decode_speed.py", "smollm2-135m-float16"),
    *(("prefill_chunked", "prefill_chunked.py", name) for name in ("pythia-70m", "smollm2-135m")),
    ("head_wise_memory", "head_wise_memory.py", "smollm2-135m"),
    ("sweep_cost", "sweep_cost.py", "pythia-70m"),
)


def goals() -> str:
    """What the benchmarks of savings were to show, beside what they show."""
    lines = ["| what | goal | measured, median (least to most) |", "|---|---|---|"]
    for benchmark, script, name in GOALS:
        folder = ROOT / "benchmarks" / benchmark
        path = folder / "results" / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            lines += [f"| {' | '.join(row)} |" for row in runpy.run_path(str(folder / script))["goals"](record)]
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def saves() -> str:
    """What compression saves, as ratios within one run: the README's short table."""
    from benchmarks.decoding import ratios, spread
    from benchmarks.prefill_chunked.prefill_chunked import of

    def record(benchmark: str, name: str) -> dict[str, Any]:
        path = ROOT / "benchmarks" / benchmark / "results" / f"{name}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    small, inside = record("decode_speed", "pythia-70m"), record("decode_speed", "compiled_float32")
    real, half_real = record("decode_speed", "smollm2-135m-float32"), record("decode_speed", "smollm2-135m-float16")
    batch = record("batch", "pythia-70m")
    long, served = record("prefill_chunked", "smollm2-135m"), record("serve", "first-smollm2-135m")["samples_s"]
    pieces = {"tokens": 32_768, "press": "snapkv"}
    whole, own = (of(long, "peak_bytes", method=method, **pieces) for method in ("whole", "pieces"))
    later = served["coldpress, later question"]
    waits = [a / b for a, b in zip(served["transformers serve, whole text"], later, strict=True)]
    all_pairs, same, half = "transformers, full", "transformers, 0.5", "coldpress, 0.5"
    rows: list[tuple[str, list[float], list[float]]] = [
        (
            "a token behind 8,192 tokens, Pythia-70M's shape, float32",
            *(ratios(small, slow, half) for slow in (all_pairs, same)),
        ),
        ("the same, in a compiled step", *(ratios(inside, slow, "compiled") for slow in (all_pairs, same))),
        (
            "a token behind 4,096 tokens, SmolLM2-135M, float32",
            *(ratios(real, slow, half) for slow in (all_pairs, same)),
        ),
        (
            "the same, in a compiled step",
            *(ratios(real, slow, "coldpress, 0.5, compiled") for slow in (all_pairs, same)),
        ),
        (
            "the same in float16, against llama.cpp in 16 bits with all pairs",
            ratios(half_real, "llama.cpp, full", "coldpress, 0.5, compiled"),
            [],
        ),
        ("a batch of 32 prompts of 512 to 1,024 tokens", ratios(batch, f"32: {all_pairs}", f"32: {half}"), []),
        (
            "peak memory of a prefill of 32,768 tokens, in pieces",
            [a / b for a, b in zip(whole, own, strict=True)],
            [],
        ),
        ("the wait for an answer about 6,000 tokens that are a snapshot", waits, []),
    ]
    lines = ["| half of the pairs, two CPU cores | times better: median (least to most) | with the same pairs |"]
    lines.append("|---|---:|---:|")
    return "\n".join([*lines, *(f"| {what} | {spread(values)} | {spread(rest)} |" for what, values, rest in rows)])


def generated(name: str) -> str:
    kind, _, argument = name.partition(" ")
    makers = {
        "presses": lambda: presses(argument),
        "ten": lambda: ten(argument),
        "headline": lambda: headline(argument),
        "press": press_sections,
        "results": lambda: results(argument),
        "quality": lambda: quality(argument),
        "past_eviction": past_eviction,
        "unseen": unseen,
        "sweepcost": lambda: measured("sweep_cost", "sweep_cost.py", argument),
        "parity": parity,
        "leaderboard": leaderboard,
        "goals": goals,
        "saves": saves,
        "faults": faults,
        "overhead": lambda: measured("press_overhead", "press_overhead.py", argument),
        "chunked": lambda: measured("prefill_chunked", "prefill_chunked.py", argument),
        "quantised": lambda: measured("quantised", "quantised.py", argument),
        "packed": lambda: measured("packed", f"{argument.partition('-')[0]}.py", argument),
        "mixed": mixed,
        "compiled": lambda: measured("decode_speed", "compiled.py", argument),
        "decode": lambda: measured("decode_speed", "decode_speed.py", argument),
        "shares": lambda: measured("decode_speed", "shares.py", argument),
        "lengths": lambda: measured("decode_speed", "lengths.py", argument),
        "headwise": lambda: measured("head_wise_memory", "head_wise_memory.py", argument),
        "batch": lambda: measured("batch", "batch.py", argument),
        "budget": lambda: measured("batch", "budget.py", argument),
        "stream": lambda: measured("long_stream", "long_stream.py", argument),
        "decoding": lambda: measured("long_stream", "decoding.py", argument),
        "far": lambda: measured("long_stream", "precision.py", argument, "far"),
        "startup": lambda: measured("startup", "startup.py", argument),
        "serve": lambda: measured("serve", "serve.py", argument),
        "needlelayers": lambda: measured("needle_layers", "needle_layers.py", argument),
        "klbound": lambda: measured("kl_bound", "kl_bound.py", argument),
        "ends": lambda: measured("prompt_ends", "prompt_ends.py", argument),
        "readspeed": lambda: measured("read_little", "speed.py", argument),
        "agreement": lambda: measured("read_little", "agreement.py", argument),
        "drift": lambda: measured("long_stream", "precision.py", argument, "drift"),
    }
    if kind not in makers:
        raise ColdpressError(f"nothing called {name!r} is generated; there are {', '.join(makers)}")
    return makers[kind]()


def render(text: str) -> str:
    """``text`` with its generated parts made anew."""
    return PART.sub(lambda m: f"{m[1]}{generated(m['name'])}\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))  # for what benchmarks say of their own results
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
