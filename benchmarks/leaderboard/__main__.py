"""Measure the leaderboard in a given time, two processes of one thread side by side, and write its page.

    python -m benchmarks.leaderboard --wikitext FOLDER --pg19 FOLDER --toy FOLDER --minutes 60

Stopped or out of time, the page shows what there is, with its number of windows; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from benchmarks.leaderboard.board import page
from benchmarks.leaderboard.plan import SHARES, Sizes, Stage, lanes
from benchmarks.leaderboard.rank import condensed

from coldpress.records.results import read_results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
GRACE_S = 120  # for a sweep to write what it has, after it was told to stop


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--wikitext",
        default="wikitext",
        help="WikiText: a folder in the hub's layout, a hub id, or demo for a small trial",
    )
    add("--pg19", default="pg19", help="PG-19, likewise")
    add("--model", default="smollm2", help="what the board is about")
    add(
        "--toy",
        default="demo",
        help="a smaller model beside it: a folder such as tiny-neox (default: the embedded one)",
    )
    add("--minutes", type=float, default=60.0)
    add("--press", nargs="+", help="only these; with --publish the other rows of the published board stay")
    add("--output", type=Path, default=Path("results/leaderboard"), help="folder of the records, the page and the logs")
    add("--publish", action="store_true", help="also write what docs/leaderboard.md is generated from")
    for field in fields(Sizes):
        add(f"--{field.name}", type=int, default=field.default)
    args = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    where = {name: _linked(name, getattr(args, name)) for name in ("wikitext", "pg19", "toy")}
    plans = lanes(where["wikitext"], where["pg19"], args.model, where["toy"], sizes, args.press)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # sweeps of a job in the background would ignore it
    begin, is_stopped = time.monotonic(), threading.Event()
    of_all = begin, args.minutes * 60, args.output, is_stopped
    threads = [threading.Thread(target=_lane, args=(lane, *of_all)) for lane in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        try:
            thread.join()
        except KeyboardInterrupt:  # which the sweeps have heard of, too
            is_stopped.set()
            thread.join()
    records = [record for record in read_results(args.output) if record["press"] != "no_press"]
    document = condensed(records)
    if args.publish and args.press:
        document = beside(document, json.loads((RESULTS / "leaderboard.json").read_text(encoding="utf-8")))
    html = args.output / "leaderboard.html"
    html.write_text(page(document), encoding="utf-8")
    if args.publish:
        RESULTS.mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in document["rows"])
        (RESULTS / "leaderboard.json").write_text(f'{{"env": {json.dumps(document["env"])}, "rows": [\n{lines}\n]}}\n')
        (RESULTS / "leaderboard.html").write_text(page(document), encoding="utf-8")
    n_failed = sum(record["status"] == "failed" for record in records)
    print(f"{len(records)} records, {n_failed} failed, {(time.monotonic() - begin) / 60:.0f} minutes; {html}")
    return 1 if n_failed or not records else 0


def beside(document: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The rows of ``document``, and of ``before`` those of what it has not measured, under the same versions."""

    def what(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("press", "compression_ratio", "protocol", "model", "dataset", "subset"))

    for name in ("torch", "transformers"):
        if document["env"][name] != before["env"][name]:
            raise SystemExit(
                f"The board was measured under {name} {before['env'][name]} and these presses under "
                f"{document['env'][name]}: measure all of them, without --press."
            )
    again = {what(row) for row in document["rows"]}
    return {**document, "rows": document["rows"] + [row for row in before["rows"] if what(row) not in again]}


def _linked(name: str, given: str) -> str:
    """A folder under a name that does not say where on this machine it is; anything else as it is."""
    if not Path(given).is_dir():
        return given
    link = Path("results/inputs") / ("tiny-neox" if name == "toy" and "neox" in Path(given).name else name)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(given).resolve())
    return str(link)


def _lane(stages: list[Stage], begin: float, seconds: float, output: Path, is_stopped: threading.Event) -> None:
    """The sweeps of a lane, one after the other; each is stopped when its part of the time is over."""
    config = output / "config"
    config.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for stage in stages:
        left = begin + seconds * SHARES[stage.share] - time.monotonic()
        if is_stopped.is_set():
            return
        if left < 5:
            print(f"{stage.name}: no time left", flush=True)
            continue
        path = config / f"{stage.name}.yaml"
        path.write_text(yaml.safe_dump(stage.config, sort_keys=False), encoding="utf-8")
        command = [
            sys.executable,
            "src/coldpress_command.py",
            "sweep",
            "--config",
            str(path),
            "--output_dir",
            str(output),
        ]
        with open(config / f"{stage.name}.log", "w", encoding="utf-8") as log:
            started = time.monotonic()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
            how = _waited(process, left)
            print(f"{stage.name}: {how}, {(time.monotonic() - started) / 60:.1f} minutes; {log.name}", flush=True)


def _waited(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How a sweep ended: by itself, or told to stop, as Ctrl-C does; then it writes what it has."""
    try:
        code = process.wait(seconds)
        return "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
        return "out of time"
    except subprocess.TimeoutExpired:
        process.kill()
        return "killed"


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
