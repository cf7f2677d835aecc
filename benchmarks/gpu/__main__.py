"""Everything that is worth knowing of a GPU, in a given time: tests, decoding, prompts, batches, memory, and kvpress.

    python -m benchmarks.gpu --minutes 12 --output results/gpu
    python -m benchmarks.gpu --tiny            # the same on the CPU, with a tiny model

Each part is a process with a time limit and a record of its own, which it writes as it goes. A part that fails says why
in its record, and the others go on; time that a part leaves goes to those after it. Where a process is cut off, what it
had measured stays.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.record import Record, read, write

ROOT = Path(__file__).resolve().parents[2]
SHARES = {  # of the time, in the order in which parts run
    "environment": 3, "tests": 16, "attention": 5, "decode": 19, "prefill": 14, "batch": 13, "kvpress": 9,
    "compiled": 21,
}  # fmt: skip
LEAST_S = 30.0  # of a part, most of which a process takes to begin
TESTS = (
    "tests/devices/test_stores.py", "tests/stores/test_rotated.py", "tests/eval/test_memory.py",
    "tests/devices/test_steps.py", "tests/devices/test_presses.py",
)  # fmt: skip
GRACE_S = 5.0  # for a process to end by itself
KVPRESS = (".venv-parity/bin/python",)  # where `make parity` has put it


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--device", default=None, help="cuda where there is one; a tiny model on the CPU elsewhere")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU unless --device says otherwise")
    parser.add_argument("--output", type=Path, default=None, help="results/gpu, or results/gpu-tiny")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return run_part(args)
    start = time.monotonic()
    choose(args)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in SHARES:
        (args.output / f"{name}.json").unlink(missing_ok=True)
    for i, name in enumerate(args.parts):
        left = 60 * args.minutes - (time.monotonic() - start)
        limit = min(left, max(LEAST_S, left * SHARES[name] / sum(SHARES[later] for later in args.parts[i:])))
        print(f"{name}: {limit:.0f} s of the {left:.0f} s that are left", flush=True)
        outcome = measure(name, args, limit)
        print(f"{name}: {outcome}", flush=True)
    from benchmarks.gpu.report import report

    said = report(args.output)
    (args.output / "report.md").write_text(said, encoding="utf-8")
    print(f"\n{said}\n{time.monotonic() - start:.0f} s; records and report.md are in {args.output}")
    return 0


def choose(args: argparse.Namespace) -> None:
    """Device and folder, where none are named."""
    if args.device is None and not args.tiny:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else None
        if args.device is None:
            print("No CUDA device here: the tiny model runs on the CPU, which says that everything runs, not how fast.")
            args.tiny = True
    args.device = args.device or "cpu"
    args.output = args.output or ROOT / "results" / ("gpu-tiny" if args.tiny else "gpu")


def run_part(args: argparse.Namespace) -> int:
    """One part, in this process."""
    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.shapes import sizes_of

    settings = {"device": args.device, "tiny": args.tiny}
    record = Record(args.output / f"{args.part}.json", args.part, args.seconds, settings)
    try:
        PARTS[args.part](record, sizes_of(args.tiny), args.device)
    except BaseException as error:
        record.fail(args.part, error)
        record.note(status="failed")
        raise
    return 0


def measure(name: str, args: argparse.Namespace, limit: float) -> str:
    """Run a part in a process, and say in its record how it ended: in a word, with a reason."""
    path = args.output / f"{name}.json"
    where = ["--seconds", f"{max(1.0, limit - GRACE_S):.1f}", "--device", args.device, "--output", str(args.output)]
    where += ["--tiny"] if args.tiny else []
    log = args.output / f"{name}.log"
    if name == "tests":
        return tests(args, limit, log)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *where]
    if name == "kvpress":
        python = python_with_kvpress()
        if python is None:
            write(path, {"part": name, "status": "not installed", "samples": [], "failed": {}, "rounds": {}})
            return "not installed (benchmarks/parity/requirements.txt)"
        command = [python, "-m", "benchmarks.gpu.kvpress_side", *where]
    status, seconds = run(command, limit, log)
    said = read(path) or {"part": name, "samples": [], "failed": {}, "rounds": {}}
    if status != 0:
        said["failed"].setdefault(name, last_line(log))
    if status is None:
        said["status"] = f"cut off after {seconds:.0f} s"
    elif status != 0 or said.get("status") == "running":
        said["status"] = "failed"
    write(path, said | {"process_s": round(seconds, 1)})
    return f"{said['status']} in {seconds:.0f} s, {len(said['samples'])} samples, {len(said['failed'])} failed"


def tests(args: argparse.Namespace, limit: float, log: Path) -> str:
    """The tests that need a GPU; without one they are all skipped."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "-m",
        "gpu and not network",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        *TESTS,
    ]
    status, seconds = run(command, limit, log)
    output = log.read_text(encoding="utf-8", errors="replace")
    ends = re.findall(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b.*\[ *\d+%\]$", output, re.MULTILINE)
    counts = {word.lower(): ends.count(word) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    failed = dict(re.findall(r"^(?:FAILED|ERROR) (\S+?)(?: - (.*))?$", output, re.MULTILINE))
    ended = f"cut off after {seconds:.0f} s" if status is None else "done" if status in (0, 1) else "failed"
    if ended == "failed":
        failed["pytest"] = last_line(log)
    write(
        args.output / "tests.json",
        {"part": "tests", "status": ended, "process_s": round(seconds, 1), "counts": counts, "failed": failed,
         "rounds": {}, "samples": []},
    )  # fmt: skip
    return f"{ended} in {seconds:.0f} s, " + ", ".join(f"{n} {word}" for word, n in counts.items())


def run(command: list[str], limit: float, log: Path) -> tuple[int | None, float]:
    """Exit status, None if it was cut off, and seconds; the output goes to a file, and its indented lines through."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        told = 0
        while process.poll() is None and time.monotonic() - start < limit:
            time.sleep(0.2)
            told = tell(log, told)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started, such as compilers
            process.wait()
            return None, time.monotonic() - start
    tell(log, told)
    return process.returncode, time.monotonic() - start


def tell(log: Path, told: int) -> int:
    """Pass on the new lines that are meant for who waits."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        lines.seek(told)
        while line := lines.readline():
            if not line.endswith("\n"):
                break
            told = lines.tell()
            if line.startswith("    ") and ("s left)" in line or "Error: " in line):
                print(line.rstrip(), flush=True)
    return told


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def python_with_kvpress() -> str | None:
    """An interpreter that has kvpress: this one, or that of `make parity`."""
    for python in (sys.executable, *(str(ROOT / name) for name in KVPRESS)):
        found = shutil.which(python)
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('kvpress') is None)"
        if found and subprocess.run([found, "-c", look], capture_output=True).returncode == 0:
            return found
    return None


if __name__ == "__main__":
    sys.exit(main())
