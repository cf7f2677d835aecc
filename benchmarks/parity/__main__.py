"""Run both libraries, compare them, write results.json; exit with 1 if a difference is left that nothing explains.

python -m benchmarks.parity [--smollm2 FILE] [--only NAME ...] [--models NAME ...] [--add]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.parity.case import RATIOS, Case
from benchmarks.parity.cases import CASES
from benchmarks.parity.compare import Row, compare, problems
from benchmarks.parity.models import MODELS, N_SCORED, N_SCORED_LONG
from benchmarks.parity.report import RESULTS, read, spelled, write

import coldpress

ROOT = Path(__file__).resolve().parents[2]


def run_sides(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What each library saved; both run at the same time."""
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    outs = {name: folder / f"{name}.pt" for name in ("coldpress", "kvpress")}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.parity.side", name, str(out), *arguments], cwd=ROOT, env=environment
        )
        for name, out in outs.items()
    ]
    if any([process.wait() for process in running]):
        raise SystemExit("parity: a side failed; see above")
    return {name: torch.load(out) for name, out in outs.items()}


def absent(case: Case) -> str:
    """Why a case cannot be run, or nothing."""
    missing = [name for name in spelled(case)[1] if not hasattr(coldpress, name)]
    return f"coldpress has no {missing[0]}" if missing else case.not_compared


def with_committed(rows: list[Row], versions: dict[str, str]) -> list[Row]:
    """``rows``, and those of results.json of other cases and models, as far as they were made in the same way."""
    committed = read(RESULTS)
    if any(committed[name] != number for name, number in versions.items()):
        raise SystemExit(f"parity: {RESULTS.name} was made with other versions; run everything.")
    made, presses = {(row.case, row.model) for row in rows}, {case.name: spelled(case)[0] for case in CASES}
    found = list(rows)
    for case in committed["cases"]:
        if presses.get(case["name"]) == case["press"]:
            for record in case["rows"]:
                row = Row(case["name"], **{name: value for name, value in record.items() if name != "agrees"})
                if (row.case, row.model) not in made:
                    found.append(row)
    return sorted(found, key=lambda row: MODELS.index(row.model))


def document(rows: list[Row], versions: dict[str, str]) -> dict[str, Any]:
    """Everything that the tables are made of."""
    cases = []
    for case in CASES:
        mine = [row for row in rows if row.case == case.name]
        cases.append(
            {
                "name": case.name,
                "press": spelled(case)[0],
                "letter": case.letter,
                "why": case.why,
                "breaks": list(case.breaks),
                "breaks_why": case.breaks_why,
                "is_default": case.is_default,
                "absent": "" if mine else absent(case) or "it was not run",
                "rows": [row.as_record() for row in mine],
            }
        )
    models = [model for model in MODELS if any(row.model == model for row in rows)]
    facts = {"models": models, "ratios": list(RATIOS), "scored": N_SCORED, "scored_long": N_SCORED_LONG}
    return versions | facts | {"cases": cases}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M as a GGUF file")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--models", nargs="*", help="names of models")
    parser.add_argument("--add", action="store_true", help="into results.json, which keeps its other rows")
    given = parser.parse_args()
    arguments: list[str] = []
    if given.smollm2 is None:
        print("parity: SmolLM2-135M is left out; give its GGUF file with --smollm2 (make parity SMOLLM2=FILE)")
    elif not given.smollm2.is_file():
        print(f"parity: no such file: {given.smollm2}", file=sys.stderr)
        return 2
    else:
        arguments += ["--smollm2", str(given.smollm2.resolve())]
    wanted = [case.name for case in CASES if not absent(case) and (not given.only or case.name in given.only)]
    arguments += ["--only", *wanted]
    if given.models:
        arguments += ["--models", *given.models]
    with tempfile.TemporaryDirectory() as folder:
        sides = run_sides(Path(folder), arguments)
    rows = compare(CASES, sides["coldpress"]["results"], sides["kvpress"]["results"])
    versions = {"coldpress": version("coldpress"), "kvpress": version("kvpress"), **sides["kvpress"]["versions"]}
    everything = given.smollm2 and not given.only and not given.models
    out = RESULTS if everything or given.add else ROOT / "results" / "parity.json"
    if given.add:
        rows = with_committed(rows, versions)
    out.parent.mkdir(exist_ok=True)
    write(out, document(rows, versions))
    wrong = [text for case in CASES for text in problems(case, [row for row in rows if row.case == case.name])]
    agree = sum(row.agrees for row in rows if row.variant == "kvpress")
    total = sum(row.variant == "kvpress" for row in rows)
    print(f"parity: {agree} of {total} runs keep the same pairs and losses; {out.relative_to(ROOT)} has them all")
    for case in CASES:
        if absent(case):
            print(f"parity: not compared: {case.name}: {absent(case)}")
    for text in wrong:
        print(f"parity: UNEXPLAINED {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
